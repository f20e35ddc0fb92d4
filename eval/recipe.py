"""`mqa-hf recipe`: convert, train and evaluate with one command and one file.

    version: 1
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

Each step takes the options of its command. The results are `output/converted`, `output/trained` and
`output/evaluation`. A finished step is not run again; an interrupted one continues.
"""

import difflib
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

from mqa_hf.base.errors import MQAError
from mqa_hf.base.files import REPORT_FILE, TRAINING_FILE, read_yaml
from mqa_hf.base.options import Job, Option
from mqa_hf.base.steps import Step, run_steps
from mqa_hf.conversion.convert import Conversion
from mqa_hf.finetune.uptrain import Uptraining

from .evaluate import Evaluation

STEPS: dict[str, type[Job]] = {job.name: job for job in (Conversion, Uptraining, Evaluation)}
VERSION = 1  # of the recipe format
KNOWN = ("version", "source", "output", *STEPS)
DONE = "recipe.json"  # the commands that produced the results


@dataclass(frozen=True)
class Recipe(Job[Path]):
    """Convert, train and evaluate as a file describes; finished steps are not run again.

    Returns:
        The directory with all results.

    Raises:
        MQAError: before the first step, if the file is invalid or a step has changed and `overwrite` is false; and
            whatever the steps raise.
    """

    name = "recipe"

    file: Annotated[Path, Option("YAML file with source, output, convert and further steps.")]
    _: KW_ONLY
    overwrite: Annotated[bool, Option("Rerun changed steps and the steps after them.", recorded="never")] = False

    def run(self) -> Path:
        output, steps = read_recipe(self.file)
        run_steps(steps, output / DONE, str(self.file), self.overwrite)
        return output

    def dry_run(self) -> dict[str, Any]:
        """The command of each step."""
        _, steps = read_recipe(self.file)
        return {name: step.job.command() for name, step in steps.items()}

    def interrupted(self) -> str:
        return "Finished steps and the progress of the current one are kept; run the same command to continue."


def read_recipe(path: Path) -> tuple[Path, dict[str, Step]]:
    """Read the output directory and the steps from a file, and check each step as far as possible before it runs.

    Raises:
        MQAError: naming the invalid step and option.
    """
    recipe = read_yaml(path)
    check_keys(path, recipe)
    source, output = recipe["source"], Path(recipe["output"])
    check_places(path, Path(source), output)
    converted, trained = output / "converted", output / "trained"
    results = [converted, *([trained] if "uptrain" in recipe else [])]
    # Options set by the recipe itself; the result; whether the step takes long.
    plan: dict[str, tuple[dict[str, Any], Path, bool]] = {
        "convert": ({"source": source, "output": converted}, converted / REPORT_FILE, True),
        "uptrain": ({"student": converted, "output": trained}, trained / TRAINING_FILE, True),
        "evaluate": (
            {"original": source, "checkpoints": results, "output": output / "evaluation"},
            output / "evaluation" / "evaluation.json",
            False,
        ),
    }
    steps: dict[str, Step] = {}
    for name, (own, result, costly) in plan.items():
        if name in recipe:
            try:
                job = job_of(STEPS[name], recipe[name] or {}, own)
            except MQAError as error:
                raise MQAError(f"{path}, {name}: {error}") from error
            steps[name] = Step(job, result, tuple(steps), costly)
    return output, steps


def check_keys(path: Path, recipe: Any) -> None:
    """Raise MQAError if a file is not a recipe, whatever the options of its steps."""
    if not isinstance(recipe, dict) or not {"source", "output", "convert"} <= set(recipe):
        raise MQAError(f"{path} needs source, output and convert")
    for name in recipe:
        if name not in KNOWN:
            close = difflib.get_close_matches(str(name), KNOWN, 1)
            hint = f"did you mean {close[0]}?" if close else f"a recipe has {', '.join(KNOWN)}"
            raise MQAError(f"{path}: {name}: {hint}")
    version = recipe.get("version", VERSION)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise MQAError(f"{path}: version must be a whole number such as {VERSION}; got {version!r}")
    if version > VERSION:
        raise MQAError(f"{path} has version {version}, and this mqa-hf reads up to {VERSION}; update mqa-hf to run it")
    for name in ("source", "output"):
        if not isinstance(recipe[name], str) or not recipe[name]:
            raise MQAError(f"{path}: {name} must be a string, in quotes if need be; got {recipe[name]!r}")
    for name in STEPS:
        if not isinstance(recipe.get(name), dict | None):
            raise MQAError(f"{path}: {name} must hold options, one per line")


def check_places(path: Path, source: Path, output: Path) -> None:
    """Raise MQAError if `output` cannot be a directory, or if it and the source contain each other."""
    try:
        here, there = output.resolve(), source.resolve()
        known = source.is_dir()  # else a Hub id, which a directory of that name would hide
        if here == there or there in here.parents or (known and here in there.parents):
            raise MQAError(
                f"{path}: source {source} and output {output} must not be the same or contain each other; give "
                "another output"
            )
        for place in (here, *here.parents):
            if place.exists() and not place.is_dir():
                raise MQAError(f"{path}: output {output}: {place} is a file; give a directory")
    except (OSError, RuntimeError, ValueError) as error:  # the last two for link loops and invalid names
        raise MQAError(f"{path}: output {str(output)!r} cannot be written: {error}") from error


def job_of(kind: type[Job], given: Mapping[Any, Any], own: Mapping[str, Any]) -> Job:
    """Make a step's job from the options `given` and from `own`, those that the recipe sets.

    Raises:
        MQAError: for options that are unknown, have no value or contradict each other.
    """
    for name, value in given.items():
        if str(name).replace("-", "_") in own:
            raise MQAError(f"`{name}` is set by the recipe's source and output; leave it out")
        if value is None:
            raise MQAError(f"`{name}` takes a value, not null; leave it out for its default")
    job = kind.of({**given, **own})
    job.check()
    return job
