"""Convert, train and evaluate by one file."""

import datetime
import json
import shlex
import shutil

import pytest
import yaml
from tokenizer import write_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.main import get_command
from typer.testing import CliRunner

from mqa_hf.base import steps
from mqa_hf.base.errors import MQAError
from mqa_hf.cli import app
from mqa_hf.finetune import trainer


@pytest.fixture
def recipe(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"row {i} of the text, " * 6}) + "\n" for i in range(60)))
    config = LlamaConfig(
        vocab_size=93, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "source")
    write_tokenizer(tmp_path / "source")
    sizes = {"sequence_length": 16}
    return {
        "source": str(tmp_path / "source"),
        "output": str(tmp_path / "results"),
        "convert": {"method": "shared", "calibration": str(text), "calibration_tokens": 512, **sizes},
        "uptrain": {
            "dataset": [str(text)],
            "tokens": 1024,
            "batch_tokens": 128,
            "save_every": 2,
            "report_to": "none",
            **sizes,
        },
        "evaluate": {
            "text": str(text),
            "tokens": 320,
            "window": 16,
            "prompts": 2,
            "prompt_tokens": 4,
            "new_tokens": 4,
        },
    }


def run(tmp_path, recipe, *more):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return CliRunner().invoke(app, ["recipe", str(tmp_path / "recipe.yaml"), *more])


def test_steps_run_once_in_order_and_again_only_when_asked(tmp_path, recipe):
    result = run(tmp_path, recipe)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "results" / "evaluation" / "evaluation.json").read_text())["checkpoints"]
    assert [r["name"] for r in found] == ["source", "converted", "trained"]
    assert found[2]["kv_bytes_per_token"] * 4 == found[0]["kv_bytes_per_token"]
    weights = tmp_path / "results" / "trained" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    result = run(tmp_path, recipe)
    assert result.stderr.count("already done") == 3
    assert weights.stat().st_mtime_ns == before

    recipe["uptrain"]["tokens"] = 512
    refused = run(tmp_path, recipe)
    assert isinstance(refused.exception, MQAError)
    assert "--tokens 1024" in str(refused.exception)
    result = run(tmp_path, recipe, "--overwrite")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("already done") == 1
    report = json.loads((tmp_path / "results" / "trained" / "uptraining.json").read_text())
    assert report["tokens"] == 512


def test_an_interrupted_recipe_goes_on(tmp_path, recipe, monkeypatch):
    plain = trainer.LossTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(trainer.LossTrainer, "training_step", interrupted)
    assert run(tmp_path, recipe).exit_code != 0
    monkeypatch.undo()
    result = run(tmp_path, recipe)
    assert result.exit_code == 0, result.output
    assert "convert: already done" in result.stderr
    assert "resumes from step 4 of 8" in result.stderr


def test_a_step_that_was_killed_just_after_its_result_is_done(tmp_path, recipe, monkeypatch):
    assert run(tmp_path, recipe).exit_code == 0
    record = tmp_path / "results" / "recipe.json"
    whole = json.loads(record.read_text())

    plain = steps.write_record

    def killed(path, done, begun):  # just after the result was there
        if "uptrain" in done:
            raise KeyboardInterrupt
        plain(path, done, begun)

    record.write_text(json.dumps({k: v for k, v in whole.items() if k == "convert"}))
    shutil.rmtree(tmp_path / "results" / "trained")
    monkeypatch.setattr(steps, "write_record", killed)
    assert run(tmp_path, recipe).exit_code != 0
    monkeypatch.undo()
    assert json.loads(record.read_text())["begun"].keys() == {"uptrain"}
    result = run(tmp_path, recipe)
    assert result.exit_code == 0, result.output
    assert "uptrain: already done" in result.stderr
    assert json.loads(record.read_text()) == whole

    recipe["uptrain"]["tokens"] = 512
    monkeypatch.setattr(steps.Step, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(tmp_path, recipe, "--overwrite").exit_code != 0
    monkeypatch.undo()
    refused = run(tmp_path, recipe)  # the old result is not taken for the new one
    assert isinstance(refused.exception, MQAError)
    assert "was made by another command" in str(refused.exception)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {}}, "recipe.yaml: train: did you mean uptrain?"),
        ({"zzz": {}}, "zzz: a recipe has version, source, output, convert"),
        ({"version": 2}, "recipe.yaml has version 2, and this mqa-hf reads up to 1"),
        ({"version": "new"}, "version must be a whole number such as 1; got 'new'"),
        ({"convert": None, "source": "nowhere"}, "nowhere"),
        ({"convert": [1]}, "convert must hold options"),
        ({"output": None}, "output must be a string, in quotes if need be; got None"),
        ({"output": ["results"]}, r"output must be a string, in quotes if need be; got ['results']"),
        ({"output": datetime.date(2026, 1, 1)}, "output must be a string"),
        ({"source": 5}, "source must be a string"),
        ({"convert": {"zz": False}}, "recipe.yaml, convert: unknown option `zz`; use one of"),
        ({"convert": {"method": "sharde"}}, "recipe.yaml, convert: `method` must be one of mean"),
        ({"convert": {"head_width": 2}}, "recipe.yaml, convert: widths and `cache_budget` are for `method` shared"),
        ({"convert": {"source": "other"}}, "convert: `source` is set by the recipe's source and output"),
        ({"uptrain": {"tokns": 5}}, "recipe.yaml, uptrain: unknown option `tokns`; did you mean `tokens`?"),
        ({"uptrain": {"tokens": 5}}, "recipe.yaml, uptrain: `dataset` is missing: Training text"),
        ({"uptrain": {"dataset": "x"}}, "uptrain: pass `tokens`, or `alpha` with `pretraining_tokens`"),
        (
            {"uptrain": {"dataset": "x", "tokens": True}},
            "uptrain: `tokens` must be a whole number at least 1 and below 2**50; got True",
        ),
        ({"uptrain": {"dataset": "x", "tokens": float("nan")}}, "uptrain: `tokens` must be a whole number at least 1"),
        ({"uptrain": {"dataset": "x", "tokens": {"main": 5}}}, "uptrain: `tokens` must be a whole number at least 1"),
        ({"uptrain": {"dataset": "x", "tokens": 9, "teacher": None}}, "uptrain: `teacher` takes a value, not null"),
        ({"uptrain": {"dataset": "x", "tokens": 9, "compile": 1}}, "uptrain: `compile` must be true or false; got 1"),
        ({"uptrain": {"dataset": "x", "tokens": 9, "loss": "kk"}}, "uptrain: `loss` takes lm, kl, hidden, attention"),
        (
            {"uptrain": {"dataset": "x", "tokens": 9, "attention_tokens": 9}},
            "uptrain: `attention_tokens` must be below `tokens` 9, got 9",
        ),
        ({"uptrain": {"dataset": [], "tokens": 9}}, "uptrain: `dataset` is empty; give a text"),
        ({"uptrain": {"dataset": ["x=nan"], "tokens": 9}}, "uptrain: `dataset` needs weights above 0; got [nan]"),
        ({"uptrain": {"dataset": ["x", "y=0"], "tokens": 9}}, "`dataset` needs weights above 0; got [1.0, 0.0]"),
        (
            {"uptrain": {"dataset": "x", "tokens": 9, "micro_batch": 3}},
            "uptrain: `micro_batch` must divide the 64 rows of a step, got 3",
        ),
        ({"convert": False}, "convert must hold options"),
        ({"convert": ""}, "convert must hold options"),
        ({"uptrain": 0}, "uptrain must hold options"),
        ({"output": "a\0b"}, "cannot be written: "),
        ({"evaluate": {"window": 8, "stride": 9}}, "evaluate: `window` must be at least as long as `stride`"),
        ({"evaluate": {"text": ["a", "b"]}}, "evaluate: `text` must be a text; got ['a', 'b']"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_said(tmp_path, recipe, change, message):
    result = run(tmp_path, {**recipe, **change})
    assert isinstance(result.exception, MQAError), result.output
    assert message in str(result.exception)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("output", ["source", "source/results", ".", "source/../source/a/b"])
def test_source_and_output_do_not_lie_in_each_other(tmp_path, recipe, output):
    before = sorted(tmp_path.rglob("*"))
    result = run(tmp_path, {**recipe, "output": str(tmp_path / output)})
    assert isinstance(result.exception, MQAError), result.output
    assert "must not be the same or contain each other" in str(result.exception)
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "recipe.yaml"])
    hub = run(tmp_path, {**recipe, "source": "someone/model", "output": "someone/model/results"})
    assert "must not be the same or contain each other" in str(hub.exception)


@pytest.mark.parametrize("output", ["text.jsonl", "text.jsonl/results"])
def test_an_output_that_is_a_file_is_said(tmp_path, recipe, output):
    result = run(tmp_path, {**recipe, "output": str(tmp_path / output)})
    assert isinstance(result.exception, MQAError), result.output
    assert "text.jsonl is a file; give a directory" in str(result.exception)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("source: a\noutput: b\nconvert:\nconvert:\n  method: first\n", "line 4: convert is given twice"),
        ("source: a\noutput: b\nconvert: {kv_heads: 1, kv_heads: 2}\n", "line 3: kv_heads is given twice"),
    ],
)
def test_what_is_there_twice_is_refused(tmp_path, content, message):
    (tmp_path / "recipe.yaml").write_text(content)
    result = CliRunner().invoke(app, ["recipe", str(tmp_path / "recipe.yaml")])
    assert isinstance(result.exception, MQAError)
    assert message in str(result.exception)


def test_json_is_all_that_standard_output_has(tmp_path, recipe):
    for name in ("uptrain", "evaluate"):
        del recipe[name]
    recipe["convert"] = None
    result = run(tmp_path, recipe, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == recipe["output"]
    assert "key/value heads" in result.stderr


@pytest.mark.parametrize("record", ["[]", '{"convert": 5}', '{"convert": [1]}', '{"begun": []}', "null"])
def test_a_record_of_steps_that_is_none_is_said(tmp_path, recipe, record):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "recipe.json").write_text(record)
    result = run(tmp_path, recipe)
    assert isinstance(result.exception, MQAError), result.output
    assert "recipe.json" in str(result.exception)


def test_each_command_is_said_before_anything_runs(tmp_path, recipe):
    result = run(tmp_path, recipe, "--dry-run")
    assert result.exit_code == 0, result.output
    said = dict(line.split(": ", 1) for line in result.output.strip().splitlines())
    assert list(said) == ["convert", "uptrain", "evaluate"]
    assert said["evaluate"].startswith(f"mqa-hf evaluate {recipe['source']} {tmp_path}/results/converted")
    assert not (tmp_path / "results").exists()
    for name in ("uptrain", "evaluate"):
        del recipe[name]
    assert list(json.loads(run(tmp_path, recipe, "--dry-run", "--json").output)) == ["convert"]


def test_the_commands_are_those_that_can_be_typed(tmp_path, recipe):
    recipe["uptrain"] |= {"bf16": False, "columns": ["text"], "compile": True, "log-every": 3}
    for command in json.loads(run(tmp_path, recipe, "--dry-run", "--json").output).values():
        name, *words = shlex.split(command)[1:]
        get_command(app).commands[name].make_context(name, words).close()
    words = shlex.split(json.loads(run(tmp_path, recipe, "--dry-run", "--json").output)["uptrain"])
    assert {"--no-bf16", "--compile"} <= set(words)
    assert words[words.index("--columns") + 1] == "text"


def test_what_is_no_yaml_is_said(tmp_path):
    for content in (b"", b"\xff\xfe", b"source: [", b"- 5", b"source: &a [*a]", b"\x00"):
        (tmp_path / "recipe.yaml").write_bytes(content)
        result = CliRunner().invoke(app, ["recipe", str(tmp_path / "recipe.yaml")])
        assert isinstance(result.exception, MQAError), content
        assert "recipe.yaml" in str(result.exception)
    assert isinstance(CliRunner().invoke(app, ["recipe", str(tmp_path)]).exception, MQAError)
