"""Options of jobs: checked once, for every way in which a job is asked for."""

import numpy as np
import pytest

import mqa_hf
from mqa_hf.base.errors import MQAError
from mqa_hf.conversion.convert import Conversion
from mqa_hf.finetune.uptrain import Uptraining


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("kv_heads", 0, "`kv_heads` must be a whole number at least 1; got 0"),
        ("kv_heads", 1.5, "a whole number at least 1; got 1.5"),
        ("kv_heads", True, "a whole number at least 1; got True"),
        ("kv_heads", [1], "a whole number"),
        ("head_width", float("nan"), "`head_width` must be a number above 0; got nan"),
        ("head_width", "wide", "a number above 0; got 'wide'"),
        ("seed", 2**64, "at least 0 and below 2**64"),
        ("seed", 10**400, "`seed` must be"),
        ("method", "median", "one of mean, first, random, shared, latent; got 'median'"),
        ("attention", [], "a list, each one of decoder, cross, encoder"),
        ("attention", "decoder,selfish", "got 'selfish'"),
        ("overwrite", "yes", "`overwrite` must be true or false"),
        ("revision", " ", "`revision` must be a text"),
        ("tokenizer", "llama", "`tokenizer` must be an object in memory"),
        ("calibration", {"a": 1}, "`calibration` must be"),
    ],
)
def test_a_value_that_is_none_is_said_by_name(option, value, said):
    with pytest.raises(MQAError) as error:
        Conversion("source", "output", **{option: value})
    assert said in str(error.value)


@pytest.mark.parametrize("arguments", [(3, "out"), (None, "out"), ("source", 3.5j), ("", "out"), ("source", b"out")])
def test_arguments_are_checked_too(arguments):
    with pytest.raises(MQAError, match=r"must be a (text|path)"):
        Conversion(*arguments)


def test_numbers_of_other_libraries_are_numbers():
    assert Conversion("a", "b", kv_heads=np.int64(2), head_width=np.float32(0.5)).kv_heads == 2


def test_an_unknown_keyword_is_an_error_of_the_function_with_the_nearest_name():
    with pytest.raises(TypeError, match=r"convert\(\) got an unexpected keyword argument 'kvheads'; did you mean 'kv"):
        mqa_hf.convert("a", "b", kvheads=1)
    with pytest.raises(TypeError, match=r"uptrain\(\) got an unexpected keyword argument 'nonsense'$"):
        mqa_hf.uptrain("a", "b", dataset="x", nonsense=1)


def test_a_mapping_may_spell_options_as_flags_but_once():
    assert Uptraining.of({"student": "a", "output": "b", "dataset": "x", "batch-tokens": 64}).batch_tokens == 64
    with pytest.raises(MQAError, match="`batch_tokens` is given twice"):
        Uptraining.of({"student": "a", "output": "b", "dataset": "x", "batch-tokens": 64, "batch_tokens": 32})
    with pytest.raises(MQAError, match="unknown option `batch_token`; did you mean `batch_tokens`"):
        Uptraining.of({"student": "a", "output": "b", "dataset": "x", "batch_token": 64})
    with pytest.raises(MQAError, match="`latent` must be"):
        Conversion.of({"source": "a", "output": "b", "latent": ["a", "b"]})
