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

from mqa_hf.base.errors import MQAError
from mqa_hf.base.options import NUMBER_TYPES, Job, Option, Options, function, refuse

if TYPE_CHECKING:
    from rich.console import Console

    from .evaluation_record import EvaluationRecord


@dataclass(frozen=True)
class Running(Options, panel="Running"):
    """How models run."""

    _: KW_ONLY
    batch_tokens: Annotated[int, Option("Tokens read at once.", min=1)] = 8_192
    dtype: Annotated[
        str | None,
        Option("Of the weights. Default: the checkpoint's; float32 on a CPU.", choices=NUMBER_TYPES),
    ] = None


@dataclass(frozen=True)
class Tasks(Options, panel="lm-eval"):
    """Tasks of EleutherAI's language model evaluation harness."""

    _: KW_ONLY
    tasks: Annotated[Sequence[str], Option("Tasks of lm-eval.", comma=True)] = ()
    include_path: Annotated[Path | None, Option("Directory with tasks of one's own.")] = None
    limit: Annotated[int | None, Option("Examples of each task.", min=1)] = None


@dataclass(frozen=True)
class Prompts(Options, panel="What it writes"):
    """What models write freely."""

    _: KW_ONLY
    prompts: Annotated[int, Option("Texts that are continued or translated; 0: none.", min=0)] = 64
    prompt_tokens: Annotated[int, Option("Of a text's beginning.", min=1)] = 64
    new_tokens: Annotated[int, Option("Most tokens to write.", min=1)] = 128
    beams: Annotated[int, Option("Of beam search (encoder-decoder).", min=1)] = 4


@dataclass(frozen=True)
class Text(Options, panel="Held-out text"):
    """What models predict."""

    _: KW_ONLY
    text: Annotated[
        str | None,
        Option("Held-out text: file, JSON lines, parquet, or an id of the Hub's datasets. Default: Python's manual."),
    ] = None
    columns: Annotated[
        Sequence[str],
        Option(
            "Column of the text (default: text) or of chats, or two for encoder-decoder models: en,de.", comma=True
        ),
    ] = ()
    tokens: Annotated[int, Option("Tokens to predict, at most.", min=1)] = 131_072
    seed: Annotated[int, Option("Of the choice of documents.", min=0, below=2**64)] = 0
    window: Annotated[
        int | None, Option("Tokens that a model reads at once. Default: its positions, 2,048 at most.", min=1)
    ] = None
    stride: Annotated[
        int | None,
        Option(
            "Tokens from window to window; each token is predicted once, with more than `window` less `stride` before "
            "it where there are so many. Default: half of `window`.",
            min=1,
        ),
    ] = None


@dataclass(frozen=True)
class Results(Options, panel="Output"):
    """Where results go."""

    _: KW_ONLY
    output: Annotated[Path | str, Option("Directory for results; what is there is not measured again.")] = Path(
        "evaluation"
    )


@dataclass(frozen=True)
class Evaluation(Running, Tasks, Prompts, Text, Results, Job["EvaluationRecord"]):
    """Say how much worse a checkpoint is than its original: likelihood, distributions, what it writes, tasks.

    Language models: the likelihood of held-out text in sliding windows, the distance of each token's distribution from
    the original's, and what is written freely after the beginnings of the texts. Encoder-decoder models: the same
    likelihoods of the targets, and the texts that are written, greedily and with beams.

    Returns:
        The content of `evaluation.json`, an `EvaluationRecord`.

    Raises:
        MQAError: for what cannot be measured: no checkpoint, another tokenizer, too little text, logits that are no
            numbers.
    """

    name = "evaluate"

    original: Annotated[str | os.PathLike[str], Option("Directory or hub id of the original.")]
    checkpoints: Annotated[Sequence[str], Option("What was made of it: directories or hub ids.")] = ()

    def resolve(self) -> "Evaluation":
        """Itself; raises MQAError for options that contradict each other."""
        contradictions = (
            (
                self.text is None and bool(self.columns),
                "`columns` are of `text`, which is missing",
            ),
            (
                self.window is not None and self.stride is not None and self.stride > self.window,
                f"`window` must be at least as long as `stride`; got {self.window} and {self.stride}",
            ),
            (
                not self.tasks and (self.include_path is not None or self.limit is not None),
                "`include_path` and `limit` are about `tasks`, which are missing",
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
        return f"The results so far are kept in {self.output}; the same command goes on."

    def show(self, result: "EvaluationRecord", console: "Console") -> None:
        """The main numbers as a table, with their intervals."""
        from rich.console import Console

        wide = Console(file=console.file, width=max(250, console.width), markup=False, highlight=False)
        wide.print(table_of(result))
        if result.note:
            wide.print(result.note)


def table_of(result: "EvaluationRecord") -> Any:
    """A row for each checkpoint."""
    from rich.table import Table

    first, beams = result.checkpoints[0], result.settings.beams
    speech = first.greedy is not None and first.greedy.word_error_rate is not None
    columns = ["", "loss,\nnats", "above the original", "perplexity", "KL", "same first\nchoice"]
    if speech:
        columns += ["word errors, greedy", f"beam {beams}"]
    elif first.greedy is not None:
        columns += ["BLEU, greedy", f"BLEU, beam {beams}", "chrF"]
    else:
        columns += ["tokens before\nit differs", "repetition"]
    columns.append("cache,\nbytes a token")
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
    """A number of a record and its interval."""
    interval = getattr(found, f"{name}_interval")
    said = format(getattr(found, name), form)
    if interval is None or not all(map(math.isfinite, interval)):
        return said
    low, high = (format(x, form) for x in interval)
    return f"{said} [{low}, {high}]"


evaluate = function(Evaluation)
