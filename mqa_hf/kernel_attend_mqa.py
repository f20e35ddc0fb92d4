"""Attention of one new query per row to a cache.

    B rows decoded, R rows of the cache, S allocated cache positions, H query heads, G key/value heads, g = H / G,
    D query/key head width, Dv value head width

- The keys of a row are split among programs, whose results are merged (flash decoding), so that one row with a long
  context fills the device.
- The g query heads of a group, and the beams that share an encoder's output, are the rows of one matrix product: a key
  is read once for all of them (Shazeer 2019, arXiv 1911.02150, section 3).
"""

from functools import cache

import torch

from .cache_mqa import from_float8
from .kernel_launch_mqa import (
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch,
    power,
    processors,
    shared_memory,
    tl,
    triton,
)

MAX_HEAD_WIDTH = 512
MAX_MERGED = 3  # up to this many shares of a row, the last program merges them faster than a separate launch


@jit
def _prefetch(pointer, count, MOST: tl.constexpr):
    """Prefetch `count` numbers, at most `MOST`, into the L2 cache."""
    EACH: tl.constexpr = 1024 // pointer.dtype.element_ty.primitive_bitwidth  # numbers in 128 bytes
    at = tl.minimum(tl.arange(0, MOST // EACH) * EACH, tl.maximum(count - 1, 0))
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointer + at], dtype=tl.int32, is_pure=False, pack=1
    )


@jit
def _share(
    length, start, row, split, splits, length_step,
    HAS_START: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The keys [low, high) of a program, the end of all keys in use, and their start."""
    last = tl.load(length + row * length_step)
    first = 0
    if HAS_START:
        first = tl.load(start + row)
    origin = first
    if WINDOW > 0:
        first = tl.maximum(first, last - WINDOW)
    share = tl.cdiv(tl.cdiv(last - first, splits), BLOCK_N) * BLOCK_N
    low = first + split * share
    return low, tl.minimum(low + share, last), last, origin


@jit
def _biased(
    s, n, valid, slope, table, q_head, asked, last, origin, scale, table_width,
    BIAS: tl.constexpr, FROM_START: tl.constexpr,
):  # fmt: skip
    """Add the position bias to logits s [queries, keys at n]; `BIAS` as in `_attend_kernel`."""
    if BIAS == 1:
        s += slope[:, None] * (n - last + 1)[None, :].to(tl.float32)
    if BIAS == 2:
        position = n
        if FROM_START:
            position = n - origin
        near = position.to(tl.float32).to(tl.bfloat16).to(tl.float32)
        s += (slope[:, None] * near[None, :]).to(tl.bfloat16).to(tl.float32) * scale
    if BIAS == 3:
        distance = tl.minimum(last - 1 - n, table_width - 1)
        s += tl.load(
            table + q_head[:, None] * table_width + distance[None, :],
            mask=asked[:, None] & valid[None, :], other=0.0,
        )  # fmt: skip
    return s


@jit
def _merged(
    partial, statistics, place, dv, asked, written, splits, places,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Merge the shares of the outputs at `place` that other programs wrote."""
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    merged = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for other in range(0, splits):
        its = other * places + place
        log = tl.load(statistics + its, mask=asked, other=0.0, cache_modifier=".cg")
        part = tl.load(partial + its[:, None] * DV + dv[None, :], mask=written, other=0.0, cache_modifier=".cg")
        more = tl.maximum(most, log)
        known = more > float("-inf")
        keep = tl.where(known, tl.exp2(most - more), 0.0)
        add = tl.where(known, tl.exp2(log - more), 0.0)
        merged = merged * keep[:, None] + part * add[:, None]
        weight = weight * keep + add
        most = more
    return merged / weight[:, None]


@jit
def _write(
    accumulated, total, largest, out, partial, statistics, counters, place, asked, dv, splits, places,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Write a program's result; the last program of a row to finish merges all. `SPLIT` as in `_attend_kernel`."""
    written = asked[:, None] & (dv < DV)[None, :]
    to = out + place[:, None] * DV + dv[None, :]
    if SPLIT == 0:
        tl.store(to, (accumulated / total[:, None]).to(out.dtype.element_ty), mask=written)
    else:
        mine = tl.program_id(1) * places + place
        accumulated = tl.where(total[:, None] > 0, accumulated / total[:, None], 0.0)
        tl.store(partial + mine[:, None] * DV + dv[None, :], accumulated, mask=written)
        tl.store(statistics + mine, tl.where(total > 0, largest + tl.log2(total), float("-inf")), mask=asked)
        if SPLIT == 2:
            tl.debug_barrier()  # whoever sees the count also sees what all threads of this program wrote
            counter = counters + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
            if tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1:
                tl.store(counter, 0)
                merged = _merged(partial, statistics, place, dv, asked, written, splits, places, DV, BLOCK_M, BLOCK_DV)
                tl.store(to, merged.to(out.dtype.element_ty), mask=written)


@jit
def _attend_kernel(
    query, keys, values, key_scales, value_scales, out, partial, statistics, counters,
    length, start, rows, slopes, table, sinks,
    scale, softcap, splits, S, G, g, B, key_row, key_head, value_row, value_head, query_row, rows_row, length_step,
    table_width,
    D: tl.constexpr, DV: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, FOLD: tl.constexpr,
    WINDOW: tl.constexpr, HAS_START: tl.constexpr, HAS_ROWS: tl.constexpr, BIAS: tl.constexpr,
    FROM_START: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SPLIT: tl.constexpr, EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: the queries of one key/value head of one cache row, over one share of that row's keys and values,
    which are `KEY` and `VALUE` numbers apart.

    `BIAS`: 0 none, 1 ALiBi, 2 ALiBi rounded to bfloat16, 3 a table by distance. `out` is [B, H, DV]. If `SPLIT` is not
    0, each program writes its share to `partial` [splits, B, H, DV] and `statistics` [splits, B, H] (log of the sum,
    base 2); if it is 2, the last program of a row to finish merges the shares.
    """
    row, head, split = tl.program_id(0) // G, tl.program_id(0) % G, tl.program_id(1)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)  # of the g · FOLD queries that share this head
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    H = G * g
    asked = m < g * FOLD
    q_row, q_head = row * FOLD + m // g, head * g + m % g
    if PDL:
        gdc_launch_dependents()
    low, high, last, origin = _share(length, start, row, split, splits, length_step, HAS_START, WINDOW, BLOCK_N)
    if PDL:
        # Lengths and the keys and values of all tokens but the newest were written long before: prefetch the first of
        # them into the L2 cache while the kernel that rotates the queries still runs.
        if not HAS_ROWS:
            here, far = tl.minimum(low, last - 1), row.to(tl.int64)
            count = high - low - 1
            _prefetch(keys + far * key_row + head * key_head + here * KEY, count * KEY + D, 2 * BLOCK_N * BLOCK_D)
            _prefetch(
                values + far * value_row + head * value_head + here * VALUE, count * VALUE + DV, 2 * BLOCK_N * BLOCK_DV
            )
        gdc_wait()
    q = tl.load(
        query + q_row[:, None] * query_row + q_head[:, None] * D + d[None, :],
        mask=asked[:, None] & (d < D)[None, :], other=0.0,
    )  # fmt: skip

    slope = tl.zeros([BLOCK_M], tl.float32)
    if BIAS == 1 or BIAS == 2:
        slope = tl.load(slopes + q_head, mask=asked, other=0.0)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulated = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    log2e = 1.4426950408889634
    if SINKS:  # noqa: SIM102 (one condition is known when the kernel is compiled)
        if split == 0:  # one of the shares counts the sinks
            largest = tl.load(sinks + q_head, mask=asked, other=0.0).to(tl.float32) * log2e
            total += 1.0
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    for block in range(low, high, BLOCK_N):
        n = block + tl.arange(0, BLOCK_N)
        valid = n < high
        at = tl.zeros([BLOCK_N], tl.int64) + row
        if HAS_ROWS:
            at = tl.load(rows + row * rows_row + n, mask=valid, other=0).to(tl.int64)
        k = tl.load(
            keys + at[:, None] * key_row + head * key_head + n[:, None] * KEY + d[None, :],
            mask=valid[:, None] & (d < D)[None, :], other=0.0,
        )  # fmt: skip
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=precision) * scale
        if SCALED:
            s *= tl.load(key_scales + (at * G + head) * S + n, mask=valid, other=0.0)[None, :]
        if CAPPED:
            s = (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0) * softcap
        s = _biased(s, n, valid, slope, table, q_head, asked, last, origin, scale, table_width, BIAS, FROM_START)
        s = tl.where(valid[None, :], s * log2e, float("-inf"))
        larger = tl.maximum(largest, tl.max(s, 1))
        p = tl.exp2(s - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(
            values + at[:, None] * value_row + head * value_head + n[:, None] * VALUE + dv[None, :],
            mask=valid[:, None] & (dv < DV)[None, :], other=0.0,
        )  # fmt: skip
        if SCALED:
            p *= tl.load(value_scales + (at * G + head) * S + n, mask=valid, other=0.0)[None, :]
        accumulated *= shrink[:, None]
        accumulated = tl.dot(p.to(q.dtype), v.to(q.dtype), accumulated, input_precision=precision)
        largest = larger

    _write(
        accumulated, total, largest, out, partial, statistics, counters, q_row * H + q_head, asked, dv, splits, B * H,
        DV, BLOCK_M, BLOCK_DV, SPLIT,
    )  # fmt: skip


@jit
def _merge_kernel(
    partial, statistics, out, splits, places,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[place] = Σ_s 2^statistics[s, place] · partial[s, place] / Σ_s 2^statistics[s, place]; one program per place
    and block of components.
    """
    place = tl.program_id(0)
    s, dv = tl.arange(0, BLOCK_S), tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    logs = tl.load(statistics + s * places + place, mask=s < splits, other=float("-inf"))
    parts = tl.load(
        partial + (s[:, None] * places + place) * DV + dv[None, :],
        mask=(s < splits)[:, None] & (dv < DV)[None, :], other=0.0,
    )  # fmt: skip
    weights = tl.exp2(logs - tl.max(logs, 0))
    merged = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + place * DV + dv, merged.to(out.dtype.element_ty), mask=dv < DV)


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: torch.Tensor,
    scale: float,
    *,
    capacity: int,
    start: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    fold: int = 1,
    window: int | None = None,
    slopes: torch.Tensor | None = None,
    bfloat16_from_start: bool | None = None,
    table: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    blocks: tuple[int, int, int] | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """Attention of one new query per row to a cache of which `length` positions are in use.

    Args:
        query: [B, H, D], contiguous.
        keys, values: [R, G, S, D] and [R, G, S, Dv], the last dimension contiguous; B = R · `fold`.
        length: int32, [1] or [R]: positions in use, the new one included.
        scale: factor on query · key.
        capacity: the largest `length` that will occur; it determines how the work is split.
        start: int32 [R], the first position in use (left padding).
        rows: int32 [B, S], the cache row that holds each position of a query row (beams); default: its own.
        fold: query rows that share a row of the cache (beams that share an encoder's output).
        window: positions attended to, the newest included.
        slopes: float32 [H] (ALiBi, arXiv 2108.12409).
        bfloat16_from_start: round ALiBi as Falcon does, positions counted from `start` or (`False`) from 0; `slopes`
            are then slope / `scale`, rounded to bfloat16.
        table: float32 [H, n], a bias for each distance; the last one is for all larger distances.
        key_scales, value_scales: float32 [R, G, S] of a float8 cache.
        counters: R · H int32 zeros, not shared with a call that may run at the same time; a few shares are then merged
            without a separate launch.
        softcap: cap of the logits, before biases.
        sinks: [H], a logit of each query head that takes part in its softmax and has no value.
        blocks: keys a program reads at once, warps, stages. Default: by size.
        splits: programs that share a row. Default: by size.

    Returns:
        [B, H, Dv].
    """
    B, H, D = query.shape
    R, G, S, DV = values.shape
    g = H // G
    block_d, block_dv = max(power(D), 16), max(power(DV), 16)
    block_m = min(max(power(g * fold), 16), 16 if query.dtype == torch.float32 else 64)
    tiles = triton.cdiv(g * fold, block_m)
    row, span = (block_d + block_dv) * keys.element_size(), min(capacity, window or capacity)
    biased = 0 if table is None else block_m
    splits, blocks = attend_plan(query, R * G * tiles, span, row, splits, blocks, block_m * block_d, biased)
    block_n, warps, stages = blocks
    out = query.new_empty(B, H, DV)
    partial = statistics = out
    if splits > 1:
        partial = torch.empty(splits, B, H, DV, dtype=torch.float32, device=query.device)
        statistics = torch.empty(splits, B, H, dtype=torch.float32, device=query.device)
    bias = 3 if table is not None else 0 if slopes is None else 1 if bfloat16_from_start is None else 2
    some = length  # placeholder for missing arguments, never read
    at_once = counters is not None and splits <= MAX_MERGED
    launch(_attend_kernel, (R * G, splits, tiles),
        query, keys, values,
        some if key_scales is None else key_scales, some if value_scales is None else value_scales,
        out, partial, statistics, counters if at_once else some,
        length, some if start is None else start, some if rows is None else rows,
        some if slopes is None else slopes, some if table is None else table, some if sinks is None else sinks,
        scale, softcap or 1.0, splits, S, G, g, B, keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        query.stride(0), 0 if rows is None else rows.stride(0), 0 if len(length) == 1 else 1,
        0 if table is None else table.shape[1],
        D=D, DV=DV, KEY=keys.stride(2), VALUE=values.stride(2), FOLD=fold, WINDOW=window or 0,
        HAS_START=start is not None, HAS_ROWS=rows is not None, BIAS=bias,
        FROM_START=bool(bfloat16_from_start), SCALED=key_scales is not None,
        CAPPED=softcap is not None, SINKS=sinks is not None,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_DV=block_dv,
        SPLIT=0 if splits == 1 else 2 if at_once else 1,
        EXACT=query.dtype == torch.float32, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1 and not at_once:
        merge(partial, statistics, out)
    return out


def merge(partial: torch.Tensor, statistics: torch.Tensor, out: torch.Tensor) -> None:
    """Merge shares `partial` [splits, B, H, Dv], with weights 2^`statistics` [splits, B, H], into out [B, H, Dv]."""
    splits, B, H, DV = partial.shape
    columns = min(max(power(DV), 16), 32 if splits > 16 else 128)
    launch(_merge_kernel, (B * H, triton.cdiv(DV, columns)),
        partial, statistics, out, splits, B * H,
        DV=DV, BLOCK_DV=columns, BLOCK_S=power(splits), num_warps=4,
    )  # fmt: skip


def attend_plan(
    query: torch.Tensor,
    programs: int,
    span: int,
    row: int,
    splits: int | None,
    blocks: tuple[int, int, int] | None,
    numbers: int,
    biased: int,
) -> tuple[int, tuple[int, int, int]]:
    """Defaults for `splits` and `blocks`: [`attend_splits`] and [`attend_blocks`] of the query's device."""
    if splits is None:
        splits = attend_splits(programs, span, row, processors(query.device))
    if blocks is None:
        crowded = programs * splits > processors(query.device) and span // splits <= 1024
        memory, exact = shared_memory(query.device), query.dtype == torch.float32
        blocks = attend_blocks(row, memory, exact, crowded, numbers * query.element_size(), biased)
    return splits, blocks


def naive_attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: torch.Tensor,
    scale: float,
    *,
    capacity: int,
    start: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    fold: int = 1,
    window: int | None = None,
    slopes: torch.Tensor | None = None,
    bfloat16_from_start: bool | None = None,
    table: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    blocks: tuple[int, int, int] | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """[`attend`] in float64, one row at a time. Arguments that divide the work (`capacity`, `counters`, `blocks`,
    `splits`) have no effect.
    """
    B, H, _ = query.shape
    G, out = keys.shape[1], []
    if key_scales is not None and value_scales is not None:
        keys, values = (from_float8(*held, torch.float32) for held in ((keys, key_scales), (values, value_scales)))
    for b in range(B):
        r = b // fold
        last = int(length[r] if len(length) > 1 else length[0])
        origin = 0 if start is None else int(start[r])
        at = torch.arange(max(origin, last - window) if window else origin, last, device=query.device)
        row = torch.full_like(at, r) if rows is None else rows[b, at].long()
        k, v = (x[row, :, at].double().repeat_interleave(H // G, 1) for x in (keys, values))  # [n, H, D]
        logits = torch.einsum("hd,nhd->hn", query[b].double(), k) * scale
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
        out.append(torch.einsum("hn,nhd->hd", logits.softmax(-1)[:, : len(at)], v))
    return torch.stack(out)


@cache
def attend_splits(programs: int, length: int, row: int, multiprocessors: int) -> int:
    """Choose how many programs share the keys of a row, for the least time in units of keys read in sequence. Without
    sharing there are `programs`; a key and a value take `row` bytes.

    Measured on an H100: one multiprocessor alone reads 1.6 times as fast as beside all others; starting a program
    takes as long as reading 64 keys, and merging as long as reading 68 KB.
    """

    def keys(s: int) -> float:
        alone = min(1.6, max(1.0, multiprocessors / (programs * s)))
        return -(-programs * s // multiprocessors) * (length / s + 64) / alone + (s > 1) * 68_000 / row

    return min(range(1, max(1, min(length // 64, 256)) + 1), key=keys)


@cache
def attend_blocks(
    row: int, memory: int, exact: bool, crowded: bool, queries: int, biased: int
) -> tuple[int, int, int]:
    """Keys a program reads at once, its warps and its stages, for `row` bytes of a key and a value: 64 KiB in each of
    three stages if they fit in shared memory, half of it if programs with few keys should overlap (`crowded`).
    Products in float32 (`exact`) need much of the shared memory themselves. Products of 64 queries read these from
    shared memory too, `queries` bytes; and biases of a table for `biased` queries are loaded two stages ahead.
    """
    if exact:
        return 16, 4, 1
    block_n, stages = min(64 if crowded else 128, max(16, power(65536 // row + 1) // 2)), 3

    def needed() -> int:
        return block_n * row * stages + max(32768, queries + 2 * 4 * biased * block_n + 2048)

    while needed() > memory and (block_n > 16 or stages > 2):
        block_n, stages = (block_n // 2, stages) if block_n > 32 or stages == 2 else (block_n, stages - 1)
    return block_n, 4, stages
