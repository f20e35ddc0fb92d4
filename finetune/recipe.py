"""A recipe: convert, train and evaluate with one command and one file.

    source: HuggingFaceTB/SmolLM2-135M-Instruct
    output: smollm2-mqa
    convert:
      method: shared
      calibration: text.jsonl
    uptrain:
      dataset: [text.jsonl]
      tokens: 20000000
    evaluate:
      text: validation.jsonl

Under each stand the options of its command. The results are `output/converted`, `output/trained` and
`output/evaluation`. A step whose result is whole is not run again; one that was interrupted goes on.
"""

import functools
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mqa_hf.base.errors import MQAError
from mqa_hf.base.files import REPORT_FILE, TRAINING_FILE, read_json, read_yaml, write_whole

STEPS = {
    "convert": f"converted/{REPORT_FILE}",
    "uptrain": f"trained/{TRAINING_FILE}",
    "evaluate": "evaluation/evaluation.json",
}
DONE = "recipe.json"  # the commands that made what is there
BEGUN = "begun"  # and in it those that were begun


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe in a file.

    Raises:
        MQAError: where it is none.
    """
    recipe = read_yaml(path)
    known = ("source", "output", *STEPS)
    if not isinstance(recipe, dict) or not {"source", "output", "convert"} <= set(recipe):
        raise MQAError(f"{path} needs source, output and convert")
    unknown = [name for name in recipe if name not in known]
    wrong = [name for name in STEPS if name in recipe and not isinstance(recipe[name] or {}, dict)]
    for name in ("source", "output"):
        if not isinstance(recipe[name], str) or not recipe[name]:
            raise MQAError(f"{path}: {name} must be a text, in quotes if need be; got {recipe[name]!r}")
    if wrong:
        raise MQAError(f"{path}: {', '.join(wrong)} must hold options, one a line")
    if unknown:
        raise MQAError(f"{path}: {', '.join(map(str, unknown))}: a recipe has {', '.join(known)}")
    return recipe


def flags(options: dict[str, Any] | None, command: Any) -> list[str]:
    """Options of a command as words: `true` is a flag, `false` its negation where there is one, a list the same option
    many times, or its parts with commas between them.

    Raises:
        MQAError: for a value that is none.
    """
    known = {option: p for p in command.params for option in (*p.opts, *p.secondary_opts)}
    words: list[str] = []
    for name, value in (options or {}).items():
        flag = "--" + str(name).replace("_", "-")
        parameter = known.get(flag)
        if parameter is None:
            raise MQAError(f"{command.name}: No such option: {flag}")
        if isinstance(value, bool) != parameter.is_flag or value is None or isinstance(value, dict):
            kind = "true or false" if parameter.is_flag else "a value"
            raise MQAError(f"{command.name}: {name} takes {kind}, not {json.dumps(value, default=str)}")
        if value is True:
            words.append(flag)
        elif value is False:
            words += parameter.secondary_opts if flag in parameter.opts else parameter.opts
        elif isinstance(value, list) and not parameter.multiple:
            words += [flag, ",".join(map(str, value))]
        else:
            for item in value if isinstance(value, list) else [value]:
                words += [flag, str(item)]
    return words


def commands(recipe: dict[str, Any], known: dict[str, Any]) -> dict[str, list[str]]:
    """The words of each step's command, in order; `known` are the commands."""
    output, source = Path(recipe["output"]), str(recipe["source"])
    converted, trained = str(output / "converted"), str(output / "trained")
    found = {"convert": ["convert", source, converted, *flags(recipe["convert"], known["convert"])]}
    results = [source, converted]
    if "uptrain" in recipe:
        found["uptrain"] = ["uptrain", converted, trained, *flags(recipe["uptrain"], known["uptrain"])]
        results.append(trained)
    if "evaluate" in recipe:
        words = ["--output", str(output / "evaluation"), *flags(recipe["evaluate"], known["evaluate"])]
        found["evaluate"] = ["evaluate", *results, *words]
    return found


def run_recipe(path: Path, overwrite: bool = False) -> None:
    """Run the steps of a recipe whose results are not there yet.

    Args:
        path: of the file.
        overwrite: run a step that has changed since its result was made, and all after it, again.

    Raises:
        MQAError: where a step has changed and `overwrite` is false, and whatever the commands raise.
    """
    recipe = read_recipe(path)
    output = Path(recipe["output"])
    needs: tuple[str, ...] = ()
    steps: dict[str, Step] = {}
    try:
        words_of = commands(recipe, command_group().commands)
    except MQAError as error:
        raise MQAError(f"{path}, {error}") from error
    for step, words in words_of.items():
        steps[step] = Step(words, output / STEPS[step], needs, step != "evaluate")
        needs += (step,)
    run_steps(steps, output / DONE, str(path), overwrite)


@dataclass(frozen=True)
class Step:
    """A command of this package.

    Attributes:
        words: of the command.
        result: the file that is there when it is done.
        needs: steps whose results it reads.
        costly: whether a result takes long to make again, so that it is replaced only when that is asked for.
    """

    words: list[str]
    result: Path
    needs: tuple[str, ...] = ()
    costly: bool = False


@functools.cache
def command_group() -> Any:
    """All commands; made once, since typer takes milliseconds for that and many steps ask."""
    from typer.main import get_command

    from mqa_hf.cli import app

    return get_command(app)


def read_record(record: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """By step, the words of those that are done, and of those that were begun: none where a record was cut off.

    Raises:
        MQAError: for a file that is no such record.
    """
    try:
        json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}, {}
    done = read_json(record)
    begun = done.pop(BEGUN, {})
    for steps in (done, begun):
        if not isinstance(steps, dict) or not all(
            isinstance(words, list) and all(isinstance(word, str) for word in words) for words in steps.values()
        ):
            raise MQAError(f"{record} does not say which steps are done; remove it to begin again")
    return done, begun


def write_record(record: Path, done: dict[str, list[str]], begun: dict[str, list[str]]) -> None:
    write_whole(record, json.dumps({**done, **({BEGUN: begun} if begun else {})}, indent=2) + "\n")


def kept_words(step: Step, record: Path) -> list[str]:
    """The words of a step, paths under the record's directory as they are from there."""
    return [word.removeprefix(f"{record.parent}{os.sep}") for word in step.words]


def unfinished(steps: dict[str, Step], record: Path) -> list[str]:
    """Steps whose results are not there, or were made by other words."""
    done, _ = read_record(record)
    return [
        name
        for name, step in steps.items()
        if not (step.result.is_file() and done.get(name) == kept_words(step, record))
    ]


def run_steps(
    steps: dict[str, Step], record: Path, name: str, overwrite: bool = False, keep_going: bool = False
) -> None:
    """Run commands whose results are not there yet, in order.

    Args:
        steps: by name.
        record: file beside the results that says which are done, and by which words; paths under its directory are
            kept as they are from there.
        name: of what they are steps of, for messages.
        overwrite: run a step that has changed, and those that need it, again.
        keep_going: run steps that need none of those that failed, too, before the first error is raised.

    Raises:
        MQAError: where a step has changed and `overwrite` is false, and whatever the commands raise.
    """
    main = command_group()
    done, begun = read_record(record)
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    failed: dict[str, Exception] = {}
    for step, what in steps.items():
        there, words = what.result.is_file(), kept_words(what, record)
        if set(what.needs) & set(failed):
            continue
        # A costly result appears whole; it may have come to be there just before its run was killed.
        if there and words in (done.get(step), begun.get(step)):
            console.print(f"{step}: done before")
            if step not in done:
                done |= {step: begun.pop(step)}
                write_record(record, done, begun)
            continue
        replaced = there and what.costly
        try:
            if replaced and not overwrite:
                made = f" ({shlex.join(done[step])})" if step in done else ""
                raise MQAError(
                    f"{what.result} was made by another command{made}, or from what has been made again since; give "
                    f"{name} another output, or pass --overwrite to run this step and those that need it again"
                )
            if there and not what.costly:
                what.result.unlink()
            stay = {n for n, other in steps.items() if n != step and step not in other.needs}
            done, begun = ({n: kept for n, kept in said.items() if n in stay} for said in (done, begun))
            if what.costly and not there:
                begun[step] = words
            write_record(record, done, begun)
            console.print(f"{step}: mqa-hf {shlex.join(what.words)}")
            start = time.monotonic()
            run_command(main, [*what.words, *["--overwrite"] * replaced], f"{name}, {step}")
        except Exception as error:
            if not keep_going:
                raise
            console.print(f"{step}: {type(error).__name__}: {error}")
            failed[step] = error
            continue
        console.print(f"{step}: done in {time.monotonic() - start:.0f} s")
        done[step] = words
        begun.pop(step, None)
        write_record(record, done, begun)
    if failed:
        raise next(iter(failed.values()))


def run_command(main: Any, words: list[str], name: str) -> None:
    """Run a command of this package in this process; `name` says in messages what it is."""
    before, sys.argv = sys.argv, ["mqa-hf", *words]  # from where commands note how they were called
    try:
        main(words, standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):  # of click: an option that is none
            raise
        raise MQAError(f"{name}: {error.format_message()}") from error
    finally:
        sys.argv = before
