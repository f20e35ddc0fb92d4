"""Training of one converted attention on what the attention with all its heads gives at the same place.

Closed forms fit one map at a time and to first order; a few hundred steps of all maps together win what they leave.
B sequences, T tokens of each, d hidden size
"""

import math

import torch

from mqa_hf.layer_mqa import MQADecoderLayer

from .heads import compare, heads_output, refit
from .states import Stream

ROWS = 4  # sequences of a step
LEARNING_RATE = 0.01  # of numbers of size 1; each tensor's is relative to its root mean square
WARMUP = 10


def train(
    stream: Stream,
    teacher: MQADecoderLayer,
    student: MQADecoderLayer,
    site: str,
    steps: int,
    generator: torch.Generator,
) -> None:
    """Train the student's attention for some steps of Adam, and refit its output projection again where
    that is asked for.

    The error of a token counts relative to the size of the stream that it is added to. What was there before is put
    back where it was nearer to the teacher on the held-out tokens.
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


def _loss(stream: Stream, teacher: MQADecoderLayer, student: MQADecoderLayer, site: str, rows: slice) -> torch.Tensor:
    """The squared error of the attention's output relative to it, both relative to the stream."""
    with torch.no_grad():
        h, source, mask = stream.at(student, site, rows)
        expected = heads_output(stream, getattr(teacher, site), h, source, mask)[1]
        size = stream.states[rows].to(stream.device).square().sum(-1, keepdim=True)
        weight = stream.valid(rows)[..., None] / size.clamp(min=1e-12)
    found = heads_output(stream, getattr(student, site), h, source, mask)[1]
    return (weight * (found - expected).square()).sum() / (weight * expected.square()).sum().clamp(min=1e-30)
