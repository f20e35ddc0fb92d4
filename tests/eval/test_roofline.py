"""The counts of a plan against the tensors of real models."""

import json
import re
from pathlib import Path

import pytest
import torch
from native_sources import BASE, CONFIGS, make_native
from sources import LLAMA, make_model, need, save
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from mqa_hf import MQAForCausalLM, MQAForConditionalGeneration, plan
from mqa_hf.base.datasheets import DEVICES, Device
from mqa_hf.base.errors import MQAError
from mqa_hf.base.shapes import SHAPES
from mqa_hf.cache_mqa import DecodeCache
from mqa_hf.cli import app
from mqa_hf.conversion.canonical import decoder_of
from mqa_hf.conversion.source import Source
from mqa_hf.eval.choices import canonical_models, compare, own_models
from mqa_hf.eval.roofline import largest_batch, step_cost, step_weights, weights_of
from mqa_hf.eval.shapes import own_shape, read_shape


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
    with pytest.raises(MQAError, match="has no layer with keys and values"):
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


def test_plans_of_every_shape():
    for name in SHAPES:
        _, config = read_shape(name)
        records = compare(canonical_models(config, [1], [1]), 8, 1024, DEVICES["a100-80gb"], source=64)
        assert records[-1].tokens_per_sec >= 0.99 * records[0].tokens_per_sec


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
    config = AutoConfig.for_model("gemma2", **{**BASE, **CONFIGS["gemma2"]})
    own = own_shape(Source("source", Path(), None, config, {}), 4)
    assert step_cost(own.config, 3, 40, weights=own.weights).cache_bytes == 3 * 2 * 4 * 16 * (5 + 40)


def test_the_command_plans_what_convert_takes(tmp_path: Path):
    qwen3 = save(make_native("qwen3"), tmp_path / "qwen3")
    llama = save(make_model("llama", LLAMA), tmp_path / "llama")
    bloom = save(
        make_model("bloom", {"hidden_size": 48, "n_head": 6, "n_layer": 1, "vocab_size": 99}), tmp_path / "bloom"
    )
    for arguments in ([qwen3], [qwen3, "--target", "native"], [llama, "--target", "native"]):
        result = CliRunner().invoke(app, ["plan", *map(str, arguments), "--kv-heads", "1", "--json"])
        assert result.exit_code == 0, result.output
        assert [r["kv_heads"][:4] for r in json.loads(result.output)["choices"]] == ["orig", "1"]
    for arguments, message in (
        ([qwen3, "--target", "mqa"], "converted in its own class only: .*; use --target native"),
        ([qwen3, "--widths", "2"], "--widths is for --target mqa"),
        ([llama, "--target", "native", "--widths", "1,2"], "--widths is for --target mqa"),
        ([qwen3, "--kv-heads", "3"], "--kv-heads 3 does not divide the source's 4"),
        ([bloom, "--target", "native"], "no class of transformers holds a bloom"),
        ([llama, "--target", "vllm"], "--target must be one of mqa, native"),
    ):
        result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
        assert isinstance(result.exception, MQAError), result.output
        assert re.search(message, str(result.exception))
