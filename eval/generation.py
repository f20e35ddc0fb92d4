"""What checkpoints write, beside what the original writes:

    python -m mqa_hf.eval.generation ORIGINAL CHECKPOINT ... --text validation.jsonl

continues the beginnings of texts greedily and prints, for each checkpoint, how many tokens agree with the original's
before the first difference, how often its first choice is the original's where both read the same text, chrF of its
continuation against the original's (sacrebleu), and how much it repeats itself.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mqa_hf.cli import main as run
from mqa_hf.conversion.errors import ConversionError
from mqa_hf.conversion.text import calibration_tokens


@dataclass(frozen=True)
class Writing:
    """What a checkpoint writes; means over prompts.

    Attributes:
        checkpoint: its name.
        agreeing_tokens: before the first that is not the original's.
        same_first_choice: share of the original's tokens that are also this model's first choice there.
        chrf: of its text against the original's, 0 to 100 (Popović 2015).
        repetition: share of 4-grams of tokens that stood in the same text before.
        sample: its continuation of the first prompt.
    """

    checkpoint: str
    agreeing_tokens: float
    same_first_choice: float
    chrf: float
    repetition: float
    sample: str


def repetition(rows: torch.Tensor, n: int = 4) -> float:
    """The share of n-grams of tokens [N, T] that stood in their row before."""
    grams = [[tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in rows.tolist()]
    return sum(len(g) - len(set(g)) for g in grams) / max(1, sum(map(len, grams)))


@torch.no_grad()
def continuations(model: PreTrainedModel, prompts: torch.Tensor, count: int, batch: int = 16) -> torch.Tensor:
    """[N, count] tokens that follow prompts [N, T], the likeliest one each time."""
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    written = [model.generate(rows.to(model.device), **options) for rows in prompts.split(batch)]  # type: ignore[operator]
    return torch.cat([rows[:, prompts.shape[1] :].cpu() for rows in written])


@torch.no_grad()
def first_choices(model: PreTrainedModel, prompts: torch.Tensor, told: torch.Tensor, batch: int = 16) -> torch.Tensor:
    """[N, T] of a model's first choices where it reads prompts and then `told` [N, T]."""
    whole = torch.cat((prompts, told), dim=1)
    start = prompts.shape[1] - 1
    chosen = [
        model(rows.to(model.device), use_cache=False).logits[:, start:-1].argmax(-1).cpu()
        for rows in whole.split(batch)
    ]
    return torch.cat(chosen)


def compare(
    name: str,
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: torch.Tensor,
    ours: torch.Tensor,
    original: torch.Tensor,
) -> Writing:
    """A model's continuations `ours` [N, T] of prompts beside `original` [N, T]."""
    try:
        from sacrebleu.metrics import CHRF
    except ImportError as error:
        raise ConversionError("this needs sacrebleu: pip install 'mqa-hf[evaluation]'") from error
    agreeing = (ours == original).long().cumprod(1).sum(1).float().mean()
    texts = [tokenizer.batch_decode(rows, skip_special_tokens=True) for rows in (ours, original)]
    return Writing(
        checkpoint=name,
        agreeing_tokens=float(agreeing),
        same_first_choice=float((first_choices(model, prompts, original) == original).float().mean()),
        chrf=CHRF().corpus_score(texts[0], [texts[1]]).score,
        repetition=repetition(ours),
        sample=texts[0][0],
    )


def main(
    original: Annotated[Path, typer.Argument(help="The original.")],
    checkpoints: Annotated[list[Path], typer.Argument(help="What is made of it.")],
    text: Annotated[str | None, typer.Option(help="As --calibration of mqa-hf convert.")] = None,
    prompts: Annotated[int, typer.Option(help="Texts to continue.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a beginning.")] = 64,
    tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 64,
    device: Annotated[str, typer.Option(help="A PyTorch device.")] = "cuda" if torch.cuda.is_available() else "cpu",
    output: Annotated[Path | None, typer.Option(help="File that gets the numbers and samples as JSON.")] = None,
) -> None:
    """What checkpoints write, beside what the original writes."""
    table = Table(title=f"{tokens} tokens after {prompts} beginnings of {prompt_tokens}", title_justify="left")
    for column in ("checkpoint", "agreeing tokens", "same first choice", "chrF", "repetition"):
        table.add_column(column, justify="left" if column == "checkpoint" else "right")
    tokenizer = AutoTokenizer.from_pretrained(original)
    found: list[Writing] = []
    told = torch.empty(0)
    beginnings = torch.empty(0)
    for checkpoint in (original, *checkpoints):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval().to(device)
        if checkpoint is original:
            size = model.config.vocab_size
            beginnings = calibration_tokens(original, text, prompts * prompt_tokens, prompt_tokens, size, seed=0)
        ours = continuations(model, beginnings, tokens)
        told = ours if checkpoint is original else told
        writing = compare(checkpoint.name, model, tokenizer, beginnings, ours, told)
        found.append(writing)
        table.add_row(
            writing.checkpoint,
            f"{writing.agreeing_tokens:.1f}",
            f"{writing.same_first_choice:.1%}",
            f"{writing.chrf:.1f}",
            f"{writing.repetition:.1%}",
        )
    console = Console(width=120, markup=False, highlight=False)
    console.print(table)
    for writing in found:
        console.print(f"{writing.checkpoint}: {writing.sample!r}", soft_wrap=True)
    if output is not None:
        output.write_text(json.dumps([asdict(writing) for writing in found], indent=2) + "\n")


if __name__ == "__main__":
    run(lambda: typer.run(main))
