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

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from mqa_hf.conversion.errors import ConversionError
from mqa_hf.conversion.source import REPORT_FILE

from .uptrain import REPORT

STEPS = {
    "convert": f"converted/{REPORT_FILE}",
    "uptrain": f"trained/{REPORT}",
    "evaluate": "evaluation/evaluation.json",
}
DONE = "recipe.json"  # the commands that made what is there


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe in a file.

    Raises:
        ConversionError: where it is none.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error
    known = ("source", "output", *STEPS)
    if not isinstance(recipe, dict) or not {"source", "output", "convert"} <= set(recipe):
        raise ConversionError(f"{path} needs source, output and convert")
    unknown = [name for name in recipe if name not in known]
    wrong = [name for name in STEPS if name in recipe and not isinstance(recipe[name] or {}, dict)]
    if unknown or wrong:
        raise ConversionError(f"{path}: {', '.join(map(str, unknown + wrong))}: a recipe has {', '.join(known)}")
    return recipe


def flags(options: dict[str, Any] | None, command: Any) -> list[str]:
    """Options of a command as words: `true` is a flag, `false` its negation where there is one, a list the same option
    many times, or its parts with commas between them."""
    known = {option: parameter for parameter in command.params for option in parameter.opts}
    words: list[str] = []
    for name, value in (options or {}).items():
        flag = "--" + str(name).replace("_", "-")
        parameter = known.get(flag)
        if value is True:
            words.append(flag)
        elif value is False:
            words += [] if parameter is None else list(parameter.secondary_opts)
        elif isinstance(value, list) and not (parameter is not None and parameter.multiple):
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
        ConversionError: where a step has changed and `overwrite` is false, and whatever the commands raise.
    """
    recipe = read_recipe(path)
    output = Path(recipe["output"])
    steps = {
        step: Step(words, output / STEPS[step], step != "evaluate")
        for step, words in commands(recipe, known_commands()).items()
    }
    run_steps(steps, output / DONE, str(path), overwrite)


@dataclass(frozen=True)
class Step:
    """A command of this package.

    Attributes:
        words: of the command.
        result: the file that is there when it is done.
        costly: whether a result takes long to make again, so that it is replaced only when that is asked for.
    """

    words: list[str]
    result: Path
    costly: bool = False


def known_commands() -> dict[str, Any]:
    from typer.main import get_command

    from mqa_hf.cli import app

    main: Any = get_command(app)
    return main.commands


def read_done(record: Path) -> dict[str, list[str]]:
    """The words of each step that is done."""
    return json.loads(record.read_text()) if record.is_file() else {}


def run_steps(steps: dict[str, Step], record: Path, name: str, overwrite: bool = False) -> None:
    """Run commands whose results are not there yet, in order.

    Args:
        steps: by name.
        record: file that says which are done.
        name: of what they are steps of, for messages.
        overwrite: run a step that has changed, and all after it, again.

    Raises:
        ConversionError: where a step has changed and `overwrite` is false, and whatever the commands raise.
    """
    from typer.main import get_command

    from mqa_hf.cli import app

    main: Any = get_command(app)
    done = read_done(record)
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    names = list(steps)
    for step, what in steps.items():
        there = what.result.is_file()
        if there and done.get(step) == what.words:
            console.print(f"{step}: done before")
            continue
        replaced = there and what.costly
        if replaced and not overwrite:
            made = f"by {shlex.join(done[step])}" if step in done else "before a step above was run again"
            raise ConversionError(
                f"{what.result} was made {made}; give {name} another output, or pass --overwrite to run this step and "
                "those after it again"
            )
        console.print(f"{step}: mqa-hf {shlex.join(what.words)}")
        before, sys.argv = sys.argv, ["mqa-hf", *what.words]  # from where commands note how they were called
        try:
            main([*what.words, *["--overwrite"] * replaced], standalone_mode=False)
        except Exception as error:
            if not hasattr(error, "format_message"):  # of click: an option that is none
                raise
            raise ConversionError(f"{name}, {step}: {error.format_message()}") from error
        finally:
            sys.argv = before
        record.parent.mkdir(parents=True, exist_ok=True)
        # What later steps have made is of what was there before.
        done = {n: words for n, words in done.items() if names.index(n) < names.index(step)} | {step: what.words}
        record.write_text(json.dumps(done, indent=2) + "\n")
