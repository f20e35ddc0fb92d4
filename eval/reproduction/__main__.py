"""`python -m mqa_hf.eval.reproduction`: run, cost, page."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from mqa_hf.cli import main
from mqa_hf.conversion.errors import ConversionError
from mqa_hf.finetune.data import Part
from mqa_hf.finetune.pretrain import Pretraining, find_tokenizer
from mqa_hf.finetune.recipe import run_steps

from .experiments import Chain, Experiment
from .queue import run_chains

MODULE = "mqa_hf.eval.reproduction"
app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

Work = Annotated[Path, typer.Argument(help="Directory for everything.")]
Recipes = Annotated[
    list[str],
    typer.Argument(
        help="RECIPE=TEXT: translation, language or a YAML file; a directory with train.jsonl.xz, validation.jsonl.xz "
        "and test.jsonl.xz, or an id of the Hub's data sets with these splits."
    ),
]


def read(work: Path, recipes: list[str]) -> list[Experiment]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [Experiment.parse(said, work.resolve(), device) for said in recipes]


def chains_of(experiments: list[Experiment]) -> list[Chain]:
    """Of all experiments, those first that others need."""
    return sorted((chain for e in experiments for chain in e.chains()), key=lambda chain: len(chain.needs))


@app.command()
def run(
    work: Work,
    recipes: Recipes,
    per_device: Annotated[int, typer.Option(min=1, help="Chains at once on a GPU.")] = 3,
    limit: Annotated[float, typer.Option(help="Stop after so many seconds.")] = float("inf"),
    only: Annotated[str | None, typer.Option(help="Chains whose names have this in them.")] = None,
) -> None:
    """Run experiments, or what is left of them; results are in WORK/results.jsonl."""
    experiments = read(work, recipes)
    for experiment in experiments:
        what = Pretraining(
            config={},
            dataset=(Part(experiment.split("train")),),
            columns=tuple(experiment.recipe.get("columns", "").split(",")) if experiment.columns else (),
            vocab_size=experiment.recipe["vocab_size"],
        )
        find_tokenizer(what, experiment.tokenizer, bool(experiment.columns), 0)
    chains = chains_of(experiments)
    chosen = [chain for chain in chains if only is None or only in chain.name]
    left, failed = run_chains(chosen, [MODULE, "chain", str(work), *recipes], work, per_device, limit)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    collect(work, experiments)
    console.print(f"{work / 'results.jsonl'}; {left} chains are not done")
    if failed:
        raise ConversionError(f"{len(failed)} chains failed: {', '.join(failed)}; see log.txt in their directories")


@app.command(hidden=True)
def chain(work: Work, recipes: Recipes) -> None:
    """Run the chain that the last of the arguments names."""
    *recipes, name = recipes
    found = next(c for c in chains_of(read(work, recipes)) if c.name == name)
    run_steps(found.steps, work.resolve() / name / "steps.json", name)


@app.command()
def times(work: Work, recipes: Recipes) -> None:
    """Time decoding of what was converted, while nothing else runs; results are added to WORK/results.jsonl."""
    experiments = read(work, recipes)
    steps = {e.task: e.times for e in experiments}
    run_steps(steps, work.resolve() / "times.json", "times")
    collect(work, experiments)


def collect(work: Path, experiments: list[Experiment]) -> None:
    """Write what has been measured, one line a checkpoint."""
    measured = [m.record() for chain in chains_of(experiments) for m in chain.measured]
    found = [record for record in measured if record is not None]
    found += [record for experiment in experiments for record in experiment.time_records()]
    path = work / "results.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in found), encoding="utf-8")


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
    docs: Annotated[Path, typer.Argument(help="Directory with reproduction.md and what was measured.")],
) -> None:
    """Make tables and pictures of reproduction.md from reproduction/*.jsonl."""
    from .page import fill

    fill(docs)


if __name__ == "__main__":
    main(app)
