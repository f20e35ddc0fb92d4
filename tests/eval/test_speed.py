import json
import re
from pathlib import Path

import pytest
import torch
from native_sources import make_native
from seq2seq_sources import BART, WHISPER, make_seq2seq
from sources import LLAMA, make_model, save
from typer.testing import CliRunner

from mqa_hf import convert
from mqa_hf.base.errors import MQAError
from mqa_hf.base.shapes import SHAPES
from mqa_hf.cli import app
from mqa_hf.eval.benchmark import Benchmark, Cell
from mqa_hf.eval.benchmark_record import BenchmarkRecord
from mqa_hf.eval.contenders import (
    Contender,
    cache_bytes,
    contenders,
    filled_cache,
    own_contenders,
    random_model,
)
from mqa_hf.eval.shapes import read_shape
from mqa_hf.eval.timing import time_tokens
from mqa_hf.eval.timing_plots import draw_times
from mqa_hf.eval.timing_table import model_names


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(make_model("llama", {**LLAMA, "num_key_value_heads": 6}), tmp_path / "source")


def benchmark(*arguments) -> object:
    device = () if "--device" in arguments else ("--device", "cpu")
    return CliRunner().invoke(app, ["benchmark", *map(str, arguments), *device])


def test_original_grouped_and_multi_query_in_every_engine(source: Path):
    theirs, ours = read_shape(str(source))
    found = contenders("llama", theirs, ours, [None, 3, 1], ["mqa-hf", "dynamic"])
    assert [c.name for c in found] == [
        "MQA, 6 K/V heads, mqa-hf",
        "Llama, 6 K/V heads, dynamic",
        "MQA, 3 K/V heads, mqa-hf",
        "Llama, 3 K/V heads, dynamic",
        "MQA, 1 K/V heads, mqa-hf",
        "Llama, 1 K/V heads, dynamic",
    ]
    sizes = []
    for contender in found:
        model = random_model(contender, torch.float32, "cpu")
        times = time_tokens(contender, model, batch=2, context=8, tokens=4)
        assert len(times.step_sec) == 4
        assert all(t > 0 for t in times.step_sec)
        sizes.append(times.cache_bytes)
    assert sizes[0] == 2 * sizes[2] == 6 * sizes[4]  # one buffer from the start, for all steps
    assert sizes[1] == 2 * sizes[3] == 6 * sizes[5]


@pytest.mark.parametrize("engine", ["mqa-hf", "dynamic", "static"])
def test_a_filled_cache_holds_what_it_is_said_to(source: Path, engine: str):
    theirs, ours = read_shape(str(source))
    (contender,) = contenders("llama", theirs, ours, [1], [engine])
    model = random_model(contender, torch.float32, "cpu")
    cache = filled_cache(contender, model, batch=2, context=7, capacity=20)
    assert int(cache.get_seq_length()) == 7
    assert cache.layers[0].keys.shape == (2, 1, 7 if engine == "dynamic" else 20, 8)
    assert cache.layers[2].values[:, :, :7].std() > 0.5
    assert cache_bytes(cache) == 2 * 3 * 2 * (7 if engine == "dynamic" else 20) * 8 * 4


def test_the_command_writes_a_line_per_cell_and_pictures(source: Path, tmp_path: Path):
    pytest.importorskip("matplotlib")
    lines = tmp_path / "cells.jsonl"
    arguments = (
        source,
        "--kv-heads",
        "original,1",
        "--engines",
        "mqa-hf,dynamic",
        "--cells",
        "1x8,2x16",
        "--tokens",
        3,
    )
    result = benchmark(*arguments, "--rounds", 2, "--output", lines, "--plots", tmp_path / "plots")
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(records) == 8
    for record in records:
        assert record["time_per_token_p10_ms"] <= record["time_per_token_ms"] <= record["time_per_token_p90_ms"]
        assert record["tokens_per_sec"] == pytest.approx(1000 * record["batch"] / record["time_per_token_ms"])
        assert 0 < record["floor_share"] <= 1.5
        assert record["time_to_first_token_sec"] > 0
        assert set(record["versions"]) == {"mqa-hf", "transformers", "torch", "python"}
    pictures = list((tmp_path / "plots").glob("*.png"))
    assert len(pictures) == 4
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in pictures)


def test_encoder_decoder_shapes_with_beams_and_a_window(tmp_path: Path, monkeypatch):
    tiny = {
        "model_type": "t5",
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 64,
    }
    monkeypatch.setitem(SHAPES, "tiny", tiny)
    lines = tmp_path / "cells.jsonl"
    arguments = ("tiny", "--kv-heads", "1", "--cells", "2x6", "--tokens", 8, "--beams", "1,3", "--window", 4)
    result = benchmark(*arguments, "--rounds", 1, "--output", lines)
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [(r["engine"], r["beams"], r["source"]) for r in records] == [
        ("mqa-hf", 1, 6),
        ("mqa-hf", 3, 6),
        ("dynamic", 1, 6),
        ("dynamic", 3, 6),
    ]


def test_a_converted_checkpoint_is_timed_as_it_is(source: Path, tmp_path: Path):
    convert(source, tmp_path / "ours", kv_heads=2)
    result = benchmark(tmp_path / "ours", "--kv-heads", "original", "--cells", "1x8", "--tokens", 2, "--rounds", 1)
    assert result.exit_code == 0, result.output
    assert "MQA, 2 K/V heads, dynamic" in " ".join(result.output.split())


@pytest.mark.parametrize("model_type", ["falcon_h1", "jamba", "beam", "nemotron_h", "zamba"])
def test_a_model_in_its_own_class_is_timed_there(tmp_path: Path, model_type: str):
    path = save(make_native(model_type), tmp_path / "source")
    _, own = read_shape(str(path))
    for contender in own_contenders("source", own, [None, 1], ["dynamic"]):
        model = random_model(contender, torch.float32, "cpu")
        assert type(model).__name__.lower().startswith(model_type.replace("_", ""))
        assert sum(p.numel() for p in model.parameters()) == contender.weights.total
        times = time_tokens(contender, model, batch=2, context=4, tokens=2)
        seen = 4 + 8 + 2 - 1  # all but the last token
        windows = [seen if kind == "full_attention" else 4 for kind in contender.config.layer_types]  # window 5
        assert times.cache_bytes == 2 * 2 * contender.kv_heads * 8 * sum(windows) * 4


def test_the_command_times_a_model_in_its_own_class_and_what_was_made_of_it(tmp_path: Path):
    source = save(make_native("falcon_h1"), tmp_path / "source")
    convert(source, tmp_path / "native", target="native")
    lines = tmp_path / "cells.jsonl"
    arguments = ("--cells", "1x8", "--tokens", 2, "--rounds", 1, "--output", lines)
    for shapes in ((source,), (tmp_path / "native", "--kv-heads", "original", "--engines", "dynamic,static")):
        result = benchmark(*shapes, *arguments)
        assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [(r["engine"], r["kv_heads"], r["original"]) for r in records] == [
        ("dynamic", 4, True),
        ("dynamic", 1, False),
        ("dynamic", 1, True),
        ("static", 1, True),
    ]
    assert {r["model"].split(",")[0] for r in records} == {"FalconH1"}
    for more, message in (
        (
            ("--engines", "mqa-hf,dynamic"),
            "falcon_h1 keeps its own class and runs only in transformers' loops .*use --engines dynamic",
        ),
        (("--window", 4), "--window needs a model in this package's class"),
        (("--latents", 16), "latents need a model in this package's class; .* keeps its own"),
        (("--kv-heads", 3), "--kv-heads must divide the source's 4 key/value heads, got 3"),
        (("--beams", 2), "--beams needs encoder-decoder shapes"),
        (("--largest-batch",), "--largest-batch needs decoder-only shapes on a GPU"),
    ):
        result = benchmark(source, *more)
        assert isinstance(result.exception, MQAError), result.output
        assert re.search(message, str(result.exception))
        assert "--target" not in str(result.exception)
    minimax = save(make_native("minimax"), tmp_path / "minimax")
    result = benchmark(minimax, *arguments)
    assert isinstance(result.exception, MQAError), result.output
    assert "minimax does not run from a cache of 8 positions with --engines dynamic" in str(result.exception)


def test_several_shapes_are_timed_in_one_run(source: Path, tmp_path: Path):
    convert(source, tmp_path / "ours")
    lines = tmp_path / "cells.jsonl"
    arguments = ("--kv-heads", "original", "--engines", "mqa-hf", "--cells", "1x8", "--tokens", 2, "--rounds", 2)
    result = benchmark(source, tmp_path / "ours", *arguments, "--output", lines)
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [(Path(r["shape"]).name, r["kv_heads"]) for r in records] == [("source", 6), ("ours", 1)]
    assert "│ ours " in result.output  # a shape has one model here
    assert all(r["original"] for r in records)


def record(**fields) -> BenchmarkRecord:
    given = {"shape": "x", "model": "x", "engine": "mqa-hf", "batch": 1, "context": 1, "device": "a"}
    times = {} if "error" in fields else {"time_per_token_ms": 2.0, "tokens_per_sec": 500.0}
    return BenchmarkRecord(**{**given, **times, **fields})


def test_models_of_several_shapes_are_told_apart():
    one, other = record(shape="a/final"), record(shape="b/final")
    assert model_names([one, one]) == ["x", "x"]
    assert model_names([one, other, one]) == ["a-final", "b-final", "a-final"]
    different = record(shape="b/final", model="y")
    assert model_names([one, different, other]) == ["a-final: x", "b-final: y", "b-final: x"]


def test_pictures_of_an_empty_result_are_none(tmp_path: Path):
    pytest.importorskip("matplotlib")
    assert draw_times([record(error="out of memory")], tmp_path) == []


def test_lines_are_read_as_they_were_written(tmp_path: Path):
    path = tmp_path / "times.jsonl"
    written = [record(batch=2, source=3), record(error="out of memory")]
    for one in written:
        one.append(path)
    assert BenchmarkRecord.read_lines(path) == written
    assert "error" not in json.loads(path.read_text().splitlines()[0])
    old = {k: v for k, v in json.loads(path.read_text().splitlines()[0]).items() if k != "version"}
    path.write_text("\n" + json.dumps(old | {"unknown": 1}) + "\n")
    assert BenchmarkRecord.read_lines(path) == written[:1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (None, "times.jsonl is not a result file of mqa-hf benchmark: .*No such file"),
        ("", "times.jsonl is not a result file of mqa-hf benchmark: it is empty"),
        ("{}", "times.jsonl, line 2, is not a valid benchmark.jsonl: batch: field required"),
        ("[]", "times.jsonl is not a result file of mqa-hf benchmark: line 2 is not an object"),
        ('{"shape": ', "times.jsonl is not a result file of mqa-hf benchmark: line 2: Expecting value"),
        ("time_per_token_ms", "line 2, .* time_per_token_ms missing, and no error"),
        ('"time_per_token_ms": NaN', "line 2, .* time_per_token_ms: input should be a finite number"),
        ('"batch": "many"', "line 2, .* batch: input should be a valid integer"),
        ('"version": 99', "line 2, has version 99, but this mqa-hf reads 1 at most"),
    ],
)
def test_lines_that_are_none_are_named(tmp_path: Path, line: str | None, message: str):
    path = tmp_path / "times.jsonl"
    if line is not None:
        record().append(path)
        whole = path.read_text()
        if line.startswith('"'):
            line = whole.strip().removesuffix("}") + f", {line}}}"
        elif line == "time_per_token_ms":
            line = json.dumps({k: v for k, v in json.loads(whole).items() if k != line})
        path.write_text(whole + line + "\n" if line else "")
    with pytest.raises(MQAError, match=message):
        BenchmarkRecord.read_lines(path)


def test_what_is_asked_for_is_parsed_once():
    job = Benchmark("llama-2-7b", kv_heads=["original", 8, "8"], cells="1x8, 2x16", beams=[1, 4])
    assert job.head_counts == [None, 8]
    assert job.workload == [Cell(1, 8, 1), Cell(1, 8, 4), Cell(2, 16, 1), Cell(2, 16, 4)]
    assert Benchmark("x", batch=[1, 2], context=7).workload == [Cell(1, 7), Cell(2, 7)]
    words = "benchmark llama-2-7b --kv-heads original,8,8 --cells 1x8,2x16 --beams 1,4"
    assert job.words() == words.split()


def test_the_command_is_noted_as_it_was_asked_for(source: Path, tmp_path: Path):
    job = Benchmark([source], kv_heads=["1"], engines=["mqa-hf"], cells=["1x4"], tokens=2, rounds=1, device="cpu")
    (found,) = job.run()
    assert found.command == job.command()
    assert found.version == 1
    assert found.dtype == "float32"


def test_a_class_without_room_for_fewer_heads_is_replaced_by_ours():
    theirs, ours = read_shape("pythia-6.9b")
    (contender,) = contenders("llama", theirs, ours, [1], ["dynamic"])
    assert isinstance(contender, Contender)
    assert type(contender.run_config).__name__ == "MQAConfig"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engines", "vllm"), "--engines must be a list, each one of mqa-hf, dynamic, static; got 'vllm'"),
        (("--kv-heads", "4"), "must divide the 6 key/value heads"),
        (("--kv-heads", "original,x"), "--kv-heads takes positive whole numbers or original, got 'x'"),
        (("--kv-heads", "0"), "--kv-heads takes positive whole numbers or original, got '0'"),
        (("--cells", "8"), "--cells takes pairs of batch and context"),
        (("--cells", "1x2x3"), "--cells takes pairs of batch and context such as 1x512,16x4096, got '1x2x3'"),
        (("--cells", "0x8"), "--cells takes pairs of batch and context"),
        (("--cells", "1x8,"), "--cells must be a list, each a text; got ''"),
        (("--cells", f"1x{2**31}"), "--cells takes pairs of batch and context"),
        (("--keys", "rebuilt"), "--keys needs latents whose keys this package's loop rebuilds"),
        (("--keys", "stored"), "--keys must be a list, each one of auto, rebuilt, expanded; got 'stored'"),
        (("--latents", "32", "--keys", "expanded", "--engines", "dynamic"), "--keys needs latents"),
        (("--latents", "300"), "--latents must be at most 48, the width of all keys and values of a token; got 300"),
        (("--latent-bits", "2"), "--latent-bits must be a list, each one of 16, 8, 4; got"),
        (("--batch", "0"), "--batch must be a list, each a whole number at least 1"),
        (("--batch", "nan"), "--batch must be a list, each a whole number at least 1"),
        (("--beams", "2"), "--beams needs encoder-decoder shapes"),
        (("--dtype", "int8"), "--dtype must be one of"),
        (("--window", "1"), "--window must be a whole number at least 2"),
        (("--largest-batch",), "--largest-batch needs decoder-only shapes on a GPU"),
        (("--output", "no/such/file"), "--output no/such/file must be a file in an existing directory"),
        (("--device", "cuda:99"), "--device cuda:99"),
        (("--device", "abacus"), "--device abacus: Expected one of cpu, cuda"),
        (("--device", "meta"), "--device meta cannot compute"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said(source: Path, arguments, message: str):
    result = benchmark(source, *arguments)
    assert isinstance(result.exception, MQAError)
    assert message in str(result.exception)


@pytest.mark.parametrize("content", [b"mine\n", b'\n{"shape": "x"}\n', b"[]", b"\xff\xfe\n"])
def test_a_file_of_something_else_is_not_appended_to(source: Path, tmp_path: Path, content: bytes):
    (tmp_path / "lines").write_bytes(content)
    result = benchmark(source, "--cells", "1x4", "--output", tmp_path / "lines")
    assert isinstance(result.exception, MQAError)
    assert "--output must be a new file or one with records; give another: " in str(result.exception)
    assert (tmp_path / "lines").read_bytes() == content


def test_a_cell_without_memory_is_a_record_of_that(source: Path, tmp_path: Path):
    lines = tmp_path / "cells.jsonl"
    arguments = ("--kv-heads", "1", "--engines", "mqa-hf", "--tokens", 2, "--rounds", 1, "--output", lines)
    result = benchmark(source, "--cells", f"{2**31 - 1}x{2**31 - 1},1x4", *arguments)
    assert result.exit_code == 0, result.output
    failed, good = BenchmarkRecord.read_lines(lines)
    assert failed.error
    assert failed.time_per_token_ms is None
    assert good.time_per_token_ms > 0


@pytest.mark.parametrize("name", ["shapes", "kv_heads", "engines", "batch", "context", "cells", "beams"])
def test_an_empty_list_leaves_nothing_to_time(name: str):
    with pytest.raises(MQAError, match=rf"`{name}` (is empty|must be a list)"):
        Benchmark(**{"shapes": ["gpt2"], name: []}).run()


def test_pictures_need_matplotlib_before_anything_is_timed(source: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("mqa_hf.base.figures.find_spec", lambda name: None)
    result = benchmark(source, "--plots", tmp_path / "plots", "--output", tmp_path / "lines")
    assert "--plots needs matplotlib" in str(result.exception)
    assert not (tmp_path / "lines").exists()


def test_positions_that_a_model_does_not_have_are_refused(tmp_path: Path):
    gpt2 = {"n_embd": 48, "n_head": 6, "n_layer": 1, "vocab_size": 99, "n_positions": 64}
    gpt2 = save(make_model("gpt2", gpt2), tmp_path / "gpt2")
    bart = save(make_seq2seq("bart", BART), tmp_path / "bart")
    n = BART["max_position_embeddings"]
    fits = ("--rounds", 1, "--engines", "mqa-hf,dynamic", "--kv-heads", 1, "--tokens")
    for shape, context, tokens, message in (
        (gpt2, 40, 17, None),
        (gpt2, 40, 18, "has 64 positions; --context 40 and 8 \\+ 18 --tokens need 65"),
        (bart, n, n, None),
        (bart, n + 1, 4, f"has {n} positions; --context {n + 1} need {n + 1}"),
        (bart, 4, n + 1, f"has {n} positions; --tokens {n + 1} need {n + 1}"),
    ):
        result = benchmark(shape, "--cells", f"1x{context}", *fits, tokens)
        if message is None:
            assert result.exit_code == 0, result.output
        else:
            assert re.search(message, str(result.exception))


def test_speech_is_not_timed(tmp_path: Path):
    whisper = save(make_seq2seq("whisper", WHISPER), tmp_path / "whisper")
    assert "is a speech model, which cannot be timed" in str(benchmark(whisper).exception)


def test_a_shape_that_is_given_twice_is_refused_before_it_is_timed(source: Path, monkeypatch):
    monkeypatch.chdir(source.parent)
    result = benchmark(source, "./source")
    assert "a checkpoint is given twice" in str(result.exception)


def test_an_unknown_shape_is_answered_with_those_that_are_known():
    result = benchmark("no/such-model")
    assert "Known shapes are gpt2" in str(result.exception)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_read(name: str):
    theirs, ours = read_shape(name)
    assert theirs.model_type == SHAPES[name]["model_type"]
    assert ours.model_type in ("mqa", "mqa_seq2seq")
