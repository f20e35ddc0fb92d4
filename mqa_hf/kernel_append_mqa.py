"""Norm and rotation of queries and keys, and the write of keys and values to the cache.

B rows, S allocated cache positions, H query heads, G key/value heads, D query/key head width, Dv value head width
"""

import torch

from .cache_mqa import to_float8
from .kernel_launch_mqa import gdc_launch_dependents, gdc_wait, jit, launch, power, tl, triton


@jit
def _read(x, head, at, inside, partner, c, s, D: tl.constexpr, TURNED: tl.constexpr):
    """Components `at` of heads of one row of projections, in float32; if `TURNED`, rotated with those at `partner`."""
    y = tl.load(x + head[:, None] * D + at[None, :], mask=inside, other=0.0).to(tl.float32)
    if TURNED:
        z = tl.load(x + head[:, None] * D + partner[None, :], mask=inside, other=0.0).to(tl.float32)
        y = y * c[None, :] + z * s[None, :]
    return y


@jit
def _deviation(y, inside, eps, D: tl.constexpr, CENTRED: tl.constexpr):
    """The mean of each row of y [heads, D], 0 unless `CENTRED`, and the inverse of the deviation from it."""
    centre = tl.sum(y, 1) * 0.0
    if CENTRED:
        centre = tl.sum(y, 1) / D
    away = tl.where(inside, y - centre[:, None], 0.0)
    return centre, 1.0 / tl.sqrt(tl.sum(away * away, 1) / D + eps)


@jit
def _joint_deviation(
    x, head, at, partner, c, s, H, G, eps, tiles,
    D: tl.constexpr, HEADS: tl.constexpr, TURNED: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """For each of the heads, the mean of all queries or of all keys, 0 unless `CENTRED`, and the inverse of the
    deviation from it."""
    queries, keys = tl.zeros([HEADS], tl.float32), tl.zeros([HEADS], tl.float32)
    if CENTRED:
        for tile in range(0, tiles):
            some = tile * HEADS + tl.arange(0, HEADS)
            inside = (some < H + G)[:, None] & (at < D)[None, :]
            total = tl.sum(_read(x, some, at, inside, partner, c, s, D, TURNED), 1)
            queries += tl.where(some < H, total, 0.0)
            keys += tl.where(some < H, 0.0, total)
    query_mean, key_mean = tl.sum(queries, 0) / (H * D), tl.sum(keys, 0) / (G * D)
    queries, keys = tl.zeros([HEADS], tl.float32), tl.zeros([HEADS], tl.float32)
    for tile in range(0, tiles):
        some = tile * HEADS + tl.arange(0, HEADS)
        inside = (some < H + G)[:, None] & (at < D)[None, :]
        away = _read(x, some, at, inside, partner, c, s, D, TURNED) - tl.where(some < H, query_mean, key_mean)[:, None]
        total = tl.sum(tl.where(inside, away * away, 0.0), 1)
        queries += tl.where(some < H, total, 0.0)
        keys += tl.where(some < H, 0.0, total)
    square = tl.where(head < H, tl.sum(queries, 0) / (H * D), tl.sum(keys, 0) / (G * D))
    return tl.where(head < H, query_mean, key_mean), 1.0 / tl.sqrt(square + eps)


@jit
def _normalised(
    y, centre, spread, weight, bias, head, at, inside,
    D: tl.constexpr, CENTRED: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """y [heads, components at] normalised, times weights, plus biases."""
    if CENTRED:
        y = y - centre[:, None]
    y = y * spread[:, None]
    place = head[:, None] * D + at[None, :]
    if WEIGHT:
        y *= tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias + place, mask=inside, other=0.0).to(tl.float32)
    return y


@jit
def _append_kernel(
    projected, query, keys, values, key_scales, value_scales, cos, sin, frequency, positions, length,
    norm_weight, norm_bias, eps,
    S, H, G, tiles, projected_row, key_row, key_head, value_row, value_head, angles_row,
    D: tl.constexpr, DV: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, HEAD: tl.constexpr,
    ROTATED: tl.constexpr, CHOSEN: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
    NORM: tl.constexpr, JOINT: tl.constexpr, CENTRED: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: `HEADS` heads of one row of `projected` [B, H·D + G·D + G·DV]; the first `tiles` programs of a row
    handle queries and keys. Both are rotated; queries go to `query` [B, H, D], keys and values to the cache at
    position `length` - 1, in float8 with a scale if `SCALED`. Positions are `KEY` and `VALUE` numbers apart.

    With `NORM`, queries and keys are normalised, by head or, if `JOINT`, all heads together. The rotation comes
    `FIRST` or `LAST`, or not at all.

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
        x = projected + row * projected_row
        partner, c, s = at, tl.full([BLOCK], 1.0, tl.float32), tl.zeros([BLOCK], tl.float32)
        if FIRST or LAST:
            within = at % HEAD
            turned = (within < ROTATED) & (at < D)
            other = tl.where(within < ROTATED // 2, at + ROTATED // 2, at - ROTATED // 2)
            partner = tl.where(turned, other, at)
            angle = within
            if CHOSEN:
                angle = tl.load(frequency + within, mask=turned, other=0).to(tl.int32)
            place = tl.load(positions + row) * angles_row + angle
            c = tl.load(cos + place, mask=turned, other=1.0).to(tl.float32)
            s = tl.load(sin + place, mask=turned, other=0.0).to(tl.float32)
        y = _read(x, head, at, inside, partner, c, s, D, FIRST)
        if NORM:
            if JOINT:
                centre, spread = _joint_deviation(
                    x, head, at, partner, c, s, H, G, eps, tiles, D, HEADS, FIRST, CENTRED
                )  # fmt: skip
            else:
                centre, spread = _deviation(y, inside, eps, D, CENTRED)
            y = _normalised(y, centre, spread, norm_weight, norm_bias, head, at, inside, D, CENTRED, WEIGHT, BIAS)
            if LAST:
                z = _read(x, head, partner, inside, partner, c, s, D, False)
                z = _normalised(
                    z, centre, spread, norm_weight, norm_bias, head, partner, inside, D, CENTRED, WEIGHT, BIAS
                )  # fmt: skip
                y = y * c[None, :] + z * s[None, :]
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
    head: int | None = None,
    frequency: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    norm: tuple[str, bool, bool] | None = None,
    eps: float = 0.0,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalise and rotate queries and keys, and write keys and values to the cache at position `length` - 1.

    Args:
        projected: [B, H·D + G·D + G·Dv], the outputs of the three projections.
        keys, values: [B, G, S, D] and [B, G, S, Dv], the last dimension contiguous; written in place.
        length: int32 [1], positions in use, the new one included.
        cos, sin: [positions, components] of all positions; the first half of `sin` is negated. `None`: no rotation.
        positions: int32 [B], the position of each row's new token.
        head: rotation is repeated every `head` components. Default: D.
        frequency: int64 [rotated], the index of each component's angle; default: in order.
        key_scales, value_scales: float32 [B, G, S] of a float8 cache; written in place.
        norm: the norm of queries and keys: `"rms_norm"` or `"layer_norm"`, whether it is of all heads together, and
            whether it follows the rotation. `None`: no norm.
        eps: of the norm.
        norm_weight, norm_bias: [H + G, D], of queries and then of keys.

    Returns:
        The queries [B, H, D].
    """
    B = projected.shape[0]
    G, S, D = keys.shape[1:]
    DV = values.shape[-1]
    rotated = 0 if cos is None else cos.shape[-1] if frequency is None else len(frequency)
    query = projected.new_empty(B, H, D)
    some = projected
    kind, joint, after = norm or ("", False, True)
    block = power(max(D, DV))
    heads = max(1, min(2048 // block, power(H + G)))
    tiles = triton.cdiv(H + G, heads)
    launch(_append_kernel, (B, tiles + triton.cdiv(G, heads)),
        projected, query, keys, values,
        some if key_scales is None else key_scales, some if value_scales is None else value_scales,
        some if cos is None else cos, some if sin is None else sin, some if frequency is None else frequency,
        some if positions is None else positions, length,
        some if norm_weight is None else norm_weight, some if norm_bias is None else norm_bias, eps,
        S, H, G, tiles, projected.stride(0), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        0 if cos is None else cos.stride(0),
        D=D, DV=DV, KEY=keys.stride(2), VALUE=values.stride(2), HEAD=head or D,
        ROTATED=rotated, CHOSEN=frequency is not None,
        HEADS=heads, BLOCK=block, SCALED=key_scales is not None,
        NORM=norm is not None, JOINT=joint, CENTRED=kind == "layer_norm",
        WEIGHT=norm_weight is not None, BIAS=norm_bias is not None,
        FIRST=rotated > 0 and after, LAST=rotated > 0 and not after, num_warps=4,
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
    head: int | None = None,
    frequency: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    norm: tuple[str, bool, bool] | None = None,
    eps: float = 0.0,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """[`append`] in float64; it writes in the cache's type."""
    B, G, _, D = keys.shape
    query, new_keys, new_values = projected.double().split([H * D, G * D, G * values.shape[-1]], -1)
    query, new_keys, new_values = query.view(B, H, D), new_keys.view(B, G, D), new_values.view(B, G, -1)
    kind, joint, after = norm or ("", False, False)

    def normal(x: torch.Tensor, some: slice) -> torch.Tensor:
        over = (1, 2) if joint else (2,)
        x = x - x.mean(over, keepdim=True) if kind == "layer_norm" else x
        x = x * (x.square().mean(over, keepdim=True) + eps).rsqrt()
        x = x if norm_weight is None else x * norm_weight[some].double()
        return x if norm_bias is None else x + norm_bias[some].double()

    if kind and not after:
        query, new_keys = normal(query, slice(H)), normal(new_keys, slice(H, None))
    if cos is not None and sin is not None and positions is not None:
        c, s = cos[positions].double()[:, None, None], sin[positions].double()[:, None, None]
        if frequency is not None:
            c, s = c[..., frequency], s[..., frequency]
        query, new_keys = (turned(x.unflatten(-1, (-1, head or D)), c, s).flatten(-2) for x in (query, new_keys))
    if kind and after:
        query, new_keys = normal(query, slice(H)), normal(new_keys, slice(H, None))
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
