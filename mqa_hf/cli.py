"""The `mqa-hf` command: each job is a command, with the options that its fields declare.

Slow imports happen when a job runs. Errors are printed as one line, with exit code 1.
"""

from importlib.metadata import version
from typing import Annotated

import typer

from .base.commands import SETTINGS, add_command
from .base.entry import run_command
from .base.options import Job
from .conversion.convert import Conversion
from .conversion.inspect import Inspection
from .eval.benchmark import Benchmark
from .eval.demo import Demo
from .eval.evaluate import Evaluation
from .eval.plan import Planning
from .eval.recipe import Recipe
from .eval.report import Report
from .finetune.pretrain import Pretraining
from .finetune.uptrain import Uptraining

JOBS: tuple[type[Job], ...] = (
    *(Conversion, Inspection, Planning, Benchmark, Pretraining, Uptraining),
    *(Evaluation, Report, Recipe, Demo),
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=SETTINGS,
    help="Turn pretrained multi-head checkpoints into multi-query ones.",
)


@app.callback(invoke_without_command=True)
def package(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if show_version:
        typer.echo(f"mqa-hf {version('mqa-hf')}")
        raise typer.Exit


for _job in JOBS:
    add_command(app, _job)


def main() -> None:
    """Entry point of `mqa-hf`."""
    run_command(app)


if __name__ == "__main__":
    main()
