"""Options that `mqa-hf uptrain` and `mqa-hf pretrain` share: text, schedule, logs and output.

What `recorded="never"` marks does not decide the result: a run that was interrupted may go on with another value.
"""

import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from mqa_hf.base.errors import MQAError
from mqa_hf.base.options import Job, Option, Options

R = TypeVar("R")

MOST_TOKENS = 2**50
MOST_BATCH_TOKENS = 2**31
LOGGERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}  # and the packages that have them

LOSSES = ("lm", "kl", "hidden", "attention")
TRAINED_ON, HOW, LOGS, OUTPUT = "What it is trained on", "How long and how", "Checkpoints and logs", "Output"


@dataclass(frozen=True)
class Part:
    """A data set of a mixture, and its weight among the others."""

    source: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Part":
        """`SOURCE` or `SOURCE=WEIGHT`."""
        source, sign, weight = text.rpartition("=")
        try:
            return cls(source, float(weight)) if sign else cls(text)
        except ValueError:
            return cls(text)  # a name with "=" in it


@dataclass(frozen=True)
class Data(Options, panel=TRAINED_ON):
    """The text that is trained on."""

    _: KW_ONLY
    dataset: Annotated[
        Sequence[str],
        Option(
            "Text file, JSON lines, parquet, or an id of the Hub's datasets (id:configuration[split]). Several are "
            "mixed by their weights: SOURCE=WEIGHT.",
            metavar="SOURCE[=WEIGHT]",
        ),
    ]
    columns: Annotated[
        Sequence[str],
        Option("Column of the text (default: text) or of chats, or two for translation: en,de.", comma=True),
    ] = ()
    streaming: Annotated[bool, Option("Fetch the text while training, instead of all of it before.")] = False
    validation: Annotated[str | None, Option("Text that losses are measured on.")] = None
    validation_tokens: Annotated[int, Option("Tokens of `validation` that are read.", min=1)] = 131_072

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(map(Part.parse, self.dataset))


@dataclass(frozen=True)
class Schedule(Options, panel=HOW):
    """How long and how a model is trained, whatever on."""

    _: KW_ONLY
    tokens: Annotated[
        int | None, Option("Tokens to train on (of the decoder), in whole steps.", min=1, below=MOST_TOKENS)
    ]
    sequence_length: Annotated[int, Option("Tokens of a row.", min=2, below=2**24)] = 512
    batch_tokens: Annotated[
        int,
        Option(
            "Tokens of a step, on all processes together, rounded to whole rows. Pairs count as `sequence_length` "
            "each.",
            min=1,
            below=MOST_BATCH_TOKENS,
        ),
    ] = 32_768
    micro_batch: Annotated[
        int | None,
        Option("Rows at once on a process. Default: all of a step's, 16,384 tokens at most.", min=1),
    ] = None
    learning_rate: Annotated[
        float | None,
        Option(
            "Peak, of AdamW (0.9, 0.95); it falls to a tenth along a cosine. Default: by width, docs/uptraining.md.",
            above=0,
        ),
    ] = None
    warmup: Annotated[
        float, Option("Share of the steps; at least 10 steps, or a fifth of a short training.", min=0, below=1)
    ] = 0.02
    weight_decay: Annotated[float, Option("Of matrices.", min=0)] = 0.1
    bf16: Annotated[
        bool | None,
        Option("Compute in bfloat16; weights and optimizer stay in float32. Default: on GPUs that can."),
    ] = None
    gradient_checkpointing: Annotated[bool, Option("Less memory, more time.")] = False
    compile: Annotated[bool, Option("Use torch.compile.")] = False
    seed: Annotated[int, Option("Of the order of rows, and of all that is random.", min=0, below=2**32)] = 0

    @property
    def rows(self) -> int:
        """Rows of a step."""
        return max(1, self.batch_tokens // self.sequence_length)

    def steps(self, row_tokens: float) -> int:
        """Steps of the whole training, where a row predicts `row_tokens` in the mean."""
        assert self.tokens is not None, "a job is resolved first"
        return math.ceil(self.tokens / (self.rows * row_tokens))

    def split(self, count: int) -> tuple[int, int]:
        """Rows at once on each of `count` processes, and how often before a step.

        Raises:
            MQAError: where they do not divide a step's rows.
        """
        share = self.rows // count
        if share * count != self.rows:
            raise MQAError(
                f"a step of {self.rows} rows of {self.sequence_length} tokens cannot be shared by {count} "
                f"processes; set `batch_tokens` to a multiple of {count * self.sequence_length:,}"
            )
        micro = self.micro_batch
        if micro is None:
            most = max(1, 16_384 // self.sequence_length)
            micro = next(n for n in range(min(share, most), 0, -1) if share % n == 0)
        if share % micro:
            raise MQAError(f"`micro_batch` {micro} must divide the {share} rows that a process has in a step")
        return micro, share // micro


@dataclass(frozen=True)
class Logs(Options, panel=LOGS):
    """What is kept and shown on the way."""

    _: KW_ONLY
    save_every: Annotated[int, Option("Steps between checkpoints. 0: about 20 in all.", min=0, recorded="never")] = 0
    keep: Annotated[int, Option("Checkpoints that are kept.", min=1, recorded="never")] = 2
    evaluate_every: Annotated[int, Option("Steps between evaluations. 0: at the start and the end.", min=0)] = 0
    log_every: Annotated[int, Option("Steps between log lines. 0: about 50 in all.", min=0, recorded="never")] = 0
    report_to: Annotated[
        Sequence[str] | None,
        Option(
            "Where logs go beside standard error. Default: tensorboard and wandb, those that are installed.",
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
                f"`workers` {self.workers:,} are more than this machine takes, which has {os.cpu_count()} processors; "
                f"give {most} at most"
            )
        asked = self.report_to or ()
        if "none" in asked and len(asked) > 1:
            raise MQAError(f"`report_to` none goes alone; got {', '.join(asked)}")
        for name in asked:
            if name in LOGGERS and not any(importlib.util.find_spec(package) for package in LOGGERS[name]):
                raise MQAError(f"`report_to` {name} is not installed here: pip install {name}")


@dataclass(frozen=True)
class Written(Options, panel=OUTPUT):
    """Where the result goes."""

    output: Annotated[Path | str, Option("Directory to write. It appears only when it is whole.")]
    _: KW_ONLY
    overwrite: Annotated[bool, Option("Replace the checkpoint at `output`.", recorded="never")] = False
    restart: Annotated[bool, Option("Begin again where an unfinished run lies.", recorded="never")] = False


@dataclass(frozen=True)
class Run(Logs, Schedule):
    """A schedule with what is logged and kept of it: all that [`train`] reads of a job."""


@dataclass(frozen=True)
class Training(Written, Run, Data, Job[R]):
    """What both commands are: text, a schedule and an output, with checkpoints beside it while it is trained."""

    @property
    def place(self) -> Path:
        """The directory of checkpoints, beside the output."""
        here = Path(self.output).resolve()
        return here.with_name(f".{here.name}.{self.name}")

    def decisive(self) -> dict[str, Any]:
        """What decides the result, by the names that it has in result files."""
        found = self.recorded()
        del found["output"]
        return {**found, "dataset": [asdict(part) for part in self.parts]}

    def interrupted(self) -> str:
        if not any(self.place.glob("*/checkpoint-*")):
            return "There was no checkpoint yet"
        again = "without `restart` " * self.restart
        return f"Checkpoints are in {self.place}; give the same command {again}again to go on"
