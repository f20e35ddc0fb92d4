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
    from typer.main import get_command

    from mqa_hf.cli import app

    recipe = read_recipe(path)
    main: Any = get_command(app)
    known = main.commands
    output = Path(recipe["output"])
    record = output / DONE
    done = json.loads(record.read_text()) if record.is_file() else {}
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    again = False
    for step, words in commands(recipe, known).items():
        there = (output / STEPS[step]).is_file()
        if there and done.get(step) == words and not again:
            console.print(f"{step}: done before")
            continue
        if there and not again and not overwrite:
            raise ConversionError(
                f"{output / STEPS[step]} was made by another command ({' '.join(done.get(step, ['unknown']))}); give "
                "the recipe another output, or pass --overwrite to run this step and those after it again"
            )
        console.print(f"{step}: mqa-hf {' '.join(words)}")
        more = ["--overwrite"] if there and step != "evaluate" else []
        try:
            main([*words, *more], standalone_mode=False)
        except Exception as error:
            if not hasattr(error, "format_message"):  # of click: an option that is none
                raise
            raise ConversionError(f"{path}, {step}: {error.format_message()}") from error
        again |= there
        output.mkdir(parents=True, exist_ok=True)
        done[step] = words
        record.write_text(json.dumps(done, indent=2) + "\n")
