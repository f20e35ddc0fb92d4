"""The whole job on a small model that comes with the package: `mqa-hf demo`.

    mqa-hf demo [OUTPUT]

converts a small language model of Shakespeare and Milton by the mean, by a fitted head and by one of twice the width,
trains the fitted one a little, measures quality and speed beside the original, and leaves a report. No network and no
GPU are needed. Each step is a command that can be typed by hand, and is shown; what is done is not done again.
"""

import json
import shlex
import shutil
import webbrowser
from importlib.resources import as_file, files
from pathlib import Path

from rich.console import Console

from mqa_hf.base.errors import MQAError
from mqa_hf.base.files import REPORT_FILE, TRAINING_FILE
from mqa_hf.finetune.recipe import Step, run_steps

from .evaluation_record import EvaluationRecord
from .report import PAGE

MODEL = "shakespeare"  # folder beside this file
TEXTS = ("train.jsonl.xz", "held-out.jsonl.xz")
DONE = "demo.json"
# Sizes that keep the whole at about three minutes on two cores.
FITTED = shlex.split("--calibration-tokens 32768 --sequence-length 256")
TRAINED = shlex.split("--tokens 196608 --sequence-length 256 --batch-tokens 4096 --validation-tokens 8192")
MEASURED = shlex.split("--tokens 16384 --window 512 --prompts 16 --prompt-tokens 32 --new-tokens 48")
TIMED = shlex.split("--cells 1x1024,8x1024,32x512,32x1024,32x2048 --tokens 12 --prefill-limit 0")


def steps(output: Path) -> dict[str, Step]:
    """The commands, in order."""
    names = ("original", "mean", "shared", "wide", "trained")
    original, mean, shared, wide, trained = checkpoints = [str(output / name) for name in names]
    text, held_out = (str(output / name) for name in TEXTS)
    evaluation, times, report = output / "evaluation", output / "times.jsonl", output / "report"
    fitted = ["--method", "shared", "--calibration", text, *FITTED]
    training = ["--dataset", text, "--validation", held_out, "--report-to", "none", *TRAINED]
    measured = ["--text", held_out, "--output", str(evaluation), *MEASURED]
    timed = ["--kv-heads", "original", "--engines", "mqa-hf", "--device", "cpu", "--output", str(times), *TIMED]
    converted = ("mean", "shared", "wide")
    shown = [str(evaluation), "--benchmark", str(times), "--output", str(report), "--cards"]
    return {
        "mean": Step(["convert", original, mean], output / "mean" / REPORT_FILE, costly=True),
        "shared": Step(["convert", original, shared, *fitted], output / "shared" / REPORT_FILE, costly=True),
        "wide": Step(
            ["convert", original, wide, *fitted, "--head-width", "2"], output / "wide" / REPORT_FILE, costly=True
        ),
        "train": Step(
            ["uptrain", shared, trained, *training], output / "trained" / TRAINING_FILE, ("shared",), costly=True
        ),
        "evaluate": Step(
            ["evaluate", *checkpoints, *measured], evaluation / EvaluationRecord.file, (*converted, "train")
        ),
        "benchmark": Step(["benchmark", original, shared, wide, *timed], times, ("shared", "wide")),
        "report": Step(
            ["report", *shown, "--title", "Eight heads become one"], report / PAGE, ("evaluate", "benchmark")
        ),
    }


def put_beside(output: Path) -> None:
    """Copy the model and its texts to where the commands look for them.

    Raises:
        MQAError: where they cannot be written, or something else is there.
    """
    try:
        if output.exists() and not (output / DONE).is_file() and (not output.is_dir() or any(output.iterdir())):
            raise MQAError(f"{output} is there and holds no demo; give another directory")
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


def demo(output: Path, overwrite: bool = False, show: bool = False) -> Path:
    """Run the demo, or what is left of it.

    Args:
        output: directory for everything.
        overwrite: run steps that have changed, and those that need them, again.
        show: whether the report is opened in a browser.

    Returns:
        The page of the report.

    Raises:
        MQAError: where `output` holds something else or cannot be written.
    """
    put_beside(output)
    run_steps(steps(output), output / DONE, "the demo", overwrite)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    found = json.loads((output / "evaluation" / EvaluationRecord.file).read_text(encoding="utf-8"))
    first = found["checkpoints"][0]["samples"][0]
    console.print(f"\nAfter\n\n{first['prompt']}\n")
    for checkpoint in found["checkpoints"]:
        console.print(f"{checkpoint['name']} writes\n\n{checkpoint['samples'][0]['text'].strip()}\n")
    page = (output / "report" / PAGE).resolve()
    console.print(f"The report: {page}")
    if show:
        webbrowser.open(page.as_uri())
    return page
