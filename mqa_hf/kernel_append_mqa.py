"""Rotation of queries and keys, and the write of keys and values to the cache.

B rows, S allocated cache positions, H query heads, G key/value heads, D query/key head width, Dv value head width
"""

import torch

from .cache_mqa import to_float8
from .kernel_launch_mqa import gdc_launch_dependents, gdc_wait, jit, launch, power, tl, triton

Pair = tuple[torch.Tensor | None, torch.Tensor | None]


@jit
def _deviation(x, inside, eps, D: tl.constexpr, CENTRED: tl.constexpr):
    """The mean of each row of x [heads, D], 0 unless `CENTRED`, and the inverse of the deviation from it."""
    centre = tl.sum(x, 1) * 0.0
    if CENTRED:
        centre = tl.sum(x, 1) / D
    away = tl.where(inside, x - centre[:, None], 0.0)
    return centre, 1.0 / tl.sqrt(tl.sum(away * away, 1) / D + eps)


@jit
def _normalised(
    x, centre, spread, weights, biases, head, at, inside,
    D: tl.constexpr, CENTRED: tl.constexpr, WEIGHTS: tl.constexpr, BIASES: tl.constexpr,
):  # fmt: skip
    """x [heads, components at] normalised, times weights, plus biases."""
    if CENTRED:
        x = x - centre[:, None]
    x = x * spread[:, None]
    place = head[:, None] * D + at[None, :]
    if WEIGHTS:
        x *= tl.load(weights + place, mask=inside, other=0.0).to(tl.float32)
    if BIASES:
        x += tl.load(biases + place, mask=inside, other=0.0).to(tl.float32)
    return x


@jit
def _append_kernel(
    projected, query, keys, values, key_scales, value_scales, cos, sin, frequency, positions, length,
    norm_weights, norm_biases, joint, eps,
    S, H, G, tiles, projected_row, key_row, key_head, value_row, value_head, angles_row,
    D: tl.constexpr, DV: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, HEAD: tl.constexpr,
    ROTATED: tl.constexpr, CHOSEN: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
    NORM: tl.constexpr, CENTRED: tl.constexpr, WEIGHTS: tl.constexpr, BIASES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: `HEADS` heads of one row of `projected` [B, H·D + G·D + G·DV]; the first `tiles` programs of a row
    handle queries and keys. Both are rotated; queries go to `query` [B, H, D], keys and values to the cache at
    position `length` - 1, in float8 with a scale if `SCALED`. Positions are `KEY` and `VALUE` numbers apart.

    `NORM`: 0 none; queries and keys are normalised 1 by head and before they are rotated, 2 by head and afterwards, or
    3 by the mean and inverse deviation `joint` [B, 2, 2] of all queries and all keys, before they are rotated.
    `norm_weights` and `norm_biases` are [H + G, D].

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
        centre = tl.zeros([HEADS], tl.float32)
        spread = tl.full([HEADS], 1.0, tl.float32)
        if NORM == 1:
            centre, spread = _deviation(y, inside, eps, D, CENTRED)
        if NORM == 3:
            of = joint + (row * 2 + (head >= H)) * 2
            centre, spread = tl.load(of), tl.load(of + 1)
        if NORM == 1 or NORM == 3:
            y = _normalised(
                y, centre, spread, norm_weights, norm_biases, head, at, inside, D, CENTRED, WEIGHTS, BIASES
            )  # fmt: skip
        if ROTATED > 0:
            within = at % HEAD
            turned = (within < ROTATED) & (at < D)
            partner = tl.where(within < ROTATED // 2, at + ROTATED // 2, at - ROTATED // 2)
            both = inside & turned[None, :]
            z = tl.load(x + partner[None, :], mask=both, other=0.0).to(tl.float32)
            if NORM == 1 or NORM == 3:
                z = _normalised(
                    z, centre, spread, norm_weights, norm_biases, head, partner, both, D, CENTRED, WEIGHTS, BIASES
                )  # fmt: skip
            angle = within
            if CHOSEN:
                angle = tl.load(frequency + within, mask=turned, other=0).to(tl.int32)
            place = tl.load(positions + row) * angles_row + angle
            c = tl.load(cos + place, mask=turned, other=1.0).to(tl.float32)
            y = y * c[None, :] + z * tl.load(sin + place, mask=turned, other=0.0).to(tl.float32)[None, :]
        if NORM == 2:
            centre, spread = _deviation(y, inside, eps, D, CENTRED)
            y = _normalised(
                y, centre, spread, norm_weights, norm_biases, head, at, inside, D, CENTRED, WEIGHTS, BIASES
            )  # fmt: skip
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
    norm: tuple[str, bool, bool] | None = None,
    eps: float = 0.0,
    norm_weights: Pair = (None, None),
    norm_biases: Pair = (None, None),
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
        norm: the norm of queries and keys: `"rms_norm"` or `"layer_norm"`, whether it is of all heads together, and
            whether it follows the rotation. `None`: no norm.
        eps: of the norm.
        norm_weights, norm_biases: of queries [H, D] and of keys [G, D]; `None`: no weights, no biases.

    Returns:
        The queries [B, H, D].
    """
    B = projected.shape[0]
    G, S, D = keys.shape[1:]
    DV = values.shape[-1]
    rotated = 0 if cos is None else cos.shape[-1] if frequency is None else len(frequency)
    query = projected.new_empty(B, H, D)
    some = projected
    kind, together, after = norm or ("", False, False)
    joint = deviations(projected, H, G, D, kind == "layer_norm", eps) if together else some
    weights, biases = (some if pair[0] is None else torch.cat(pair) for pair in (norm_weights, norm_biases))  # type: ignore[arg-type]
    block = power(max(D, DV))
    heads = max(1, min(2048 // block, power(H + G)))
    tiles = triton.cdiv(H + G, heads)
    launch(_append_kernel, (B, tiles + triton.cdiv(G, heads)),
        projected, query, keys, values,
        some if key_scales is None else key_scales, some if value_scales is None else value_scales,
        some if cos is None else cos, some if sin is None else sin, some if frequency is None else frequency,
        some if positions is None else positions, length, weights, biases, joint, eps,
        S, H, G, tiles, projected.stride(0), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        0 if cos is None else cos.stride(0),
        D=D, DV=DV, KEY=keys.stride(2), VALUE=values.stride(2), HEAD=D if frequency is not None else head,
        ROTATED=rotated, CHOSEN=frequency is not None,
        HEADS=heads, BLOCK=block, SCALED=key_scales is not None,
        NORM=0 if norm is None else 3 if together else 2 if after else 1, CENTRED=kind == "layer_norm",
        WEIGHTS=norm_weights[0] is not None, BIASES=norm_biases[0] is not None, num_warps=4,
    )  # fmt: skip
    return query


def deviations(projected: torch.Tensor, H: int, G: int, D: int, centred: bool, eps: float) -> torch.Tensor:
    """Means (0 unless `centred`) and inverse deviations of all queries together and of all keys, [B, 2, 2]."""
    found = []
    for part in projected.float().split([H * D, G * D, projected.shape[1] - (H + G) * D], -1)[:2]:
        mean = part.mean(-1, keepdim=True) if centred else torch.zeros_like(part[:, :1])
        found.append(torch.cat((mean, torch.rsqrt((part - mean).square().mean(-1, keepdim=True) + eps)), -1))
    return torch.stack(found, 1)


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
    norm: tuple[str, bool, bool] | None = None,
    eps: float = 0.0,
    norm_weights: Pair = (None, None),
    norm_biases: Pair = (None, None),
) -> torch.Tensor:
    """[`append`] in float64; it writes in the cache's type."""
    B, G, _, D = keys.shape
    query, new_keys, new_values = projected.double().split([H * D, G * D, G * values.shape[-1]], -1)
    query, new_keys, new_values = query.view(B, H, D), new_keys.view(B, G, D), new_values.view(B, G, -1)
    kind, together, after = norm or ("", False, False)

    def normal(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        over = (1, 2) if together else (2,)
        x = x - x.mean(over, keepdim=True) if kind == "layer_norm" else x
        x = x * (x.square().mean(over, keepdim=True) + eps).rsqrt()
        x = x if weight is None else x * weight.double()
        return x if bias is None else x + bias.double()

    def normalised() -> tuple[torch.Tensor, torch.Tensor]:
        both = zip((query, new_keys), norm_weights, norm_biases)
        of_queries, of_keys = (normal(*each) for each in both)
        return of_queries, of_keys

    if kind and not after:
        query, new_keys = normalised()
    if cos is not None and sin is not None and positions is not None:
        c, s = cos[positions].double()[:, None, None], sin[positions].double()[:, None, None]
        if frequency is not None:
            c, s, head = c[..., frequency], s[..., frequency], D
        query, new_keys = (turned(x.unflatten(-1, (-1, head)), c, s).flatten(-2) for x in (query, new_keys))
    if kind and after:
        query, new_keys = normalised()
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
