"""The demo: the model that is shipped, and the whole job on it."""

import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from mqa_hf.base.errors import MQAError
from mqa_hf.base.text import documents
from mqa_hf.cli import app
from mqa_hf.eval import demo
from mqa_hf.eval.evaluate import evaluate
from mqa_hf.finetune import trainer

SHIPPED = Path(demo.__file__).parent / demo.MODEL
STEPS = ["mean", "shared", "wide", "train", "evaluate", "benchmark", "report"]


def run(*words):
    return CliRunner().invoke(app, ["demo", *map(str, words)])


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(demo, "FITTED", {"calibration_tokens": 512, "sequence_length": 32})
    trained = {"tokens": 1024, "sequence_length": 32, "batch_tokens": 256, "validation_tokens": 128, "save_every": 1}
    monkeypatch.setattr(demo, "TRAINED", trained)
    measured = {"tokens": 512, "window": 64, "prompts": 2, "prompt_tokens": 8, "new_tokens": 8}
    monkeypatch.setattr(demo, "MEASURED", measured)
    timed = {"cells": ["1x8", "2x8", "1x16"], "tokens": 2, "rounds": 1, "prefill_limit": 0}
    monkeypatch.setattr(demo, "TIMED", timed)


def test_the_shipped_model_is_small_and_knows_its_authors(tmp_path):
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10_000_000
    model = AutoModelForCausalLM.from_pretrained(SHIPPED)
    assert model.config.num_attention_heads == model.config.num_key_value_heads == 8
    asked = {"text": str(SHIPPED / "text" / "held-out.jsonl.xz"), "tokens": 4096, "window": 512, "prompts": 0}
    found = evaluate(SHIPPED, output=tmp_path, **asked).checkpoints[0].next_token
    assert found.bits_per_byte < 2.3  # of letters drawn by their frequency: above 4.5
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    assert len(tokenizer) == model.config.vocab_size


def test_the_texts_share_no_work_and_have_no_notes_by_others():
    works = {}
    for name in demo.TEXTS:
        rows = documents(str(SHIPPED / "text" / name), ["work"])
        works[name] = set(rows)
    assert works["held-out.jsonl.xz"] == {"julius_caesar", "winters_tale"}
    assert len(works["train.jsonl.xz"]) == 44
    assert not works["train.jsonl.xz"] & works["held-out.jsonl.xz"]
    assert not works["train.jsonl.xz"] & {"comus", "poemata", "poetical_works"}


def test_the_whole_job_and_nothing_of_it_twice(small, tmp_path, monkeypatch):
    result = run(tmp_path / "demo")
    assert result.exit_code == 0, f"{result.output} {result.exception}"
    assert re.findall(r"^(\w+): mqa-hf \w+", result.stderr, re.MULTILINE) == STEPS
    found = json.loads((tmp_path / "demo" / "evaluation" / "evaluation.json").read_text())["checkpoints"]
    assert [c["name"] for c in found] == ["original", "mean", "shared", "wide", "trained"]
    assert [c["kv_bytes_per_token"] for c in found] == [4096, 512, 512, 1024, 512]
    page = (tmp_path / "demo" / "report" / "index.html").read_text()
    assert all(f"</span> {c['name']}</th>" in page for c in found)
    assert "Times of mean and trained are those of shared, which has the same shape." in page  # timed once for all
    for c in found:
        assert f"{c['name']} writes" in result.output
    assert str((tmp_path / "demo" / "report" / "index.html").resolve()) in result.output
    again = run(tmp_path / "demo")
    assert again.stderr.count("already done") == len(STEPS)

    monkeypatch.chdir(tmp_path / "demo")  # the same place by another path
    times = Path("times.jsonl").read_text()
    shutil.rmtree("mean")
    Path("original/tokenizer.json").unlink()
    result = run(".")
    assert result.exit_code == 0, f"{result.output} {result.exception}"
    assert re.findall(r"^(\w+): mqa-hf \w+", result.stderr, re.MULTILINE) == ["mean", "evaluate", "report"]
    assert Path("times.jsonl").read_text() == times
    assert Path("original/tokenizer.json").is_file()

    (tmp_path / "demo" / "demo.json").write_text("")  # killed while it was written
    refused = run(".")
    assert isinstance(refused.exception, MQAError)
    assert "pass --overwrite" in str(refused.exception)


def test_an_interrupted_demo_goes_on(small, tmp_path, monkeypatch):
    plain = trainer.LossTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(trainer.LossTrainer, "training_step", interrupted)
    assert run(tmp_path / "demo").exit_code != 0
    monkeypatch.setattr(trainer.LossTrainer, "training_step", plain)
    (tmp_path / "demo" / "times.jsonl").write_text("no record\n")  # as an interrupted benchmark may leave it
    result = run(tmp_path / "demo", "--json")
    assert result.exit_code == 0, f"{result.output} {result.exception}"
    assert json.loads(result.stdout) == str((tmp_path / "demo" / "report" / "index.html").resolve())
    assert result.stderr.count("already done") == 3
    assert "resumes from step 2 of 4" in result.stderr
    assert "no record" not in (tmp_path / "demo" / "times.jsonl").read_text()


def test_what_is_there_already_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    result = run(tmp_path)
    assert isinstance(result.exception, MQAError)
    assert "is not a demo" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    result = run(tmp_path / "mine.txt")
    assert isinstance(result.exception, MQAError)
    result = run(tmp_path / "mine.txt" / "demo")
    assert "cannot be written" in str(result.exception)


@pytest.mark.slow
def test_the_demo_shows_what_it_is_for(tmp_path):
    result = run(tmp_path / "demo")
    assert result.exit_code == 0, f"{result.output} {result.exception}"
    found = json.loads((tmp_path / "demo" / "evaluation" / "evaluation.json").read_text())["checkpoints"]
    losses = {c["name"]: c["next_token"]["loss"] for c in found}
    assert losses["original"] < losses["wide"] < losses["shared"] < losses["mean"]
    assert losses["trained"] < losses["shared"]
    lines = (tmp_path / "demo" / "times.jsonl").read_text().splitlines()
    times = {
        r["kv_heads"]: r["time_per_token_ms"] for r in map(json.loads, lines) if r["batch"] * r["context"] == 2**15
    }
    assert times[1] < times[8]
