"""`mqa-hf demo`: run the whole workflow on a small model that ships with the package.

    mqa-hf demo [OUTPUT]

converts a small language model of Shakespeare and Milton with the mean of the heads, with a fitted head and with a
fitted head of twice the width, trains the fitted one briefly, compares quality and speed with the original, and writes
a report. It needs no network and no GPU. Each step is a command, shown so that you can run it yourself; finished steps
are not run again.
"""

import shutil
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mqa_hf.base.errors import MQAError
from mqa_hf.base.files import REPORT_FILE, TRAINING_FILE
from mqa_hf.base.options import Job, Option
from mqa_hf.base.steps import Step, run_steps
from mqa_hf.conversion.convert import Conversion
from mqa_hf.finetune.uptrain import Uptraining

from .benchmark import Benchmark
from .evaluate import Evaluation
from .report import PAGE, Report

if TYPE_CHECKING:
    from rich.console import Console

MODEL = "shakespeare"  # folder next to this file
TEXTS = ("train.jsonl.xz", "held-out.jsonl.xz")
DONE = "demo.json"
EXTRAS = ("accelerate", "datasets", "evaluate", "matplotlib", "rouge_score", "sacrebleu")
# Sizes for a total of about three minutes on two cores.
FITTED: Mapping[str, Any] = {"calibration_tokens": 32_768, "sequence_length": 256}
TRAINED: Mapping[str, Any] = {
    "tokens": 196_608,
    "sequence_length": 256,
    "batch_tokens": 4_096,
    "validation_tokens": 8_192,
    "save_every": 12,
}
MEASURED: Mapping[str, Any] = {
    "tokens": 16_384,
    "window": 512,
    "prompts": 16,
    "prompt_tokens": 32,
    "new_tokens": 48,
}
TIMED: Mapping[str, Any] = {
    "cells": ("1x1024", "8x1024", "32x512", "32x1024", "32x2048"),
    "tokens": 12,
    "prefill_limit": 0,
}


@dataclass(frozen=True)
class Demo(Job[Path]):
    """Convert, train, evaluate and benchmark a small model that ships with the package.

    Returns:
        The report page.

    Raises:
        MQAError: if `output` holds something else or cannot be written.
    """

    name = "demo"

    output: Annotated[Path, Option("Directory for all results.")] = Path("demo")
    _: KW_ONLY
    overwrite: Annotated[bool, Option("Rerun changed steps and the steps that need them.", recorded="never")] = False
    open: Annotated[bool, Option("Open the report in a browser.", recorded="never")] = False

    def run(self) -> Path:
        missing = [name for name in EXTRAS if find_spec(name) is None]
        if missing:
            raise MQAError(f"this needs {', '.join(missing)}: pip install 'mqa-hf[demo]'")
        put_beside(self.output)
        run_steps(steps(self.output), self.output / DONE, "the demo", self.overwrite)
        page = (self.output / "report" / PAGE).resolve()
        if self.open:
            import webbrowser

            webbrowser.open(page.as_uri())
        return page

    def show(self, page: Path, console: "Console") -> None:
        """Print each model's continuation of the same prompt, and the path of the report."""
        from .evaluation_record import EvaluationRecord

        found = EvaluationRecord.read(self.output / "evaluation").checkpoints
        said = [f"\nAfter\n\n{found[0].samples[0].prompt}\n"]
        said += [f"{checkpoint.name} writes\n\n{checkpoint.samples[0].text.strip()}\n" for checkpoint in found]
        console.print("\n".join([*said, f"The report: {page}"]), soft_wrap=True)

    def dry_run(self) -> dict[str, Any]:
        """The command of each step."""
        return {name: step.job.command() for name, step in steps(self.output).items()}

    def interrupted(self) -> str:
        return "Finished steps and the progress of the current one are kept; run the same command to continue."


def steps(output: Path) -> dict[str, Step]:
    """The jobs, in order."""
    original, mean, shared, wide, trained = (
        output / name for name in ("original", "mean", "shared", "wide", "trained")
    )
    text, held_out = (str(output / name) for name in TEXTS)
    evaluation, times, page = output / "evaluation", output / "times.jsonl", output / "report"
    fitted = {"method": "shared", "calibration": text, **FITTED}
    checkpoints = list(map(str, (mean, shared, wide, trained)))
    return {
        "mean": Step(Conversion(original, mean), mean / REPORT_FILE, costly=True),
        "shared": Step(Conversion(original, shared, **fitted), shared / REPORT_FILE, costly=True),
        "wide": Step(Conversion(original, wide, **fitted, head_width=2), wide / REPORT_FILE, costly=True),
        "train": Step(
            Uptraining(shared, trained, dataset=[text], validation=held_out, report_to=["none"], **TRAINED),
            trained / TRAINING_FILE,
            ("shared",),
            costly=True,
        ),
        "evaluate": Step(
            Evaluation(original, checkpoints, text=held_out, output=evaluation, **MEASURED),
            evaluation / "evaluation.json",
            ("mean", "shared", "wide", "train"),
        ),
        "benchmark": Step(
            Benchmark(
                list(map(str, (original, shared, wide))),
                kv_heads=["original"],
                engines=["mqa-hf"],
                device="cpu",
                output=times,
                **TIMED,
            ),
            times,
            ("shared", "wide"),
        ),
        "report": Step(
            Report(evaluation, benchmark=[times], output=page, title="Eight heads become one", cards=True),
            page / PAGE,
            ("evaluate", "benchmark"),
        ),
    }


def put_beside(output: Path) -> None:
    """Copy the model and its texts to `output`.

    Raises:
        MQAError: if they cannot be written, or `output` holds something else.
    """
    try:
        if output.exists() and not (output / DONE).is_file() and (not output.is_dir() or any(output.iterdir())):
            raise MQAError(f"{output} exists and is not a demo; give another directory")
        output.mkdir(parents=True, exist_ok=True)
        if not (output / DONE).is_file():
            (output / DONE).write_text("{}\n")
        with as_file(files("mqa_hf.eval") / MODEL) as place:
            model = {path.name for path in place.iterdir() if path.is_file() and path.suffix != ".py"}
            if any(not (output / "original" / name).is_file() for name in model):
                partial = output / ".original.partial"
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                for name in model:
                    shutil.copyfile(place / name, partial / name)
                shutil.rmtree(output / "original", ignore_errors=True)
                partial.replace(output / "original")
            for name in TEXTS:
                if not (output / name).is_file():
                    shutil.copyfile(place / "text" / name, output / f".{name}.partial")
                    (output / f".{name}.partial").replace(output / name)
    except OSError as error:
        raise MQAError(f"{output} cannot be written: {error}") from error
