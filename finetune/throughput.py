"""Compare the speed of uptraining with transformers' Trainer on the same rows:

    python -m mqa_hf.finetune.throughput ORIGINAL CONVERTED --dataset text.jsonl

Tokens per second and model FLOP utilisation over the second half of a short training of each kind; and what the
teacher costs. The plain loop is the original's own class with its own loss on packed rows.
"""

import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, Trainer, TrainerCallback
from transformers.utils import logging

from mqa_hf.base.devices import peak_rate
from mqa_hf.base.entry import run_command
from mqa_hf.conversion.loading import load_model

from .arguments import training_arguments
from .data import IGNORED, collate_packed, training_set
from .losses import Objective
from .order import in_order
from .teacher import load_teacher
from .trainer import compile_layers, operations_per_token, train
from .uptrain import Uptraining
from .uptrainer import tokenizer_of


class StepClock(TrainerCallback):
    """Records the time of each log, which synchronizes the device by reading the loss."""

    def __init__(self) -> None:
        self.times: list[tuple[int, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None and "loss" in logs:
            self.times.append((state.global_step, time.perf_counter()))

    def seconds_per_step(self) -> float:
        """Median over the logs of the second half."""
        half = self.times[len(self.times) // 2 - 1 :]
        return statistics.median((end - start) / (last - first) for (first, start), (last, end) in pairwise(half))


def collate_plain(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Packed rows as transformers' models take them: they shift labels themselves."""
    batch = collate_packed(rows)
    batch["labels"] = batch["input_ids"].masked_fill(batch["position_ids"] == 0, IGNORED)
    return batch


def collate_joined(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The same where documents attend to each other: rows without positions, as plain scripts have them."""
    ids = collate_packed(rows)["input_ids"]
    return {"input_ids": ids, "labels": ids}


def main(
    original: Annotated[Path, typer.Argument(help="The original.")],
    converted: Annotated[Path, typer.Argument(help="Directory of the converted checkpoint.")],
    dataset: Annotated[str, typer.Option(help="Text to train on.")],
    sequence_length: Annotated[int, typer.Option(help="Tokens per row.")] = 512,
    batch_tokens: Annotated[int, typer.Option(help="Tokens per step.")] = 32_768,
    micro_batch: Annotated[int | None, typer.Option(help="Rows per forward pass.")] = None,
    steps: Annotated[int, typer.Option(help="Steps per run; the second half is timed.")] = 60,
    compile: Annotated[bool, typer.Option(help="Compile layers in all runs.")] = False,
    liger: Annotated[bool, typer.Option(help="Also time Liger's losses.")] = False,
) -> None:
    """Compare tokens per second."""
    logging.disable_progress_bar()
    job = Uptraining(
        converted,
        "unwritten",
        dataset=(dataset,),
        tokens=steps * (batch_tokens // sequence_length) * sequence_length,
        sequence_length=sequence_length,
        batch_tokens=batch_tokens,
        micro_batch=micro_batch,
        learning_rate=1e-5,
        save_every=10**9,
        log_every=max(1, steps // 20),
        report_to="none",
        compile=compile,
    )
    config = AutoConfig.from_pretrained(original)
    tokenizer = tokenizer_of(original, config.vocab_size)
    text = training_set(tokenizer, config, job)
    found: dict[str, tuple[float, float]] = {}

    def record(name: str, clock: StepClock, model: Any, teacher: Any = None) -> None:
        rate = job.rows * text.row_tokens / clock.seconds_per_step()
        found[name] = rate, rate * operations_per_token(model, teacher, sequence_length)

    for name, collator in (
        ("Trainer, documents see each other", collate_joined),
        ("Trainer, documents apart", collate_plain),
    ):
        with tempfile.TemporaryDirectory() as place:
            clock, model = StepClock(), load_model(original, config=config, dtype=torch.float32)
            model.config.use_cache = False
            if compile:
                compile_layers(model)
            trainer = Trainer(
                model=model,
                args=training_arguments(job, steps, Path(place)),
                train_dataset=in_order(text.rows, job, steps),
                data_collator=collator,
                callbacks=[clock],
            )
            trainer.train()
            record(name, clock, model)
    kinds: list[tuple[str, Path, str, bool]] = [
        ("uptrain, original, LM", original, "lm", False),
        ("uptrain, converted, LM", converted, "lm", False),
        ("uptrain, converted, KL", converted, "kl", False),
    ]
    if liger:
        kinds += [(f"{name}, Liger", path, loss, True) for name, path, loss, _ in kinds[1:]]
    for name, path, loss, fused in kinds:
        with tempfile.TemporaryDirectory() as place:
            clock, model = StepClock(), load_model(path, dtype=torch.float32)
            model.config.use_cache = False
            teacher = load_teacher(str(original), None, path, model, Path(place) / "teacher") if loss == "kl" else None
            objective = Objective({loss: 1.0}, teacher, liger=fused, compile=compile)
            train(name, model, objective, job, text, Path(place) / "main", callbacks=[clock])
            record(name, clock, model, teacher)

    table = Table(title=f"{batch_tokens:,} tokens a step in rows of {sequence_length}", title_justify="left")
    for column in ("", "tokens/s", "MFU", "time a token, of the plain loop"):
        table.add_column(column, justify="left" if not column else "right")
    peak, plain = peak_rate(), found["Trainer, documents apart"][0]
    for name, (rate, operations) in found.items():
        table.add_row(name, f"{rate:,.0f}", f"{operations / peak:.1%}" if peak else "", f"{plain / rate:.2f}")
    console = Console(width=120, markup=False, highlight=False)
    console.print(table)
    cost = found["uptrain, converted, LM"][0] / found["uptrain, converted, KL"][0]
    console.print(f"the teacher makes a step {cost:.2f} times as long")


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
