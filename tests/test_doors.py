"""Command line, Python and recipe are three ways to the same job: the same defaults, the same files."""

import inspect
import json
from pathlib import Path

import pytest
import torch
import yaml
from sources import save
from tokenizer import write_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.main import get_command
from typer.testing import CliRunner

import mqa_hf
from mqa_hf.base.options import options
from mqa_hf.cli import JOBS, app

SHARED = {"method": "shared", "calibration": "text.jsonl", "calibration_tokens": 512, "sequence_length": 32}
TRAINED = {"dataset": ["text.jsonl"], "tokens": 512, "sequence_length": 32, "batch_tokens": 128, "report_to": "none"}


def flags(given):
    """Options as a person types them."""
    words = []
    for name, value in given.items():
        for item in value if isinstance(value, list) else [value]:
            words += [f"--{name.replace('_', '-')}", str(item)]
    return words


def command(*words):
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output


def files(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Three directories with the same source and text; in the end, the first one is the working directory."""
    torch.manual_seed(0)
    shape = {"vocab_size": 93, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2))
    rows = [{"text": f"row {n} of a text that goes on for some words " * 3} for n in range(60)]
    for name in ("recipe", "python", "command"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        save(model, Path("original"))
        write_tokenizer(Path("original"))
        Path("text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_all_write_the_same_files(place, monkeypatch):
    out = {name: Path("out") / name for name in ("converted", "trained")}
    command("convert", "original", out["converted"], *flags(SHARED))
    command("uptrain", out["converted"], out["trained"], *flags(TRAINED))

    monkeypatch.chdir(place / "python")
    mqa_hf.convert("original", out["converted"], **SHARED)
    mqa_hf.uptrain(out["converted"], out["trained"], **TRAINED)

    monkeypatch.chdir(place / "recipe")
    recipe = {"source": "original", "output": "out", "convert": SHARED, "uptrain": TRAINED}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    command("recipe", "recipe.yaml")

    for name in out:
        first, *others = (files(place / door / "out" / name) for door in ("command", "python", "recipe"))
        assert {"config.json", "model.safetensors", "README.md"} <= set(first)
        for other in others:
            assert other.keys() == first.keys()
            assert [n for n in first if other[n] != first[n] and n != "uptraining.json"] == []
        logs = [json.loads(found["uptraining.json"]) for found in (first, *others) if "uptraining.json" in found]
        for log in logs:  # of a training's log, times differ
            for line in [line for lines in log["log"].values() for line in lines]:
                for timed in [key for key in line if "runtime" in key or "per_second" in key]:
                    del line[timed]
        assert all(log == logs[0] for log in logs)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_a_command_has_the_options_and_defaults_of_its_job(job):
    parameters = {p.name: p for p in get_command(app).commands[job.name].params}
    for field in options(job):
        if field.option.objects == "only":
            assert field.name not in parameters
            continue
        asked = parameters[field.name]
        assert asked.required == field.required
        if not field.required:
            default = field.default if asked.default is None else asked.default
            assert field.checked(default) == field.checked(field.default)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_a_function_shows_every_option_with_its_help(job):
    function = getattr(mqa_hf, job.name, None)
    if function is None:
        assert job.name in ("recipe", "demo")
        return
    signature = inspect.signature(function)
    for field in options(job):
        assert field.name in signature.parameters
        assert f"    {field.name}: {field.option.help}" in function.__doc__


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_a_recorded_command_makes_the_same_job(job):
    """Of every option, one at a time, with a value that it takes."""
    required = {f.name: ["x"] if f.many else 1 if f.kind in (int, float) else "x" for f in options(job) if f.required}
    for field in options(job):
        kind = field.kind
        if field.option.objects == "only":
            continue
        number = 0.5 if field.option.below == 1 else 7
        value = {bool: field.default is not True, int: number, float: number}.get(kind, "some text")
        if field.option.choices:
            value = field.option.choices[-1]
        made = job(**{**required, field.name: [value] if field.many else value})
        if field.name not in made.recorded() and not field.positional:
            continue
        words = made.words()
        context = get_command(app).commands[job.name].make_context(job.name, words[1:])
        params = {n: v for n, v in context.params.items() if v not in (None, ())}  # () is a list that was not given
        given = {f.name: params[f.name] for f in options(job) if f.name in params}
        assert job(**given).words() == words
