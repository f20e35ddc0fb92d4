"""The `mqa-hf` command. What takes long to import is imported by the command that needs it."""

import json
import shlex
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turn pretrained multi-head checkpoints into multi-query ones.",
)

Source = Annotated[str, typer.Argument(help="Directory or hub id of the checkpoint.", show_default=False)]
KVHeads = Annotated[int, typer.Option(min=1, help="Key/value heads of the result; a divisor of the source's.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
IgnoreSwitch = Annotated[
    list[str] | None,
    typer.Option(help="An unknown switch in config.json that does not change the model; may be repeated."),
]

# What `conversion.json` says of each layer, by method.
ERRORS = (
    *("key_error", "value_error", "cross_key_error", "cross_value_error"),
    *("attention_error", "attention_kl", "discarded_key_energy", "discarded_value_energy"),
    *("cross_attention_error", "cross_attention_kl", "cross_discarded_key_energy", "cross_discarded_value_energy"),
)
OUTPUT, HUB, SHARED = "Output", "Hub", "Fitted heads (--method shared)"
DATA, WRITING, HARNESS, RUNNING = "Held-out text", "What it writes", "lm-eval", "Running"


@app.command()
def convert(
    source: Source,
    output: Annotated[Path, typer.Argument(help="Directory to write.", show_default=False)],
    kv_heads: KVHeads = 1,
    method: Annotated[str, typer.Option(help="How heads become one: mean, first, random or shared.")] = "mean",
    seed: Annotated[int, typer.Option(help="Seed of --method random and shared.")] = 0,
    attention: Annotated[
        str | None,
        typer.Option(
            help="Of an encoder-decoder model, the attentions to convert: any of decoder,cross,encoder. "
            "Default: decoder,cross.",
            show_default=False,
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(help="Positions that the decoder's self-attention sees, the current one included. Default: all."),
    ] = None,
    ignore_switch: IgnoreSwitch = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text file, JSON lines, parquet, or an id of the Hub's datasets. Default: Python's manual.",
            rich_help_panel=SHARED,
        ),
    ] = None,
    calibration_tokens: Annotated[
        int, typer.Option(help="Tokens that heads are fitted on.", rich_help_panel=SHARED)
    ] = 131_072,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sequence.", rich_help_panel=SHARED)] = 512,
    calibration_columns: Annotated[
        str | None,
        typer.Option(
            help="Column of the text; for encoder-decoder models also two, such as en,de: read and written.",
            rich_help_panel=SHARED,
        ),
    ] = None,
    head_width: Annotated[
        float, typer.Option(help="Width of a new head in units of an old one.", rich_help_panel=SHARED)
    ] = 1,
    key_width: Annotated[
        float | None, typer.Option(help="The same, of keys alone.", rich_help_panel=SHARED, show_default=False)
    ] = None,
    value_width: Annotated[
        float | None, typer.Option(help="The same, of values alone.", rich_help_panel=SHARED, show_default=False)
    ] = None,
    cache_budget: Annotated[
        str | None,
        typer.Option(
            help="In place of widths: cache bytes per token at 16 bits, or a share of the source's such as 25%. "
            "The widths of each layer are chosen so that the least is lost.",
            rich_help_panel=SHARED,
        ),
    ] = None,
    refit: Annotated[
        bool | None,
        typer.Option(
            help="Whether output projections are refitted on the calibration text. Default: with --method shared.",
            rich_help_panel=SHARED,
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where layers run.", rich_help_panel=SHARED)] = "cpu",
    target: Annotated[
        str,
        typer.Option(
            help="mqa: this package's class, as remote code. native: a class of transformers, where one fits.",
            rich_help_panel=OUTPUT,
        ),
    ] = "mqa",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16 or bfloat16. Default: as in the source.", rich_help_panel=OUTPUT),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights.", rich_help_panel=OUTPUT)] = "5GB",
    allow_nonfinite: Annotated[
        bool,
        typer.Option("--allow-nonfinite", help="Convert weights that hold NaN or infinity.", rich_help_panel=OUTPUT),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the checkpoint at OUTPUT.", rich_help_panel=OUTPUT)
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub id.", rich_help_panel=HUB)
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(help="Repository to upload the result to.", rich_help_panel=HUB)
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.", rich_help_panel=HUB)
    ] = False,
) -> None:
    """Convert a checkpoint to fewer key/value heads."""
    from mqa_hf.conversion import ConversionWarning, convert

    warnings.simplefilter("ignore", ConversionWarning)  # they are printed below
    report = convert(
        source,
        output,
        kv_heads=kv_heads,
        method=method,
        attentions=None if attention is None else [name.strip() for name in attention.split(",")],
        window=window,
        calibration=calibration,
        calibration_columns=() if calibration_columns is None else calibration_columns.split(","),
        calibration_tokens=calibration_tokens,
        sequence_length=sequence_length,
        head_width=head_width,
        key_width=key_width,
        value_width=value_width,
        cache_budget=cache_budget,
        refit=refit,
        device=device,
        target=target,
        dtype=dtype,
        seed=seed,
        revision=revision,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        ignore_switches=ignore_switch or (),
        allow_nonfinite=allow_nonfinite,
        push_to_hub=push_to_hub,
        private=private,
        progress=True,
    )
    for message in report["warnings"]:
        Console(stderr=True).print(f"warning: {message}", style="yellow", markup=False, highlight=False)
    cache, cross = report["kv_bytes_per_token"], report["cross_kv_bytes_per_token"]
    attentions = report["attentions"]
    heads = ", ".join(
        f"{n['before']} -> {n['after']} key/value heads" + (f" ({name})" if len(attentions) > 1 else "")
        for name, n in attentions.items()
    )
    source_tokens = f", {cross['before']:,} -> {cross['after']:,} per source token" if cross["before"] else ""
    Console(markup=False).print(
        f"{output}: {heads}; {cache['before']:,} -> {cache['after']:,} cache bytes per token{source_tokens}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def inspect(
    source: Source,
    kv_heads: KVHeads = 1,
    ignore_switch: IgnoreSwitch = None,
    revision: Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a checkpoint is and what a conversion would make of it, without reading weights."""
    from mqa_hf.conversion import inspect

    result = inspect(source, kv_heads=kv_heads, revision=revision, ignore_switches=ignore_switch or ())
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name in (
        "source",
        "family",
        "encoder_layers",
        "layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ):
        if name in result:
            table.add_row(name.replace("_", " "), str(result[name]))
    if "parameters" in result:
        table.add_row("parameters", f"{result['parameters']:,}")
        for name in ("kv_bytes_per_token", "cross_kv_bytes_per_token"):
            if name in result:
                cache = result[name]
                after = f" -> {cache['after']:,} with {kv_heads} key/value head(s)" if "after" in cache else ""
                title = "cache bytes per token" if name.startswith("kv") else "cache bytes per source token"
                table.add_row(title, f"{cache['now']:,}{after}")
    answer = "yes" if result["convertible"] else "no"
    table.add_row("can be converted", f"{answer}: {result['reason']}" if result["reason"] else answer)
    if result.get("native") is not None:
        table.add_row("native target", result["native"] or "none")
    if result["conversion"]:
        conversion = result["conversion"]
        table.add_row("made by", conversion["command"])
        if "held_out_loss" in conversion:
            loss = conversion["held_out_loss"]
            measured = f" ({loss['tokens']:,} tokens of {loss['text']})" if "tokens" in loss else ""
            table.add_row("held-out loss", f"{loss['before']:.3f} -> {loss['after']:.3f} nats per token{measured}")
        for name in ERRORS:
            errors = [layer[name] for layer in conversion["layers"] if layer.get(name) is not None]
            if not errors:
                continue
            table.add_row(name.replace("_", " "), f"{min(errors):.3f} to {max(errors):.3f} over the layers")
    if result["training"]:
        training = result["training"]
        table.add_row("trained on", f"{training['tokens']:,} tokens")
        for name, loss in ((training["validation"] or {}).get("after") or {}).items():
            before = training["validation"]["before"].get(name)
            table.add_row(
                f"{name} on validation text", f"{loss:.3f}" if before is None else f"{before:.3f} -> {loss:.3f}"
            )
        if training["command"]:
            table.add_row("trained by", training["command"])
    Console(markup=False).print(table)


@app.command()
def plan(
    shape: Annotated[
        str, typer.Argument(help="A published shape by name, a directory or a hub id.", show_default=False)
    ],
    kv_heads: Annotated[
        str | None,
        typer.Option(
            help="Key/value heads to compare with the original's. Default: those of 1, 2, 4 and 8 that divide them.",
            show_default=False,
        ),
    ] = None,
    widths: Annotated[
        str | None,
        typer.Option(
            help="Widths of a new head in units of an old one. Default: 1,2; of native targets 1.", show_default=False
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="mqa or native, as of convert. Default: mqa; native where the type is converted in its own class "
            "only.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows decoded at once.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Positions in the cache.")] = 4096,
    source: Annotated[int, typer.Option(min=0, help="Positions of the encoder's output, where there is one.")] = 512,
    device: Annotated[str, typer.Option(help="h100, a100-80gb, l4, ..., or measured: the one that is here.")] = "h100",
    dtype: Annotated[str, typer.Option(help="Of weights and cache.")] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how fast decoding can be with fewer key/value heads, before anything is converted."""
    from mqa_hf.eval.roofline import show

    heads = None if kv_heads is None else numbers("--kv-heads", kv_heads)
    wide = None if widths is None else numbers("--widths", widths)
    show(shape, heads, wide, batch, context, device, source, dtype, as_json, target)


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

    from mqa_hf.conversion import ConversionError
    from mqa_hf.eval.speed import benchmark

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    pairs = [(b, n) for b in numbers("--batch", batch) for n in numbers("--context", context)]
    if cells is not None:
        split = [cell.split("x") for cell in cells.split(",")]
        if any(len(cell) != 2 for cell in split):
            raise ConversionError(f"--cells takes pairs of batch and context such as 1x512,16x4096, got {cells!r}")
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
    from mqa_hf.finetune.pretrain import Pretraining, read_config
    from mqa_hf.finetune.pretrain import pretrain as run
    from mqa_hf.finetune.training import processes

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

    from mqa_hf.conversion import ConversionError
    from mqa_hf.finetune.training import processes
    from mqa_hf.finetune.uptrain import Uptraining, default_learning_rate, original_of, parse_losses
    from mqa_hf.finetune.uptrain import uptrain as run

    if (tokens is None) == (alpha is None) or (alpha is None) != (pretraining_tokens is None):
        raise ConversionError("pass --tokens, or --alpha with --pretraining-tokens")
    if tokens is None:
        if alpha is None or not 0 < alpha < float("inf"):
            raise ConversionError(f"--alpha must be a share above 0; got {alpha}")
        tokens = max(1, round(alpha * (pretraining_tokens or 0)))
    if not (Path(student) / "config.json").is_file():
        raise ConversionError(f"{student} is no checkpoint: it has no config.json")
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
    from mqa_hf.conversion import ConversionError

    try:
        from mqa_hf.eval import quality
        from mqa_hf.finetune.training import processes
    except ImportError as error:
        raise ConversionError(f"this needs {error.name}: pip install 'mqa-hf[evaluation]'") from error
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
    from mqa_hf.conversion import ConversionError

    try:
        from mqa_hf.eval.demo import demo
    except ImportError as error:
        raise ConversionError(f"this needs {error.name}: pip install 'mqa-hf[demo]'") from error
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
    from mqa_hf.conversion import ConversionError

    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() and int(part) for part in parts):
        raise ConversionError(f"{option} takes positive integers with commas between them, got {text!r}")
    return [int(part) for part in parts]


def main(command: Callable[[], None] = app) -> None:
    """Entry point: errors meant for a person are printed as one message, with exit code 1."""
    # A job that is told to stop cleans up like one that is interrupted by hand.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        command()
    except ValueError as error:
        from mqa_hf.conversion import ConversionError

        if not isinstance(error, ConversionError):
            raise
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
