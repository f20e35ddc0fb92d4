"""`--method shared`: fitted heads through the whole conversion."""

import json

import pytest
import torch
from safetensors.torch import load_file
from seq2seq_sources import T5, make_seq2seq
from sources import CASES, IDS, LLAMA, batch, largest_difference, make_model, save
from tokenizer import write_tokenizer
from transformers import AutoModelForCausalLM

from mqa_hf.conversion import ConversionError, convert
from mqa_hf.conversion.text import documents

SMALL = {"calibration_tokens": 1024, "sequence_length": 32}
CHOSEN = [
    "llama: multi-head",
    "llama: grouped",
    "llama: biases",
    "llama: wide heads",
    "llama: rope yarn",
    "smollm3: layers without rotation",
    "mistral: window 5",
    "qwen2: grouped",
    "gpt2: as published",
    "opt: post-norm, projected",
    "gpt_neox: parallel, quarter rotary",
    "gptj: as published",
    "bloom: five heads",
    "mpt: six heads",
    "gemma: multi-head, wide heads",
    "gpt_neo: windows",
    "xglm: as published",
]


def make(what, tmp_path):
    model_type, _, config = CASES[IDS.index(what)]
    theirs = make_model(model_type, config)
    source = save(theirs, tmp_path / "source")
    write_tokenizer(source)
    return source, theirs


def load(directory):
    return AutoModelForCausalLM.from_pretrained(directory).eval()


@pytest.mark.parametrize("what", CHOSEN)
def test_at_full_width_nothing_is_lost(what, tmp_path):
    source, theirs = make(what, tmp_path)
    heads = load_heads(source, tmp_path)
    report = convert(source, tmp_path / "wide", method="shared", head_width=heads, **SMALL)
    ours = load(tmp_path / "wide")
    assert ours.config.num_key_value_heads == 1
    assert ours.config.qk_head_dim == heads * ours.config.head_dim
    difference, size = largest_difference(ours, theirs)
    # The refit towards the old projection is a ridge regression, and float32 weights have been multiplied.
    assert difference <= 2e-3 * size
    assert max(layer["attention_error"] for layer in report["layers"]) < 1e-3
    assert max(layer["discarded_key_energy"] for layer in report["layers"]) < 1e-6
    assert report["held_out_loss"]["after"] == pytest.approx(report["held_out_loss"]["before"], abs=1e-3)


def load_heads(source, tmp_path):
    return convert(source, tmp_path / "probe", method="first")["num_key_value_heads"]["before"]


@pytest.mark.parametrize("what", CHOSEN)
def test_a_fitted_head_is_nearer_than_the_mean(what, tmp_path):
    source, theirs = make(what, tmp_path)
    ids = batch(8)[0]
    with torch.no_grad():
        expected = theirs(ids).logits
        distances = []
        for options in (
            {"method": "mean"},
            {"method": "shared", "refit": False, **SMALL},
            {"method": "shared", **SMALL},
        ):
            convert(source, tmp_path / "ours", overwrite=True, **options)
            distances.append(float((load(tmp_path / "ours")(ids).logits - expected).norm()))
    assert distances[2] < distances[0]
    assert distances[1] < 1.1 * distances[0]


def test_one_seed_gives_one_checkpoint(tmp_path):
    source, _ = make("llama: grouped", tmp_path)
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        convert(source, tmp_path / name, method="shared", seed=seed, **SMALL)
    one, same, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "same", "other"))
    torch.testing.assert_close(one, same, rtol=0, atol=0)
    name = "model.layers.1.self_attn.k_proj.weight"
    assert not torch.equal(one[name], other[name])


def test_the_native_target_holds_a_fitted_head_of_the_old_width(tmp_path):
    source, _ = make("llama: grouped", tmp_path)
    convert(source, tmp_path / "ours", method="shared", **SMALL)
    convert(source, tmp_path / "native", method="shared", target="native", **SMALL)
    assert largest_difference(load(tmp_path / "native"), load(tmp_path / "ours"))[0] <= 1e-4
    with pytest.raises(ConversionError, match="--target native"):
        convert(source, tmp_path / "wide", method="shared", target="native", head_width=2, **SMALL)


def test_calibration_text_from_files(tmp_path):
    source, _ = make("llama: grouped", tmp_path)
    (tmp_path / "text.txt").write_text("all work and no play makes a dull model. " * 60)
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"n": 1, "text": "no play " * 30}) for _ in range(20)))
    for name in ("text.txt", "text.jsonl"):
        report = convert(source, tmp_path / f"from-{name}", method="shared", calibration=str(tmp_path / name), **SMALL)
        assert report["options"]["calibration"].endswith(name)
        assert f"--calibration {tmp_path / name}" in report["command"]
    card = (tmp_path / "from-text.txt" / "README.md").read_text()
    assert "the loss went from" in card


def test_the_default_text_is_there_without_a_network():
    texts = documents(None)
    assert sum(map(len, texts)) > 400_000


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"head_width": 7}, "--key-width 7 is more than the 6 old heads"),
        ({"head_width": 0}, "widths must be above 0"),
        ({"window": 4}, "--window and --method shared"),
        ({"device": "warp"}, "--device warp: "),
        ({"method": "mean", "head_width": 2}, "widths and --cache-budget are for --method shared, not mean"),
        ({"calibration": "/nowhere.txt"}, "--calibration /nowhere.txt cannot be read"),
        ({"calibration_tokens": 10}, "at least two sequences of 32 are needed"),
    ],
)
def test_requests_that_cannot_be(options, match, tmp_path):
    source, _ = make("llama: multi-head", tmp_path)
    with pytest.raises(ConversionError, match=match):
        convert(source, tmp_path / "ours", **{"method": "shared", **SMALL, **options})
    assert not (tmp_path / "ours").exists()


def test_what_it_is_not_for(tmp_path):
    source = save(make_seq2seq("t5", T5), tmp_path / "t5")
    with pytest.raises(ConversionError, match="tokenizer"):
        convert(source, tmp_path / "ours", method="shared")
    bare = save(make_model("llama", LLAMA), tmp_path / "bare")
    with pytest.raises(ConversionError, match="tokenizer"):
        convert(bare, tmp_path / "ours", method="shared")
