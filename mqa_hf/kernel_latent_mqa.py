"""Attention of one new query per row to a cache of latents, from which keys are rebuilt in the kernel.

    B rows decoded, R rows of the cache, S allocated cache positions, H query heads, r latent width, W key width
    (C = W / 2 complex components)

A row of the cache holds one latent c per position, in the model's type or packed (`packing_mqa.py`). A query attends
to the rotated components Rot_t (U c_t + b) [W], to the latent itself [r], or to both; the output mixes latents:

    logit(h, t) = scale · (wide_h · Rot_t (U c_t + b) + plain_h · c_t) + bias        out_h = Σ_t softmax_t(logit) c_t

The components of a block of positions are rebuilt once for all queries and are not written to memory.
"""

import torch

from .kernel_attend_mqa import MAX_MERGED, _biased, _prefetch, _share, _write, attend_splits, merge
from .kernel_latent_hopper_mqa import _attend_latent_hopper_kernel
from .kernel_latent_plan_mqa import hopper_seconds, hopper_sizes, hopper_splits, latent_blocks, latent_bytes
from .kernel_launch_mqa import (
    gdc_launch_dependents,
    gdc_wait,
    hopper,
    jit,
    launch,
    power,
    processors,
    shared_memory,
    tl,
    triton,
)
from .packing_mqa import unpack_latent

ROOM = 256  # extra positions in a table of angles, because blocks of positions reach past the end


def latent_angles(cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Make the table of rotation angles for [`attend_latent`], with the positions of one frequency contiguous.

    Args:
        cos, sin: [positions, 2 · F] for F frequencies, the first half of `sin` negated; preferably in float32.
        dtype: type of the model.

    Returns:
        For float32, float32 [F, positions + 256, 2], cosine and sine. Otherwise int32 [F, positions + 256], with the
        cosine in the lower and the sine in the upper half of each number: for float16 as float16, for bfloat16 such
        that the whole number, read as float32, is the sine rounded to as many bits.
    """
    half = cos.shape[-1] // 2
    pair = torch.stack((cos[:, :half], sin[:, half:]), -1).float().transpose(0, 1)
    pair = torch.nn.functional.pad(pair, (0, 0, 0, ROOM))
    if dtype == torch.float32:
        return pair.contiguous()
    if dtype == torch.float16:
        return pair.half().contiguous().view(torch.int32).squeeze(-1)
    low = pair[..., 0].bfloat16().contiguous().view(torch.int16).int() & 0xFFFF
    bits = pair[..., 1].contiguous().view(torch.int32).long()
    return (((bits - low + 0x8000) >> 16 << 16) + low).int()


def unpacked_angles(angles: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The cosines and sines [F, positions + 256, 2] of a table of [`latent_angles`], in float32."""
    if angles.is_floating_point():
        return angles
    if dtype == torch.float16:
        return angles[..., None].view(torch.float16).float()
    return torch.stack(((angles << 16).view(torch.float32), angles.view(torch.float32)), -1)


@jit
def _fetched(
    latents, scales, offsets, at, n, valid, S, latent_row,
    R: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The latents [BLOCK_N, BLOCK_R] of cache rows `at` at positions `n`, unpacked."""
    if BITS == 16:
        k = tl.arange(0, BLOCK_R)
        c = tl.load(
            latents + at[:, None] * latent_row + n[:, None] * R + k[None, :],
            mask=valid[:, None] & (k < R)[None, :], other=0.0,
        )  # fmt: skip
    else:
        width: tl.constexpr = R * BITS // 8
        j = tl.arange(0, BLOCK_R * BITS // 8)
        x = tl.load(
            latents + at[:, None] * latent_row + n[:, None] * width + j[None, :],
            mask=valid[:, None] & (j < width)[None, :], other=0,
        )  # fmt: skip
        if BITS == 4:
            x = tl.reshape(x, [BLOCK_N, BLOCK_R // 32, 16])
            x = tl.reshape(tl.permute(tl.join(x & 15, x >> 4), (0, 1, 3, 2)), [BLOCK_N, BLOCK_R])
        scale = tl.load(scales + at * S + n, mask=valid, other=0.0).to(tl.float32)
        offset = tl.load(offsets + at * S + n, mask=valid, other=0.0).to(tl.float32)
        c = (x.to(tl.float32) * scale[:, None] + offset[:, None]).to(DTYPE)
        if BLOCK_R > R:
            c = tl.where((tl.arange(0, BLOCK_R) < R)[None, :], c, 0.0).to(DTYPE)
    return c


@jit
def _angles(angles, place, EXACT: tl.constexpr, HALF: tl.constexpr):
    """Cosines and sines at `place`, as [`latent_angles`] packs them."""
    if EXACT:
        cos, sin = tl.load(angles + 2 * place), tl.load(angles + 2 * place + 1)
    else:
        word = tl.load(angles + place)
        if HALF:
            cos = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            sin = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        else:
            cos, sin = (word << 16).to(tl.float32, bitcast=True), word.to(tl.float32, bitcast=True)
    return cos, sin


@jit
def _rebuilt(
    c, s, wide, weight, bias, angles, frequency, query, asked, place, angles_row,
    R: tl.constexpr, W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PAIRS: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Add to s [positions, queries] the products of components, rebuilt from latents c and rotated, with `query`."""
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    C: tl.constexpr = W // 2
    k, j = tl.arange(0, BLOCK_R), tl.arange(0, 2 * PAIRS)
    for first in range(0, C, PAIRS):
        # Real parts, then imaginary ones, in one product, so that a thread has both parts of a component.
        inside = first + j % PAIRS < C
        component = first + j % PAIRS + (j // PAIRS) * C
        u = tl.load(
            weight + component[:, None] * R + k[None, :], mask=inside[:, None] & (k < R)[None, :], other=0.0
        )  # fmt: skip
        x = tl.dot(c, tl.trans(u), input_precision=precision)
        real, imaginary = tl.split(tl.permute(tl.reshape(x, [BLOCK_N, 2, PAIRS]), (0, 2, 1)))
        pair = first + tl.arange(0, PAIRS)
        known = pair < C
        real += tl.load(bias + pair, mask=known, other=0.0)[None, :]
        imaginary += tl.load(bias + C + pair, mask=known, other=0.0)[None, :]
        f = tl.load(frequency + pair, mask=known, other=0) * angles_row
        cos, sin = _angles(angles, f[None, :] + place[:, None], EXACT, wide.dtype.element_ty == tl.float16)
        there = asked[:, None] & known[None, :]
        q = tl.load(wide + query[:, None] + pair[None, :], mask=there, other=0.0)
        s = tl.dot((real * cos - imaginary * sin).to(c.dtype), tl.trans(q), s, input_precision=precision)
        q = tl.load(wide + query[:, None] + C + pair[None, :], mask=there, other=0.0)
        s = tl.dot((imaginary * cos + real * sin).to(c.dtype), tl.trans(q), s, input_precision=precision)
    return s


@jit
def _attend_latent_kernel(
    wide, plain, latents, scales, offsets, weight, bias, angles, frequency, positions, out, partial, statistics,
    length, start, rows, slopes, table, counters, sinks,
    scale, splits, S, H, B, latent_row, wide_row, wide_head, plain_row, plain_head, angles_row, rows_row, length_step,
    table_width, softcap,
    R: tl.constexpr, W: tl.constexpr, PLAIN: tl.constexpr, BITS: tl.constexpr, FOLD: tl.constexpr,
    WINDOW: tl.constexpr, HAS_START: tl.constexpr, HAS_ROWS: tl.constexpr, BIAS: tl.constexpr,
    FROM_START: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, PAIRS: tl.constexpr, SPLIT: tl.constexpr, EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: `BLOCK_M` of the queries of one cache row, over one share of its positions.

    `BIAS`, `SPLIT`, `out`, `partial` and `statistics` are those of `_attend_kernel`.
    """
    row, split = tl.program_id(0), tl.program_id(1)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_R)
    asked = m < H * FOLD
    q_row, q_head = row * FOLD + m // H, m % H
    if PDL:
        gdc_launch_dependents()
    low, high, last, origin = _share(length, start, row, split, splits, length_step, HAS_START, WINDOW, BLOCK_N)
    if PDL:
        if not HAS_ROWS:
            here, width = tl.minimum(low, last - 1), R * BITS // 16 if BITS == 16 else R * BITS // 8
            _prefetch(
                latents + row.to(tl.int64) * latent_row + here * width, (high - low) * width, 2 * BLOCK_N * BLOCK_R
            )
        gdc_wait()
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    DTYPE: tl.constexpr = out.dtype.element_ty
    slope = tl.zeros([BLOCK_M], tl.float32)
    if BIAS == 1 or BIAS == 2:
        slope = tl.load(slopes + q_head, mask=asked, other=0.0)
    if PLAIN:
        q = tl.load(
            plain + (q_row * plain_row + q_head * plain_head)[:, None] + k[None, :],
            mask=asked[:, None] & (k < R)[None, :], other=0.0,
        )  # fmt: skip
    query, shift = q_row * wide_row + q_head * wide_head, 0
    if W > 0:
        shift = tl.load(positions + row).to(tl.int32) - last + 1  # maps a cache index to a position
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulated = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    log2e = 1.4426950408889634
    if SINKS:  # noqa: SIM102 (one condition is known when the kernel is compiled)
        if split == 0:  # one of the shares counts the sinks
            largest = tl.load(sinks + q_head, mask=asked, other=0.0).to(tl.float32) * log2e
            total += 1.0
    for block in range(low, high, BLOCK_N):
        n = block + tl.arange(0, BLOCK_N)
        valid = n < high
        at = tl.zeros([BLOCK_N], tl.int64) + row
        if HAS_ROWS:
            at = tl.load(rows + row * rows_row + n, mask=valid, other=0).to(tl.int64)
        c = _fetched(latents, scales, offsets, at, n, valid, S, latent_row, R, BITS, BLOCK_N, BLOCK_R, DTYPE)
        t = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if PLAIN:
            t = tl.dot(q, tl.trans(c), input_precision=precision)
        if W > 0:
            s = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            s = _rebuilt(
                c, s, wide, weight, bias, angles, frequency, query, asked, n + shift, angles_row,
                R, W, BLOCK_N, BLOCK_R, PAIRS, EXACT,
            )  # fmt: skip
            t += tl.trans(s)
        t *= scale
        if CAPPED:
            t = (2.0 * tl.sigmoid(2.0 * t / softcap) - 1.0) * softcap
        t = _biased(t, n, valid, slope, table, q_head, asked, last, origin, scale, table_width, BIAS, FROM_START)
        t = tl.where(valid[None, :], t * log2e, float("-inf"))
        larger = tl.maximum(largest, tl.max(t, 1))
        p = tl.exp2(t - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(p, 1)
        accumulated *= shrink[:, None]
        accumulated = tl.dot(p.to(c.dtype), c, accumulated, input_precision=precision)
        largest = larger
    _write(
        accumulated, total, largest, out, partial, statistics, counters, q_row * H + q_head, asked, k, splits, B * H,
        R, BLOCK_M, BLOCK_R, SPLIT,
    )  # fmt: skip


def attend_latent(
    latents: torch.Tensor,
    length: torch.Tensor,
    scale: float,
    *,
    capacity: int,
    wide: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    angles: torch.Tensor | None = None,
    frequency: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    plain: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    fold: int = 1,
    window: int | None = None,
    slopes: torch.Tensor | None = None,
    bfloat16_from_start: bool | None = None,
    table: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    blocks: tuple[int, int, int, int] | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """Attention of one new query per row to a cache of latents of which `length` positions are in use.

    Args:
        latents: [R, S, r], or packed codes uint8 [R, S, r · bits / 8] with `scales` and `offsets` [R, S] of the type
            of the queries; the last two dimensions contiguous; B = R · `fold`.
        length, scale, capacity, start, rows, fold, window, slopes, bfloat16_from_start, table, counters, softcap,
            sinks, splits: as in [`attend`].
        wide: [B, H, W], rotated queries for the rebuilt components, real parts first; the last dimension contiguous.
        weight, bias: [W, r] and float32 [W], the map U and b from a latent to its components, real parts first.
        angles: from [`latent_angles`], for all positions that occur.
        frequency: int32 [C], the frequency of each complex component; fastest if equal ones are adjacent.
        positions: int64 [B], the position of each row's query; that of its key n is positions - (length - 1) + n.
        plain: [B, H, r], queries for the latent itself, the last dimension contiguous.
        blocks: positions and complex components a program handles at once, warps, stages. Default: by size.

    Returns:
        [B, H, r].
    """
    queries = wide if wide is not None else plain
    assert queries is not None
    B, H, _ = queries.shape
    R, S, width = latents.shape
    device, dtype, W = queries.device, queries.dtype, 0 if wide is None else wide.shape[2]
    r = width if scales is None else weight.shape[1] if weight is not None else queries.shape[2]
    bits = 16 if scales is None else width * 8 // r
    span, size = min(capacity, window or capacity), latent_bytes(r, bits, dtype)
    exact, hopper_layout = dtype == torch.float32, None
    if blocks is None and hopper(device) and (W == 0 or fold == 1) and softcap is None and sinks is None:
        hopper_layout = hopper_sizes(r, W, bits, H * fold, plain is not None, dtype, shared_memory(device))
    if hopper_layout is not None:
        tiles = triton.cdiv(H * fold, hopper_layout["M"])
        if splits is None:
            position = hopper_seconds(r, W, bits, hopper_layout["M"])
            splits = hopper_splits(R * tiles, span, position, size, B * H * r, processors(device))
    else:
        block_m = min(max(power(H * fold), 16), 16 if exact else 64)
        tiles = triton.cdiv(H * fold, block_m)
        if blocks is None:
            blocks = latent_blocks(max(power(r), 32), W, block_m, dtype.itemsize, shared_memory(device), exact)
        if splits is None:
            splits = attend_splits(R * tiles, span, size, processors(device))
    out = queries.new_empty(B, H, r)
    partial = statistics = out
    if splits > 1:
        partial = torch.empty(splits, B, H, r, dtype=torch.float32, device=device)
        statistics = torch.empty(splits, B, H, dtype=torch.float32, device=device)
    at_once = counters is not None and splits <= MAX_MERGED and hopper_layout is None
    if bits < 16 and hopper_layout is not None:
        latents = latents.view(torch.int32)
    some = length  # placeholder for missing arguments, never read
    tensors = (
        out if wide is None else wide, out if plain is None else plain, latents, some if scales is None else scales,
        some if offsets is None else offsets, out if weight is None else weight, some if bias is None else bias,
        some if angles is None else angles, some if frequency is None else frequency,
        some if positions is None else positions, out, partial, statistics, length, some if start is None else start,
        some if rows is None else rows, some if slopes is None else slopes, some if table is None else table,
    )  # fmt: skip
    numbers = (
        scale, splits, S, H, B, latents.stride(0),
        0 if wide is None else wide.stride(0), 0 if wide is None else wide.stride(1),
        0 if plain is None else plain.stride(0), 0 if plain is None else plain.stride(1),
        0 if angles is None else angles.shape[1], 0 if rows is None else rows.stride(0), 0 if len(length) == 1 else 1,
        0 if table is None else table.shape[1],
    )  # fmt: skip
    options = {
        "R": r, "W": W, "PLAIN": plain is not None, "BITS": bits, "FOLD": fold, "WINDOW": window or 0,
        "HAS_START": start is not None, "HAS_ROWS": rows is not None,
        "BIAS": 3 if table is not None else 0 if slopes is None else 1 if bfloat16_from_start is None else 2,
        "FROM_START": bool(bfloat16_from_start), "SPLIT": 0 if splits == 1 else 2 if at_once else 1,
    }  # fmt: skip
    if hopper_layout is not None:
        kernel = _attend_latent_hopper_kernel
        launch(kernel, (R, splits, tiles), *tensors, *numbers, **options, **hopper_layout, num_warps=4)
    else:
        assert blocks is not None
        block_n, pairs, warps, stages = blocks
        launch(_attend_latent_kernel, (R, splits, tiles),
            *tensors, counters if at_once else some, some if sinks is None else sinks, *numbers, softcap or 1.0,
            **options, CAPPED=softcap is not None, SINKS=sinks is not None,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_R=max(power(r), 32), PAIRS=pairs, EXACT=exact,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    if splits > 1 and not at_once:
        merge(partial, statistics, out)
    return out


def naive_attend_latent(
    latents: torch.Tensor,
    length: torch.Tensor,
    scale: float,
    *,
    capacity: int,
    wide: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    angles: torch.Tensor | None = None,
    frequency: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    plain: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    fold: int = 1,
    window: int | None = None,
    slopes: torch.Tensor | None = None,
    bfloat16_from_start: bool | None = None,
    table: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    blocks: tuple[int, int, int, int] | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """[`attend_latent`] in float64 and complex numbers, one row at a time. Arguments that divide the work (`capacity`,
    `counters`, `blocks`, `splits`) have no effect.
    """
    queries = wide if wide is not None else plain
    assert queries is not None
    if scales is not None and offsets is not None:
        r = weight.shape[1] if weight is not None else queries.shape[2]
        latents = unpack_latent(latents, scales, offsets, latents.shape[2] * 8 // r)
    out = []
    for b in range(len(queries)):
        row = b // fold
        last = int(length[row] if len(length) > 1 else length[0])
        origin = 0 if start is None else int(start[row])
        at = torch.arange(max(origin, last - window) if window else origin, last, device=queries.device)
        c = latents[torch.full_like(at, row) if rows is None else rows[b, at].long(), at].double()  # [n, r]
        logits = torch.zeros(queries.shape[1], len(at), dtype=torch.float64, device=queries.device)
        if plain is not None:
            logits += plain[b].double() @ c.T
        if wide is not None:
            assert weight is not None
            assert bias is not None
            assert angles is not None
            assert frequency is not None
            assert positions is not None
            keys = torch.complex(*(c @ weight.double().T + bias.double()).chunk(2, -1))  # [n, C]
            turns = torch.view_as_complex(unpacked_angles(angles, queries.dtype).double())  # [F, positions]
            keys = keys * turns[frequency.long()[:, None], int(positions[b]) - (last - 1) + at].T
            logits += (torch.complex(*wide[b].double().chunk(2, -1)).conj() @ keys.T).real
        logits *= scale
        if softcap is not None:
            logits = (logits / softcap).tanh() * softcap
        if table is not None:
            logits += table[:, (last - 1 - at).clamp(max=table.shape[1] - 1)].double()
        if slopes is not None and bfloat16_from_start is None:
            logits += slopes.double()[:, None] * (at - last + 1)
        elif slopes is not None:
            position = at - origin if bfloat16_from_start else at
            logits += (slopes.bfloat16()[:, None] * position).double() * scale
        if sinks is not None:
            logits = torch.cat((logits, sinks.double()[:, None]), -1)
        out.append(logits.softmax(-1)[:, : len(at)] @ c)
    return torch.stack(out)
