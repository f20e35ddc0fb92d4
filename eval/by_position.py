"""The loss of checkpoints by position, in texts longer than the calibration text's rows:

python -m mqa_hf.eval.by_position ORIGINAL CONVERTED --text validation.jsonl.xz --length 8192 --device cuda
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from mqa_hf.base.options import Job, Option

if TYPE_CHECKING:
    from rich.console import Console

FIRST = 512  # positions of the first part; each further part is as long as all parts before it


@dataclass(frozen=True)
class LossByPosition(Job[dict[str, list[float]]]):
    """Compare the loss of checkpoints by position.

    Returns:
        By checkpoint, the mean loss in nats on positions below 512, from 512 to 1,024, from there to 2,048, ...
    """

    name = "by-position"

    checkpoints: Annotated[Sequence[Path], Option("Directories, the original first.")]
    _: KW_ONLY
    text: Annotated[str, Option("Held-out text.")]
    length: Annotated[int, Option("Tokens per row.", min=2)] = 8192
    tokens: Annotated[int, Option("Tokens to measure on.", min=2)] = 262_144
    device: Annotated[str, Option("A PyTorch device.")] = "cpu"

    def resolve(self) -> "LossByPosition":
        """Return the job; raise MQAError for an unavailable device, or rows longer than a model's positions."""
        from mqa_hf.base.devices import check_device
        from mqa_hf.base.errors import MQAError
        from mqa_hf.conversion.source import load_config

        check_device(self.device)
        for checkpoint in self.checkpoints:
            config = load_config(checkpoint).get_text_config(decoder=True)
            most = getattr(config, "max_position_embeddings", None)  # some have no limit
            if most is not None and self.length > most:
                raise MQAError(
                    f"`length` must be at most {most:,}, the positions of {checkpoint}, got {self.length:,}"
                )
        return self

    def run(self) -> dict[str, list[float]]:
        import torch

        from mqa_hf.base.text import load_tokenizer
        from mqa_hf.base.tokens import calibration_tokens
        from mqa_hf.conversion.loading import load_model
        from mqa_hf.conversion.source import load_config

        job = self.resolve()
        size = load_config(job.checkpoints[0]).get_text_config(decoder=True).vocab_size
        tokenizer = load_tokenizer(job.checkpoints[0])
        rows = calibration_tokens(tokenizer, job.text, job.tokens, job.length, size, seed=0)
        found = {}
        for checkpoint in job.checkpoints:
            model = load_model(checkpoint, dtype=torch.float32).to(job.device)
            total = torch.zeros(job.length - 1, dtype=torch.float64)
            for row in rows:
                with torch.no_grad():
                    logits = model(row[None].to(job.device), use_cache=False).logits[0, :-1].float()
                losses = torch.nn.functional.cross_entropy(logits, row[1:].to(job.device), reduction="none")
                total += losses.double().cpu()
            found[str(checkpoint)] = [float(total[first:last].mean() / len(rows)) for first, last in job.parts()]
        return found

    def parts(self) -> list[tuple[int, int]]:
        """Ranges of positions whose losses are averaged."""
        ends, last = [FIRST], self.length - 1  # the last token has no next token
        while ends[-1] < last:
            ends.append(2 * ends[-1])
        ends[-1] = last
        return list(zip([0, *ends], ends))

    def show(self, result: dict[str, list[float]], console: "Console") -> None:
        """Print a table of the first checkpoint's losses, and the differences of the others from it."""
        from rich.table import Table

        table = Table(title=f"loss in nats by position, rows of {self.length:,} tokens", title_justify="left")
        table.add_column("positions")
        for name in result:
            table.add_column(name, justify="right")
        first = next(iter(result.values()))
        for i, (start, end) in enumerate(self.parts()):
            others = [f"{losses[i] - first[i]:+.3f}" for losses in list(result.values())[1:]]
            table.add_row(f"{start:,} to {end:,}", f"{first[i]:.3f}", *others)
        console.print(table)


if __name__ == "__main__":
    from mqa_hf.base.commands import run_job

    run_job(LossByPosition)
