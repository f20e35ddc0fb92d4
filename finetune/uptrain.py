"""`mqa-hf uptrain`: recover the quality of a converted checkpoint with a short training.

GQA (arXiv 2305.13245, section 3.2) trained converted models on 5% of their pretraining tokens. Here the original is
the teacher; its distribution says more about each token than the token itself, so fewer tokens are needed.

    mqa-hf uptrain CONVERTED OUTPUT --dataset text.jsonl --tokens 10000000
    accelerate launch -m mqa_hf uptrain CONVERTED OUTPUT --dataset text.jsonl --tokens 10000000

do the same on one process and on many. Checkpoints are kept in `.OUTPUT.uptrain` beside the output. The same command
resumes from the last one; they are removed once OUTPUT is complete.
"""

import math
import os
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mqa_hf.base.console import warn
from mqa_hf.base.errors import MQAError
from mqa_hf.base.files import REPORT_FILE, read_json
from mqa_hf.base.options import Option, Options, as_flags, function, refuse

from .options import HOW, LOSSES, MOST_TOKENS, TRAINED_ON, Schedule, Training

if TYPE_CHECKING:
    from rich.console import Console

    from .records import UptrainingRecord

NO_TEACHER = "none"
# Peak learning rate times hidden size (at least 512); measured in docs/uptraining.md.
LEARNING_RATES = {"all": 0.35, "attention": 0.7, "lora": 2.0}
NARROW = 512
LATENT = 0.25  # factor on these for students with latents, which start near their teacher
RANK = 32  # default rank of adapters


@dataclass(frozen=True)
class Student(Options):
    """The checkpoint to train."""

    student: Annotated[str | os.PathLike[str], Option("Directory of the converted checkpoint.")]


@dataclass(frozen=True)
class Lesson(Options, panel=TRAINED_ON):
    """The teacher and the losses."""

    _: KW_ONLY
    teacher: Annotated[
        str | None,
        Option(
            "Directory or hub id of the original. Default: the source in conversion.json; none: train without teacher."
        ),
    ] = None
    teacher_revision: Annotated[
        str | None, Option("Branch, tag or commit of a teacher on the Hub. Default: the one in conversion.json.")
    ] = None
    loss: Annotated[
        str | None,
        Option(
            "Loss: lm, kl, hidden, attention, or a weighted sum such as kl=1,hidden=0.5. Default: kl with a teacher, "
            "else lm."
        ),
    ] = None
    attention_tokens: Annotated[
        int, Option("Share of `tokens` for a first stage that fits each attention layer to the teacher's.", min=0)
    ] = 0


@dataclass(frozen=True)
class UptrainingSchedule(Schedule, panel=HOW):
    """How long a student is trained, and which weights."""

    _: KW_ONLY
    tokens: Annotated[
        int | None, Option("Tokens to train on (decoder tokens), in whole steps.", min=1, below=MOST_TOKENS)
    ] = None
    alpha: Annotated[float | None, Option("Instead of `tokens`: a share of `pretraining_tokens`.", above=0)] = None
    pretraining_tokens: Annotated[
        int | None, Option("Tokens that the original was trained on.", min=1, below=MOST_TOKENS)
    ] = None
    train: Annotated[
        str,
        Option("Weights to train: all, the attention layers, or adapters (lora).", choices=tuple(LEARNING_RATES)),
    ] = "all"
    lora_rank: Annotated[int, Option("Rank of the adapters, merged at the end.", min=1, below=2**16)] = RANK
    dropout: Annotated[bool | None, Option("Keep the model's own dropout. Default: only with `loss` lm alone.")] = None
    liger: Annotated[bool, Option("Use Liger's fused losses, if installed.")] = False


@dataclass(frozen=True)
class Uptraining(UptrainingSchedule, Lesson, Training["UptrainingRecord"], Student):
    """Train a converted checkpoint to recover its quality, with the original as teacher.

    Returns:
        The content of `uptraining.json`: options, losses before and after, the log.

    Raises:
        MQAError: if the request is invalid, before any training, or if training diverges.
    """

    name = "uptrain"

    @property
    def taught(self) -> bool:
        """Whether there is a teacher."""
        return self.teacher != NO_TEACHER

    @property
    def losses(self) -> dict[str, float]:
        """Weights of the losses by name, for a resolved job."""
        return parse_losses(self.loss or "")

    def decisive(self) -> dict[str, Any]:
        derived = ("student", "alpha", "pretraining_tokens", "loss")
        found = {name: value for name, value in super().decisive().items() if name not in derived}
        return {**found, "teacher": self.teacher if self.taught else None, "losses": [*map(list, self.losses.items())]}

    @property
    def all_tokens(self) -> int | None:
        """Tokens to train on, given or as a share of the pretraining tokens."""
        if self.alpha is not None and self.pretraining_tokens is not None:
            share = self.alpha * self.pretraining_tokens
            if not share < MOST_TOKENS:
                raise MQAError(
                    f"`alpha` {self.alpha:g} of `pretraining_tokens` {self.pretraining_tokens:,} is {share:.3g} "
                    f"tokens; it must be below 2**{math.log2(MOST_TOKENS):g}"
                )
            return max(1, round(share))
        return self.tokens

    @property
    def chosen_loss(self) -> str:
        return self.loss or ("kl" if self.taught else "lm")

    def check(self) -> None:
        self.check_upload()
        given = (self.alpha is not None, self.pretraining_tokens is not None)
        if given not in ((False, False), (True, True)) or (self.tokens is None) != all(given):
            raise MQAError("pass `tokens`, or `alpha` with `pretraining_tokens`")
        tokens, losses = self.all_tokens, parse_losses(self.chosen_loss)
        weights = [part.weight for part in self.parts]
        contradictions = (
            (
                not weights,
                "`dataset` is empty; give a text to train on",
            ),
            (
                not all(0 < weight < math.inf for weight in weights),
                f"`dataset` needs weights above 0; got {weights}",
            ),
            (
                self.rows % (self.micro_batch or 1) > 0,
                f"`micro_batch` must divide the {self.rows} rows of a step, got {self.micro_batch}",
            ),
            (
                not self.taught and self.teacher_revision is not None,
                f"`teacher_revision` {self.teacher_revision} needs a teacher, but `teacher` is {NO_TEACHER}",
            ),
            (
                self.lora_rank != RANK and self.train != "lora",
                f"`lora_rank` {self.lora_rank:,} is for `train` lora, not {self.train}",
            ),
            (
                "attention" in losses and self.train == "lora",
                "`loss` attention cannot be combined with `train` lora; use `attention_tokens`",
            ),
            (
                tokens is not None and tokens <= self.attention_tokens,
                f"`attention_tokens` must be below `tokens` {tokens:,}, got {self.attention_tokens:,}",
            ),
            (
                self.attention_tokens > 0 and not self.taught,
                "`attention_tokens` needs a teacher; pass `teacher`",
            ),
        )
        refuse(contradictions)

    def resolve(self) -> "Uptraining":
        """Fill in tokens, teacher, losses, learning rate and dropout.

        Raises:
            MQAError: if the student is not a checkpoint or names no source, or options contradict each other.
        """
        self.check()
        student = Path(self.student)
        if not (student / "config.json").is_file():
            raise MQAError(f"{student} is not a checkpoint: it has no config.json")
        teacher, revision = self.teacher, self.teacher_revision
        if teacher is None:
            teacher, said = original_of(student)
            revision = revision or said
        loss, rate = self.chosen_loss, self.learning_rate
        return replace(
            self,
            tokens=self.all_tokens,
            alpha=None,
            pretraining_tokens=None,
            teacher=teacher,
            teacher_revision=revision,
            loss=loss,
            dropout=parse_losses(loss).keys() == {"lm"} if self.dropout is None else self.dropout,
            learning_rate=default_learning_rate(self.train, *sizes_of(student)) if rate is None else rate,
        )

    def run(self) -> "UptrainingRecord":
        try:
            from .uptrainer import carry_out
        except ImportError as error:
            raise MQAError(f"this needs {error.name}: pip install 'mqa-hf[training]'") from error
        return carry_out(self.resolve())

    def dry_run(self) -> dict[str, Any]:
        try:
            from .estimate import estimate
        except ImportError as error:
            raise MQAError(f"this needs {error.name}: pip install 'mqa-hf[training]'") from error
        return estimate(self.resolve())

    def show(self, record: "UptrainingRecord", console: "Console") -> None:
        """Print the losses before and after in a line, and warn if one rose."""
        said = f"{self.output}: trained on {record.tokens:,} tokens"
        measured = record.validation
        if measured is None:
            console.print(said, soft_wrap=True)
            return
        before, after = measured.before, measured.after
        pairs = [(name, before.get(name), loss) for name, loss in after.items()]
        changes = ", ".join(f"{name} {a:.3f} -> {b:.3f}" for name, a, b in pairs if a is not None and b is not None)
        console.print(f"{said}; {changes}", soft_wrap=True)
        worse = [name for name, _ in record.options["losses"] if (after.get(name) or 0.0) > (before.get(name) or 0.0)]
        if worse:
            rate = record.options["learning_rate"]
            said = f"{', '.join(worse)} on `validation` is higher after training than before; lower "
            warn(as_flags(f"{said}`learning_rate` ({rate:g}) or train on more `tokens`", type(self)))


def default_learning_rate(train: str, hidden_size: int, latent: bool = False) -> float:
    """Default peak learning rate, which falls with the width of the model, as pretraining rates do."""
    return float(f"{LEARNING_RATES[train] * (LATENT if latent else 1.0) / max(hidden_size, NARROW):.2g}")


def sizes_of(student: Path) -> tuple[int, bool]:
    """Hidden size of a checkpoint (of its decoder, if encoder-decoder), and whether it has latents."""
    from mqa_hf.conversion.families import IMAGE_TEXT

    from .architecture import checkpoint_config

    config = checkpoint_config(student)
    if config.model_type in IMAGE_TEXT:
        raise MQAError(f"{student} is multimodal, and only models of text and of pairs of texts are trained")
    stack = config.get_text_config(decoder=True) if config.is_encoder_decoder else config
    width = getattr(stack, "hidden_size", None)
    if not isinstance(width, int):
        raise MQAError(f"{student} is not a language model: its config.json has no hidden_size")
    return width, getattr(stack, "kv_latent_dim", None) is not None


def parse_losses(text: str) -> dict[str, float]:
    """Parse `kl` or `kl=1,hidden=0.5`."""
    found = []
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        try:
            found.append((name, float(weight) if weight else 1.0))
        except ValueError:
            raise MQAError(f"`loss` takes names with weights such as kl=1,hidden=0.5; got {text!r}") from None
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        raise MQAError(f"`loss` takes each name once; got {text!r}")
    unknown = [name for name, weight in found if name not in LOSSES or not 0 < weight < math.inf]
    if unknown:
        raise MQAError(f"`loss` takes {', '.join(LOSSES)}, each with a weight above 0; got {text!r}")
    return dict(found)


def original_of(student: Path) -> tuple[str, str | None]:
    """Source and revision from `conversion.json`; raises MQAError if it names no source."""
    path = student / REPORT_FILE
    said = read_json(path) if path.is_file() else {}
    if not isinstance(said.get("source"), str) or not isinstance(said.get("revision"), str | None):
        raise MQAError(
            f"{student} has no source in {REPORT_FILE}; name its original with `teacher`, or train without one: "
            f"`teacher` {NO_TEACHER}"
        )
    return said["source"], said.get("revision")


uptrain = function(Uptraining)
