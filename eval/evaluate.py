"""`mqa-hf evaluate`: how much worse a converted checkpoint is than its original.

mqa-hf evaluate ORIGINAL CONVERTED ... --text held-out.jsonl --output evaluation
accelerate launch -m mqa_hf evaluate ORIGINAL CONVERTED ... --text held-out.jsonl --output evaluation
"""

import math
import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mqa_hf.base.chats import LOSS_ON
from mqa_hf.base.errors import MQAError
from mqa_hf.base.options import NUMBER_TYPES, Job, Option, Options, function, refuse

if TYPE_CHECKING:
    from rich.console import Console

    from .evaluation_record import EvaluationRecord


@dataclass(frozen=True)
class Running(Options, panel="Running"):
    """How the models run."""

    _: KW_ONLY
    batch_tokens: Annotated[int, Option("Tokens per forward pass.", min=1)] = 8_192
    dtype: Annotated[
        str | None,
        Option("Type of the weights. Default: the checkpoint's; float32 on a CPU.", choices=NUMBER_TYPES),
    ] = None


@dataclass(frozen=True)
class Tasks(Options, panel="lm-eval"):
    """Tasks of EleutherAI's lm-evaluation-harness."""

    _: KW_ONLY
    tasks: Annotated[Sequence[str], Option("Tasks of lm-eval.", comma=True)] = ()
    include_path: Annotated[Path | None, Option("Directory with your own tasks.")] = None
    limit: Annotated[int | None, Option("Examples per task. Default: all.", min=1)] = None


@dataclass(frozen=True)
class Prompts(Options, panel="Generation"):
    """What the models generate."""

    _: KW_ONLY
    prompts: Annotated[int, Option("Texts to continue or translate; 0: none.", min=0)] = 64
    prompt_tokens: Annotated[int, Option("Tokens of each text used as its prompt.", min=1)] = 64
    new_tokens: Annotated[int, Option("Maximum number of tokens to generate.", min=1)] = 128
    beams: Annotated[int, Option("Beams of beam search (encoder-decoder).", min=1)] = 4


@dataclass(frozen=True)
class Text(Options, panel="Held-out text"):
    """The text that the models predict."""

    _: KW_ONLY
    text: Annotated[
        str | None,
        Option("Held-out text: text file, JSON lines, parquet, or a dataset id. Default: Python's manual."),
    ] = None
    columns: Annotated[
        Sequence[str],
        Option(
            "Column with the text or chats, or columns of a prompt and an answer; two for encoder-decoder models: "
            "en,de. Default: text, messages, prompt and completion, or instruction and output.",
            comma=True,
        ),
    ] = ()
    loss_on: Annotated[
        str,
        Option("Tokens of chats and instructions that are predicted: all, or those of answers.", choices=LOSS_ON),
    ] = "all"
    tokens: Annotated[int, Option("Maximum number of tokens to predict.", min=1)] = 131_072
    seed: Annotated[int, Option("Seed for choosing documents.", min=0, below=2**64)] = 0
    window: Annotated[
        int | None, Option("Window in tokens. Default: the model's context length, at most 2,048.", min=1)
    ] = None
    stride: Annotated[
        int | None,
        Option(
            "Tokens from one window to the next. Each token is predicted once, with more than `window` - `stride` "
            "tokens before it if there are that many. Default: half of `window`.",
            min=1,
        ),
    ] = None


@dataclass(frozen=True)
class Results(Options, panel="Output"):
    """Where results go."""

    _: KW_ONLY
    output: Annotated[Path | str, Option("Directory for results; existing measurements are kept.")] = Path(
        "evaluation"
    )


@dataclass(frozen=True)
class Evaluation(Running, Tasks, Prompts, Text, Results, Job["EvaluationRecord"]):
    """Measure how much worse a checkpoint is than its original: loss, KL divergence, generated text, tasks.

    For language models: the likelihood of held-out text in sliding windows, the divergence of each token's
    distribution from the original's, and continuations of the texts' beginnings. For encoder-decoder models: the same
    likelihoods on the targets, and the texts generated greedily and with beam search.

    Returns:
        The content of `evaluation.json`, an `EvaluationRecord`.

    Raises:
        MQAError: if an argument is not a checkpoint, tokenizers differ, there is too little text, or logits are not
            finite.
    """

    name = "evaluate"

    original: Annotated[str | os.PathLike[str], Option("Directory or Hub id of the original.")]
    checkpoints: Annotated[Sequence[str], Option("Checkpoints made from it: directories or Hub ids.")] = ()

    def resolve(self) -> "Evaluation":
        """Return the job; raise MQAError for options that contradict each other."""
        contradictions = (
            (
                self.text is None and bool(self.columns),
                "`columns` needs `text`",
            ),
            (
                self.window is not None and self.stride is not None and self.stride > self.window,
                f"`window` must be at least as long as `stride`; got {self.window} and {self.stride}",
            ),
            (
                not self.tasks and (self.include_path is not None or self.limit is not None),
                "`include_path` and `limit` need `tasks`",
            ),
        )
        refuse(contradictions)
        return self

    def run(self) -> "EvaluationRecord":
        job = self.resolve()
        try:
            from .evaluator import carry_out
        except ImportError as error:
            raise MQAError(f"this needs {error.name}: pip install 'mqa-hf[evaluation]'") from error
        return carry_out(job)

    def interrupted(self) -> str:
        return f"Results so far are kept in {self.output}; run the same command to continue."

    def show(self, result: "EvaluationRecord", console: "Console") -> None:
        """Print the main numbers and their intervals as a table."""
        from rich.console import Console

        wide = Console(file=console.file, width=max(250, console.width), markup=False, highlight=False)
        wide.print(table_of(result))
        if result.note:
            wide.print(result.note)


def table_of(result: "EvaluationRecord") -> Any:
    """Make a table with a row for each checkpoint."""
    from rich.table import Table

    first, beams = result.checkpoints[0], result.settings.beams
    speech = first.greedy is not None and first.greedy.word_error_rate is not None
    columns = ["", "loss,\nnats", "above original", "perplexity", "KL", "same first\nchoice"]
    if speech:
        columns += ["word errors, greedy", f"beam {beams}"]
    elif first.greedy is not None:
        columns += ["BLEU, greedy", f"BLEU, beam {beams}", "chrF"]
    else:
        columns += ["tokens before\nit differs", "repetition"]
    columns.append("cache,\nbytes/token")
    over = first.next_token.intervals_over
    table = Table(title_justify="left", title=f"held-out text; 95% intervals over {over}")
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for found in result.checkpoints:
        next_token = found.next_token
        cells = [
            found.name,
            f"{next_token.loss:.3f}",
            "" if found is first else spread(next_token, "loss_above_original", "+.3f"),
            f"{next_token.perplexity:.2f}",
            f"{next_token.kl:.3f}",
            f"{next_token.same_first_choice:.1%}",
        ]
        if speech:
            cells += [spread(found.greedy, "word_error_rate", ".1%"), spread(found.beam, "word_error_rate", ".1%")]
        elif found.greedy is not None:
            cells += [spread(found.greedy, "bleu", ".1f"), spread(found.beam, "bleu", ".1f")]
            cells.append(f"{found.greedy.chrf:.1f}")
        elif found.writing is not None:
            cells += [f"{found.writing.agreeing_tokens:.1f}", f"{found.writing.repetition:.1%}"]
        else:
            cells += ["", ""]
        size = found.kv_bytes_per_token
        latent = f"\n{found.latent.name}" if found.latent else ""
        table.add_row(*cells, f"{size:,}{latent}" if size is not None else "")
    return table


def spread(found: Any, name: str, form: str) -> str:
    """Format a number of a record with its interval."""
    interval = getattr(found, f"{name}_interval")
    said = format(getattr(found, name), form)
    if interval is None or not all(map(math.isfinite, interval)):
        return said
    low, high = (format(x, form) for x in interval)
    return f"{said} [{low}, {high}]"


evaluate = function(Evaluation)
