"""How much quality a short training recovers after a conversion, by start, loss and tokens:

    python -m mqa_hf.finetune.compare SOURCE OUTPUT --dataset train.jsonl --validation validation.jsonl \
        --pretraining-tokens 300000000

converts SOURCE in several ways, trains each as `mqa-hf uptrain` does on shares of the pretraining tokens (each with a
schedule of its own), beside the original on the same tokens, and prints the validation loss of each. OUTPUT gets one
JSON line per training, which is not run again, and a picture.
"""

import itertools
import json
import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from mqa_hf.base.entry import run_command
from mqa_hf.base.errors import ConversionWarning
from mqa_hf.conversion.convert import convert
from mqa_hf.conversion.inspect import inspect

from .uptrain import NO_TEACHER, Uptraining, default_learning_rate, sizes_of

ORIGINAL = "original, LM"
# By name: how the source is converted, the loss (lm: no teacher), and the share of the tokens for attention alone.
RUNS: dict[str, tuple[dict[str, Any], str, float]] = {
    "shared, KL": ({"method": "shared"}, "kl", 0.0),
    "mean, LM": ({"method": "mean"}, "lm", 0.0),
    "mean, KL": ({"method": "mean"}, "kl", 0.0),
    ORIGINAL: ({"kv_heads": 0}, "lm", 0.0),
    "shared, LM": ({"method": "shared"}, "lm", 0.0),
    "mean, attention then KL": ({"method": "mean"}, "kl", 0.2),
    "shared, attention then KL": ({"method": "shared"}, "kl", 0.2),
    "shared, width 2, KL": ({"method": "shared", "head_width": 2}, "kl", 0.0),
    "shared, width 4, KL": ({"method": "shared", "head_width": 4}, "kl", 0.0),
    "shared, 2 heads, KL": ({"method": "shared", "kv_heads": 2}, "kl", 0.0),
    "shared, 4 heads, KL": ({"method": "shared", "kv_heads": 4}, "kl", 0.0),
    "mean, 2 heads, LM": ({"method": "mean", "kv_heads": 2}, "lm", 0.0),
    "mean, 4 heads, LM": ({"method": "mean", "kv_heads": 4}, "lm", 0.0),
    "shared, KL and hidden": ({"method": "shared"}, "kl=1,hidden=1", 0.0),
    "shared, KL and LM": ({"method": "shared"}, "kl=0.5,lm=0.5", 0.0),
}


def picture(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot the loss above the original's best, by share of the pretraining tokens."""
    from matplotlib.figure import Figure

    best = min(r["lm"] for r in results if r["run"] == ORIGINAL)
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for name in sorted(dict.fromkeys(r["run"] for r in results), key=lambda n: n != ORIGINAL):
        points = sorted((r["share"], r["lm"] - best) for r in results if r["run"] == name)
        style: dict[str, Any] = {"ls": ":" if "mean" in name else "-"}
        if name == ORIGINAL:
            style = {"color": "black", "ls": "--"}
        axes.plot(
            [100 * x for x, y in points if y > 0],
            [y for _, y in points if y > 0],
            marker="o",
            ms=4,
            label=name,
            **style,
        )
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks([100 * x for x in sorted({r["share"] for r in results})])
    axes.xaxis.set_major_formatter("{x:g}%")
    axes.set_xlabel("tokens of training, share of the pretraining")
    axes.set_ylabel(f"validation loss above {best:.3f} (the original, trained on too), nats a token")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=130)


def main(
    source: Annotated[Path, typer.Argument(help="The original.")],
    output: Annotated[Path, typer.Argument(help="Directory for results.")],
    dataset: Annotated[str, typer.Option(help="Text to train and fit heads on.")],
    validation: Annotated[str, typer.Option(help="Text to measure on.")],
    pretraining_tokens: Annotated[int, typer.Option(help="Tokens that the original was trained on.")],
    shares: Annotated[str, typer.Option(help="Shares of the pretraining tokens.")] = "0.05,0.01,0.005,0.001",
    runs: Annotated[str | None, typer.Option(help="Names of runs, separated by ;. Default: all.")] = None,
    learning_rates: Annotated[
        str | None, typer.Option(help="Rates to compare. Default: that of mqa-hf uptrain.")
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens per row.")] = 512,
    batch_tokens: Annotated[int, typer.Option(help="Tokens per step.")] = 32_768,
    micro_batch: Annotated[int | None, typer.Option(help="Rows per forward pass.")] = None,
    validation_tokens: Annotated[int, typer.Option(help="Tokens to measure on.")] = 262_144,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens to fit heads on.")] = 131_072,
    device: Annotated[str, typer.Option(help="Device to fit heads on.")] = "cpu",
    train: Annotated[str, typer.Option(help="Weights to train: all, attention or lora.")] = "all",
    limit: Annotated[float, typer.Option(help="Start no training after this many seconds.")] = float("inf"),
) -> None:
    """Compare starts and losses of uptraining."""
    warnings.simplefilter("ignore", ConversionWarning)
    logging.disable_progress_bar()
    begun = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    lines, student = output / "results.jsonl", output / "student"
    results = [json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else []
    heads = inspect(source)["num_key_value_heads"]
    own_rate = default_learning_rate(train, *sizes_of(source))
    rates = [float(r) for r in learning_rates.split(",")] if learning_rates else [own_rate]
    console = Console(width=140, markup=False, highlight=False)
    for name in runs.split(";") if runs else RUNS:
        options, loss, stage = RUNS[name]
        shutil.rmtree(student, ignore_errors=True)
        fitted = options.get("method") == "shared"
        text = {"calibration": dataset, "calibration_tokens": calibration_tokens, "device": device} if fitted else {}
        chosen = {**options, "kv_heads": options.get("kv_heads", 1) or heads, "dtype": "float32"}
        for rate, share in itertools.product(rates, map(float, shares.split(","))):
            key = {"run": name, "share": share, "learning_rate": rate, "train": train}
            if any(all(r.get(k) == v for k, v in key.items()) for r in results):
                continue
            if time.monotonic() - begun > limit:
                console.print(f"no time left for {key}")
                continue
            if not student.exists():
                convert(source, student, **chosen, **text)
            tokens = max(1, round(share * pretraining_tokens))
            job = Uptraining(
                student,
                output / "trained",
                dataset=(dataset,),
                validation=validation,
                validation_tokens=validation_tokens,
                teacher=NO_TEACHER if loss == "lm" else str(source),
                loss=loss,
                attention_tokens=round(stage * tokens),
                train=train,
                tokens=tokens,
                sequence_length=sequence_length,
                batch_tokens=batch_tokens,
                micro_batch=micro_batch,
                learning_rate=rate,
                save_every=10**9,
                report_to=("none",),
                overwrite=True,
                restart=True,
            )
            before, after = measure(job, key)
            for line in [after] + [before] * (not any(r["run"] == name and not r["share"] for r in results)):
                results.append(line)
                with lines.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            console.print_json(json.dumps(after), indent=None)
    shutil.rmtree(student, ignore_errors=True)
    shutil.rmtree(output / "trained", ignore_errors=True)
    here = [r for r in results if r["learning_rate"] == rates[0] and r["train"] == train]
    if any(r["run"] == ORIGINAL for r in here):
        picture(here, output / "curves.png")
    show(results, console)


def measure(job: Uptraining, key: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure before and after a training; returns both result lines."""
    start = time.monotonic()
    record = job.run()
    assert record.validation is not None
    after = {**key, "tokens": record.tokens, **record.validation.after}
    after["seconds"] = round(time.monotonic() - start, 1)
    return {**key, "share": 0.0, "tokens": 0, **record.validation.before}, after


def show(results: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the validation loss by run and share of the pretraining tokens."""
    shares = sorted({r["share"] for r in results})
    table = Table(title="validation loss, nats a token, by share of the pretraining tokens", title_justify="left")
    table.add_column("run")
    for share in shares:
        table.add_column(f"{share:.1%}", justify="right")
    kinds = dict.fromkeys((r["run"], r["train"], r["learning_rate"]) for r in results if r["share"])
    for run_name, train, rate in kinds:
        cells = []
        for share in shares:
            found = [
                r["lm"]
                for r in results
                if r["run"] == run_name
                and r["share"] == share
                and (not share or (r["train"], r["learning_rate"]) == (train, rate))
            ]
            cells.append(f"{found[0]:.3f}" if found else "")
        table.add_row(f"{run_name} ({train}, {rate:g})", *cells)
    console.print(table)


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
