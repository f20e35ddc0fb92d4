"""How wide fitted heads are: as asked for, or from a cache budget that goes to the layers that need it."""

import copy
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mqa_hf.base.errors import ConversionError
from mqa_hf.configuration_mqa import of_layer
from mqa_hf.configuration_mqa_seq2seq import MQASeq2SeqConfig

from .canonical import CanonicalConfig, heads_of, stack_of

STEP = 8  # components by which widths of a budget differ: what kernels like, and what 16-byte loads fit


@dataclass(frozen=True)
class Curves:
    """What each width of one attention would leave out.

    Attributes:
        keys, values: share of the energy that is left out with 0, 1, ... components of each new head; convex, from 1
            down to 0 at the width of all old heads.
        unit_keys, unit_values: width of an old head.
        key_cost, value_cost: squared relative error of the attention's output with one old head's width of keys
            (values) and all of the other, times the output's share of the stream that it is added to.
    """

    keys: torch.Tensor
    values: torch.Tensor
    unit_keys: int
    unit_values: int
    key_cost: float
    value_cost: float


Widths = tuple[list[int], list[int]]  # of keys and of values, a layer each


def choose_widths(curves: Sequence[Curves], components: int, step: int = STEP) -> Widths:
    """Share out `components` of keys and values per token and new head among layers, where they reduce the error most.

    The error of an output is taken as its measured cost at one old head's width times the share of energy left out
    relative to that width's. The curves are convex, so the greedy choice is the best in steps of `step`.

    Raises:
        ConversionError: where `components` are less than `step` for every key and value.
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
    """Sizes whose cost is at most `total`, chosen where each step reduces the error most for what it costs.

    Args:
        slots: of each, the error at the sizes 0, 1, ..., convex, and the largest size.
        costs: of one more, by slot.
        total: of all.
        step: by which sizes grow; each is at least one step.

    Raises:
        ValueError: with the least that is needed, where `total` is less.
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
        config: the source's.
        attention: "decoder" or "cross".

    Raises:
        ConversionError: where it is no such number, or bytes where there are two caches.
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
    """How many pairs of a new key head of `width` are rotated: as large a part as `rotary` of an old `head`, within
    what `heads` of them have."""
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
) -> CanonicalConfig:
    """The configuration of fitted heads.

    Args:
        config: with all the source's heads.
        pooled: with the heads that are asked for.
        attentions: those that are fitted.
        factors: widths of keys and of values in units of an old head.
        widths: by attention, chosen widths instead.
        choose_frequencies: whether the fit chooses the frequencies of rotated pairs, instead of all alike.

    Returns:
        `pooled` with those widths, the bias of values folded into that of the output, and a place for the frequencies
        that are chosen.

    Raises:
        ConversionError: where a width is more than the old heads that a new one stands for have.
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
        stack.output_bias = stack.value_bias or stack.output_bias
        stack.value_bias = False
        if choose_frequencies and name != "cross" and stack.position_embedding == "rotary":
            stack.rope_frequencies = []
            for i in range(stack.num_hidden_layers):
                R = stack.rotary_dim if stack.rope_layers[i] else 0
                pairs = rotated_pairs(of_layer(stack.qk_head_dim, i), R, stack.head_dim, most)
                stack.rope_frequencies.append([j % (R // 2) for j in range(pairs)])
    return fitted
