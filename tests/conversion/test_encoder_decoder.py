"""The exactness rule, the mean rule and generation, for every encoder-decoder row of the table."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from seq2seq_sources import (
    BART,
    SEQ2SEQ_CASES,
    SEQ2SEQ_IDS,
    T5,
    inputs,
    make_seq2seq,
    overwrite_with_mean,
    seq2seq_difference,
)
from sources import save
from transformers import AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

from mqa_hf.conversion import ConversionError, convert, inspect

TOLERANCE = 1e-4  # on logits of order 10, float32
FIRST = {family: (family, what, config) for family, what, config in reversed(SEQ2SEQ_CASES)}


def load(directory, model_type):
    auto = AutoModelForSpeechSeq2Seq if model_type == "whisper" else AutoModelForSeq2SeqLM
    return auto.from_pretrained(directory).eval()


def heads_of(model) -> int:
    return getattr(model.config, "decoder_attention_heads", None) or model.config.num_heads


def convert_all_heads(model_type, config, tmp_path):
    theirs = make_seq2seq(model_type, config)
    source = save(theirs, tmp_path / "source")
    convert(source, tmp_path / "ours", kv_heads=heads_of(theirs))
    return load(source, model_type), load(tmp_path / "ours", model_type)


@pytest.mark.parametrize(("model_type", "what", "config"), SEQ2SEQ_CASES, ids=SEQ2SEQ_IDS)
def test_with_all_heads_it_is_the_source(model_type, what, config, tmp_path):
    theirs, ours = convert_all_heads(model_type, config, tmp_path)
    difference, size = seq2seq_difference(ours, theirs)
    assert 1 < size < 100
    assert difference <= TOLERANCE, f"{difference} on logits up to {size}"


@pytest.mark.parametrize("attentions", [("decoder", "cross"), ("decoder", "cross", "encoder"), ("cross",)], ids=str)
@pytest.mark.parametrize(("model_type", "what", "config"), SEQ2SEQ_CASES, ids=SEQ2SEQ_IDS)
def test_the_mean_is_the_source_with_its_heads_overwritten_by_their_mean(
    model_type, what, config, attentions, tmp_path
):
    theirs = make_seq2seq(model_type, config)
    source = save(theirs, tmp_path / "source")
    report = convert(source, tmp_path / "ours", attentions=attentions)
    theirs, ours = load(source, model_type), load(tmp_path / "ours", model_type)
    overwrite_with_mean(theirs, 1, attentions)
    difference, size = seq2seq_difference(ours, theirs)
    assert difference <= TOLERANCE, f"{difference} on logits up to {size}"
    assert {name for name, heads in report["attentions"].items() if heads["after"] == 1} == set(attentions)


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}], ids=["greedy", "beam 4"])
@pytest.mark.parametrize(("model_type", "what", "config"), FIRST.values(), ids=FIRST)
def test_generation_is_that_of_the_source(model_type, what, config, options, tmp_path):
    theirs, ours = convert_all_heads(model_type, config, tmp_path)
    for padding in ("right", "left") if model_type != "whisper" else (None,):
        arguments = {k: v for k, v in inputs(theirs, padding).items() if k != "decoder_input_ids"}
        arguments |= {"max_new_tokens": 50, "min_new_tokens": 50, "do_sample": False, **options}
        expected = theirs.generate(**arguments)
        assert expected.shape[1] >= 50
        for caching in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
            torch.testing.assert_close(ours.generate(**arguments, **caching), expected)


def test_sampling_follows_the_seed(tmp_path):
    theirs, ours = convert_all_heads(*SEQ2SEQ_CASES[0][::2], tmp_path)
    arguments = {k: v for k, v in inputs(theirs).items() if k != "decoder_input_ids"}
    samples = []
    for model in (theirs, ours):
        torch.manual_seed(5)
        samples.append(model.generate(**arguments, do_sample=True, top_k=20, max_new_tokens=20))
    torch.testing.assert_close(*samples)


@pytest.mark.parametrize("model_type", ["t5", "bart", "marian"])
def test_the_loss_of_labels_is_the_source_s(model_type, tmp_path):
    theirs, ours = convert_all_heads(*FIRST[model_type][::2], tmp_path)
    arguments = inputs(theirs, "right")
    labels = arguments.pop("decoder_input_ids").clone()
    labels[1, 5:] = -100
    expected = theirs(**arguments, labels=labels).loss
    found = ours(**arguments, labels=labels).loss
    torch.testing.assert_close(found, expected)
    found.backward()
    assert all(p.grad is not None for name, p in ours.named_parameters() if "k_proj" in name)


def test_copies_of_the_embedding_in_old_files_are_left_out(tmp_path):
    theirs = make_seq2seq("t5", T5)
    source = save(theirs, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors["shared.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "ours", kv_heads=6)
    ours = load(tmp_path / "ours", "t5")
    assert seq2seq_difference(ours, theirs)[0] <= TOLERANCE
    assert sum("embed" in name or "lm_head" in name for name in load_file(tmp_path / "ours/model.safetensors")) == 1
    tensors["encoder.embed_tokens.weight"] += 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"both stand for .*, and differ"):
        convert(source, tmp_path / "other")


def test_how_to_generate_comes_from_an_old_configuration(tmp_path):
    source = save(make_seq2seq("bart", BART), tmp_path / "source")
    (source / "generation_config.json").unlink()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_beams": 4, "no_repeat_ngram_size": 3}))
    convert(source, tmp_path / "ours")
    generation = load(tmp_path / "ours", "bart").generation_config
    assert (generation.num_beams, generation.no_repeat_ngram_size) == (4, 3)
    assert generation.decoder_start_token_id == 2


def test_inspection_counts_both_caches(tmp_path):
    source = save(make_seq2seq("t5", T5), tmp_path / "source")
    result = inspect(source)
    assert result["kv_bytes_per_token"] == {"now": 2 * 2 * 6 * 16, "after": 2 * 2 * 16}
    assert result["cross_kv_bytes_per_token"] == {"now": 2 * 2 * 6 * 16, "after": 2 * 2 * 16}
    assert result["native"] is False
    convert(source, tmp_path / "ours")
    assert inspect(tmp_path / "ours")["cross_kv_bytes_per_token"] == {"now": 2 * 2 * 16}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"attentions": ["encoder", "selfish"]}, "--attention encoder,selfish: this model's attentions are decoder"),
        ({"attentions": []}, "--attention"),
        ({"kv_heads": 4}, "does not divide the source's 6 key/value heads of the decoder attention"),
        ({"target": "native"}, "--target native"),
    ],
)
def test_requests_that_cannot_be(options, match, tmp_path):
    source = save(make_seq2seq("t5", T5), tmp_path / "source")
    with pytest.raises(ConversionError, match=match):
        convert(source, tmp_path / "ours", **options)
    assert not (tmp_path / "ours").exists()


def test_prompts_that_no_projection_makes_are_refused(tmp_path):
    source = save(make_seq2seq("mvp", {**BART, "use_prompt": True}), tmp_path / "source")
    with pytest.raises(ConversionError, match="use_prompt=True is not supported"):
        convert(source, tmp_path / "ours")
