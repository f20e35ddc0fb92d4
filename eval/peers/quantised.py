"""The original with its cache quantised to a few bits: per token, and as in KIVI (arXiv 2402.02750).

B sequences, T tokens of each, H query heads, G key/value heads, D head width, R latest tokens that are not quantised
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AttentionInterface

from mqa_hf.attention_mqa import mqa_attention_forward
from mqa_hf.configuration_mqa import of_layer
from mqa_hf.modeling_mqa import MQAForCausalLM

from .common import Calibration, Peer, attentions_of, renewed

BITS = (8, 4, 3, 2)
GROUP = 32  # numbers that share a scale and a zero point
OVERHEAD = 32  # bits of both
WINDOWS = (128, 32)  # of KIVI: the paper's, and the smallest with whole groups of keys


def rounded(x: torch.Tensor, bits: int, dim: int = -1) -> torch.Tensor:
    """Quantise x to `bits` bits in groups of 32 along a dimension (KIVI, asymmetric group-wise quantisation).

    q = round((x - z) / s) with z = min x and s = (max x - min x) / (2^bits - 1) of the group, both kept in 16 bits;
    x̂ = q s + z.
    """

    def whole(x: torch.Tensor) -> torch.Tensor:
        low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
        scale = ((high - low) / (2**bits - 1)).half().to(x.dtype)
        low = low.half().to(x.dtype)
        steps = ((x - low) / torch.where(scale > 0, scale, 1.0)).round().clamp(0, 2**bits - 1)
        return steps * scale + low

    return torch.cat([whole(group) for group in x.split(GROUP, dim)], dim)


def bits_of(width: int, bits: int) -> int:
    """Bits of a vector quantised along its components."""
    return width * bits + -(-width // GROUP) * OVERHEAD


def by_token(bits: int) -> Callable[..., Any]:
    """Attention to keys and values quantised within each token and head."""

    def attend(module, query, key, value, attention_mask, **kwargs):
        key, value = rounded(key, bits), rounded(value, bits)
        return mqa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    return attend


def windows(tokens: int, window: int, device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Which keys and values are already quantised when each token is decoded: two masks [T, T].

    KIVI, algorithm 1: keys are quantised R at a time, once R have gathered; values one at a time, once there are R
    newer ones.
    """
    t, s = torch.arange(tokens, device=device)[:, None], torch.arange(tokens, device=device)
    return s < t // window * window, s < t - window


def whole_share(tokens: int, window: int) -> float:
    """Fraction of the keys and values attended to in a row that is not quantised."""
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    found = [(visible & ~mask).sum() / visible.sum() for mask in windows(tokens, window)]
    return float(sum(found)) / 2


def kivi(bits: int, window: int) -> Callable[..., Any]:
    """Attention as KIVI decodes: keys quantised per channel over 32 tokens, values within each token and head.

    Each token is present three times: with keys and values quantised, with only keys quantised, and unquantised. Each
    query attends to the one that it would find in the cache.
    """

    def attend(module, query, key, value, attention_mask, **kwargs):
        T = query.shape[2]
        lowest = torch.finfo(query.dtype).min
        mask = attention_mask
        if mask is None:
            mask = torch.ones(1, 1, T, T, dtype=torch.bool, device=query.device).tril()
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, lowest)
        keys, values = windows(T, window, query.device)
        mask = torch.cat([mask.masked_fill(~seen, lowest) for seen in (values, keys & ~values, ~keys)], -1)
        rounded_key, rounded_value = rounded(key, bits, 2), rounded(value, bits)
        key = torch.cat((rounded_key, rounded_key, key), 2)
        value = torch.cat((rounded_value, value, value), 2)
        return mqa_attention_forward(module, query, key, value, mask, **kwargs)

    return attend


def with_attention(model: MQAForCausalLM, name: str, attend: Callable[..., Any]) -> list[torch.nn.Module]:
    """Give the model's attentions this attention function."""
    AttentionInterface.register(name, attend)
    config = copy.deepcopy(model.config)
    config._attn_implementation = name
    return [renewed(attention, config=config) for attention in attentions_of(model)]


def token_peers(calibration: Calibration) -> Iterator[Peer]:
    """Quantised per token."""
    model = calibration.model
    for bits in BITS:
        yield Peer(
            f"by token, {bits} bits",
            sum(bits_of(width, bits) for width in widths(model)) // 8,
            with_attention(model, f"rounded_{bits}", by_token(bits)),
        )


def kivi_peers(calibration: Calibration) -> Iterator[Peer]:
    """KIVI; the bytes of its window are not counted, because it does not grow with the text."""
    model = calibration.model
    for window in WINDOWS:
        for bits in BITS:
            by_channel = sum(width * bits + width * OVERHEAD // GROUP for width in widths(model)[::2])
            yield Peer(
                f"KIVI ({window} whole), {bits} bits",
                (by_channel + sum(bits_of(width, bits) for width in widths(model)[1::2])) // 8,
                with_attention(model, f"kivi_{bits}_{window}", kivi(bits, window)),
            )


def widths(model: MQAForCausalLM) -> list[int]:
    """Width of each key and each value head of a token, in turn."""
    config = model.config
    layers = range(config.num_hidden_layers)
    both = ((of_layer(config.qk_head_dim, i), of_layer(config.v_head_dim, i)) for i in layers)
    return [width for pair in both for width in pair * config.num_key_value_heads]
