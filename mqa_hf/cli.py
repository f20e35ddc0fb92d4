"""The `mqa-hf` command: each job is a command, with the options that its fields declare.

What takes long to import is imported by what runs. Errors that are meant for a person are one line, with exit code 1.
"""

import inspect
import json
import shlex
import sys
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
from .eval.evaluate import Evaluation
from .eval.plan import Planning
from .finetune.pretrain import Pretraining
from .finetune.uptrain import Uptraining

JOBS: tuple[type[Job], ...] = (Conversion, Inspection, Planning, Pretraining, Uptraining, Evaluation)

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


OUTPUT = "Output"


@app.command()
def benchmark(
    shapes: Annotated[
        list[str],
        typer.Argument(help="Published shapes by name, directories or hub ids.", show_default=False),
    ],
    kv_heads: Annotated[
        str, typer.Option(help="Key/value heads to time; `original`: the source's own.")
    ] = "original,1",
    engines: Annotated[
        str | None,
        typer.Option(
            help="mqa-hf; dynamic and static are transformers' loops. Default: mqa-hf,dynamic; dynamic for types that "
            "run in their own class only.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[str, typer.Option(help="Rows decoded at once.")] = "1",
    context: Annotated[str, typer.Option(help="Positions in the cache, or tokens of the source.")] = "512",
    cells: Annotated[
        str | None, typer.Option(help="In place of both: pairs such as 1x512,16x4096.", show_default=False)
    ] = None,
    beams: Annotated[str, typer.Option(help="Beams, of encoder-decoder shapes.")] = "1",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens that are timed.")] = 48,
    dtype: Annotated[str | None, typer.Option(help="Default: bfloat16 on a GPU, float32 on a CPU.")] = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one.")] = None,
    window: Annotated[int | None, typer.Option(help="Positions that self-attention sees. Default: all.")] = None,
    largest_batch: Annotated[
        bool, typer.Option("--largest-batch", help="Time the largest batch that fits at each context, too.")
    ] = False,
    prefill_limit: Annotated[
        int, typer.Option(help="Largest batch times context of which the first token is timed; 0: of none.")
    ] = 32768,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Turns that the models take. Default: 3 on a CPU, 1 on a GPU.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File that gets one JSON line per cell.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Directory for pictures.")] = None,
) -> None:
    """Time decoding: the original, grouped and multi-query, this package's loop beside transformers'."""
    import torch

    from mqa_hf.base.errors import MQAError
    from mqa_hf.eval.speed import benchmark

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    pairs = [(b, n) for b in numbers("--batch", batch) for n in numbers("--context", context)]
    if cells is not None:
        split = [cell.split("x") for cell in cells.split(",")]
        if any(len(cell) != 2 for cell in split):
            raise MQAError(f"--cells takes pairs of batch and context such as 1x512,16x4096, got {cells!r}")
        pairs = [(numbers("--cells", b)[0], numbers("--cells", n)[0]) for b, n in split]
    heads = [0 if part.strip() == "original" else numbers("--kv-heads", part)[0] for part in kv_heads.split(",")]
    benchmark(
        shapes,
        heads,
        None if engines is None else [engine.strip() for engine in engines.split(",")],
        [(*pair, k) for pair in pairs for k in numbers("--beams", beams)],
        tokens,
        dtype or ("float32" if device == "cpu" else "bfloat16"),
        device,
        window,
        sorted({n for _, n in pairs}) if largest_batch else [],
        prefill_limit,
        rounds,
        output,
        plots,
        shlex.join(["mqa-hf", *sys.argv[1:]]),
    )


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
