"""Likelihoods of held-out text, and the divergence of a checkpoint's distributions from the original's."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mqa_hf.base.errors import MQAError
from mqa_hf.finetune.data import IGNORED

from .evaluation_record import ContextLoss, WindowRecord
from .held_out import HeldOut

POSITIONS = 1024  # compared at once, in float32


@torch.no_grad()
def predict(
    ours: Any,
    theirs: Any,
    held_out: HeldOut,
    chosen: Sequence[int],
    batch_tokens: int,
    path: Path,
    apart: Sequence[int] = (),
) -> Iterator[WindowRecord]:
    """Compute the likelihoods of windows, and their divergence from the original's.

    Args:
        ours, theirs: the checkpoint's model and its original, which may be the same.
        held_out: provides the windows.
        chosen: indices of the windows.
        batch_tokens: tokens per batch.
        path: the checkpoint, for messages.
        apart: token ids that only one of the models has.
    """
    windows = held_out.windows
    for batch in by_length(chosen, lambda i: len(windows[i].ids), batch_tokens):
        inputs = held_out.collate([windows[i] for i in batch])
        labels = inputs.pop("labels")
        our_logits = logits(ours, inputs)
        their_logits = our_logits if theirs is ours else logits(theirs, inputs)
        for row, index in enumerate(batch):
            places = (labels[row] != IGNORED).nonzero()[:, 0]
            measured = compare(our_logits[row], their_logits[row], labels[row], places, apart)
            if not measured.isfinite().all():
                wrong = "its" if not measured[0].isfinite().all() else "the original's"
                raise MQAError(
                    f"{path}: {wrong} logits are not finite in document {windows[index].document}, "
                    f"{int((~measured.isfinite()).any(0).sum())} of {len(places)} tokens (dtype {ours.dtype}); try "
                    "`dtype` float32, or check the weights"
                )
            nats, divergence, same = measured
            reached = (places + 1).float().log2().floor().long()
            context: dict[int, tuple[float, int]] = {}
            for bucket in reached.unique().tolist():
                here = reached == bucket
                context[bucket] = (float(nats[here].sum()), int(here.sum()))
            yield WindowRecord(
                id=index,
                document=windows[index].document,
                nats=float(nats.sum()),
                divergence=float(divergence.sum()),
                same=int(same.sum()),
                tokens=len(places),
                bytes=windows[index].bytes,
                context=context,
            )


def by_length(chosen: Sequence[int], length: Callable[[int], int], most: int) -> Iterator[list[int]]:
    """Batches of similar length, the longest first, each of at most `batch_tokens` tokens."""
    batch: list[int] = []
    for i in sorted(chosen, key=lambda i: (-length(i), i)):
        if batch and (len(batch) + 1) * length(batch[0]) > most:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**{name: value.to(model.device) for name, value in inputs.items()}, use_cache=False).logits


def compare(
    ours: torch.Tensor, theirs: torch.Tensor, labels: torch.Tensor, places: torch.Tensor, apart: Sequence[int] = ()
) -> torch.Tensor:
    """For each position: nats of its label, KL(theirs ‖ ours) in nats, and whether both have the same first choice.

    Each model's loss is over its own vocabulary. If one has more tokens (a padded embedding, an added token), the
    other two numbers are over the tokens that both have.

    Args:
        ours, theirs: logits [T, V] and [T, V'].
        labels: [T].
        places: [n], positions in T.
        apart: token ids that only one of them has.

    Returns:
        [3, n] in float64.
    """
    words = min(ours.shape[-1], theirs.shape[-1])
    common: slice | list[int] = slice(words)
    if any(i < words for i in apart):
        common = sorted(set(range(words)).difference(apart))
    found = []
    for part in places.split(POSITIONS):
        log_p = ours[part.to(ours.device)].float().log_softmax(-1)
        nats = -log_p.gather(-1, labels[part].to(log_p.device)[:, None])[:, 0]
        if common != slice(ours.shape[-1]):
            log_p = log_p[:, common].log_softmax(-1)
        log_q = theirs[part.to(theirs.device)][:, common].float().log_softmax(-1).to(log_p.device)
        divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
        found.append(torch.stack((nats, divergence, (log_p.argmax(-1) == log_q.argmax(-1)).to(nats.dtype))))
    return torch.cat(found, 1).double().cpu()


def by_document(groups: Sequence[int], values: Sequence[float]) -> dict[int, float]:
    """The sum of the values of each document."""
    sums: dict[int, float] = {}
    for group, value in zip(groups, values):
        sums[group] = sums.get(group, 0) + value
    return sums


def by_context(records: Sequence[WindowRecord]) -> list[ContextLoss]:
    """Loss by the number of tokens before the predicted one, in powers of two."""
    sums: dict[int, tuple[float, int]] = {}
    for record in records:
        for bucket, (nats, count) in record.context.items():
            before = sums.get(bucket, (0.0, 0))
            sums[bucket] = (before[0] + nats, before[1] + count)
    return [
        ContextLoss(first=2**b, last=2 ** (b + 1) - 1, loss=sums[b][0] / sums[b][1], tokens=sums[b][1])
        for b in sorted(sums)
    ]
