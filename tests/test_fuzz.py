"""Whatever stands in a file, a command ends with a result or with one message, and never with a traceback.

Each test draws some inputs, the same at every run. To draw more, and others: MQA_FUZZ=500 pytest tests/test_fuzz.py
"""

import io
import json
import os
import shutil
import struct
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sources import save
from tokenizer import write_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mqa_hf.base.entry import run_command
from mqa_hf.cli import app

MORE = int(os.environ.get("MQA_FUZZ", "0"))


def fuzzed(examples):
    return settings(
        max_examples=MORE or examples,
        deadline=None,
        derandomize=not MORE,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def run(*words):
    """Exit code, standard output and standard error of a command."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            run_command(lambda: app([str(word) for word in words]))
            code = 0
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue(), err.getvalue()


def ends_well(*words):
    """Run a command; anything that is no MQAError, and no SystemExit, is raised here and fails the test."""
    code, out, err = run(*words)
    assert code in (0, 1, 2), (code, err)
    if code == 1:
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, err
        assert len(lines[0]) > len("error: ") + 3
        assert "Traceback" not in err
    return code, out, err


# What takes the place of a value somewhere in a file.
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 3, 7, 64, 10**6, 10**9, 2**31, 2**63, -(2**63), 10**30]),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), 0.5, -0.0, 1e308, 1e-320]),
    st.sampled_from(
        ["", "x", "nan", "1", "-1", "../..", "/", "llama", "n" * 5000, "é\u202e", "a\0b", "{}", "cuda:99"]
    ),
    st.sampled_from([[], [[]], [1], ["x"], [None], {}, {"x": 1}, {"": {}}, [[1] * 50]]),
    st.text(max_size=8),
)


def places(content, path=()):
    """Every place in a JSON value."""
    found = [path]
    if isinstance(content, dict):
        for key in content:
            found += places(content[key], (*path, key))
    elif isinstance(content, list):
        for i in range(min(len(content), 3)):
            found += places(content[i], (*path, i))
    return found


@st.composite
def changed(draw, content):
    """A JSON value with some of its places replaced or taken away, or with something new in it."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(content)))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(VALUES)
            if isinstance(content, dict):
                content[draw(st.text(max_size=6))] = draw(VALUES)
            continue
        parent = content
        for key in path[:-1]:
            parent = parent[key]
        if draw(st.integers(0, 3)) == 0:
            del parent[path[-1]]
        else:
            parent[path[-1]] = draw(VALUES)
    return content


@st.composite
def broken_text(draw, text):
    """A text cut off, with a byte changed, or something else altogether."""
    data = text.encode()
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return data[: draw(st.integers(0, len(data)))]
    if kind == 1:
        at = draw(st.integers(0, len(data) - 1))
        return data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
    if kind == 2:
        return draw(st.sampled_from([b"", b"\xff\xfe", b"null", b"[]", b"3", b'"x"', b"{" * 100_000, b"[" * 100_000]))
    return draw(st.binary(max_size=40))


def as_json(content):
    return json.dumps(content).encode("utf-8", "surrogatepass")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Small sources, a conversion, an evaluation and a text to spoil."""
    place = tmp_path_factory.mktemp("fuzz")
    torch.manual_seed(0)
    small = {"vocab_size": 93, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    save(LlamaForCausalLM(LlamaConfig(**small, num_hidden_layers=2, max_position_embeddings=64)), place / "llama")
    gpt2 = GPT2Config(vocab_size=93, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    save(GPT2LMHeadModel(gpt2), place / "gpt2")
    for name in ("llama", "gpt2"):
        write_tokenizer(place / name)
    rows = [{"text": f"row {n} of a text that goes on for some words " * 3} for n in range(40)]
    (place / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("convert", place / "llama", place / "converted")[0] == 0
    return place


def spoiled(source, output, name, data):
    """A copy of a directory with another content in one of its files."""
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(source, output)
    (output / name).write_bytes(data)
    return output


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_configurations(here, family, tmp_path):
    config = json.loads((here / family / "config.json").read_text())

    @fuzzed(40)
    @given(st.one_of(changed(config).map(as_json), broken_text(json.dumps(config))))
    def check(data):
        source = spoiled(here / family, tmp_path / "source", "config.json", data)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        code, *_ = ends_well("convert", source, tmp_path / "out")
        assert (tmp_path / "out" / "config.json").is_file() == (code == 0)
        ends_well("inspect", source)

    check()


def test_headers(here, tmp_path):
    data = (here / "llama" / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]

    def whole(text):
        return struct.pack("<Q", len(text)) + text + body

    cut = st.integers(0, len(data)).map(lambda n: data[:n])
    sizes = st.sampled_from([0, 1, size - 1, size + 1, 2**40, 2**64 - 1]).map(
        lambda n: struct.pack("<Q", n) + data[8:]
    )

    @fuzzed(40)
    @given(st.one_of(changed(header).map(as_json).map(whole), broken_text(json.dumps(header)).map(whole), cut, sizes))
    def check(data):
        source = spoiled(here / "llama", tmp_path / "source", "model.safetensors", data)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        code, *_ = ends_well("convert", source, tmp_path / "out")
        assert (tmp_path / "out" / "config.json").is_file() == (code == 0)

    check()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_companions(here, name, tmp_path):
    text = (here / "llama" / name).read_text() if (here / "llama" / name).is_file() else "{}"

    @fuzzed(15)
    @given(st.one_of(changed(json.loads(text)).map(as_json), broken_text(text)))
    def check(data):
        source = spoiled(here / "llama", tmp_path / "source", name, data)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        code, *_ = ends_well("convert", source, tmp_path / "out")
        assert (tmp_path / "out" / "config.json").is_file() == (code == 0)

    check()


@pytest.mark.parametrize("name", ["conversion.json", "config.json"])
def test_results_that_are_inspected(here, name, tmp_path):
    content = json.loads((here / "converted" / name).read_text())

    @fuzzed(40)
    @given(st.one_of(changed(content).map(as_json), broken_text(json.dumps(content))))
    def check(data):
        ends_well("inspect", spoiled(here / "converted", tmp_path / "converted", name, data))

    check()


WORDS = st.one_of(
    st.sampled_from(
        ["nan", "inf", "-1", "0", "1e400", "", " ", "x", "1,2", "1,x", "2x", "1x1", "cuda:99", "meta", "🙂"]
    ),
    st.text(max_size=6),
)


@pytest.mark.parametrize(
    "command", ["convert", "inspect", "plan", "benchmark", "uptrain", "pretrain", "evaluate", "report", "recipe"]
)
def test_values_of_options(here, command, tmp_path):
    """Options with values that are none, beside arguments that are there."""
    from typer.main import get_command

    arguments = {
        "convert": [here / "llama", tmp_path / "out"],
        "inspect": [here / "llama"],
        "plan": ["gpt2"],
        "benchmark": [here / "llama", "--tokens", "2", "--context", "4"],
        "uptrain": [here / "converted", tmp_path / "out", "--dataset", here / "text.jsonl", "--tokens", "0"],
        "pretrain": [tmp_path / "out", "--config", "{}", "--dataset", here / "text.jsonl", "--tokens", "1"],
        "evaluate": [here / "nothing", "--output", tmp_path / "evaluation"],
        "report": [here / "nothing", "--output", tmp_path / "report"],
        "recipe": [here / "nothing.yaml"],
    }[command]
    options = [p for p in get_command(app).commands[command].params if p.opts[0].startswith("--") and not p.is_flag]
    flags = [p.opts[0] for p in options if p.opts[0] not in ("--device", "--plots", "--output")]
    if not flags:
        return

    @fuzzed(25)
    @given(st.sampled_from(flags), WORDS)
    def check(flag, value):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        ends_well(command, *arguments, f"{flag}={value}")

    check()


RECIPE = {
    "source": "SOURCE",
    "output": "OUTPUT",
    "convert": {"method": "mean", "kv_heads": 1},
    "uptrain": {"dataset": ["text.jsonl"], "tokens": 64, "sequence_length": 16},
    "evaluate": {"tokens": 64, "prompts": 1},
}


def test_recipes(here, tmp_path):
    """Spoiled ones; whatever is still right in them names a source that there is not, so that nothing is run."""

    @fuzzed(60)
    @given(
        st.one_of(
            changed(RECIPE).map(lambda r: yaml.safe_dump(r).encode("utf-8", "ignore")),
            broken_text(yaml.safe_dump(RECIPE)),
        )
    )
    def check(data):
        (tmp_path / "recipe.yaml").write_bytes(data)
        before = Path.cwd()
        os.chdir(tmp_path)
        try:
            ends_well("recipe", tmp_path / "recipe.yaml")
        finally:
            os.chdir(before)

    check()
