"""Options that `mqa-hf uptrain` and `mqa-hf pretrain` share: text, schedule, logs and output.

Options with `recorded="never"` do not change the result; an interrupted run may resume with other values of them.
"""

import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from mqa_hf.base.chats import LOSS_ON
from mqa_hf.base.errors import MQAError
from mqa_hf.base.mixture import Part
from mqa_hf.base.options import Job, Option, Options
from mqa_hf.base.upload import Upload

R = TypeVar("R")

MOST_TOKENS = 2**50
MOST_BATCH_TOKENS = 2**31
LOGGERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}  # and their packages

LOSSES = ("lm", "kl", "hidden", "attention")
TRAINED_ON, HOW, LOGS, OUTPUT = "What it is trained on", "How long and how", "Checkpoints and logs", "Output"


@dataclass(frozen=True)
class Data(Options, panel=TRAINED_ON):
    """The training and validation text."""

    _: KW_ONLY
    dataset: Annotated[
        Sequence[str],
        Option(
            "Training text: a text, JSON lines or parquet file, or the id of a data set on the Hub "
            "(id:configuration[split]). Repeat it to mix several by weight: SOURCE=WEIGHT.",
            metavar="SOURCE[=WEIGHT]",
        ),
    ]
    columns: Annotated[
        Sequence[str],
        Option(
            "Column of the text or of chats, or columns of a prompt and an answer; for encoder-decoder models two, "
            "such as en,de. Default: text, messages, prompt and completion, or instruction and output.",
            comma=True,
        ),
    ] = ()
    loss_on: Annotated[
        str,
        Option("Tokens of chats and instructions that the losses count: all, or those of answers.", choices=LOSS_ON),
    ] = "all"
    streaming: Annotated[bool, Option("Fetch the text during training instead of all of it first.")] = False
    validation: Annotated[str | None, Option("Held-out text to measure losses on.")] = None
    validation_tokens: Annotated[int, Option("Number of tokens to read from `validation`.", min=1)] = 131_072

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(map(Part.parse, self.dataset))


@dataclass(frozen=True)
class Schedule(Options, panel=HOW):
    """How long and how a model is trained."""

    _: KW_ONLY
    tokens: Annotated[
        int | None, Option("Tokens to train on (decoder tokens), in whole steps.", min=1, below=MOST_TOKENS)
    ]
    sequence_length: Annotated[int, Option("Tokens per row.", min=2, below=2**24)] = 512
    batch_tokens: Annotated[
        int,
        Option(
            "Tokens per step over all processes, rounded to whole rows. A pair counts as `sequence_length` tokens.",
            min=1,
            below=MOST_BATCH_TOKENS,
        ),
    ] = 32_768
    micro_batch: Annotated[
        int | None,
        Option("Rows per process and forward pass. Default: all of a step, up to 16,384 tokens.", min=1),
    ] = None
    learning_rate: Annotated[
        float | None,
        Option(
            "Peak learning rate of AdamW (betas 0.9, 0.95); decays to a tenth along a cosine. Default: by model "
            "width, see docs/uptraining.md.",
            above=0,
        ),
    ] = None
    warmup: Annotated[
        float, Option("Share of warmup steps; at least 10 steps, or a fifth of a short training.", min=0, below=1)
    ] = 0.02
    weight_decay: Annotated[float, Option("Weight decay of matrices.", min=0)] = 0.1
    bf16: Annotated[
        bool | None,
        Option("Compute in bfloat16; weights and optimizer stay in float32. Default: on GPUs that support it."),
    ] = None
    gradient_checkpointing: Annotated[bool, Option("Recompute activations: less memory, more time.")] = False
    compile: Annotated[bool, Option("Compile layers and losses with torch.compile.")] = False
    seed: Annotated[int, Option("Random seed of the order of rows and everything else.", min=0, below=2**32)] = 0

    @property
    def rows(self) -> int:
        """Rows per step."""
        return max(1, self.batch_tokens // self.sequence_length)

    def steps(self, row_tokens: float) -> int:
        """Number of steps in all, if a row predicts `row_tokens` tokens on average."""
        assert self.tokens is not None, "resolve the job first"
        return math.ceil(self.tokens / (self.rows * row_tokens))

    def split(self, count: int) -> tuple[int, int]:
        """Rows per forward pass on each of `count` processes, and the number of passes per step.

        Raises:
            MQAError: if they do not divide the rows of a step.
        """
        share = self.rows // count
        if share * count != self.rows:
            raise MQAError(
                f"a step of {self.rows} rows of {self.sequence_length} tokens cannot be split over {count} "
                f"processes; set `batch_tokens` to a multiple of {count * self.sequence_length:,}"
            )
        micro = self.micro_batch
        if micro is None:
            most = max(1, 16_384 // self.sequence_length)
            micro = next(n for n in range(min(share, most), 0, -1) if share % n == 0)
        if share % micro:
            raise MQAError(f"`micro_batch` must divide the {share} rows per process and step, got {micro}")
        return micro, share // micro


@dataclass(frozen=True)
class Logs(Options, panel=LOGS):
    """What is saved and shown during training."""

    _: KW_ONLY
    save_every: Annotated[
        int,
        Option(
            "Steps between checkpoints. 0: by time, at least every 15 minutes and for at most 3% of it.",
            min=0,
            recorded="never",
        ),
    ] = 0
    keep: Annotated[int, Option("Number of checkpoints to keep.", min=1, recorded="never")] = 2
    evaluate_every: Annotated[int, Option("Steps between evaluations. 0: only at start and end.", min=0)] = 0
    log_every: Annotated[int, Option("Steps between log lines. 0: about 50 in all.", min=0, recorded="never")] = 0
    report_to: Annotated[
        Sequence[str] | None,
        Option(
            "Where to log in addition to standard error. Default: tensorboard and wandb, if installed.",
            choices=(*LOGGERS, "none"),
            comma=True,
            recorded="never",
        ),
    ] = None
    workers: Annotated[
        int | None, Option("Processes that read data. Default: 4 on a GPU, else none.", min=0, recorded="never")
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        most = 16 * (os.cpu_count() or 1)
        if self.workers is not None and self.workers > most:
            raise MQAError(
                f"`workers` must be at most {most} on this machine with {os.cpu_count()} processors, got "
                f"{self.workers:,}"
            )
        asked = self.report_to or ()
        if "none" in asked and len(asked) > 1:
            raise MQAError(f"`report_to` none cannot be combined with others; got {', '.join(asked)}")
        for name in asked:
            if name in LOGGERS and not any(importlib.util.find_spec(package) for package in LOGGERS[name]):
                raise MQAError(f"`report_to` {name} is not installed: pip install {name}")


@dataclass(frozen=True)
class Written(Options, panel=OUTPUT):
    """Where the result goes."""

    output: Annotated[Path | str, Option("Directory to write. It appears only once it is complete.")]
    _: KW_ONLY
    overwrite: Annotated[bool, Option("Replace the checkpoint at `output`.", recorded="never")] = False
    restart: Annotated[bool, Option("Discard an unfinished run and start over.", recorded="never")] = False


@dataclass(frozen=True)
class Run(Logs, Schedule):
    """A schedule with its logs and checkpoints: all that [`train`] reads of a job."""


@dataclass(frozen=True)
class Training(Upload, Written, Run, Data, Job[R]):
    """Options of both commands. During training, checkpoints are kept beside the output."""

    @property
    def place(self) -> Path:
        """Directory of checkpoints, beside the output."""
        here = Path(self.output).resolve()
        return here.with_name(f".{here.name}.{self.name}")

    def decisive(self) -> dict[str, Any]:
        """Options that decide the result, by their names in result files."""
        found = self.recorded()
        del found["output"]
        return {**found, "dataset": [asdict(part) for part in self.parts]}

    def interrupted(self) -> str:
        if not any(self.place.glob("*/checkpoint-*[0-9]")):
            return "No checkpoint was saved yet"
        again = " without `restart`" * self.restart
        return f"Checkpoints are in {self.place}; run the same command again{again} to resume"
