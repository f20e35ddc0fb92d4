"""The `mqa-hf` command: each job is a command, with the options that its fields declare.

What takes long to import is imported by what runs. Errors that are meant for a person are one line, with exit code 1.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .base.commands import SETTINGS, add_command
from .base.entry import run_command
from .base.options import Job
from .conversion.convert import Conversion
from .conversion.inspect import Inspection
from .eval.benchmark import Benchmark
from .eval.evaluate import Evaluation
from .eval.plan import Planning
from .finetune.pretrain import Pretraining
from .finetune.uptrain import Uptraining

JOBS: tuple[type[Job], ...] = (Conversion, Inspection, Planning, Benchmark, Pretraining, Uptraining, Evaluation)

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


@app.command()
def report(
    evaluation: Annotated[Path, typer.Argument(help="What mqa-hf evaluate has written.", show_default=False)],
    benchmark: Annotated[
        list[Path] | None,
        typer.Option(help="File of mqa-hf benchmark --output; may be repeated.", show_default=False),
    ] = None,
    output: Annotated[Path, typer.Option(help="Directory for the page and its pictures.")] = Path("report"),
    title: Annotated[str | None, typer.Option(help="Of the page.")] = None,
    cards: Annotated[
        bool,
        typer.Option("--cards", help="Put table and pictures into the model cards of converted checkpoints, too."),
    ] = False,
) -> None:
    """Quality against speed on one page that needs no network."""
    from mqa_hf.eval.report import write_report

    page = write_report(evaluation, benchmark or (), output, title, cards)
    Console(markup=False).print(str(page), highlight=False, soft_wrap=True)


@app.command()
def demo(
    output: Annotated[Path, typer.Argument(help="Directory for everything.")] = Path("demo"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Run steps that have changed, and those that need them, again.")
    ] = False,
    show: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
) -> None:
    """The whole job on a small model that comes with the package: convert, train, measure, show."""
    from mqa_hf.base.errors import MQAError

    try:
        from mqa_hf.eval.demo import demo
    except ImportError as error:
        raise MQAError(f"this needs {error.name}: pip install 'mqa-hf[demo]'") from error
    demo(output, overwrite, show)


@app.command()
def recipe(
    file: Annotated[Path, typer.Argument(help="YAML with source, output, convert, ...", show_default=False)],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Run steps that have changed, and those after them, again.")
    ] = False,
) -> None:
    """Convert, train and evaluate by a file; steps that are done are not run again."""
    from mqa_hf.finetune.recipe import run_recipe

    run_recipe(file, overwrite)


def main() -> None:
    """Entry point of `mqa-hf`."""
    run_command(app)


if __name__ == "__main__":
    main()
