"""Projections of a decode step: those with the same input are one matrix product, with norm, activation and residual.
Norms of queries and keys have one tensor of weights.

B rows decoded, N outputs and K inputs of a projection, H query heads, G key/value heads, D query/key head width
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import nn

from .attention_mqa import HeadNorm
from .kernel_linear_mqa import MAX_SMALL_ROWS, fused_linear
from .kernel_norm_mqa import ACTIVATIONS, activate, normalise
from .parallel_mqa import Sums, divided, local, summed_over

if TYPE_CHECKING:
    from .layer_mqa import MQAAttention

WIDE = 16384  # outputs from which the kernel for a few rows reads weights faster than cuBLAS does (measured, H100)


class Plan(NamedTuple):
    """What is multiplied for a group of projections.

    Attributes:
        weight, bias: [ΣN, K] and [ΣN]; of this rank, if the modules are divided.
        sums: adds the outputs of all ranks, where K is divided among them.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    sums: Sums | None = None


class Projections:
    """act(norm(x) · Wᵀ + b) + residual for modules that share their input.

    Args:
        hidden_act: name of the activation that [`Projections.__call__`] may get.
        triton: whether to use the kernels.
        rows: B.
    """

    def __init__(self, hidden_act: str, triton: bool, rows: int):
        self.activation = hidden_act if hidden_act in ACTIVATIONS else None
        self.triton, self.rows = triton, rows
        self.plans: dict[int, Plan | None] = {}
        self.adding: Sums | None = None

    def prepare(self, groups: Iterable[tuple[nn.Module, ...]]) -> bool:
        """Join the weights of each group of modules; called before the first step of each text.

        Returns:
            Whether a captured graph is invalid, because a module may have changed (a switchable adapter).
        """
        before = {key: plan is not None for key, plan in self.plans.items()}
        self.plans = {}
        for modules in groups:
            self.weights(modules)
        now = {key: plan is not None for key, plan in self.plans.items()}
        return now != before or not all(now.values())

    def weights(self, modules: tuple[nn.Module, ...]) -> Plan | None:
        """Joined weight and bias of plain projections; `None` if one is not plain (LoRA, int8)."""
        key = id(modules[0])
        if key not in self.plans:
            self.plans[key] = None
            linears = [module for module in modules if plain(module)]
            if len(linears) == len(modules) and len({m.weight.dtype for m in linears}) == 1:
                weights = [local(m.weight) for m in linears]
                biases = [local(m.bias) for m in linears]
                sizes = [len(w) for w in weights if w is not None]
                if joinable(weights, sizes) and joinable(biases, sizes):
                    weight = joined(weights, sizes)
                    assert weight is not None
                    self.plans[key] = Plan(weight, joined(biases, sizes), self.sums(weight, linears[0].weight))
        return self.plans[key]

    def sums(self, own: torch.Tensor, weight: Any) -> Sums | None:
        """What adds the outputs of a projection with the part `own` of a `weight`; all of them share one."""
        ranks = summed_over(weight)
        if ranks is None:
            return None
        if self.adding is None:
            self.adding = Sums(ranks, self.rows, len(own), own.dtype, own.device, self.triton)
        return self.adding

    def __call__(
        self,
        x: torch.Tensor,
        modules: tuple[nn.Module, ...],
        norm: nn.Module | None = None,
        activation: nn.Module | None = None,
        gated: bool = False,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """act(norm(x) · Wᵀ + b) + residual with the joined weights of `modules`.

        Args:
            x: [B, K].
            activation: a module, applied to all outputs; with `gated`, to the outputs of the first of two modules,
                which are then multiplied with those of the second.
            residual: [B, N]; the result may be written to it.
        """
        found, name = self.weights(modules), None if activation is None else self.activation
        if found is None:
            y = x if norm is None else norm(x)
            parts = [module(y) for module in modules]
            if activation is not None:
                parts[0] = activation(parts[0])
            out = parts[0] * parts[1] if gated else torch.cat(parts, -1) if len(parts) > 1 else parts[0]
            return out if residual is None else residual + out
        weight, bias, sums = found
        if sums is not None:  # behind a norm, inputs are whole
            room = sums.room(len(x), len(weight))
            if self.triton and len(x) == 1 and weight.dtype == x.dtype:
                out = fused_linear(x, weight, out=room)
            else:
                out = product(x, weight, None) if room is None else torch.mm(x, weight.t(), out=room)
            out = sums(out)
            out = out if bias is None else out + bias
            return out if residual is None else residual + out
        fits = self.triton and (activation is None or name is not None) and weight.dtype == x.dtype
        normal = None if norm is None else kernel_norm(norm)
        if fits and len(x) == 1 and (norm is None or normal is not None):
            return fused_linear(x, weight, bias, *(normal or ()), activation=name, gated=gated, residual=residual)
        y = x if norm is None else self.normed(x, norm)
        if fits and len(x) <= MAX_SMALL_ROWS and len(weight) >= WIDE and x.element_size() == 2:
            return fused_linear(y, weight, bias, activation=name, gated=gated, residual=residual)
        if residual is not None and bias is None and y.is_cuda:
            return torch.addmm(residual, y, weight.t(), out=residual)
        out = product(y, weight, bias)
        if activation is not None and fits:
            out = activate(out, name, gated)  # type: ignore[arg-type]
        elif activation is not None:
            first, *second = out.chunk(2, -1) if gated else (out,)
            out = activation(first) * second[0] if gated else activation(first)
        return out if residual is None else residual + out

    def normed(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """norm(x) for x [B, d]."""
        normal = kernel_norm(norm)
        return normalise(x, *normal) if self.triton and normal is not None else norm(x)


class HeadNorms:
    """Weights and biases of the norms of queries and keys, joined for the kernel that appends to the cache, at fixed
    addresses while a graph is in use.

    Attributes:
        joined: by layer, weight and bias [H + G, D], or `None`.
    """

    def __init__(self) -> None:
        self.joined: dict[int, tuple[torch.Tensor | None, torch.Tensor | None]] = {}

    def prepare(self, attentions: "Iterable[MQAAttention]") -> None:
        """Read the current weights; called before the first step of each text."""
        for attention in attentions:
            q, k = attention.q_norm, attention.k_norm
            if q is None or k is None or not plain_norms(attention):
                continue
            now = both(q.weight, k.weight), both(q.bias, k.bias)
            for table, new in zip(self.joined.setdefault(attention.layer_idx, now), now):
                if table is not None and new is not None:
                    table.copy_(new)

    def __call__(self, attention: "MQAAttention") -> dict[str, Any]:
        """Arguments of `append` for the norm of queries and keys."""
        norm = attention.q_norm
        if norm is None or attention.k_norm is None:
            return {}
        kind = "layer_norm" if norm.centred else "rms_norm", norm.joint, attention.norm_after_rotation
        weight, bias = self.joined[attention.layer_idx]
        return {"norm": kind, "eps": norm.eps, "norm_weight": weight, "norm_bias": bias}


def both(of_queries: torch.Tensor | None, of_keys: torch.Tensor | None) -> torch.Tensor | None:
    """[H, D] and [G, D] -> [H + G, D]."""
    return None if of_queries is None or of_keys is None else torch.cat((of_queries.detach(), of_keys.detach()))


def plain_norms(attention: "MQAAttention") -> bool:
    """Whether the norms of queries and keys are unmodified: no trained copy in their place."""
    return all(norm is None or type(norm) is HeadNorm for norm in (attention.q_norm, attention.k_norm))


def plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is only a matrix product (no adapter, no quantised weight, no hook), or one rank's part."""
    return (
        type(module) is nn.Linear
        and (type(module.weight) is nn.Parameter or divided(module.weight))
        and module.weight.element_size() > 1
        and module.weight.is_contiguous()
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def kernel_norm(norm: nn.Module) -> tuple[str, torch.Tensor | None, torch.Tensor | None, float] | None:
    """Kind, weight, bias and epsilon of a norm that the kernels support."""
    if type(norm) is nn.RMSNorm and norm.eps is not None:
        return "rms_norm", norm.weight, None, norm.eps
    if type(norm) is nn.LayerNorm:
        return "layer_norm", norm.weight, norm.bias, norm.eps
    return None


def are_joined(parameters: list[torch.Tensor | None], sizes: list[int]) -> bool:
    """Whether parameters are contiguous, one after the other, in a storage of their own."""
    one = next(p for p in parameters if p is not None)
    width, storage = one[0].numel(), one.untyped_storage()
    offsets = [sum(sizes[:i]) * width for i in range(len(sizes))]
    return storage.nbytes() == sum(sizes) * width * one.element_size() and all(
        p is None or (p.untyped_storage().data_ptr() == storage.data_ptr() and p.storage_offset() == offset)
        for p, offset in zip(parameters, offsets)
    )


def joinable(parameters: list[torch.Tensor | None], sizes: list[int]) -> bool:
    """Whether parameters may become views of one tensor: not if something else relies on their storage, such as an
    optimiser that keeps all weights in one buffer, or other processes that share them.
    """
    present = [p for p in parameters if p is not None]
    alone = all(
        p.untyped_storage().nbytes() == p.numel() * p.element_size()
        and not p.is_inference()
        and not (p.device.type == "cpu" and p.is_shared())
        for p in present
    )
    return len(parameters) == 1 or not present or alone or are_joined(parameters, sizes)


def joined(parameters: list[torch.Tensor | None], sizes: list[int]) -> torch.Tensor | None:
    """Concatenate parameters along their first dimension into one tensor, and make them views of it.

    A missing bias (`None`) becomes zeros. A second call returns the tensor of the first.

    Args:
        parameters: tensors of `sizes[i]` rows each, or `None`.
    """
    present = [p for p in parameters if p is not None]
    if not present:
        return None
    if len(parameters) == 1:
        return present[0].data
    one, total = present[0], sum(sizes)
    if are_joined(parameters, sizes):
        return one.data.as_strided((total, *one.shape[1:]), one.stride(), 0)
    whole = one.data.new_zeros(total, *one.shape[1:])
    for p, part in zip(parameters, whole.split(sizes)):
        if p is not None:
            part.copy_(p.data)
            p.data = part
    return whole


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x · Wᵀ + b."""
    return few_rows(x, weight, bias) if left_is_faster(x) else nn.functional.linear(x, weight, bias)


def left_is_faster(x: torch.Tensor) -> bool:
    """Whether the product is faster with the weights on the left: for a few rows of float32 on a CPU, where MKL takes
    1.3 to 2.9 times as long with them on the right (measured, 2 to 32 rows).
    """
    return x.device.type == "cpu" and x.dtype == torch.float32 and 1 < len(x) <= 32


def few_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out = torch.mm(weight, x.t()).t().contiguous()
    return out if bias is None else out.add_(bias)
