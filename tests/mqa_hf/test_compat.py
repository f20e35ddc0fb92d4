"""The code of a checkpoint on versions of transformers that it was not written for."""

import inspect
import logging
import shutil

import pytest
import torch
from isolated import run_without_the_package
from seq2seq_sources import T5, WHISPER, make_seq2seq
from sources import LLAMA, make_model, save
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    DynamicCache,
    GenerationMixin,
)
from transformers.generation import logits_process

from mqa_hf import compat_mqa, convert, rules_mqa
from mqa_hf.compat_mqa import cache_name, check_version
from mqa_hf.modeling_mqa import MQAAttention

OTHER_NAME = {"cache": "past_key_values", "past_key_values": "cache"}[cache_name()]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    root = tmp_path_factory.mktemp("compat")
    convert(save(make_model("llama", LLAMA), root / "source"), root / "ours")
    return root / "ours"


@pytest.fixture
def model(converted):
    return AutoModelForCausalLM.from_pretrained(converted).eval()


@pytest.fixture
def logged():
    """What this package's code logs, which transformers says once a process."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    handler, loggers = Handler(), [logging.getLogger(f"mqa_hf.{name}_mqa") for name in ("compat", "decoding")]
    for logger in loggers:
        logger.warning_once.cache_clear()
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
    yield lines
    for logger in loggers:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


@pytest.fixture
def looked_up_again():
    """Look private names up again, as in a process of its own, and once more when the test has put them back."""
    rules_mqa.obstacle.cache_clear()
    yield
    rules_mqa.obstacle.cache_clear()


def ids(length=6):
    return torch.randint(3, 100, (2, length), generator=torch.Generator().manual_seed(3))


def greedy(model, **options):
    return model.generate(ids(), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None, **options)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.no_grad()
def test_the_cache_is_taken_by_either_name(name, model):
    text = ids()
    whole = model(text, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    steps = [model(text[:, t : t + 1], **{name: cache}).logits for t in range(text.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    prefix = DynamicCache(config=model.config)
    model(text[:, :4], **{name: prefix})
    assert greedy(model, **{name: prefix}).tolist() == greedy(model).tolist()
    prepared = model.prepare_inputs_for_generation(text, **{name: cache}, next_sequence_length=1)
    assert prepared[cache_name()] is cache


def test_a_cache_that_is_given_twice_is_an_error(model):
    with pytest.raises(ValueError, match="got both `cache` and `past_key_values`"):
        model(ids(), cache=DynamicCache(), past_key_values=DynamicCache())


@pytest.mark.parametrize("name", ["kv_store", "past_kv", "token_type_ids", "head_mask"])
def test_an_argument_that_nobody_reads_is_an_error(name, model):
    with pytest.raises(TypeError, match=f"unknown arguments: {name}.*5.17"):
        model(ids(), **{name: torch.ones(1)})
    assert model(ids(), **{name: None}).logits.isfinite().all()


def test_arguments_that_an_attention_function_reads_reach_it(model):
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    from mqa_hf.attention_mqa import mqa_attention_forward

    seen = []

    def attention(*arguments, pages=None, **more):
        seen.append(pages)
        return mqa_attention_forward(*arguments, **more)

    AttentionInterface.register("paging", attention)
    AttentionMaskInterface.register("paging", sdpa_mask)
    model.set_attn_implementation("paging")
    model(ids(), pages=3)
    assert seen == [3] * model.config.num_hidden_layers
    with pytest.raises(TypeError, match="slots"):
        model(ids(), slots=3)


def test_a_transformers_that_hands_the_cache_over_by_a_new_name_is_an_error(model, monkeypatch):
    prepare = GenerationMixin.prepare_inputs_for_generation

    def renamed(self, *arguments, **options):
        inputs = prepare(self, *arguments, **options)
        inputs["kv_store"] = inputs.pop(cache_name())
        return inputs

    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", renamed)
    with pytest.raises(TypeError, match="kv_store"):
        greedy(model)


@pytest.mark.parametrize("gone", ["_prefill", "_pad_token_tensor", "_is_user_defined"])
@pytest.mark.usefixtures("looked_up_again")
def test_where_a_private_name_is_gone_transformers_own_loop_is_taken(gone, model, monkeypatch, logged):
    expected = greedy(model)
    assert not logged
    rules_mqa.obstacle.cache_clear()
    if gone == "_prefill":
        # Under its old name it raises: nothing of ours may call it.
        prefill = GenerationMixin._prefill

        def renamed(self, tokens, *arguments, **options):
            return prefill(self, tokens, *arguments, **options)

        monkeypatch.setattr(GenerationMixin, "_prefill", renamed)
    else:
        mentions = rules_mqa.mentions
        monkeypatch.setattr(rules_mqa, "mentions", lambda *asked: gone not in asked and mentions(*asked))
    monkeypatch.setattr("mqa_hf.decoding_mqa.decode", None)
    assert greedy(model).tolist() == expected.tolist()
    greedy(model)
    assert len(logged) == 1
    assert "slower loop: transformers" in logged[0]


@pytest.mark.usefixtures("looked_up_again")
def test_a_loop_with_other_arguments_is_called_as_it_wants(model, monkeypatch, logged):
    expected = greedy(model)
    rules_mqa.obstacle.cache_clear()
    sample, calls = GenerationMixin._sample, []

    def other(self, input_ids, *, plan=None, **more):
        calls.append(more)
        return sample(self, input_ids, **more)

    monkeypatch.setattr(GenerationMixin, "_sample", other)
    assert greedy(model).tolist() == expected.tolist()
    assert len(calls) == 1
    assert "GenerationMixin._sample" in logged[0]


def test_a_processor_that_keeps_its_numbers_elsewhere_goes_to_transformers_own_loop(model, monkeypatch):
    expected = greedy(model, repetition_penalty=1.5)
    processor = logits_process.RepetitionPenaltyLogitsProcessor
    call = processor.__call__

    def moved(self, *arguments, **options):
        vars(self).update(vars(self).pop("inner", {}))
        return call(self, *arguments, **options)

    begin = processor.__init__

    def hidden(self, *arguments, **options):
        begin(self, *arguments, **options)
        vars(self)["inner"] = {"penalty": vars(self).pop("penalty")}

    monkeypatch.setattr(processor, "__init__", hidden)
    monkeypatch.setattr(processor, "__call__", moved)
    monkeypatch.setattr("mqa_hf.decoding_mqa.decode", None)
    assert greedy(model, repetition_penalty=1.5).tolist() == expected.tolist()


def test_a_transformers_that_is_too_old_is_one_sentence():
    with pytest.raises(ImportError, match=r"needs transformers 5\.17 or newer, found 4\.57\.3; upgrade"):
        check_version("4.57.3")


def test_a_transformers_that_is_newer_than_any_tested_is_one_warning(logged):
    assert check_version("5.17.0")
    assert check_version("5.24.9.dev0")
    assert not logged
    assert not check_version("5.25.0")
    assert not check_version("5.25.0")
    assert len(logged) == 1
    assert "transformers 5.25.0 is newer" in logged[0]


def test_the_self_check_passes_once_and_changes_nothing(model, monkeypatch):
    expected, calls = greedy(model), []
    monkeypatch.setattr("mqa_hf.decoding_mqa.self_check", lambda m: calls.append(compat_mqa.self_check(m)))
    model.decoding.checked = False
    for _ in range(2):
        assert greedy(model).tolist() == expected.tolist()
    assert len(calls) == 1
    assert model.decoding.checked
    assert model.decoding.enabled


@pytest.fixture
def lost_cache(monkeypatch):
    """A transformers whose steps see one token each."""
    prepare = GenerationMixin.prepare_inputs_for_generation

    def lost(self, *arguments, **options):
        inputs = prepare(self, *arguments, **options)
        del inputs[cache_name()]
        return inputs

    return lambda: monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", lost)


def test_the_self_check_finds_a_cache_that_is_lost(model, lost_cache):
    lost_cache()
    model.decoding.checked = False
    for _ in range(2):
        with pytest.raises(RuntimeError, match="logits with and without a cache differ by"):
            greedy(model)


def test_the_self_check_finds_frequencies_that_were_not_set(model):
    model.model.rotary_emb.original_inv_freq.zero_()
    model.decoding.checked = False
    with pytest.raises(RuntimeError, match=r"without setting up model\.rotary_emb"):
        greedy(model)


def test_a_checkpoint_that_is_older_than_transformers_warns_once_checks_and_runs(converted, tmp_path):
    """As remote code that knows fewer versions than there are."""
    old = tmp_path / "old"
    shutil.copytree(converted, old)
    code = (old / "compat_mqa.py").read_text()
    assert "NEWEST = (5, 17), (5, 24)" in code
    (old / "compat_mqa.py").write_text(code.replace("NEWEST = (5, 17), (5, 24)", "NEWEST = (5, 1), (5, 2)"))
    program = """
import json, logging, sys
import torch
from transformers import AutoModelForCausalLM
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("mqa_hf").addHandler(handler)
path, options = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
checked = model.decoding.checked
tokens = model.generate(torch.tensor([[5, 6, 7]]), **options)
print(json.dumps([checked, model.decoding.checked, tokens.tolist(), [line for line in lines if "newer" in line]]))
"""
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    before, after, tokens, warnings = run_without_the_package(program, old, options, scratch=tmp_path)
    assert (before, after, len(warnings)) == (False, True, 1)
    ours = AutoModelForCausalLM.from_pretrained(converted).eval()
    assert tokens == ours.generate(torch.tensor([[5, 6, 7]]), **options).tolist()


@pytest.mark.parametrize("kind", ["encoder-decoder", "speech"])
def test_the_self_check_runs_on_models_with_an_encoder(kind, lost_cache, tmp_path):
    model_type, config = ("whisper", WHISPER) if kind == "speech" else ("t5", T5)
    convert(save(make_seq2seq(model_type, config), tmp_path / "source"), tmp_path / "ours")
    auto = AutoModelForSpeechSeq2Seq if kind == "speech" else AutoModelForSeq2SeqLM
    model = auto.from_pretrained(tmp_path / "ours").eval()
    compat_mqa.self_check(model)
    lost_cache()
    with pytest.raises(RuntimeError, match="logits with and without a cache differ"):
        compat_mqa.self_check(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_self_check_passes_where_the_model_was_cast(dtype, model):
    compat_mqa.self_check(model.to(dtype))


def test_the_self_check_finds_a_private_method_that_what_is_generated_relies_on(model, monkeypatch):
    monkeypatch.setattr(type(model), "relies_on", ("_prepare_everything",))
    with pytest.raises(RuntimeError, match="no longer has _prepare_everything"):
        compat_mqa.self_check(model)


def test_vllm_finds_where_attention_is_called():
    """Its backend for transformers' models reads the source of the layer's `forward`, and the name of the cache."""
    forward = MQAAttention.forward
    assert "ALL_ATTENTION_FUNCTIONS.get_interface(" in inspect.getsource(forward)
    assert "past_key_values" in inspect.signature(forward).parameters
