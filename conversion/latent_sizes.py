"""Sizes of latents: as requested, or allocated to the layers from a cache budget.

r numbers of a latent, W rebuilt components of keys
"""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mqa_hf.base.errors import ConversionError
from mqa_hf.configuration_checks_mqa import LATENT_BLOCK
from mqa_hf.configuration_mqa import MQAConfig

from .canonical import CanonicalConfig, heads_of, stack_of
from .convert import ConversionOptions
from .widths import budget_components, share_out

if TYPE_CHECKING:
    from .latents import LatentCurves

STEP = 16  # granularity of chosen sizes; the numbers that matrix units multiply at once
Sizes = tuple[list[int], list[int]]  # r and W of each layer


def most_numbers(stack: MQAConfig, heads: int) -> int:
    """The largest useful r: the hidden size, or all keys and values of a token."""
    return min(stack.hidden_size, 2 * heads * stack.head_dim)


def most_keys(stack: MQAConfig, heads: int, layer: int, attention: str) -> int:
    """The largest W: all rotated components of all heads; 0 without rotary positions."""
    rotated = attention != "cross" and stack.rope_layers[layer]
    return heads * stack.rotary_dim if rotated else 0


def check_attentions(config: CanonicalConfig, attentions: Sequence[str]) -> None:
    """Raise ConversionError for attentions that cannot have latents, alone or together."""
    if "encoder" in attentions:
        raise ConversionError(
            "a latent saves cache, and an encoder has none; leave encoder out of `attention`, or use another `method`"
        )
    if len(counts := {heads_of(config)[name] for name in attentions}) > 1:
        raise ConversionError(
            f"the attentions have {' and '.join(map(str, sorted(counts)))} key/value heads, but latents need the "
            f"same number in all; select one with `attention`"
        )


def check_sizes(config: CanonicalConfig, attentions: Sequence[str], job: ConversionOptions) -> None:
    """Raise ConversionError, before any layer is read, for sizes of latents that the source cannot have."""
    check_attentions(config, attentions)
    for name in attentions:
        if job.cache_budget is None:
            chosen_numbers(config, name, job)
        else:
            allowed_numbers(config, name, job)
    if job.key_width is None:
        return
    most = max(
        most_keys(stack, heads_of(config)[name], i, name)
        for name in attentions
        for stack in (stack_of(config, name),)
        for i in range(stack.num_hidden_layers)
    )
    if not most:
        raise ConversionError(
            f"`key_width` counts rotated key components, but the keys of {' and '.join(attentions)} attention are "
            f"not rotated; "
            "leave it out"
        )
    if job.key_width > most:
        raise ConversionError(
            f"`key_width` {job.key_width:g} is more than the {most} rotated components of all keys; {most} "
            "loses nothing"
        )


def chosen_numbers(config: CanonicalConfig, attention: str, job: ConversionOptions) -> int:
    """r of every layer without a budget; raises ConversionError if it is too large or not a valid multiple."""
    stack, heads = stack_of(config, attention), heads_of(config)[attention]
    most = most_numbers(stack, heads)
    step = check_step(most, attention, job)
    r = job.latent if job.latent is not None else max(min(2 * stack.head_dim, most) // step, 1) * step
    if r > most:
        raise ConversionError(
            f"`latent` {r} is more than the {most} numbers that hold all keys and values of {attention} attention; "
            f"{most} loses nothing"
        )
    if r < 1 or r % step:
        raise ConversionError(f"`latent` must be a multiple of {step} with `latent_bits` {job.latent_bits}; got {r}")
    return r


def equal_latents(config: CanonicalConfig, attention: str, job: ConversionOptions) -> Sizes:
    """The same r and W in every layer; W as requested, or its maximum."""
    stack, heads = stack_of(config, attention), heads_of(config)[attention]
    layers = range(stack.num_hidden_layers)
    if job.cache_budget is None:
        r = chosen_numbers(config, attention, job)
    else:
        step = step_of(job)
        r = min(allowed_numbers(config, attention, job) // len(layers), most_numbers(stack, heads)) // step * step
    most = [most_keys(stack, heads, i, attention) for i in layers]
    return [r] * len(layers), [min(int(job.key_width or n), n) for n in most]


def step_of(job: ConversionOptions) -> int:
    """The number that r must be a multiple of."""
    return LATENT_BLOCK if job.latent_bits < 16 else 1


def check_step(most: int, attention: str, job: ConversionOptions) -> int:
    """The number that r must be a multiple of; raises ConversionError if it is more than `most`."""
    step = step_of(job)
    if step > most:
        raise ConversionError(
            f"`latent_bits` {job.latent_bits} needs a latent width that is a multiple of {step}, but {most} numbers "
            f"hold all keys and values of {attention} attention; use `latent_bits` 16"
        )
    return step


def allowed_numbers(config: CanonicalConfig, attention: str, job: ConversionOptions) -> int:
    """The sum of all layers' latent widths that a cache budget allows; raises ConversionError if it is too small."""
    assert job.cache_budget is not None
    stack = stack_of(config, attention)
    layers, most = stack.num_hidden_layers, most_numbers(stack, heads_of(config)[attention])
    nbytes = 2 * budget_components(job.cache_budget, config, 1, attention)
    scales = 0 if job.latent_bits == 16 else 4 * layers
    allowed = max(int((nbytes - scales) * 8 / job.latent_bits), 0)
    least = layers * min(max(STEP, check_step(most, attention, job)), most)
    if allowed < least:
        raise ConversionError(
            f"the cache budget allows {allowed} latent numbers per token; the {layers} layers need at least {least}"
        )
    return allowed


def choose_latents(
    curves: Sequence["LatentCurves"], config: CanonicalConfig, attention: str, job: ConversionOptions
) -> Sizes:
    """r and W of each layer.

    r is as requested, or allocated from a budget to the layers where it reduces the loss most. If W is not requested,
    it is the least whose loss is below that of r. With a budget and a requested W, W is allocated too, so that all
    layers together have no more operations than with this W in each. [`check_sizes`] rejects invalid requests.
    """
    stack, heads = stack_of(config, attention), heads_of(config)[attention]
    most = most_numbers(stack, heads)
    if job.cache_budget is None:
        r = [chosen_numbers(config, attention, job)] * len(curves)
    else:
        step = max(STEP, step_of(job))
        allowed = allowed_numbers(config, attention, job)
        r = share_out([(c.latent, most // step * step or most) for c in curves], [1.0] * len(curves), allowed, step)
    pairs = [most_keys(stack, heads, i, attention) // 2 for i in range(len(curves))]
    if job.key_width is None:
        return r, [2 * fewest(c, n, k) for c, n, k in zip(curves, r, pairs)]
    each = int(job.key_width) // 2
    rotated = [i for i, k in enumerate(pairs) if k]
    costs = [float(r[i]) for i in rotated]
    slots = [(curves[i].keys, pairs[i]) for i in rotated]
    try:
        found = share_out(slots, costs, sum(costs) * each, STEP // 2)
    except ValueError:
        found = [min(each, k) for _, k in slots]
    widths = [0] * len(curves)
    for i, n in zip(rotated, found):
        widths[i] = 2 * n
    return r, widths


def fewest(curves: "LatentCurves", numbers: int, pairs: int) -> int:
    """The fewest pairs of rebuilt components whose loss is at most that of a latent of `numbers` numbers."""
    allowed = float(curves.latent[min(numbers, len(curves.latent) - 1)])
    step = STEP // 2
    return next((n for n in range(min(step, pairs), pairs, step) if float(curves.keys[n]) <= allowed), pairs)


def latent_config(
    config: CanonicalConfig, pooled: CanonicalConfig, attentions: Sequence[str], sizes: Mapping[str, Sizes], bits: int
) -> CanonicalConfig:
    """The configuration of latents.

    Args:
        config: with all the source's heads.
        pooled: with one head.
        attentions: the fitted attentions.
        sizes: their r and W.
        bits: bits per stored number.

    Returns:
        `pooled` with latents, the bias of values folded into the output bias, and placeholders for the chosen
        frequencies.
    """
    check_attentions(config, attentions)
    fitted = copy.deepcopy(pooled)
    for name in attentions:
        stack, heads = stack_of(fitted, name), heads_of(config)[name]
        r, W = sizes[name]
        stack.kv_latent_heads, stack.kv_latent_bits = heads, bits
        setattr(stack, "cross_kv_latent_dim" if name == "cross" else "kv_latent_dim", same(r))
        stack.output_bias = True  # for what all values have in common
        stack.value_bias = stack.key_bias = False
        if name == "cross":
            continue
        stack.qk_norm_after_rotation, stack.qk_norm_affine = False, True  # queries alone are normalised
        stack.qk_head_dim = same(W)
        if stack.position_embedding == "rotary":
            half = stack.rotary_dim // 2
            stack.rope_frequencies = [
                [stack.first_frequency(i) + c * half // max(n // 2, 1) for c in range(n // 2)] if n else []
                for i, n in enumerate(W)
            ]
    return fitted


def same(values: list[int]) -> int | list[int]:
    """A single number if all layers have the same."""
    return values[0] if len(set(values)) == 1 else values
