"""Shared by all peers: replace a model's attentions, and collect their inputs on calibration tokens.

B sequences, T tokens of each, L layers, H query heads, G key/value heads, D head width, d hidden size
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mqa_hf.layer_mqa import MQAAttention
from mqa_hf.modeling_mqa import MQAForCausalLM

SHARES = (2 / 3, 1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 8)  # of the original's cache
FISHER_ROWS = 32  # sequences for gradients


@dataclass(frozen=True)
class Peer:
    """A method for a smaller cache, with its setting.

    Attributes:
        name: "METHOD, setting".
        cache_bytes: bytes per token in a long text, over all layers.
        attentions: one per layer, in place of the original's.
    """

    name: str
    cache_bytes: int
    attentions: Sequence[nn.Module]


def attentions_of(model: MQAForCausalLM) -> list[MQAAttention]:
    return [layer.self_attn for layer in model.model.layers]


@torch.no_grad()
def mean_loss(model: PreTrainedModel, tokens: torch.Tensor, batch: int = 4) -> float:
    """Mean cross-entropy in nats of each token after the first of its row; tokens [N, T]."""
    total = 0.0
    for rows in tokens.split(batch):
        logits = model(rows.to(model.device), use_cache=False).logits[:, :-1].float()
        labels = rows[:, 1:].to(model.device)
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
    return total / (tokens.shape[0] * (tokens.shape[1] - 1))


@contextmanager
def swapped(model: MQAForCausalLM, attentions: Sequence[nn.Module]) -> Iterator[None]:
    """Put these attentions into the model's layers."""
    originals = attentions_of(model)

    def put(modules: Sequence[nn.Module]) -> None:
        for layer, module in zip(model.model.layers, modules, strict=True):
            layer.self_attn = module

    put(attentions)
    try:
        yield
    finally:
        put(originals)


def renewed(attention: MQAAttention, **changes: Any) -> MQAAttention:
    """Copy an attention with other projections or settings; the rest is shared with it."""
    new = copy.copy(attention)
    for held in ("_parameters", "_buffers", "_modules"):
        new.__dict__[held] = dict(getattr(attention, held))
    for name, value in changes.items():
        setattr(new, name, value)
    return new


def affine(linear: nn.Linear) -> torch.Tensor:
    """[out, d + 1] in float64: the weight with the bias as its last column, for inputs with a 1 appended."""
    bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
    return torch.cat((linear.weight, bias[:, None]), dim=1).detach().double()


def linear(rows: torch.Tensor, like: nn.Linear) -> nn.Linear:
    """A projection with these rows [out, d + 1], in the type and on the device of another."""
    made = nn.Linear(rows.shape[1] - 1, len(rows), bias=bool(rows[:, -1].any()), device="meta")
    made.weight = nn.Parameter(rows[:, :-1].to(like.weight), requires_grad=False)
    if made.bias is not None:
        made.bias = nn.Parameter(rows[:, -1].to(like.weight), requires_grad=False)
    return made


@torch.no_grad()
def watch(model: MQAForCausalLM, rows: torch.Tensor, see: Callable[[int, torch.Tensor], None], batch: int = 4) -> None:
    """Run the model on token ids [N, T]; `see` gets each layer's number and the input of its attention [B, T, d]."""

    def hook(number: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: see(number, args[0])

    handles = [a.register_forward_pre_hook(hook(i)) for i, a in enumerate(attentions_of(model))]
    try:
        for some in rows.split(batch):
            model.model(some.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def moments(model: MQAForCausalLM, rows: torch.Tensor) -> list[torch.Tensor]:
    """E[x x'] [d + 1, d + 1] of each layer's attention inputs with a 1 appended, in float64."""
    d = model.config.hidden_size + 1
    found = [torch.zeros(d, d, dtype=torch.float64, device=model.device) for _ in attentions_of(model)]

    def see(i: int, x: torch.Tensor) -> None:
        flat = nn.functional.pad(x.flatten(0, 1).double(), (0, 1), value=1.0)
        found[i] += flat.mT @ flat

    watch(model, rows, see)
    return [moment / rows.numel() for moment in found]


def fisher(model: MQAForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Sensitivity of the loss to W_K and W_V of each layer: the mean of √E[g²] over entries, [L, 2].

    g is the gradient of a sequence's loss (Palu, arXiv 2407.21118, automatic rank allocation).
    """
    weights = [p.weight for a in attentions_of(model) for p in (a.k_proj, a.v_proj)]
    squares = [torch.zeros_like(w) for w in weights]
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    for row in rows.split(1):
        ids = row.to(model.device)
        loss = model(ids, labels=ids, use_cache=False).loss
        for square, gradient in zip(squares, torch.autograd.grad(loss, weights)):
            square += gradient.square()
    model.requires_grad_(False)
    return torch.stack([(s / len(rows)).sqrt().mean() for s in squares]).view(-1, 2).cpu()


@dataclass(frozen=True)
class Calibration:
    """The data that peers are fitted on.

    Attributes:
        model: with all its heads.
        rows: token ids [N, T].
    """

    model: MQAForCausalLM
    rows: torch.Tensor

    @cached_property
    def moments(self) -> list[torch.Tensor]:
        """See [`moments`]."""
        return moments(self.model, self.rows)

    @cached_property
    def fisher(self) -> torch.Tensor:
        """See [`fisher`]."""
        return fisher(self.model, self.rows[:FISHER_ROWS])


def components(model: MQAForCausalLM) -> int:
    """Cached numbers per token of the model, over all layers."""
    return model.config.kv_bytes_per_token // 2


def dominant(gram: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvectors [..., n, rank] and the largest eigenvalues [..., rank] of symmetric matrices [..., n, n]."""
    values, vectors = torch.linalg.eigh(gram)
    return vectors.flip(-1)[..., :rank], values.flip(-1)[..., :rank].clamp(min=0)
