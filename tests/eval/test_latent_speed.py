"""Latents in a benchmark: what is timed, and what it has to read and compute."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sources import LLAMA, make_model, save
from typer.testing import CliRunner

from mqa_hf.base.datasheets import Device
from mqa_hf.base.shapes import SHAPES
from mqa_hf.cli import app
from mqa_hf.eval.benchmark import Benchmark
from mqa_hf.eval.benchmark_record import BenchmarkRecord
from mqa_hf.eval.contenders import Contender, filled_cache, random_model
from mqa_hf.eval.latent_choices import with_latent
from mqa_hf.eval.roofline import weights_of
from mqa_hf.eval.shapes import read_shape
from mqa_hf.eval.timing import time_tokens


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(make_model("llama", {**LLAMA, "num_key_value_heads": 6}), tmp_path / "source")


def latent_bytes(bits: int, keys: str) -> int:
    """Of a token and layer with latents of 32 numbers and 24 key components in float32."""
    if keys == "expanded":
        return 4 * (32 + 24)
    return 4 * 32 if bits == 16 else 32 * bits // 8 + 2 * 4


def test_latents_are_timed_beside_heads_with_keys_rebuilt_and_kept(source: Path, tmp_path: Path):
    lines = tmp_path / "cells.jsonl"
    latents = ("--latents", 32, "--key-widths", 24, "--latent-bits", "16,4", "--keys", "rebuilt,expanded")
    arguments = ("--cells", "2x8", "--tokens", 3, "--rounds", 1, "--output", lines)
    words = ["benchmark", source, "--kv-heads", "1", "--engines", "mqa-hf,dynamic", *latents, *arguments]
    result = CliRunner().invoke(app, [*map(str, words), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    records = BenchmarkRecord.read_lines(lines)
    assert [(r.model, r.kv_heads, r.keys, r.original) for r in records] == [
        ("MQA, 1 K/V heads, mqa-hf", 1, None, False),
        ("Llama, 1 K/V heads, dynamic", 1, None, False),
        ("MQA, latent 32, keys 24 rebuilt, mqa-hf", None, "rebuilt", False),
        ("MQA, latent 32, keys 24 expanded, mqa-hf", None, "expanded", False),
        ("MQA, latent 32, keys 24, dynamic", None, None, False),
        ("MQA, latent 32 at 4 bits, keys 24 rebuilt, mqa-hf", None, "rebuilt", False),
        ("MQA, latent 32 at 4 bits, keys 24 expanded, mqa-hf", None, "expanded", False),
        ("MQA, latent 32 at 4 bits, keys 24, dynamic", None, None, False),
    ]
    d, layers, written = 48, 3, 8 + 8 + 3
    attention = 2 * d * d + d * 32 + 32 * 24 + 6 * 24 + 6 * 8 * 32  # q, o; Z, U, factors and values of 6 heads of 8
    weights = 4 * (layers * (attention + 3 * d * 80) + 101 * d)
    for record in records[2:]:
        assert record.latent is not None
        assert (record.latent.width, record.latent.heads, record.latent.key_components) == (32, 6, 24)
        size = latent_bytes(record.latent.bits, record.keys or "expanded")
        assert record.bytes_per_step == weights + 2 * 8 * layers * size
        if record.engine == "mqa-hf":
            positions = 4 if record.keys == "rebuilt" else 0
            assert record.cache_bytes == 2 * (written + 1) * (layers * size + positions)
        else:
            assert record.cache_bytes == 2 * (written - 1) * layers * size  # all but the last token
        assert record.floor_ms > 0
        assert record.time_to_first_token_sec > 0
    assert "rebuilt" in result.output


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("keys", ["auto", "rebuilt", "expanded"])
def test_a_checkpoint_with_latents_is_timed_as_it_is(source: Path, tmp_path: Path, keys: str, bits: int):
    _, ours = read_shape(str(source))
    with_latent(ours, 32, 24, bits).save_pretrained(tmp_path / "latent")
    options = {"cells": "1x8", "tokens": 2, "rounds": 1, "engines": ["mqa-hf"], "device": "cpu", "keys": keys}
    (found,) = Benchmark([tmp_path / "latent"], **options).run()
    assert found.original
    assert found.keys == ("expanded" if keys == "auto" else keys)  # there is room for it
    assert found.latent.bits == bits
    filled = 8 + 8 + 2 + 1
    assert found.cache_bytes >= filled * 3 * latent_bytes(bits, found.keys)


def test_the_floor_of_latents_is_the_larger_of_bytes_and_operations(source: Path):
    theirs, ours = read_shape(str(source))
    contender = Contender("llama", False, "mqa-hf", 1, with_latent(ours, 32, 24, 4), theirs)
    rebuilt, expanded = (contender.cost(2, 100, 0, 2, keys) for keys in ("rebuilt", "expanded"))
    assert rebuilt.cache_bytes == 2 * 100 * 3 * (16 + 4)
    assert expanded.cache_bytes == 2 * 100 * 3 * 2 * (32 + 24)
    assert rebuilt.cache_operations - expanded.cache_operations == 2 * 100 * 3 * 2 * 32 * 24
    slow_units = Device("a", 1e9, 1e18, 1e9)
    assert rebuilt.seconds(slow_units) == pytest.approx((rebuilt.weight_operations + rebuilt.cache_operations) / 1e9)
    # Transformers' caches keep keys and latents as numbers of the model's type.
    dynamic = replace(contender, engine="dynamic")
    assert dynamic.cost(2, 100).cache_bytes == expanded.cache_bytes
    memory = 1e8
    left = 0.96 * memory - 2 * weights_of(contender.config).total
    assert contender.largest_batch(100, memory, 2) == left // (100 * 3 * 20)
    assert dynamic.largest_batch(100, memory, 2) == left // (100 * 3 * 112)
    assert replace(contender, keys="expanded").largest_batch(100, memory, 2) == left // (100 * 3 * 112)


@pytest.mark.parametrize("engine", ["mqa-hf", "dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_cache_of_latents_is_filled(source: Path, engine: str, name: str, monkeypatch):
    small = {"model_type": "gpt2", "n_embd": 48, "n_layer": 3, "n_head": 6, "vocab_size": 99}
    monkeypatch.setitem(SHAPES, "gpt2", small)
    _, ours = read_shape(str(source) if name == "llama" else "gpt2")
    config = with_latent(ours, 32, 24, 8)
    contender = Contender(name, False, engine, 1, config, config, keys="rebuilt")
    model = random_model(contender, torch.float32, "cpu")
    cache = filled_cache(contender, model, batch=2, context=7, capacity=20)
    assert int(cache.get_seq_length()) == 7
    if engine == "mqa-hf":
        assert cache.layers[0].codes.shape == (2, 1, 20, 32)
        assert cache.layers[2].codes.float().std() > 10
        assert cache.layers[1].latents(torch.float32).std() > 0.5
        assert (cache.positions is None) == (name == "gpt2")
        assert name == "gpt2" or cache.positions[:, :7].tolist() == [[*range(7)]] * 2
    else:
        length = 7 if engine == "dynamic" else 20
        widths = [t.shape for t in (cache.layers[0].keys, cache.layers[0].values)]
        expected = [24, 32] if name == "llama" else [32, 0]
        assert widths == [(2, 1, length, w) for w in expected]
    times = time_tokens(contender, model, batch=2, context=7, tokens=3)
    assert len(times.step_sec) == 3
    assert times.keys == ("rebuilt" if engine == "mqa-hf" else None)


def test_encoder_decoder_shapes_are_timed_with_latents(tmp_path: Path, monkeypatch):
    tiny = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    monkeypatch.setitem(SHAPES, "tiny", {**tiny, "vocab_size": 64})
    options = {"cells": "2x6", "tokens": 8, "rounds": 1, "engines": ["mqa-hf"], "device": "cpu"}
    found = Benchmark(["tiny"], kv_heads=["1"], latents=[32], latent_bits=[4], **options).run()[-1]
    assert (found.model, found.keys) == ("MQASeq2Seq, latent 32 at 4 bits, mqa-hf", None)
    # Five tokens in the mean step and six of the source, in two layers of 16 and 8 bytes.
    cached = 2 * (5 + 6) * 2 * (16 + 8)
    weights = 2 * (2 * (2 * 32 * 32 + 4 * 2 * 8 * 32) + 32 * 32 + 2 * 32 * 48) + 64 * 32
    assert found.bytes_per_step == cached + 4 * weights
