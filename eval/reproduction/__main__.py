"""`python -m mqa_hf.eval.reproduction`: run, times, cost, page."""

import fcntl
import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from mqa_hf.base.entry import run_command
from mqa_hf.base.errors import MQAError
from mqa_hf.base.files import read_json, write_whole
from mqa_hf.base.steps import run_steps
from mqa_hf.finetune.options import Data
from mqa_hf.finetune.tokenizer import trained_tokenizer

from .experiments import RECORD, TIMES, Chain, Experiment, read_lines
from .queue import run_chains

MODULE = "mqa_hf.eval.reproduction"
RESULTS = "results.jsonl"
app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

Work = Annotated[Path, typer.Argument(help="Directory for everything.")]
Recipes = Annotated[
    list[str],
    typer.Argument(
        help="RECIPE=TEXT: translation, language or a YAML file; a directory with train.jsonl.xz, validation.jsonl.xz "
        "and, for translation, test.jsonl.xz, or an id of the Hub's data sets with these splits."
    ),
]


def read(work: Path, recipes: list[str]) -> list[Experiment]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    experiments = [Experiment.parse(said, work.resolve(), device) for said in recipes]
    tasks = [experiment.task for experiment in experiments]
    if len(set(tasks)) < len(tasks):
        raise MQAError(f"recipes need different names; got {', '.join(tasks)}")
    return experiments


def chains_of(experiments: list[Experiment]) -> list[Chain]:
    """Of all experiments, those first that others need; of these, one seed after another."""
    chains = (chain for experiment in experiments for chain in experiment.chains())
    return sorted(chains, key=lambda chain: (len(chain.needs), chain.seed))


@app.command()
def run(
    work: Work,
    recipes: Recipes,
    per_device: Annotated[
        int | None, typer.Option(min=1, help="Chains at once on a GPU. Default: 3; 1 without a GPU.")
    ] = None,
    limit: Annotated[float, typer.Option(help="Stop after so many seconds.")] = float("inf"),
    only: Annotated[str | None, typer.Option(help="Chains in whose names this regular expression is found.")] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin trainings of these chains that are not whole anew.")
    ] = False,
) -> None:
    """Run experiments, or what is left of them; results are in WORK/results.jsonl."""
    deadline = time.monotonic() + limit
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))  # stop chains where a terminal is closed, too
    experiments = read(work, recipes)
    chains = chains_of(experiments)
    try:
        chosen = [chain for chain in chains if only is None or re.search(only, chain.name)]
    except re.error as error:
        raise MQAError(f"--only {only} is no regular expression: {error}") from None
    done = {chain.name for chain in chains if chain.done}
    needed = {name for chain in chosen for name in chain.needs} - done - {chain.name for chain in chosen}
    if not chosen:
        raise MQAError(f"--only {only}: found in no chain's name, such as {chains[0].name}")
    if needed:
        raise MQAError(f"--only {only}: these chains need {', '.join(sorted(needed))}, not run yet")
    for experiment in experiments:
        prepare_tokenizer(experiment)
    if restart:
        for chain in chosen:
            for job in chain.place.glob(".*.*train"):
                shutil.rmtree(job)
    per_device = per_device or (3 if torch.cuda.is_available() else 1)
    try:
        left, failed = run_chains(chosen, [MODULE, "chain", str(work), *recipes], per_device, deadline, done)
    finally:
        collect(work, experiments)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(f"{work / RESULTS}; {len(left)} of {len(chosen)} chains are not done")
    if failed:
        raise MQAError(f"not all chains are whole: {', '.join(failed)}; log.txt in their directories says why")


def prepare_tokenizer(experiment: Experiment) -> None:
    """Train the tokenizer that all models of an experiment have, or find it again.

    Raises:
        MQAError: where one with another vocabulary or of another text is there.
    """
    made_of = {"text": experiment.split("train"), "vocab_size": experiment.recipe.vocab_size}
    note = experiment.tokenizer.with_name("tokenizer.json")
    if note.is_file() and (there := read_json(note)) != made_of:
        raise MQAError(f"{experiment.tokenizer} is the tokenizer of {there}, not of {made_of}; give another WORK")
    columns = experiment.recipe.columns
    data = Data(dataset=(experiment.split("train"),), columns=columns or ())
    trained_tokenizer(data, experiment.recipe.vocab_size, experiment.tokenizer, columns is not None, 0)
    write_whole(note, json.dumps(made_of))


@app.command(hidden=True)
def chain(work: Work, recipes: Recipes) -> None:
    """Run the chain that the last of the arguments names."""
    *recipes, name = recipes
    found = next(c for c in chains_of(read(work, recipes)) if c.name == name)
    found.place.mkdir(parents=True, exist_ok=True)
    with (found.place / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise MQAError(f"another process is running {name}; wait for it, or end it") from None
        run_steps(found.steps, found.place / RECORD, name, keep_going=True)


@app.command()
def times(work: Work, recipes: Recipes) -> None:
    """Time decoding of what was converted, while nothing else runs; results are added to WORK/results.jsonl."""
    experiments = read(work, recipes)
    steps = {e.task: step for e in experiments if (step := e.times) is not None}
    for experiment in experiments:
        for path in experiment.timed:
            if not path.is_dir():
                raise MQAError(f"{path} is not there yet; python -m {MODULE} run makes it")
    run_steps(steps, work.resolve() / TIMES, "times")
    collect(work, experiments)


def collect(work: Path, experiments: list[Experiment]) -> None:
    """Write what has been measured, one line a checkpoint, beside what there is of other experiments."""
    path, tasks = work / RESULTS, {experiment.task for experiment in experiments}
    found = [r for r in read_lines(path) if r.get("task") not in tasks] if path.is_file() else []
    found += [record for chain in chains_of(experiments) for record in chain.records()]
    found += [record for experiment in experiments for record in experiment.time_records()]
    write_whole(path, "".join(json.dumps(record) + "\n" for record in found))


@app.command()
def cost(
    work: Work,
    batch: Annotated[int, typer.Option(min=1, help="Rows that are decoded at once.")] = 1024,
    length: Annotated[int, typer.Option(min=4, help="Tokens of source and target.")] = 128,
    rows: Annotated[int, typer.Option(min=1, help="Pairs of a training step, of twice the length.")] = 128,
    steps: Annotated[int, typer.Option(min=4, help="Of training.")] = 24,
    scale: Annotated[int, typer.Option(min=1, help="Divide the widths of the paper's shape by so much.")] = 1,
) -> None:
    """Time training and decoding of the first paper's shape; results are in WORK/cost.jsonl."""
    from .cost import measure

    measure(work, batch, length, rows, steps, scale)


@app.command()
def page(
    docs: Annotated[Path, typer.Argument(help="Directory with reproduction.md.")],
    work: Annotated[
        Path | None, typer.Option(help="Take results.jsonl and cost.jsonl from here first.", show_default=False)
    ] = None,
) -> None:
    """Make tables and pictures of reproduction.md from reproduction/*.jsonl beside it."""
    from .page import fill

    for name in (RESULTS, "cost.jsonl"):
        if work is not None and (work / name).is_file():
            shutil.copyfile(work / name, docs / "reproduction" / name)
    fill(docs)


if __name__ == "__main__":
    run_command(app)
