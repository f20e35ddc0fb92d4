"""`python -m mqa_hf.eval.reproduction`: run, times, cost, page."""

import fcntl
import json
import re
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from mqa_hf.base.commands import SETTINGS, add_command
from mqa_hf.base.console import say
from mqa_hf.base.entry import run_command
from mqa_hf.base.errors import MQAError
from mqa_hf.base.files import read_json, write_whole
from mqa_hf.base.options import Job, Option, Options
from mqa_hf.base.steps import run_steps
from mqa_hf.finetune.options import Data
from mqa_hf.finetune.tokenizer import trained_tokenizer

from .cost import Costs
from .experiments import RECORD, TIMES, Chain, Experiment, read_lines
from .page import Page
from .queue import run_chains

MODULE = "mqa_hf.eval.reproduction"
RESULTS = "results.jsonl"


def read(work: Path, recipes: Sequence[str]) -> list[Experiment]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    experiments = [Experiment.parse(said, work.resolve(), device) for said in recipes]
    tasks = [experiment.task for experiment in experiments]
    if len(set(tasks)) < len(tasks):
        raise MQAError(f"recipes need different names; got {', '.join(tasks)}")
    return experiments


def chains_of(experiments: list[Experiment]) -> list[Chain]:
    """Chains of all experiments: those that others need first, then one seed after another."""
    chains = (chain for experiment in experiments for chain in experiment.chains())
    return sorted(chains, key=lambda chain: (len(chain.needs), chain.seed))


@dataclass(frozen=True)
class Experiments(Options):
    """Recipes with their texts, and the working directory."""

    work: Annotated[Path, Option("Working directory.")]
    recipes: Annotated[
        Sequence[str],
        Option(
            "RECIPE=TEXT: translation, language or a YAML file; a directory with train.jsonl.xz, validation.jsonl.xz "
            "and, for translation, test.jsonl.xz, or a dataset id with these splits."
        ),
    ]


@dataclass(frozen=True)
class Running(Experiments, Job[list[str]]):
    """Run the remaining experiments; results are in WORK/results.jsonl.

    Returns:
        Names of the chains that are not done.
    """

    name = "run"

    _: KW_ONLY
    per_device: Annotated[int | None, Option("Chains at once per GPU. Default: 3; 1 without a GPU.", min=1)] = None
    limit: Annotated[float | None, Option("Stop after this many seconds.", min=0)] = None
    only: Annotated[str | None, Option("Run chains whose names match this regular expression.")] = None
    restart: Annotated[bool, Option("Restart unfinished trainings of these chains.")] = False

    def chosen(self, chains: Sequence[Chain], done: set[str]) -> list[Chain]:
        """The requested chains; raises MQAError if they need others that are not done."""
        try:
            chosen = [chain for chain in chains if self.only is None or re.search(self.only, chain.name)]
        except re.error as error:
            raise MQAError(f"`only` {self.only} is not a regular expression: {error}") from None
        needed = {name for chain in chosen for name in chain.needs} - done - {chain.name for chain in chosen}
        if not chosen:
            raise MQAError(f"`only` {self.only}: matches no chain; names are such as {chains[0].name}")
        if needed:
            raise MQAError(f"`only` {self.only}: these chains need {', '.join(sorted(needed))}, not run yet")
        return chosen

    def run(self) -> list[str]:
        deadline = time.monotonic() + (float("inf") if self.limit is None else self.limit)
        signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))  # also stop chains if the terminal closes
        experiments = read(self.work, self.recipes)
        chains = chains_of(experiments)
        done = {chain.name for chain in chains if chain.done}
        chosen = self.chosen(chains, done)
        for experiment in experiments:
            prepare_tokenizer(experiment)
        if self.restart:
            for chain in chosen:
                for unfinished in chain.place.glob(".*.*train"):
                    shutil.rmtree(unfinished)
        per_device = self.per_device or (3 if torch.cuda.is_available() else 1)
        words = [MODULE, OneChain.name, str(self.work), *self.recipes]
        try:
            left, failed = run_chains(chosen, words, per_device, deadline, done)
        finally:
            collect(self.work, experiments)
        say(f"{self.work / RESULTS}; {len(left)} of {len(chosen)} chains are not done")
        if failed:
            raise MQAError(f"chains failed: {', '.join(failed)}; see log.txt in their directories")
        return left


def prepare_tokenizer(experiment: Experiment) -> None:
    """Train the tokenizer that all models of an experiment share, or reuse it.

    Raises:
        MQAError: if there is one with another vocabulary or from another text.
    """
    made_of = {"text": experiment.split("train"), "vocab_size": experiment.recipe.vocab_size}
    note = experiment.tokenizer.with_name("tokenizer.json")
    if note.is_file() and (there := read_json(note)) != made_of:
        raise MQAError(f"{experiment.tokenizer} is the tokenizer of {there}, not of {made_of}; give another WORK")
    columns = experiment.recipe.columns
    data = Data(dataset=(experiment.split("train"),), columns=columns or ())
    trained_tokenizer(data, experiment.recipe.vocab_size, experiment.tokenizer, columns is not None, 0)
    write_whole(note, json.dumps(made_of))


@dataclass(frozen=True)
class OneChain(Experiments, Job[None]):
    """Run the chain named by the last argument."""

    name = "chain"

    def run(self) -> None:
        *recipes, name = self.recipes
        chains = {chain.name: chain for chain in chains_of(read(self.work, recipes))}
        if name not in chains:
            raise MQAError(f"there is no chain {name}; there are {', '.join(chains)}")
        found = chains[name]
        found.place.mkdir(parents=True, exist_ok=True)
        with (found.place / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise MQAError(f"another process is running {name}; wait for it, or end it") from None
            run_steps(found.steps, found.place / RECORD, name, keep_going=True)


@dataclass(frozen=True)
class Times(Experiments, Job[None]):
    """Time decoding of conversions while nothing else runs; results are added to WORK/results.jsonl."""

    name = "times"

    def run(self) -> None:
        experiments = read(self.work, self.recipes)
        steps = {e.task: step for e in experiments if (step := e.times) is not None}
        for experiment in experiments:
            for path in experiment.timed:
                if not path.is_dir():
                    raise MQAError(f"{path} does not exist yet; make it with python -m {MODULE} run")
        run_steps(steps, self.work.resolve() / TIMES, "times")
        collect(self.work, experiments)


def collect(work: Path, experiments: list[Experiment]) -> None:
    """Write the results, one line per checkpoint, and keep those of other experiments."""
    path, tasks = work / RESULTS, {experiment.task for experiment in experiments}
    found = [r for r in read_lines(path) if r.get("task") not in tasks] if path.is_file() else []
    found += [record for chain in chains_of(experiments) for record in chain.records()]
    found += [record for experiment in experiments for record in experiment.time_records()]
    write_whole(path, "".join(json.dumps(record) + "\n" for record in found))


app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, context_settings=SETTINGS)
for job in (Running, Times, Costs, Page):
    add_command(app, job)
add_command(app, OneChain, hidden=True)

if __name__ == "__main__":
    run_command(app)
