"""A model in memory as the source, and as the result, of a conversion."""

import inspect
import json

import pytest
import torch
from native_sources import make_native
from safetensors.torch import load_file
from seq2seq_sources import SEQ2SEQ_CASES, make_seq2seq
from sources import CASES, LLAMA, make_model, save
from tokenizer import write_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from mqa_hf import ConversionError, ConversionWarning, MQAError, convert
from mqa_hf.cli import app
from mqa_hf.conversion.record import ConversionRecord

TEXTS = [f"one key and one value for all heads of layer {n}, read once for every token" for n in range(60)]
FIT = {"method": "shared", "texts": TEXTS, "calibration_tokens": 512, "sequence_length": 16}
pytestmark = pytest.mark.filterwarnings("ignore::mqa_hf.ConversionWarning")


def make(family: str) -> PreTrainedModel:
    if family == "t5":
        return make_seq2seq("t5", next(config for name, _, config in SEQ2SEQ_CASES if name == "t5"))
    return make_model(family, next(config for name, _, config in CASES if name == family))


def assert_same_model(one: PreTrainedModel, other: PreTrainedModel) -> None:
    """Class, weights and buffers to the bit, types, ties, configuration, and how they generate."""
    assert type(one) is type(other)
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(model, kind)(remove_duplicate=False)) for model in (one, other))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype
            assert torch.equal(tensor, theirs[name]), name
    assert len(dict(one.named_parameters())) == len(dict(other.named_parameters()))
    first, second = (model.config.to_dict() for model in (one, other))
    assert {**first, "_name_or_path": ""} == {**second, "_name_or_path": ""}
    assert one.generation_config == other.generation_config
    assert not one.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, FIT], ids=["mean", "shared"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_model_and_its_path_give_the_same(family, options, dtype, tmp_path):
    source = make(family).to(dtype)
    source.generation_config.max_new_tokens = 7
    write_tokenizer(save(source, tmp_path / "source"))
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "source") if options else None
    convert(tmp_path / "source", tmp_path / "written", **options)
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    expected = auto.from_pretrained(tmp_path / "written").eval()
    assert expected.generation_config.max_new_tokens == 7
    ours = convert(source, tokenizer=tokenizer, **options)
    assert_same_model(ours, expected)
    assert_same_model(convert(tmp_path / "source", **options), expected)
    # Neither is the source changed, nor does the result share memory with it.
    for parameter in ours.parameters():
        parameter.data.fill_(7.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())


def test_a_model_is_written_as_its_path_is(tmp_path):
    source = make("gpt2")
    write_tokenizer(save(source, tmp_path / "source"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "one")
    record = convert(source, tmp_path / "two", tokenizer=tokenizer)
    one, two = ({path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert record.warnings == []
    assert record.source == "GPT2LMHeadModel in memory"
    assert (
        record.command
        == "mqa_hf.convert(model, 'OUTPUT', kv_heads=1, method='mean', refit=False, tokenizer=tokenizer)"
    )
    assert record == ConversionRecord.read(tmp_path / "two")
    card = (tmp_path / "two" / "README.md").read_text()
    assert f"```python\n{record.command}\n```" in card
    assert "base_model" not in card
    assert AutoTokenizer.from_pretrained(tmp_path / "two")("ab cd").input_ids == tokenizer("ab cd").input_ids


def test_a_result_without_a_tokenizer_says_so(tmp_path):
    with pytest.warns(ConversionWarning, match="no `tokenizer` was given"):
        record = convert(make("llama"), tmp_path / "ours")
    assert len(record.warnings) == 1
    assert not list((tmp_path / "ours").glob("tokenizer*"))


def test_texts_in_memory_are_a_text_in_a_file(tmp_path):
    write_tokenizer(save(make("llama"), tmp_path / "source"))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    record = convert(tmp_path / "source", tmp_path / "one", **FIT)
    convert(
        tmp_path / "source", tmp_path / "two", **{**FIT, "texts": None, "calibration": str(tmp_path / "text.jsonl")}
    )
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert record.held_out_loss.text == "60 texts in memory"
    assert "texts=texts" in record.command


def test_calibration_takes_the_tokenizer_of_where_the_model_was_loaded_from(tmp_path):
    write_tokenizer(save(make("llama"), tmp_path / "source"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    given = convert(loaded, tokenizer=AutoTokenizer.from_pretrained(tmp_path / "source"), **FIT)
    assert_same_model(convert(loaded, **FIT), given)


@pytest.mark.parametrize("model_type", ["olmoe", "mixtral"])
def test_a_class_of_its_own_keeps_it(model_type, tmp_path):
    """Mixtral's experts have other names on disk than in memory."""
    source = make_native(model_type)
    save(source, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "written", kv_heads=1, target="native")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "written").eval()
    assert_same_model(convert(source, kv_heads=1, target="native"), expected)


@pytest.mark.parametrize(
    ("calibration", "match"),
    [
        ([], "has fewer than"),
        ([1, 2], "a list of texts"),
        (5, "must be a list"),
        ([b"text"], "a list of texts"),
        (["a", "\udc80"], "lone surrogate"),
    ],
    ids=str,
)
def test_texts_that_are_none(calibration, match, tmp_path):
    source = save(make("llama"), tmp_path / "source")
    write_tokenizer(source)
    with pytest.raises(MQAError, match=match):
        convert(source, **{**FIT, "texts": calibration})
    with pytest.raises(MQAError, match="`calibration_columns` text needs `calibration`"):
        convert(source, **FIT, calibration_columns="text")


def quantised() -> PreTrainedModel:
    model = make("llama")
    model.config.quantization_config = {"quant_method": "fp8"}
    return model


def integers() -> PreTrainedModel:
    model = make("llama")
    layer = model.model.layers[0].mlp
    layer.up_proj.weight = nn.Parameter(layer.up_proj.weight.to(torch.int8), requires_grad=False)
    return model


def on_meta() -> PreTrainedModel:
    model = make("llama")
    model.model.layers[1].to("meta")
    return model


def peft_model() -> object:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(make("llama"), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))


def with_adapter() -> PreTrainedModel:
    model = make("llama")
    model._hf_peft_config_loaded = True  # as `add_adapter` and `load_adapter` say it
    return model


def spoiled() -> PreTrainedModel:
    model = make("llama")
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("source", "match"),
    [
        (quantised, "is quantised"),
        (integers, "up_proj.weight is stored as torch.int8"),
        (on_meta, r"9 tensors of this LlamaForCausalLM are on the meta device.*load it whole"),
        (peft_model, "has a PEFT adapter; merge it first"),
        (with_adapter, "has a PEFT adapter; merge it first"),
        (spoiled, r"1 of the .* entries of model.layers.1.self_attn.k_proj.weight of the LlamaForCausalLM in memory"),
        (lambda: nn.Linear(2, 2), "must be a path, a hub id or a model of transformers; got a Linear"),
        (lambda: {"weight": torch.ones(2)}, "must be .*; got"),
    ],
    ids=["quantised", "integers", "meta", "peft model", "adapter", "nan", "module", "state dict"],
)
def test_models_that_cannot_be_converted(source, match, tmp_path):
    model = source()
    for output in ({}, {"output": tmp_path / "ours"}):
        with pytest.raises(MQAError, match=match):
            convert(model, **output)
    assert not list(tmp_path.iterdir())


def test_nan_is_kept_where_it_is_allowed():
    with pytest.warns(ConversionWarning, match="entries of 1 tensors are NaN or infinite: model.layers.1"):
        model = convert(spoiled(), allow_nonfinite=True)
    assert model.model.layers[1].self_attn.k_proj.weight.isnan().any()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_shard_size": "1GB"}, "`max_shard_size` needs `output`, the directory to write"),
        ({"overwrite": True}, "`overwrite` needs `output`"),
        ({"push_to_hub": "me/mqa"}, "`push_to_hub` needs `output`"),
        ({"revision": "main"}, "`revision` is for hub ids; the source is a model in memory"),
        ({"method": "shared"}, "pass `tokenizer`"),
        ({"tokenizer": "llama"}, "`tokenizer` must be an object in memory; got 'llama'"),
        ({"tokenizer": 3}, "`tokenizer` must be an object in memory; got 3"),
        ({"tokenizer": dict}, "`tokenizer` must be a loaded tokenizer .*; got a type"),
        ({"kv_heads": 4}, "`kv_heads` must divide"),
    ],
    ids=str,
)
def test_options_that_do_not_go_with_a_model_in_memory(options, match):
    with pytest.raises(MQAError, match=match):
        convert(make_model("llama", LLAMA), **options)


def test_a_tokenizer_beside_a_path_is_not_ignored(tmp_path):
    source = save(make("llama"), tmp_path / "source")
    write_tokenizer(source)
    with pytest.raises(ConversionError, match="a checkpoint has its own"):
        convert(source, tokenizer=AutoTokenizer.from_pretrained(source))


def test_the_help_has_all_options():
    parameters = inspect.signature(convert).parameters
    assert list(parameters)[:2] == ["source", "output"]
    assert parameters["output"].default is None
    assert {"kv_heads", "method", "calibration", "tokenizer", "max_shard_size", "push_to_hub"} < set(parameters)
    assert "tokenizer: Tokenizer or processor" in convert.__doc__


def test_the_command_has_no_objects():
    from typer.main import get_command

    names = {parameter.name for parameter in get_command(app).commands["convert"].params}
    assert "calibration" in names
    assert "tokenizer" not in names
