"""Train one converted attention on the output of the attention with all its heads.

Closed forms fit one map at a time and to first order; a few hundred steps on all of them reduce the error further.
B sequences, T tokens of each, d hidden size
"""

import math

import torch

from mqa_hf.layer_mqa import MQADecoderLayer

from .heads import attended, compare, refit
from .states import Stream

ROWS = 4  # sequences per step
LEARNING_RATE = 0.01  # scaled by the root mean square of each tensor
WARMUP = 10


def train(
    stream: Stream,
    teacher: MQADecoderLayer,
    student: MQADecoderLayer,
    site: str,
    steps: int,
    generator: torch.Generator,
) -> None:
    """Train the student's attention for some steps of Adam, then refit its output projection if requested.

    The error of a token is relative to the size of the residual stream. The old weights are restored if they were
    nearer to the teacher on the held-out tokens.
    """
    new = getattr(student, site)
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    error = compare(stream, teacher, student, site, generator)["attention_error"]
    parameters = [p for name, p in new.named_parameters() if not name.startswith("relative_bias")]
    sizes = [max(float(p.square().mean().sqrt()), 1e-3) for p in parameters]
    groups = [{"params": [p], "lr": LEARNING_RATE * size} for p, size in zip(parameters, sizes)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / WARMUP) * (0.51 + 0.49 * math.cos(math.pi * step / steps)),
    )
    order: list[int] = []
    for _ in range(steps):
        if not order:
            order = torch.randperm(max(stream.fitted_rows // ROWS, 1), generator=generator).tolist()
        start = order.pop() * ROWS
        rows = slice(start, min(start + ROWS, stream.fitted_rows))
        optimizer.zero_grad()
        with torch.enable_grad():
            _loss(stream, teacher, student, site, rows).backward()
        optimizer.step()
        schedule.step()
    if stream.options.refit:
        refit(stream, teacher, student, site)
    if not compare(stream, teacher, student, site, generator)["attention_error"] <= error:
        new.load_state_dict(before)
        stream.known.pop(site, None)


def _loss(stream: Stream, teacher: MQADecoderLayer, student: MQADecoderLayer, site: str, rows: slice) -> torch.Tensor:
    """The squared relative error of the attention's output; tokens are weighted by 1 / ‖stream‖²."""
    with torch.no_grad():
        h, source, mask = stream.at(student, site, rows)
        expected = attended(stream, getattr(teacher, site), h, source, mask)
        size = stream.states[rows].to(stream.device).square().sum(-1, keepdim=True)
        weight = stream.valid(rows)[..., None] / size.clamp(min=1e-12)
    found = attended(stream, getattr(student, site), h, source, mask)
    return (weight * (found - expected).square()).sum() / (weight * expected.square()).sum().clamp(min=1e-30)
