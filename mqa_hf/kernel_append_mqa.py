"""Rotation of queries and keys, and the write of keys and values to the cache.

B rows, S allocated cache positions, H query heads, G key/value heads, D query/key head width, Dv value head width
"""

import torch

from .cache_mqa import to_float8
from .kernel_launch_mqa import gdc_launch_dependents, gdc_wait, jit, launch, power, tl, triton


@jit
def _append_kernel(
    projected, query, keys, values, key_scales, value_scales, cos, sin, frequency, positions, length,
    S, H, G, tiles, projected_row, key_row, key_head, value_row, value_head, angles_row,
    D: tl.constexpr, DV: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, HEAD: tl.constexpr,
    ROTATED: tl.constexpr, CHOSEN: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: `HEADS` heads of one row of `projected` [B, H·D + G·D + G·DV]; the first `tiles` programs of a row
    handle queries and keys. Both are rotated; queries go to `query` [B, H, D], keys and values to the cache at
    position `length` - 1, in float8 with a scale if `SCALED`. Positions are `KEY` and `VALUE` numbers apart.

    Components below `ROTATED` of every `HEAD` are rotated in pairs, j with j + `ROTATED` / 2; with `CHOSEN`, by the
    angles with indices `frequency` [ROTATED].
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.load(length) - 1
    if tile < tiles:
        head = tile * HEADS + tl.arange(0, HEADS)
        inside = (head < H + G)[:, None] & (at < D)[None, :]
        x = projected + row * projected_row + head[:, None] * D
        y = tl.load(x + at[None, :], mask=inside, other=0.0).to(tl.float32)
        if ROTATED > 0:
            within = at % HEAD
            turned = (within < ROTATED) & (at < D)
            partner = tl.where(within < ROTATED // 2, at + ROTATED // 2, at - ROTATED // 2)
            z = tl.load(x + partner[None, :], mask=inside & turned[None, :], other=0.0).to(tl.float32)
            angle = within
            if CHOSEN:
                angle = tl.load(frequency + within, mask=turned, other=0).to(tl.int32)
            place = tl.load(positions + row) * angles_row + angle
            c = tl.load(cos + place, mask=turned, other=1.0).to(tl.float32)
            y = y * c[None, :] + z * tl.load(sin + place, mask=turned, other=0.0).to(tl.float32)[None, :]
        asks = inside & (head < H)[:, None]
        to = query + row * H * D + head[:, None] * D + at[None, :]
        tl.store(to, y.to(query.dtype.element_ty), mask=asks)
        held, keeps = head - H, inside & (head >= H)[:, None]
        if SCALED:
            size = tl.maximum(tl.max(tl.abs(y), 1), 1e-12) / 448.0
            tl.store(key_scales + (row * G + held) * S + token, size, mask=(head >= H) & (head < H + G))
            y = y / size[:, None]
        to = keys + row * key_row + held[:, None] * key_head + token * KEY + at[None, :]
        tl.store(to, y.to(keys.dtype.element_ty), mask=keeps)
    else:
        which = (tile - tiles) * HEADS + tl.arange(0, HEADS)
        some = (which < G)[:, None] & (at < DV)[None, :]
        v = projected + row * projected_row + (H + G) * D + which[:, None] * DV + at[None, :]
        new = tl.load(v, mask=some, other=0.0).to(tl.float32)
        if SCALED:
            value_size = tl.maximum(tl.max(tl.abs(new), 1), 1e-12) / 448.0
            tl.store(value_scales + (row * G + which) * S + token, value_size, mask=which < G)
            new = new / value_size[:, None]
        there = values + row * value_row + which[:, None] * value_head + token * VALUE + at[None, :]
        tl.store(there, new.to(values.dtype.element_ty), mask=some)


def append(
    projected: torch.Tensor,
    H: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: torch.Tensor,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    head: int = 1,
    frequency: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate queries and keys, and write keys and values to the cache at position `length` - 1.

    Args:
        projected: [B, H·D + G·D + G·Dv], the outputs of the three projections.
        keys, values: [B, G, S, D] and [B, G, S, Dv], the last dimension contiguous; written in place.
        length: int32 [1], positions in use, the new one included.
        cos, sin: [positions, components] of all positions; the first half of `sin` is negated. `None`: no rotation.
        positions: int32 [B], the position of each row's new token.
        head: rotation is repeated every `head` components.
        frequency: int64 [rotated], the index of each component's angle; default: in order.
        key_scales, value_scales: float32 [B, G, S] of a float8 cache; written in place.

    Returns:
        The queries [B, H, D].
    """
    B = projected.shape[0]
    G, S, D = keys.shape[1:]
    DV = values.shape[-1]
    rotated = 0 if cos is None else cos.shape[-1] if frequency is None else len(frequency)
    query = projected.new_empty(B, H, D)
    some = projected
    block = power(max(D, DV))
    heads = max(1, min(2048 // block, power(H + G)))
    tiles = triton.cdiv(H + G, heads)
    launch(_append_kernel, (B, tiles + triton.cdiv(G, heads)),
        projected, query, keys, values,
        some if key_scales is None else key_scales, some if value_scales is None else value_scales,
        some if cos is None else cos, some if sin is None else sin, some if frequency is None else frequency,
        some if positions is None else positions, length,
        S, H, G, tiles, projected.stride(0), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        0 if cos is None else cos.stride(0),
        D=D, DV=DV, KEY=keys.stride(2), VALUE=values.stride(2), HEAD=D if frequency is not None else head,
        ROTATED=rotated, CHOSEN=frequency is not None,
        HEADS=heads, BLOCK=block, SCALED=key_scales is not None, num_warps=4,
    )  # fmt: skip
    return query


def naive_append(
    projected: torch.Tensor,
    H: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: torch.Tensor,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    head: int = 1,
    frequency: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """[`append`] in float64; it writes in the cache's type."""
    B, G, _, D = keys.shape
    query, new_keys, new_values = projected.double().split([H * D, G * D, G * values.shape[-1]], -1)
    query, new_keys, new_values = query.view(B, H, D), new_keys.view(B, G, D), new_values.view(B, G, -1)
    if cos is not None and sin is not None and positions is not None:
        c, s = cos[positions].double()[:, None, None], sin[positions].double()[:, None, None]
        if frequency is not None:
            c, s, head = c[..., frequency], s[..., frequency], D
        query, new_keys = (turned(x.unflatten(-1, (-1, head)), c, s).flatten(-2) for x in (query, new_keys))
    at = int(length) - 1
    for held, new, scales in ((keys, new_keys, key_scales), (values, new_values, value_scales)):
        if scales is not None:
            new, scales[:, :, at] = to_float8(new)
        held[:, :, at] = new.to(held.dtype)
    return query


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The first R components of x [..., width] rotated in pairs at a distance of R/2, by [..., R]."""
    R = cos.shape[-1]
    return torch.cat((x[..., :R] * cos + x[..., :R].roll(R // 2, -1) * sin, x[..., R:]), -1)
