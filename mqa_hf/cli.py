"""The `mqa-hf` command: each job is a command, with the options that its fields declare.

What takes long to import is imported by what runs. Errors that are meant for a person are one line, with exit code 1.
"""

import inspect
import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .base import console
from .base.entry import run_command
from .base.errors import MQAError
from .base.options import Field, Job, as_flags, options, summary
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
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    help="Turn pretrained multi-head checkpoints into multi-query ones.",
)


@app.callback(invoke_without_command=True)
def package(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if show_version:
        typer.echo(f"mqa-hf {version('mqa-hf')}")
        raise typer.Exit


def add(job: type[Job]) -> None:
    """Add a job's command."""

    def run(dry_run: bool = False, as_json: bool = False, quiet: bool = False, verbose: bool = False, **given: Any):
        console.set_verbosity(console.QUIET if quiet else console.VERBOSE if verbose else console.NORMAL)
        asked = None
        try:
            asked = job(**{name: value for name, value in given.items() if value is not None})
            result = asked.dry_run() if dry_run else asked.run()
        except MQAError as error:
            raise MQAError(as_flags(str(error), job)) from error
        except KeyboardInterrupt:
            console.warn(f"interrupted. {'' if asked is None else as_flags(asked.interrupted(), job)}".rstrip())
            raise typer.Exit(130) from None
        if as_json:
            typer.echo(json.dumps(result, indent=2, ensure_ascii=False, default=as_plain))
        elif dry_run:
            for name, value in result.items():
                typer.echo(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}")
        else:
            asked.show(result, Console(markup=False, highlight=False))

    parameters = [parameter(field, job) for field in options(job)]
    switches = {
        "quiet": "Say nothing but warnings and errors.",
        "verbose": "Say more.",
        "as_json": "Print the result as JSON.",
        **({} if job.dry_run is Job.dry_run else {"dry_run": "Say what would be read and written, and do nothing."}),
    }
    for name, said in switches.items():
        option = typer.Option("--" + name.removeprefix("as_").replace("_", "-"), help=said, rich_help_panel="General")
        parameters.append(switch(name, option))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command(job.name, help=as_flags(summary(job), job))(run)


def switch(name: str, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option])


def as_plain(value: Any) -> Any:
    """What JSON has in place of a record or a path."""
    return value.model_dump() if hasattr(value, "model_dump") else str(value)


def parameter(field: Field, job: type[Job]) -> inspect.Parameter:
    """What typer reads of an option."""
    option, default = field.option, field.default
    kind: Any = field.kind
    if field.many:
        kind = str if option.comma else list[kind]
        if not field.required and default:
            default = ",".join(map(str, default)) if option.comma else list(default)
    if not field.required and not default and kind is not bool:
        default, kind = default if field.kind in (int, float) else None, kind | None
    help = as_flags(option.help, job)
    metavar = option.metavar or "|".join(option.choices) or (f"<{field.kind.__name__}>" if field.many else None)
    if field.positional:
        info = typer.Argument(help=help, metavar=field.name.upper(), show_default=False)
    else:
        flags = [field.flag] if field.kind is bool and not field.optional else []
        shown = not field.required and default not in (None, False)
        info = typer.Option(*flags, help=help, metavar=metavar, show_default=shown, rich_help_panel=field.panel)
    given = inspect.Parameter.empty if field.required else default
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=given, annotation=Annotated[kind, info]
    )


for _job in JOBS:
    add(_job)


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


def numbers(option: str, text: str) -> list[int]:
    """The positive integers of a comma-separated list."""
    from mqa_hf.base.errors import MQAError

    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() and int(part) for part in parts):
        raise MQAError(f"{option} takes positive integers with commas between them, got {text!r}")
    return [int(part) for part in parts]


def main() -> None:
    """Entry point of `mqa-hf`."""
    run_command(app)


if __name__ == "__main__":
    main()
