"""Steps that are run once: what is done stays, what has changed is run again only when that is asked for."""

import json
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

import pytest

from mqa_hf.base.errors import MQAError
from mqa_hf.base.options import Job, Option
from mqa_hf.base.steps import Step, run_steps, unfinished

RUNS = []


@dataclass(frozen=True)
class Writing(Job[str]):
    """Write a file."""

    name = "write"

    path: Annotated[Path, Option("What is written.")]
    _: KW_ONLY
    text: Annotated[str, Option("Into it.")] = "text"
    fails: Annotated[bool, Option("Whether nothing comes of it.")] = False
    overwrite: Annotated[bool, Option("Replace it.", recorded="never")] = False

    def run(self):
        RUNS.append((self.path.name, self.overwrite))
        if self.fails:
            raise MQAError("no")
        if self.path.exists() and not self.overwrite:
            raise MQAError(f"{self.path} is there")
        self.path.write_text(self.text)
        return f"{self.path.name} has {self.text}"

    def show(self, result, console):
        console.print(result)


@pytest.fixture(autouse=True)
def runs():
    RUNS.clear()
    return RUNS


def steps(place, **one):
    return {
        "one": Step(Writing(place / "one", **one), place / "one", costly=True),
        "two": Step(Writing(place / "two", overwrite=True), place / "two", ("one",)),
        "three": Step(Writing(place / "three"), place / "three"),
    }


def test_each_runs_once_and_is_shown(tmp_path, runs, capsys):
    record = tmp_path / "done.json"
    assert unfinished(steps(tmp_path), record) == ["one", "two", "three"]
    run_steps(steps(tmp_path), record, "it")
    said = capsys.readouterr()
    assert "one has text" in said.err
    assert said.out == ""
    assert unfinished(steps(tmp_path), record) == []
    run_steps(steps(tmp_path), record, "it")
    assert [name for name, _ in runs] == ["one", "two", "three"]
    assert json.loads(record.read_text()) == {name: ["write", name] for name in ("one", "two", "three")}

    moved = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}-moved"))
    assert unfinished(steps(moved), moved / "done.json") == []
    (moved / "one").unlink()
    assert unfinished(steps(moved), moved / "done.json") == ["one"]


def test_a_changed_one_and_those_that_need_it_run_again_when_asked(tmp_path, runs):
    record = tmp_path / "done.json"
    run_steps(steps(tmp_path), record, "it")
    changed = steps(tmp_path, text="other")
    assert unfinished(changed, record) == ["one"]
    with pytest.raises(MQAError, match=r"one was made by another command \(write one\).*give it another.*`overwrite`"):
        run_steps(changed, record, "it")
    runs.clear()
    run_steps(changed, record, "it", overwrite=True)
    assert runs == [("one", True), ("two", True)]
    assert (tmp_path / "one").read_text() == "other"


def test_those_that_need_no_failed_one_run_all_the_same(tmp_path, runs, capsys):
    with pytest.raises(MQAError, match=r"^no$"):
        run_steps(steps(tmp_path, fails=True), tmp_path / "done.json", "it", keep_going=True)
    assert [name for name, _ in runs] == ["one", "three"]
    assert "one: MQAError: no" in capsys.readouterr().err
    with pytest.raises(MQAError, match=r"^no$"):
        run_steps(steps(tmp_path, fails=True), tmp_path / "done.json", "it")
    assert len(runs) == 3


def test_a_result_that_came_whole_before_its_run_was_killed_is_done(tmp_path, runs):
    record = tmp_path / "done.json"
    record.write_text(json.dumps({"begun": {"one": ["write", "one"]}}))
    (tmp_path / "one").write_text("text")
    run_steps(steps(tmp_path), record, "it")
    assert [name for name, _ in runs] == ["two", "three"]


@pytest.mark.parametrize("content", ["[]", '{"one": 5}', '{"one": [1]}', '{"begun": []}', "null"])
def test_a_record_that_is_none_is_said(tmp_path, content):
    (tmp_path / "done.json").write_text(content)
    with pytest.raises(MQAError, match=r"done\.json"):
        run_steps(steps(tmp_path), tmp_path / "done.json", "it")


def test_a_record_that_was_cut_off_is_begun_again(tmp_path, runs):
    (tmp_path / "done.json").write_text('{"one": [')
    run_steps(steps(tmp_path), tmp_path / "done.json", "it")
    assert len(runs) == 3


def test_a_first_step_that_fails_leaves_nothing(tmp_path, runs):
    place = tmp_path / "new" / "place"
    with pytest.raises(MQAError, match=r"^no$"):
        run_steps(steps(place, fails=True), place / "done.json", "it")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(MQAError, match=r"^no$"):
        run_steps(steps(tmp_path, fails=True), tmp_path / "done.json", "it")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "done.json").write_text("{}")
    with pytest.raises(MQAError, match=r"^no$"):
        run_steps(steps(tmp_path, fails=True), tmp_path / "done.json", "it")
    assert (tmp_path / "done.json").is_file()
    with pytest.raises(MQAError, match="cannot be written"):
        run_steps(steps(tmp_path), tmp_path / "mine" / "done.json", "it")
