"""Build the command of a job from its options, with the options that all commands share."""

import inspect
import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from . import console
from .entry import STOPPED, run_command
from .errors import MQAError
from .options import Field, Job, as_flags, options, summary

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


def add_command(app: typer.Typer, job: type[Job], hidden: bool = False) -> None:
    """Add a job's command."""

    def run(dry_run: bool = False, as_json: bool = False, quiet: bool = False, verbose: bool = False, **given: Any):
        if quiet and verbose:
            raise MQAError("--quiet and --verbose cannot be combined; give one of them")
        console.set_verbosity(console.QUIET if quiet else console.VERBOSE if verbose else console.NORMAL)
        asked = None
        try:
            asked = job(**{name: value for name, value in given.items() if value is not None})
            if verbose:
                console.say(asked.resolve().command(), console.VERBOSE)
            result = asked.dry_run() if dry_run else asked.run()
        except MQAError as error:
            raise type(error)(as_flags(str(error), job)) from error
        except (KeyboardInterrupt, SystemExit) as end:
            code = 130 if isinstance(end, KeyboardInterrupt) else end.code
            if code in (130, STOPPED):
                console.warn(f"interrupted. {'' if asked is None else as_flags(asked.interrupted(), job)}".rstrip())
            raise typer.Exit(code if isinstance(code, int) else 1) from None
        if not console.first_rank():
            return  # only the first process prints the result
        if as_json:
            typer.echo(json.dumps(result, indent=2, ensure_ascii=False, default=as_plain))
        elif dry_run:
            for name, value in result.items():
                typer.echo(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}")
        else:
            asked.show(result, Console(markup=False, highlight=False))

    parameters = [parameter(field, job) for field in options(job) if field.option.objects != "only"]
    switches = {
        "quiet": "Print only warnings and errors.",
        "verbose": "Print derived options, and the traceback of an error.",
        "as_json": "Print the result as JSON.",
        **({} if job.dry_run is Job.dry_run else {"dry_run": "Print what would be read and written, and exit."}),
    }
    for name, said in switches.items():
        option = typer.Option("--" + name.removeprefix("as_").replace("_", "-"), help=said, rich_help_panel="General")
        parameters.append(switch(name, option))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command(job.name, help=as_flags(summary(job), job), hidden=hidden)(run)


def switch(name: str, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option])


def as_plain(value: Any) -> Any:
    """Convert a record or a path to JSON."""
    return value.model_dump() if hasattr(value, "model_dump") else str(value)


def parameter(field: Field, job: type[Job]) -> inspect.Parameter:
    """The typer parameter of an option."""
    option, default = field.option, field.default
    kind: Any = field.kind
    if field.many:
        kind = str if option.comma else list[kind]
        if not field.required and default:
            default = ",".join(map(str, default)) if option.comma else list(default)
    if not field.required and not default and kind is not bool:
        default, kind = default if field.kind in (int, float) else None, kind | None
    help = escape(as_flags(option.help, job))
    metavar = (
        option.metavar or "|".join(map(str, option.choices)) or (f"<{field.kind.__name__}>" if field.many else None)
    )
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


def run_job(job: type[Job]) -> None:
    """Entry point of a module that is run as `python -m MODULE`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=SETTINGS)
    add_command(app, job)
    run_command(app)
