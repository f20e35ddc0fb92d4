"""The `mqa-hf` command: each job is a command, with the options that its fields declare.

What takes long to import is imported by what runs. Errors that are meant for a person are one line, with exit code 1.
"""

import inspect
import json
import shlex
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .base import console
from .base.errors import ConversionWarning, MQAError
from .base.options import Field, Job, as_flags, options, summary
from .conversion.convert import Conversion
from .conversion.inspect import Inspection
from .eval.benchmark import Benchmark
from .eval.plan import Planning

JOBS: tuple[type[Job], ...] = (Conversion, Inspection, Planning, Benchmark)

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
        info = typer.Argument(help=help, metavar=metavar, show_default=False)
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
DATA, WRITING, HARNESS, RUNNING = "Held-out text", "What it writes", "lm-eval", "Running"


TRAINING, SCHEDULE, LOGS = "What it is trained on", "How", "Checkpoints and logs"

# Options that pretrain and uptrain share.
Dataset = Annotated[
    list[str],
    typer.Option(
        help="Text file, JSON lines, parquet, or an id of the Hub's datasets (id:configuration[split]); SOURCE=WEIGHT "
        "in a mixture, for which the option is repeated.",
        rich_help_panel=TRAINING,
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        help="Column of the text (default: text) or of chats, or two for translation: en,de.", rich_help_panel=TRAINING
    ),
]
Streaming = Annotated[bool, typer.Option("--streaming", help="Fetch text on the way.", rich_help_panel=TRAINING)]
Validation = Annotated[str | None, typer.Option(help="Text that losses are measured on.", rich_help_panel=TRAINING)]
ValidationTokens = Annotated[int, typer.Option(help="So much of it.", rich_help_panel=TRAINING)]
SequenceLength = Annotated[int, typer.Option(min=2, help="Tokens of a row.", rich_help_panel=SCHEDULE)]
BatchTokens = Annotated[int, typer.Option(min=1, help="Tokens of a step, on all processes.", rich_help_panel=SCHEDULE)]
MicroBatch = Annotated[
    int | None,
    typer.Option(min=1, help="Rows at once on a process. Default: 16,384 tokens.", rich_help_panel=SCHEDULE),
]
Warmup = Annotated[float, typer.Option(help="Share of the steps.", rich_help_panel=SCHEDULE)]
WeightDecay = Annotated[float, typer.Option(help="Of matrices.", rich_help_panel=SCHEDULE)]
Bf16 = Annotated[
    bool | None, typer.Option(help="Compute in bfloat16. Default: on GPUs that can.", rich_help_panel=SCHEDULE)
]
Checkpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.", rich_help_panel=SCHEDULE)
]
Compile = Annotated[bool, typer.Option("--compile", help="torch.compile.", rich_help_panel=SCHEDULE)]
Seed = Annotated[int, typer.Option(help="Of everything.", rich_help_panel=SCHEDULE)]
SaveEvery = Annotated[int, typer.Option(help="Steps between checkpoints. 0: about 20 in all.", rich_help_panel=LOGS)]
Keep = Annotated[int, typer.Option(min=1, help="Checkpoints that are kept.", rich_help_panel=LOGS)]
EvaluateEvery = Annotated[
    int, typer.Option(help="Steps between evaluations. 0: at the start and the end.", rich_help_panel=LOGS)
]
LogEvery = Annotated[int, typer.Option(help="Steps between log lines. 0: about 50 in all.", rich_help_panel=LOGS)]
ReportTo = Annotated[
    str | None,
    typer.Option(help="tensorboard, wandb, both, or none. Default: which are installed.", rich_help_panel=LOGS),
]
Workers = Annotated[int | None, typer.Option(min=0, help="Processes that read data.", rich_help_panel=LOGS)]
Restart = Annotated[
    bool, typer.Option("--restart", help="Begin again where an unfinished run lies.", rich_help_panel=OUTPUT)
]


def schedule_of(given: dict[str, Any]) -> Any:
    """The `Schedule` that the arguments of a command describe, by their names."""
    from mqa_hf.finetune.training import Schedule

    return Schedule(**{field.name: given[field.name] for field in fields(Schedule) if field.name in given})


def text_of(given: dict[str, Any]) -> dict[str, Any]:
    """What `Pretraining` and `Uptraining` know of the text, from the arguments of a command."""
    from mqa_hf.finetune.data import Part

    columns = given["columns"]
    return {
        "dataset": tuple(map(Part.parse, given["dataset"])),
        "columns": () if columns is None else tuple(columns.split(",")),
        **{name: given[name] for name in ("streaming", "validation", "validation_tokens")},
    }


@app.command()
def pretrain(
    output: Annotated[Path, typer.Argument(help="Directory to write.", show_default=False)],
    config: Annotated[
        str,
        typer.Option(
            help="JSON or a file with it: model_type and fields of its configuration; or a published shape by name.",
            rich_help_panel=TRAINING,
        ),
    ],
    dataset: Dataset,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to train on.", rich_help_panel=TRAINING)],
    equal_parameters: Annotated[
        str | None,
        typer.Option(
            help="A configuration: feed-forward layers become so wide that the parameters are as many.",
            rich_help_panel=TRAINING,
            show_default=False,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Directory of a tokenizer. Default: one is trained on the text.", rich_help_panel=TRAINING),
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Entries of one that is trained.", rich_help_panel=TRAINING)] = 8192,
    columns: Columns = None,
    streaming: Streaming = False,
    validation: Validation = None,
    validation_tokens: ValidationTokens = 131_072,
    sequence_length: SequenceLength = 512,
    batch_tokens: BatchTokens = 65_536,
    micro_batch: MicroBatch = None,
    learning_rate: Annotated[float, typer.Option(help="Peak, of AdamW.", rich_help_panel=SCHEDULE)] = 2e-3,
    warmup: Warmup = 0.02,
    weight_decay: WeightDecay = 0.1,
    bf16: Bf16 = None,
    gradient_checkpointing: Checkpointing = False,
    compile: Compile = False,
    seed: Seed = 0,
    save_every: SaveEvery = 0,
    keep: Keep = 2,
    evaluate_every: EvaluateEvery = 0,
    log_every: LogEvery = 0,
    report_to: ReportTo = None,
    workers: Workers = None,
    dtype: Annotated[
        str, typer.Option(help="Of the weights written: float32, float16 or bfloat16.", rich_help_panel=OUTPUT)
    ] = "float32",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model pretrained at OUTPUT.", rich_help_panel=OUTPUT)
    ] = False,
    restart: Restart = False,
) -> None:
    """Train a small model from scratch, to convert it or to compare with."""
    from mqa_hf.base.devices import processes
    from mqa_hf.finetune.pretrain import Pretraining, read_config
    from mqa_hf.finetune.pretrain import pretrain as run

    what = Pretraining(
        config=read_config(config),
        **text_of(locals()),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        equal_parameters=None if equal_parameters is None else read_config(equal_parameters),
    )
    schedule = schedule_of(locals())
    report = run(output, what, schedule, dtype=dtype, overwrite=overwrite, restart=restart)
    if processes().is_main_process:
        loss = "" if report["loss"] is None else f", loss {report['loss']:.3f} nats a token"
        said = f"{output}: {report['parameters']:,} parameters, {report['tokens']:,} tokens{loss}"
        Console(markup=False).print(said, highlight=False, soft_wrap=True)


@app.command()
def uptrain(
    student: Annotated[str, typer.Argument(help="Directory of the converted checkpoint.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Directory to write.", show_default=False)],
    dataset: Dataset,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to train on.", rich_help_panel=TRAINING, show_default=False)
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="In place of --tokens: a share of --pretraining-tokens.", rich_help_panel=TRAINING),
    ] = None,
    pretraining_tokens: Annotated[
        int | None, typer.Option(help="Tokens that the original was trained on.", rich_help_panel=TRAINING)
    ] = None,
    columns: Columns = None,
    streaming: Streaming = False,
    validation: Validation = None,
    validation_tokens: ValidationTokens = 131_072,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="The original. Default: the source that conversion.json names; none: no teacher.",
            rich_help_panel=TRAINING,
            show_default=False,
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="lm, kl, hidden, attention, or a weighted sum such as kl=1,hidden=0.5. Default: kl with a teacher, "
            "else lm.",
            rich_help_panel=TRAINING,
            show_default=False,
        ),
    ] = None,
    attention_tokens: Annotated[
        int,
        typer.Option(help="Tokens of a first stage that fits attention layers alone.", rich_help_panel=TRAINING),
    ] = 0,
    train: Annotated[str, typer.Option(help="all, attention or lora.", rich_help_panel=SCHEDULE)] = "all",
    lora_rank: Annotated[int, typer.Option(min=1, help="Of the adapters.", rich_help_panel=SCHEDULE)] = 32,
    sequence_length: SequenceLength = 512,
    batch_tokens: BatchTokens = 32_768,
    micro_batch: MicroBatch = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Peak, of AdamW. Default: by width, docs/uptraining.md.", rich_help_panel=SCHEDULE),
    ] = None,
    warmup: Warmup = 0.02,
    weight_decay: WeightDecay = 0.1,
    bf16: Bf16 = None,
    gradient_checkpointing: Checkpointing = False,
    compile: Compile = False,
    dropout: Annotated[
        bool | None,
        typer.Option(
            "--dropout/--no-dropout",
            help="Keep the model's own dropout. Default: unless it learns from its teacher.",
            rich_help_panel=SCHEDULE,
            show_default=False,
        ),
    ] = None,
    liger: Annotated[
        bool, typer.Option("--liger", help="Liger's fused losses, where installed.", rich_help_panel=SCHEDULE)
    ] = False,
    seed: Seed = 0,
    save_every: SaveEvery = 0,
    keep: Keep = 2,
    evaluate_every: EvaluateEvery = 0,
    log_every: LogEvery = 0,
    report_to: ReportTo = None,
    workers: Workers = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the checkpoint at OUTPUT.", rich_help_panel=OUTPUT)
    ] = False,
    restart: Restart = False,
) -> None:
    """Train a converted checkpoint, with the original as its teacher, until it is (nearly) as good."""
    from transformers import AutoConfig

    from mqa_hf.base.devices import processes
    from mqa_hf.base.errors import MQAError
    from mqa_hf.finetune.uptrain import Uptraining, default_learning_rate, original_of, parse_losses
    from mqa_hf.finetune.uptrain import uptrain as run

    if (tokens is None) == (alpha is None) or (alpha is None) != (pretraining_tokens is None):
        raise MQAError("pass --tokens, or --alpha with --pretraining-tokens")
    if tokens is None:
        if alpha is None or not 0 < alpha < float("inf"):
            raise MQAError(f"--alpha must be a share above 0; got {alpha}")
        tokens = max(1, round(alpha * (pretraining_tokens or 0)))
    if not (Path(student) / "config.json").is_file():
        raise MQAError(f"{student} is no checkpoint: it has no config.json")
    teacher_revision = None
    if teacher is None:
        teacher, teacher_revision = original_of(Path(student))
    elif teacher == "none":
        teacher = None
    config = AutoConfig.from_pretrained(student)
    width = getattr(config, "decoder", config).hidden_size
    what = Uptraining(
        **text_of(locals()),
        teacher=teacher,
        teacher_revision=teacher_revision,
        losses=parse_losses(loss or ("lm" if teacher is None else "kl")),
        attention_tokens=attention_tokens,
        train=train,
        lora_rank=lora_rank,
        dropout=dropout,
        liger=liger,
    )
    learning_rate = default_learning_rate(train, width) if learning_rate is None else learning_rate
    schedule = schedule_of(locals())
    command = shlex.join(["mqa-hf", *sys.argv[1:]])
    report = run(student, output, what, schedule, overwrite=overwrite, restart=restart, command=command)
    if not processes().is_main_process:
        return
    said = f"{output}: trained on {report['tokens']:,} tokens"
    if report["validation"]:
        before, after = report["validation"]["before"], report["validation"]["after"]
        said += "; " + ", ".join(f"{name} {before[name]:.3f} -> {after[name]:.3f}" for name in after if name in before)
    Console(markup=False).print(said, highlight=False, soft_wrap=True)
    worse = [name for name, _ in what.losses if report["validation"] and after.get(name, 0.0) > before.get(name, 0.0)]
    if worse:
        Console(stderr=True).print(
            f"warning: {', '.join(worse)} on --validation is higher after the training than before it; lower "
            f"--learning-rate ({learning_rate:g}), or train on more --tokens",
            style="yellow",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def evaluate(
    original: Annotated[str, typer.Argument(help="Directory or hub id of the original.", show_default=False)],
    checkpoints: Annotated[
        list[str] | None, typer.Argument(help="What was made of it: directories or hub ids.", show_default=False)
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Directory for results; what is there is not measured again.", rich_help_panel=OUTPUT)
    ] = Path("evaluation"),
    text: Annotated[
        str | None,
        typer.Option(
            help="Held-out text: file, JSON lines, parquet, or an id of the Hub's datasets. Default: Python's manual.",
            rich_help_panel=DATA,
        ),
    ] = None,
    columns: Columns = None,
    tokens: Annotated[int, typer.Option(help="Tokens to predict.", rich_help_panel=DATA)] = 131_072,
    seed: Annotated[int, typer.Option(help="Of the choice of documents.", rich_help_panel=DATA)] = 0,
    window: Annotated[
        int | None,
        typer.Option(
            help="Tokens that a model reads at once. Default: its positions, 2,048 at most.", rich_help_panel=DATA
        ),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from window to window. Default: half of one.", rich_help_panel=DATA)
    ] = None,
    prompts: Annotated[
        int, typer.Option(help="Texts that are continued or translated; 0: none.", rich_help_panel=WRITING)
    ] = 64,
    prompt_tokens: Annotated[int, typer.Option(help="Of a text's beginning.", rich_help_panel=WRITING)] = 64,
    new_tokens: Annotated[int, typer.Option(help="Most tokens to write.", rich_help_panel=WRITING)] = 128,
    beams: Annotated[int, typer.Option(help="Of beam search (encoder-decoder).", rich_help_panel=WRITING)] = 4,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval, with commas between them.", rich_help_panel=HARNESS)
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Directory with tasks of one's own.", rich_help_panel=HARNESS)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Examples of each task.", rich_help_panel=HARNESS)] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens read at once.", rich_help_panel=RUNNING)] = 8_192,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16 or bfloat16. Default: the checkpoint's; float32 on a CPU.", rich_help_panel=RUNNING
        ),
    ] = None,
) -> None:
    """How much worse a checkpoint is than its original: likelihood, distributions, what it writes, tasks."""
    from mqa_hf.base.errors import MQAError

    try:
        from mqa_hf.base.devices import processes
        from mqa_hf.eval import quality
    except ImportError as error:
        raise MQAError(f"this needs {error.name}: pip install 'mqa-hf[evaluation]'") from error
    given = {**locals(), "columns": tuple(columns.split(",")) if columns else ()}
    given["tasks"] = tuple(tasks.split(",")) if tasks else ()
    what = quality.Evaluation(**{f.name: given[f.name] for f in fields(quality.Evaluation)})
    command = shlex.join(["mqa-hf", *sys.argv[1:]])
    results = quality.evaluate(original, checkpoints or (), output, what, command)
    if processes().is_main_process:
        quality.show(results, Console(width=250, markup=False, highlight=False))


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


def show_warning(message: Warning | str, category: type[Warning], *where: Any) -> None:
    if issubclass(category, ConversionWarning):
        console.warn(str(message))
    else:
        _show_warning(message, category, *where)


_show_warning = warnings.showwarning


def main(command: Callable[..., Any] = app) -> None:
    """Entry point: errors meant for a person are printed as one message, with exit code 1."""
    # A job that is told to stop cleans up like one that is interrupted by hand.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    warnings.showwarning = show_warning  # type: ignore[assignment]
    try:
        command()
    except MQAError as error:
        console.stderr().print(f"error: {error}", style="red")
        sys.exit(1)


if __name__ == "__main__":
    main()
