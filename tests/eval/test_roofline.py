"""The counts of a plan against the tensors of real models."""

import json
import re
from pathlib import Path

import pytest
import torch
from native_sources import BASE, CONFIGS, make_native
from seq2seq_sources import SEQ2SEQ_CASES, make_seq2seq
from sources import LLAMA, make_model, need, save
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from mqa_hf import MQAConfig, MQAForCausalLM, MQAForConditionalGeneration, convert, plan
from mqa_hf.base.datasheets import DEVICES, Device
from mqa_hf.base.errors import MQAError
from mqa_hf.base.shapes import SHAPES
from mqa_hf.cache_mqa import DecodeCache
from mqa_hf.cli import app
from mqa_hf.conversion.canonical import decoder_of
from mqa_hf.conversion.source import Source
from mqa_hf.eval.attention_sizes import cross_attention, kv_bytes, own_attention
from mqa_hf.eval.choices import ATTAINED, canonical_models, compare, expected, own_models
from mqa_hf.eval.latent_choices import with_latent
from mqa_hf.eval.roofline import StepCost, largest_batch, prefill_ratio, step_cost, step_weights, weights_of
from mqa_hf.eval.shapes import fitted, own_shape, read_shape


def decoder_parts(config):
    """The model without storage, and its linear layers that a step multiplies with."""
    with torch.device("meta"):
        several = config is not decoder_of(config)
        model = (MQAForConditionalGeneration if several else MQAForCausalLM)._from_config(config)
    stack = model.model.decoder if several else model.model
    linear = {n: m.weight.numel() for n, m in stack.named_modules() if isinstance(m, nn.Linear)}
    return model, stack, linear


@pytest.mark.parametrize(
    "name", ["gpt2", "opt-1.3b", "llama-2-7b", "llama-3.1-8b", "bloom-7b1", "t5-large", "shazeer-2019"]
)
def test_weights_are_those_of_the_model(name):
    _, config = read_shape(name)
    decoder = decoder_of(config)
    model, stack, linear = decoder_parts(config)
    once = {n: size for n, size in linear.items() if "cross_attn.k" not in n and "cross_attn.v" not in n}
    assert step_weights(decoder) == sum(once.values()) + model.lm_head.weight.numel()
    tied = decoder.vocab_size * decoder.embedding_size if decoder.tie_word_embeddings else 0
    total = sum(p.numel() for p in stack.parameters()) + model.lm_head.weight.numel() - tied
    assert weights_of(decoder).total == pytest.approx(total, rel=5e-3)


def test_operations_and_bytes_of_a_step():
    _, config = read_shape("llama-2-7b")
    cost = step_cost(config, batch=3, context=100)
    weights = step_weights(config)
    assert cost.weight_bytes == 2 * weights
    assert cost.weight_operations == 2 * 3 * weights
    assert cost.cache_bytes == 3 * 100 * config.kv_bytes_per_token
    assert cost.cache_operations == 2 * 3 * 100 * 32 * 32 * (128 + 128)
    one, _ = canonical_models(config, [1], [1])["1"]
    assert step_cost(one, 3, 100).cache_bytes * 32 == cost.cache_bytes
    assert step_cost(one, 3, 100).cache_operations == cost.cache_operations


def test_windows_and_sources_count():
    _, config = read_shape("shazeer-2019")
    decoder = decoder_of(config)
    cost = step_cost(decoder, 2, 100, source=50)
    assert cost.cache_bytes == 2 * (100 * decoder.kv_bytes_per_token + 50 * decoder.cross_kv_bytes_per_token)
    decoder.layer_types, decoder.sliding_window = ["sliding_attention"] * 6, 32
    assert step_cost(decoder, 2, 100).cache_bytes == 2 * 32 * decoder.kv_bytes_per_token


def test_the_cache_of_the_largest_batch_fits_as_said():
    _, config = read_shape("smollm2-135m")
    memory = 1e9
    rows = largest_batch(config, 256, memory)
    cache = DecodeCache(config, rows, 256, torch.bfloat16, "meta")
    size = sum(2 * t.numel() for layer in cache.layers for t in (layer.keys, layer.values))
    row = size // rows
    assert size + 2 * weights_of(config).total <= 0.96 * memory < size + row + 2 * weights_of(config).total


def test_time_is_the_larger_of_reading_and_computing():
    _, config = read_shape("llama-2-7b")
    slow_memory, slow_units = Device("a", 80e9, 1e9, 1e18), Device("b", 80e9, 1e18, 1e9)
    cost = step_cost(config, 4, 64)
    assert cost.seconds(slow_memory) == pytest.approx((cost.weight_bytes + cost.cache_bytes) / 1e9)
    assert cost.seconds(slow_units) == pytest.approx((cost.weight_operations + cost.cache_operations) / 1e9)


def test_multi_query_reads_less_per_operation_and_wide_heads_more_again():
    _, config = read_shape("llama-2-7b")
    records = {r.kv_heads: r for r in compare(canonical_models(config, [1, 8], [1, 2]), 256, 4096, DEVICES["h100"])}
    assert list(records) == ["original (32)", "1", "1, width x2", "8", "8, width x2"]
    ratio = [records[n].bytes_per_operation for n in ("1", "1, width x2", "8", "original (32)")]
    assert ratio == sorted(ratio)
    assert records["1"].speedup > 15
    assert records["original (32)"].prefill_bytes_per_operation < 0.001


def test_the_command(tmp_path: Path):
    source = save(make_model("llama", LLAMA), tmp_path / "source")
    shown = CliRunner().invoke(app, ["plan", str(source), "--kv-heads", "1,2", "--device", "l4"])
    assert shown.exit_code == 0, shown.output
    assert "original (6)" in shown.output
    as_json = CliRunner().invoke(app, ["plan", str(source), "--kv-heads", "1", "--json"])
    assert [r["kv_heads"] for r in json.loads(as_json.output)["choices"]] == ["original (6)", "1", "1, width x2"]
    for arguments, message in (
        (["--kv-heads", "4"], "--kv-heads 4 must divide the 6"),
        (["--device", "abacus"], "--device must be one of measured, h100"),
        (["--dtype", "int3"], "--dtype must be one of float32"),
        (["--widths", "x"], "--widths must be a list, each a whole number at least 1; got 'x'"),
        (["--kv-heads", "1,0"], "--kv-heads must be a list, each a whole number at least 1; got '0'"),
        (["--context", str(2**31)], "--context must be a whole number at least 1 and below 2**31"),
    ):
        result = CliRunner().invoke(app, ["plan", str(source), *arguments])
        assert isinstance(result.exception, MQAError)
        assert message in str(result.exception)


def test_a_checkpoint_without_keys_and_values_has_no_plan(tmp_path: Path):
    source = save(make_model("llama", LLAMA), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 0}))
    with pytest.raises(MQAError, match="has no layers with keys and values"):
        plan(source)
    for nothing in (5, None, "a" * 5000):
        with pytest.raises(MQAError):
            plan(nothing)


def test_the_function_returns_what_the_command_prints(tmp_path: Path):
    source = save(make_model("llama", LLAMA), tmp_path / "source")
    found = plan(source, kv_heads=[1], widths=[1, 2], device="l4")
    words = ["plan", str(source), "--kv-heads", "1", "--widths", "1,2", "--device", "l4", "--json"]
    assert json.loads(CliRunner().invoke(app, words).output) == found.model_dump()
    assert found.choices[1].speedup == found.choices[1].tokens_per_sec / found.choices[0].tokens_per_sec


@pytest.mark.parametrize(
    ("name", "keys"), [("llama-2-7b", 512), ("llama-3.1-8b", 1024), ("pythia-6.9b", 128), ("gpt2", 0), ("t5-large", 0)]
)
def test_weights_of_a_model_with_latents_are_those_of_the_class(name, keys):
    """Every weight of its attentions but biases, those of the encoder's latents apart, which no step makes."""
    _, config = read_shape(name)
    config = with_latent(config, 128, keys, 16)
    decoder = decoder_of(config)
    model, stack, _ = decoder_parts(config)
    layer = stack.layers[0]
    own = {n: p.numel() for n, p in layer.self_attn.named_parameters() if "bias" not in n}
    assert {"q_proj.weight", "kv_proj.weight", "v_up.weight", "o_proj.weight"} <= set(own)
    assert own_attention(decoder, 0).step_weights == sum(own.values())
    if name == "t5-large":
        cross = {n: p.numel() for n, p in layer.cross_attn.named_parameters() if "bias" not in n}
        assert cross_attention(decoder, 0).step_weights == sum(cross.values()) - cross["kv_proj.weight"]
    tied = decoder.vocab_size * decoder.embedding_size if decoder.tie_word_embeddings else 0
    total = sum(p.numel() for p in stack.parameters()) + model.lm_head.weight.numel() - tied
    assert weights_of(decoder).total == pytest.approx(total, rel=5e-3)


def test_operations_and_bytes_of_a_latent():
    """Llama 2 7B: 32 layers, 32 heads of 128; latents of 256 numbers, 512 rebuilt key components."""
    _, config = read_shape("llama-2-7b")
    sixteen, four = with_latent(config, 256, 512, 16), with_latent(config, 256, 512, 4)
    rebuilding, attending = 2 * 256 * 512, 2 * 32 * (512 + 256)
    for latent, stored in ((sixteen, 256 * 2), (four, 256 // 2 + 2 * 2)):
        assert kv_bytes(latent) == (32 * stored, 0) == (latent.kv_bytes_per_token, 0)
        rebuilt = step_cost(latent, 3, 100)
        assert rebuilt.cache_bytes == 3 * 100 * 32 * stored
        assert rebuilt.cache_operations == 3 * 100 * 32 * (rebuilding + attending)
        expanded = step_cost(latent, 3, 100, keys="expanded")
        assert expanded.cache_bytes == 3 * 100 * 32 * 2 * (512 + 256)
        assert expanded.cache_operations == 3 * 100 * 32 * attending
        assert expanded.weight_bytes == rebuilt.weight_bytes == 2 * step_weights(latent)
        assert rebuilt.weight_operations == 2 * 3 * step_weights(latent)
    assert kv_bytes(four, itemsize=4)[0] == 32 * (256 // 2 + 2 * 4)
    assert kv_bytes(sixteen, itemsize=1)[0] == 32 * 256 * 2  # latents are not kept in float8


def test_a_part_of_keys_that_is_not_rotated_is_read_from_the_latent():
    """Pythia 6.9B rotates 32 of 128 components; GPT-2 and T5 none, so that a latent is key and value."""
    _, config = read_shape("pythia-6.9b")
    cost = step_cost(with_latent(config, 256, 128, 16), 1, 10)
    assert cost.cache_operations == 10 * 32 * (2 * 256 * 128 + 2 * 32 * (128 + 256) + 2 * 32 * 256)
    _, config = read_shape("gpt2")
    plain = with_latent(config, 128, 0, 16)
    assert step_cost(plain, 1, 10).cache_operations == 10 * 12 * 2 * 12 * (128 + 128)
    assert step_cost(plain, 1, 10) == step_cost(plain, 1, 10, keys="expanded")
    _, config = read_shape("t5-large")
    decoder = decoder_of(with_latent(config, 64, 0, 8))
    cost = step_cost(decoder, 2, 10, source=7)
    assert cost.cache_operations == 2 * (10 + 7) * 24 * 4 * 16 * 64
    assert cost.cache_bytes == 2 * (10 + 7) * 24 * (64 + 2 * 2)


def test_query_heads_that_share_the_map_of_a_head_multiply_with_it_each():
    _, config = read_shape("llama-3.1-8b")
    latent = with_latent(config, 128, 256, 16)
    cost = step_cost(latent, 2, 1)
    assert cost.weight_operations == 2 * 2 * (step_weights(latent) + 32 * (32 - 8) * 128 * 128)


def test_windows_prompts_and_room_of_a_latent():
    _, config = read_shape("llama-2-7b")
    latent = with_latent(config, 256, 512, 4)
    latent.layer_types = ["sliding_attention"] * 16 + ["full_attention"] * 16
    latent.sliding_window = 32
    assert step_cost(latent, 2, 100).cache_bytes == 2 * 16 * (32 + 100) * 132
    # By head, a prompt takes the operations of the original's attention.
    weights, attention = step_weights(latent), 32 * 32 * (128 + 128)
    kept = 32 * (4 * 4096 + (32 + 32) * (128 + 128) + 256 + 512)
    told = 2 * (weights + 2 * 8 * kept) / (2.0 * 2 * 8 * weights + 2 * 8 * 8 * attention)
    assert prefill_ratio(latent, 2, 8) == pytest.approx(told)
    for keys, size in (("rebuilt", 32 * 132), ("expanded", 32 * 2 * 768)):
        left = 0.96 * 80e9 - 2 * weights_of(latent).total
        assert largest_batch(latent, 100, 80e9, keys=keys) == left // (100 * size)


def test_the_larger_of_bytes_and_operations_is_the_limit_of_a_latent():
    device = Device("a", 80e9, 1e12, 1e14)
    cost = StepCost(weight_bytes=1e9, cache_bytes=int(2e9), weight_operations=1e10, cache_operations=6e11)
    assert cost.seconds(device) == pytest.approx(1e-3 + 6e-3)
    assert cost.cache_limit(device) == "operations"
    assert expected(cost, device) == pytest.approx(1e-3 + 6e-3 / ATTAINED)
    read = StepCost(weight_bytes=1e9, cache_bytes=int(7e9), weight_operations=1e10, cache_operations=6e11)
    assert read.seconds(device) == pytest.approx(8e-3)
    assert read.cache_limit(device) == "bytes"
    assert expected(read, device) == pytest.approx(1e-3 + 6e-3 / ATTAINED)


def test_a_plan_of_latents_says_where_they_buy_room_and_not_time():
    """A latent of 256 numbers rebuilt to 512 takes 0.31 ns a token and layer at the full rate of an H100, and 0.79 at
    40% of it; the original's four heads of Qwen 2.5 7B are read in 0.61 ns and the eight of Llama 3.1 8B in 1.22."""
    asked = {"latents": [256], "key_widths": [512], "batch": 64}
    few, more = plan("qwen2.5-7b", **asked), plan("llama-3.1-8b", **asked)
    assert [c.kv_heads for c in few.choices] == [
        "original (4)",
        "latent 256, keys 512 rebuilt",
        "latent 256, keys 512 expanded",
    ]
    original, rebuilt, expanded = few.choices
    assert (rebuilt.cache_limit, expanded.cache_limit) == ("operations", "bytes")
    assert (rebuilt.keys, expanded.keys, original.keys) == ("rebuilt", "expanded", None)
    assert rebuilt.speedup > 1
    assert rebuilt.expected_ms > original.expected_ms == original.floor_ms
    head, line = few.notes
    assert head == "Expected time of a decode step, with attention to a latent at 40% of the matrix rate:"
    rows = f"({rebuilt.largest_batch:,} rows rather than {original.largest_batch:,})"
    assert line == (
        f"- latent 256, keys 512: {rebuilt.expected_ms:.2f} ms with rebuilt keys or {expanded.expected_ms:.2f} ms "
        f"with expanded keys, compared with {original.expected_ms:.2f} ms for the original; with rebuilt keys "
        f"it saves memory {rows}, not time"
    )
    assert "saves memory" not in more.notes[1]


def test_latents_stand_beside_heads_unless_either_is_asked_for(tmp_path: Path):
    source = save(make_model("llama", LLAMA), tmp_path / "source")  # 6 heads of 8
    latent = ["latent 16, keys 32 rebuilt", "latent 16, keys 32 expanded"]
    heads = ["1", "1, width x2", "2", "2, width x2"]
    for options, names in (
        ({}, [*heads, *latent]),
        ({"widths": [1]}, ["1", "2"]),
        ({"latents": [16]}, latent),
        ({"kv_heads": [1], "widths": [1], "key_widths": [32]}, ["1", *latent]),
        ({"target": "native"}, ["1", "2"]),
        (
            {"latents": [32], "key_widths": [8], "latent_bits": [8, 4]},
            [f"latent 32 at {bits} bits, keys 8 {keys}" for bits in (8, 4) for keys in ("rebuilt", "expanded")],
        ),
        ({"latent_bits": [4]}, [f"latent 32 at 4 bits, keys 32 {keys}" for keys in ("rebuilt", "expanded")]),
    ):
        assert [c.kv_heads for c in plan(source, **options).choices] == ["original (6)", *names]
    one = save(make_model("llama", {**LLAMA, "num_key_value_heads": 1}), tmp_path / "one")
    assert [c.kv_heads for c in plan(one).choices] == ["original (1)"]  # as large as a latent would be
    shown = CliRunner().invoke(app, ["plan", str(source), "--latents", "16", "--latent-bits", "16"])
    assert shown.exit_code == 0, shown.output
    assert "- latent 16, keys 32: " in shown.output


def test_a_checkpoint_with_latents_is_planned_as_it_is(tmp_path: Path):
    _, config = read_shape(str(save(make_model("llama", LLAMA), tmp_path / "source")))
    with_latent(config, 32, 24, 4).save_pretrained(tmp_path / "latent")
    found = plan(tmp_path / "latent").choices
    said = "original (one latent of 32 numbers at 4 bits, 24 rebuilt key components)"
    assert [c.kv_heads for c in found] == [f"{said} rebuilt", f"{said} expanded"]
    layers = config.num_hidden_layers
    assert [c.kv_bytes_per_token for c in found] == [layers * (16 + 4), layers * 2 * (24 + 32)]
    with pytest.raises(MQAError, match="it has a latent in place of keys and values; convert the original"):
        plan(tmp_path / "latent", latents=[32])


def test_heads_that_are_planned_divide_those_of_both_caches(tmp_path: Path):
    """Cross-attention has a latent, or one head, and the decoder's own attention all its heads."""
    name, config = "t5", next(config for name, _, config in SEQ2SEQ_CASES if name == "t5")
    source = save(make_seq2seq(name, config), tmp_path / "source")
    convert(source, tmp_path / "one", attention=["cross"])
    assert [c.kv_heads for c in plan(tmp_path / "one").choices] == ["original (6)", "1", "1, width x2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latents": [49]}, "`latents` must be at most 48, the width of all keys and values of a token; got 49"),
        ({"latents": [40], "latent_bits": [8]}, "`latents` must be multiples of 32 with `latent_bits` 8; got 40"),
        ({"latent_bits": [5]}, "`latent_bits` must be a list, each one of 16, 8, 4"),
        ({"key_widths": [7]}, "`key_widths` must be even and at most the 48 rotated components of all keys; got 7"),
        ({"key_widths": [50]}, "`key_widths` must be even and at most the 48 rotated components of all keys; got 50"),
        ({"latents": [16], "target": "native"}, "latents need `target` mqa: transformers' classes have key/value"),
    ],
    ids=str,
)
def test_latents_that_cannot_be_are_said(tmp_path: Path, options, message):
    source = save(make_model("llama", LLAMA), tmp_path / "source")  # 6 heads of 8
    with pytest.raises(MQAError, match=re.escape(message)):
        plan(source, **options)


def test_a_width_of_keys_is_refused_where_none_are_rebuilt():
    with pytest.raises(MQAError, match="`key_widths` needs rotary positions"):
        plan("gpt2", key_widths=[16])


def test_plans_of_every_shape():
    for name in SHAPES:
        _, config = read_shape(name)
        records = compare(canonical_models(config, [1], [1]), 8, 1024, DEVICES["a100-80gb"], source=64)
        assert records[-1].tokens_per_sec >= 0.99 * records[0].tokens_per_sec


@pytest.mark.parametrize("name", ["qwen3-8b", "gemma-3-12b", "mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b"])
def test_weights_of_a_canonical_model_are_those_of_its_class(name):
    _, config = read_shape(name)
    for shape in (config, fitted(config, 1)):
        with torch.device("meta"):
            model = MQAForCausalLM(shape)
        left_out = ("bias", "sinks")
        held = {n: p.numel() for n, p in model.named_parameters() if "norm" not in n and not n.endswith(left_out)}
        assert weights_of(shape).total == sum(held.values())
        assert weights_of(shape).experts == sum(count for n, count in held.items() if ".experts." in n)
        assert weights_of(shape).chosen == (shape.num_experts_per_tok / shape.num_experts if shape.num_experts else 1)


def test_weights_of_gates_and_of_a_layer_before_the_head():
    for fields in ({"attention_gate": True, "v_head_dim": 24}, {"head_transform": "gelu"}):
        config = MQAConfig(**fields)
        with torch.device("meta"):
            model = MQAForCausalLM(config)
        assert weights_of(config).total == sum(p.numel() for n, p in model.named_parameters() if "norm" not in n)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_weights_of_a_model_in_its_own_class_are_those_of_the_class(model_type):
    need(model_type)
    config = AutoConfig.for_model(model_type, **{**BASE, **CONFIGS[model_type]})
    own = own_shape(Source("source", Path(), None, config, {}), 4)
    for shape in (own, own.with_heads(1)):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape.run_config)
        assert shape.weights.total == model.num_parameters()
        experts = {n: p for n, p in model.named_parameters() if ".experts." in n}
        assert shape.weights.experts == sum(p.numel() for p in experts.values())
        assert shape.weights.chosen == (0.5 if experts else 1)  # two of four
        assert all(p.shape[0] == 4 for p in experts.values() if p.ndim == 3)
    assert own.config.kv_bytes_per_token == 4 * own.with_heads(1).config.kv_bytes_per_token
    records = compare(own_models(own, [1, 2]), 2, 64, DEVICES["l4"])
    assert [r.kv_heads for r in records] == ["original (4)", "1", "2"]
    assert records[0].cache_bytes == 4 * records[1].cache_bytes


def test_a_step_reads_the_experts_that_its_rows_choose_and_the_window_of_a_layer():
    """Of four experts each row chooses two: 2 are read by one row, 3 in the mean by two, nearly all by many."""
    config = AutoConfig.for_model("mixtral", **{**BASE, **CONFIGS["mixtral"]})
    own = own_shape(Source("source", Path(), None, config, {}), 4)
    one_expert = 2 * 3 * 48 * 56  # in two layers
    attention = 2 * 48 * 8 * (8 + 4 + 4 + 8)
    small = 2 * 4 * 48 + 5 * 48  # routers and norms
    for rows, experts in ((1, 2), (2, 3), (64, 4)):
        cost = step_cost(own.config, rows, 10, weights=own.weights)
        assert cost.weight_bytes == pytest.approx(2 * (experts * one_expert + attention + small + 101 * 48))
        assert cost.weight_operations == 2 * rows * (2 * one_expert + attention + small + 101 * 48)
    config = AutoConfig.for_model("granitemoe_swa", **{**BASE, **CONFIGS["granitemoe_swa"]})
    own = own_shape(Source("source", Path(), None, config, {}), 4)
    assert step_cost(own.config, 3, 40, weights=own.weights).cache_bytes == 3 * 2 * 4 * 16 * (5 + 40)


def test_the_command_plans_what_convert_takes(tmp_path: Path):
    own = save(make_native("falcon_h1"), tmp_path / "own")
    llama = save(make_model("llama", LLAMA), tmp_path / "llama")
    bloom = save(
        make_model("bloom", {"hidden_size": 48, "n_head": 6, "n_layer": 1, "vocab_size": 99}), tmp_path / "bloom"
    )
    for arguments in ([own], [own, "--target", "native"], [llama, "--target", "native"]):
        result = CliRunner().invoke(app, ["plan", *map(str, arguments), "--kv-heads", "1", "--json"])
        assert result.exit_code == 0, result.output
        assert [r["kv_heads"][:4] for r in json.loads(result.output)["choices"]] == ["orig", "1"]
    for arguments, message in (
        ([own, "--target", "mqa"], "can only be converted in its own class: .*; use --target native"),
        ([own, "--widths", "2"], "--widths needs --target mqa"),
        ([llama, "--target", "native", "--widths", "1,2"], "--widths needs --target mqa"),
        ([own, "--kv-heads", "3"], "--kv-heads must divide the source's 4 key/value heads, got 3"),
        ([bloom, "--target", "native"], "no class of transformers holds a bloom"),
        ([llama, "--target", "vllm"], "--target must be one of mqa, native"),
    ):
        result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
        assert isinstance(result.exception, MQAError), result.output
        assert re.search(message, str(result.exception))
