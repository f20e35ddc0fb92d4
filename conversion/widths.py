"""Widths of fitted heads: as requested, or allocated to the layers from a cache budget."""

import copy
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mqa_hf.base.errors import ConversionError
from mqa_hf.configuration_mqa import MQAConfig, of_layer
from mqa_hf.configuration_mqa_seq2seq import MQASeq2SeqConfig

from .canonical import CanonicalConfig, heads_of, stack_of

STEP = 8  # granularity of widths under a budget, in components; suits kernels and 16-byte loads


@dataclass(frozen=True)
class Curves:
    """The error of each width of one attention.

    Attributes:
        keys, values: share of the energy that is left out with 0, 1, ... components of each new head; convex, from 1
            down to 0 at the width of all old heads.
        unit_keys, unit_values: widths of an old head.
        key_cost, value_cost: squared relative error of the attention's output with one old head's width of keys
            (values) and all of the other, times the output's share of the stream that it is added to.
    """

    keys: torch.Tensor
    values: torch.Tensor
    unit_keys: int
    unit_values: int
    key_cost: float
    value_cost: float


Widths = tuple[list[int], list[int]]  # of keys and of values, by layer


def choose_widths(curves: Sequence[Curves], components: int, step: int = STEP) -> Widths:
    """Allocate `components` of keys and values per token and new head to layers, where they reduce the error most.

    The error of an output is taken as its measured cost at one old head's width times the share of energy left out
    relative to that width's. The curves are convex, so the greedy choice is the best in steps of `step`.

    Raises:
        ConversionError: if `components` are fewer than `step` for every key and value.
    """
    slots = []  # (error at each width, width)
    for curve in curves:
        for left, unit, cost in (
            (curve.keys, curve.unit_keys, curve.key_cost),
            (curve.values, curve.unit_values, curve.value_cost),
        ):
            slots.append((left * (cost / max(float(left[unit]), 1e-12)), len(left) - 1))
    try:
        widths = share_out(slots, [1.0] * len(slots), components, step)
    except ValueError as error:
        raise ConversionError(
            f"the cache budget allows {components} components of keys and values per token and head; the "
            f"{len(curves)} layers need at least {error}"
        ) from None
    return widths[::2], widths[1::2]


def share_out(slots: Sequence[tuple[torch.Tensor, int]], costs: Sequence[float], total: float, step: int) -> list[int]:
    """Choose sizes with a cost of at most `total`; each step goes where it reduces the error most for its cost.

    Args:
        slots: for each, the error at the sizes 0, 1, ..., convex, and the largest size.
        costs: cost of one more, by slot.
        total: maximum cost of all slots.
        step: increment of sizes; each size is at least one step.

    Raises:
        ValueError: if `total` is too small, with the minimum.
    """
    sizes = [min(step, most) for _, most in slots]
    remaining = total - sum(size * cost for size, cost in zip(sizes, costs))
    if remaining < 0:
        raise ValueError(f"{sum(size * cost for size, cost in zip(sizes, costs)):g}")

    def gain(i: int) -> tuple[float, int]:
        error, most = slots[i]
        size = min(step, most - sizes[i])
        return float(error[sizes[i] + size] - error[sizes[i]]) / (max(size, 1) * costs[i]), i

    queue = [gain(i) for i in range(len(slots))]
    heapq.heapify(queue)
    while queue:
        _, i = heapq.heappop(queue)
        size = min(step, slots[i][1] - sizes[i])
        if size <= 0 or size * costs[i] > remaining:
            continue
        sizes[i] += size
        remaining -= size * costs[i]
        heapq.heappush(queue, gain(i))
    return sizes


def budget_components(budget: str, config: CanonicalConfig, kv_heads: int, attention: str) -> int:
    """Components per token and new head, all layers together, that a cache budget allows.

    Args:
        budget: bytes per token at 16 bits a value, or a share of the source's cache such as "0.25" or "25%".
        config: configuration of the source.
        attention: "decoder" or "cross".

    Raises:
        ConversionError: if the budget is invalid, or in bytes for a model with two caches.
    """
    try:
        share = float(budget[:-1]) / 100 if budget.endswith("%") else float(budget)
    except ValueError:
        share = -1.0
    now = config.cross_kv_bytes_per_token if attention == "cross" else config.kv_bytes_per_token
    if not (0 < share <= 1 or (share > 1 and share.is_integer() and not budget.endswith("%"))):
        raise ConversionError(f"`cache_budget` {budget} is neither a number of bytes nor a share such as 0.25 or 25%")
    if share > 1 and isinstance(config, MQASeq2SeqConfig):
        raise ConversionError("`cache_budget` of an encoder-decoder model must be a share, as both sides have a cache")
    return int(now * share if share <= 1 else share) // (2 * kv_heads)


def rotated_pairs(width: int, rotary: int, head: int, heads: int) -> int:
    """Number of rotated pairs of a new key head of `width`: the same share as `rotary` of an old `head`, as far as
    `heads` old heads have enough rotated and plain components."""
    if not rotary:
        return 0
    pairs = round(width * rotary / head / 2)
    plain = heads * (head - rotary)
    return min(max(pairs, -(-(width - plain) // 2)), heads * rotary // 2, width // 2)


def fitted_config(
    config: CanonicalConfig,
    pooled: CanonicalConfig,
    attentions: Sequence[str],
    factors: tuple[float, float],
    widths: Mapping[str, Widths] | None = None,
    choose_frequencies: bool = True,
    linear_keys: bool = True,
) -> CanonicalConfig:
    """The configuration with fitted heads.

    Args:
        config: the configuration with all heads of the source.
        pooled: the same with the requested heads.
        attentions: the fitted attentions.
        factors: widths of keys and values as multiples of an old head's.
        widths: by attention, chosen widths instead.
        choose_frequencies: whether the fit chooses the frequencies of rotated pairs instead of equal ones.
        linear_keys: whether keys are fitted, without their norms, and not pooled.

    Returns:
        `pooled` with those widths, the bias of values folded into the output bias, and placeholders for the chosen
        frequencies.

    Raises:
        ConversionError: if a width exceeds that of the old heads that a new one replaces.
    """
    fitted = copy.deepcopy(pooled)
    for name in attentions:
        stack = stack_of(fitted, name)
        most = heads_of(config)[name] // heads_of(pooled)[name]
        fields = ("cross_qk_head_dim", "cross_v_head_dim") if name == "cross" else ("qk_head_dim", "v_head_dim")
        for field, factor, flag, chosen in zip(
            fields, factors, ("`key_width`", "`value_width`"), (widths or {}).get(name, (None, None))
        ):
            if factor > most:
                raise ConversionError(
                    f"{flag} {factor:g} is more than the {most} old heads that each new one replaces; {most} loses "
                    f"nothing"
                )
            unit = getattr(stack, field)
            setattr(stack, field, chosen if chosen is not None else max(2, 2 * round(unit * factor / 2)))
        fold_value_bias(stack)
        if name != "cross" and linear_keys:
            map_queries(stack)
        if choose_frequencies and name != "cross" and stack.position_embedding == "rotary":
            stack.rope_frequencies = []
            for i in range(stack.num_hidden_layers):
                R = stack.rotary_dim if stack.rope_layers[i] else 0
                pairs = rotated_pairs(of_layer(stack.qk_head_dim, i), R, stack.head_dim, most)
                first = stack.first_frequency(i)
                stack.rope_frequencies.append([first + j % (R // 2) for j in range(pairs)])
    return fitted


def fold_value_bias(config: MQAConfig) -> None:
    """Set that the bias of values is part of the output bias, in place, if it folds."""
    if config.folds_value_bias:
        config.output_bias = config.value_bias or config.output_bias
        config.value_bias = False


def map_queries(config: MQAConfig) -> None:
    """Set that normalised queries have maps and keys are not normalised, in place, if the model normalises them."""
    if config.qk_norm is not None:
        config.query_maps = config.key_bias = True
        config.qk_norm_after_rotation, config.qk_norm_affine = False, config.qk_norm_affine and config.qk_norm_bias
