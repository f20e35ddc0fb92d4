"""[`attend_latent`] for Hopper, in Gluon: keys are rebuilt on the tensor cores while the previous ones are rotated.

    N positions of a block for each of two warpgroups, P complex key components rebuilt at once, K = C / P chunks

The warps of a program are specialised. Two warpgroups attend, each to its own half of a block of positions: it
rebuilds a chunk of keys with one product (latents in registers, the map in shared memory), rotates it in registers,
and multiplies it with the queries from there. While one group rotates, the other keeps the tensor cores busy. Two more
groups of warps load the next latents (unpacked) and the map with the queries into shared memory. Each buffer has two
barriers for synchronisation, one for full and one for empty.
"""

from .kernel_launch_mqa import (
    async_copy,
    fence_async_shared,
    gdc_launch_dependents,
    gdc_wait,
    gl,
    gluon_jit,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon_jit
def _prefetch(latents, first, high, N: gl.constexpr, WIDTH: gl.constexpr):
    """Prefetch N rows of `WIDTH` numbers into the L2 cache."""
    EACH: gl.constexpr = 1024 // latents.dtype.element_ty.primitive_bitwidth  # numbers in 128 bytes
    LINES: gl.constexpr = WIDTH // EACH if WIDTH > EACH else 1
    L: gl.constexpr = gl.BlockedLayout([1, 1], [32 // LINES, LINES], [gl.num_warps(), 1], [1, 0])
    n = gl.minimum(first + gl.arange(0, N, layout=gl.SliceLayout(1, L)), high - 1)
    line = gl.arange(0, LINES, layout=gl.SliceLayout(0, L)) * EACH
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [latents + n[:, None] * WIDTH + line[None, :]],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon_jit
def _bytes(words):
    """The bytes [N, 4 · n] of words [N, n], in float32: a byte in the mantissa under exponent 2^23 adds its value."""
    a, b, c, d = gl.inline_asm_elementwise(
        "prmt.b32 $0, $4, 0x4B000000, 0x7440; prmt.b32 $1, $4, 0x4B000000, 0x7441;"
        "prmt.b32 $2, $4, 0x4B000000, 0x7442; prmt.b32 $3, $4, 0x4B000000, 0x7443;",
        "=r,=r,=r,=r,r", [words], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    x = gl.permute(gl.join(gl.join(a, b), gl.join(c, d)), (0, 1, 3, 2))
    x = gl.reshape(x, [words.shape[0], 4 * words.shape[1]])
    return x.to(gl.float32, bitcast=True) - 8388608.0


@gluon_jit
def _floats(codes, R: gl.constexpr, BITS: gl.constexpr):
    """Codes [N, R · BITS / 32], four or eight in a number, as float32 [N, R]."""
    if BITS == 8:
        x = _bytes(codes)
    else:
        N: gl.constexpr = codes.shape[0]
        low = gl.reshape(_bytes(codes & 0x0F0F0F0F), [N, R // 32, 16])
        high = gl.reshape(_bytes((codes >> 4) & 0x0F0F0F0F), [N, R // 32, 16])
        x = gl.reshape(gl.permute(gl.join(low, high), (0, 1, 3, 2)), [N, R])
    return x


@gluon_jit
def _fetched(
    latents, scales, offsets, rows, n, row, S, latent_row,
    R: gl.constexpr, BITS: gl.constexpr, HAS_ROWS: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """Load the packed latents of positions n: codes [N, R · BITS / 32], scales and offsets [N]."""
    WIDTH: gl.constexpr = R * BITS // 32
    j = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, L))
    at = row.to(gl.int64)
    if HAS_ROWS:
        at = gl.load(rows + n).to(gl.int64)
        codes = gl.load(latents + (at * latent_row)[:, None] + n[:, None] * WIDTH + j[None, :])
    else:
        codes = gl.load(latents + n[:, None] * WIDTH + j[None, :])
    held = gl.convert_layout(at * S + n, gl.SliceLayout(1, _floats(codes, R, BITS).type.layout))
    return codes, gl.load(scales + held), gl.load(offsets + held)


@gluon_jit
def _unpack(to, codes, scale, offset, R: gl.constexpr, BITS: gl.constexpr):
    """Unpack latents into shared memory."""
    x = _floats(codes, R, BITS) * scale.to(gl.float32)[:, None] + offset.to(gl.float32)[:, None]
    to.store(x.to(to.dtype))


@gluon_jit
def _bring_latents(
    c_smem, c_full, c_empty, latents, scales, offsets, rows, row, low, high, blocks, S, latent_row,
    R: gl.constexpr, N: gl.constexpr, SLOTS: gl.constexpr, BITS: gl.constexpr, HAS_ROWS: gl.constexpr,
    PIECE: gl.constexpr,
):  # fmt: skip
    """Load the latents of N positions for each of the two warpgroups in turn; unpack `PIECE` positions at once."""
    warps: gl.constexpr = gl.num_warps()
    if BITS == 16:
        L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // R, R // 8], [warps, 1], [1, 0])
        token = gl.arange(0, N, layout=gl.SliceLayout(1, L))
        k = gl.arange(0, R, layout=gl.SliceLayout(0, L))
        for tile in range(0, 2 * blocks):
            block = tile // 2
            slot = tile % 2 * SLOTS + block % SLOTS
            n = gl.minimum(low + tile * N + token, high - 1)
            mbarrier.wait(c_empty.index(slot), (block // SLOTS & 1) ^ 1)
            if HAS_ROWS:
                at = gl.load(rows + n).to(gl.int64) * latent_row
                pointers = latents + at[:, None] + n[:, None] * R + k[None, :]
            else:
                _prefetch(latents, low + (tile + 2) * N, high, N, R)
                pointers = latents + n[:, None] * R + k[None, :]
            async_copy.async_copy_global_to_shared(c_smem.index(slot), pointers)
            async_copy.mbarrier_arrive(c_full.index(slot), increment_count=False)
        async_copy.wait_group(0)
    else:
        PL: gl.constexpr = gl.BlockedLayout([1, 4], [4096 // (R * BITS), R * BITS // 128], [warps, 1], [1, 0])
        token = gl.arange(0, PIECE, layout=gl.SliceLayout(1, PL))
        n = gl.minimum(low + token, high - 1)
        codes, scale, offset = _fetched(
            latents, scales, offsets, rows, n, row, S, latent_row, R, BITS, HAS_ROWS, PL
        )  # fmt: skip
        for tile in range(0, 2 * blocks):
            block = tile // 2
            slot = tile % 2 * SLOTS + block % SLOTS
            if not HAS_ROWS:
                _prefetch(latents, low + (tile + 2) * N, high, N, R * BITS // 32)
            mbarrier.wait(c_empty.index(slot), (block // SLOTS & 1) ^ 1)
            for piece in gl.static_range(N // PIECE):
                n = gl.minimum(low + tile * N + (piece + 1) * PIECE + token, high - 1)
                more, its_scale, its_offset = _fetched(
                    latents, scales, offsets, rows, n, row, S, latent_row, R, BITS, HAS_ROWS, PL
                )  # fmt: skip
                _unpack(c_smem.index(slot).slice(piece * PIECE, PIECE), codes, scale, offset, R, BITS)
                codes, scale, offset = more, its_scale, its_offset
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(c_full.index(slot), count=1)


@gluon_jit
def _bring_map(
    u_smem, q_smem, u_full, u_empty, q_full, q_empty, weight, wide, m0, H, wide_head, blocks,
    C: gl.constexpr, R: gl.constexpr, K: gl.constexpr, M: gl.constexpr, P: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    """Load the map of each chunk of components, real parts before imaginary ones, and the queries for it."""
    if K > 0:
        _bring_chunks(
            u_smem, q_smem, u_full, u_empty, q_full, q_empty, weight, wide, m0, H, wide_head, blocks,
            C, R, K, M, P, QUERIES,
        )  # fmt: skip


@gluon_jit
def _bring_chunks(
    u_smem, q_smem, u_full, u_empty, q_full, q_empty, weight, wide, m0, H, wide_head, blocks,
    C: gl.constexpr, R: gl.constexpr, K: gl.constexpr, M: gl.constexpr, P: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    warps: gl.constexpr = gl.num_warps()
    UL: gl.constexpr = gl.BlockedLayout([1, 8], [256 // R, R // 8], [warps, 1], [1, 0])
    QL: gl.constexpr = gl.BlockedLayout([1, 8], [128 // P, P // 4], [warps, 1], [1, 0])
    k = gl.arange(0, R, layout=gl.SliceLayout(0, UL))
    j = gl.arange(0, 2 * P, layout=gl.SliceLayout(1, UL))
    map_place = (j % P + j // P * C)[:, None] * R + k[None, :]
    head = gl.minimum(m0 + gl.arange(0, M, layout=gl.SliceLayout(1, QL)), H - 1)
    i = gl.arange(0, 2 * P, layout=gl.SliceLayout(0, QL))
    query_place = head[:, None] * wide_head + (i % P + i // P * C)[None, :]
    for u in range(0, blocks * K):
        mbarrier.wait(u_empty.index(u % 2), (u // 2 & 1) ^ 1)
        async_copy.async_copy_global_to_shared(u_smem.index(u % 2), weight + u % K * (P * R) + map_place)
        async_copy.mbarrier_arrive(u_full.index(u % 2), increment_count=False)
        mbarrier.wait(q_empty.index(u % QUERIES), (u // QUERIES & 1) ^ 1)
        async_copy.async_copy_global_to_shared(q_smem.index(u % QUERIES), wide + u % K * P + query_place)
        async_copy.mbarrier_arrive(q_full.index(u % QUERIES), increment_count=False)
    async_copy.wait_group(0)


@gluon_jit
def _halves(x):
    """Split [N, 2 · P] into real and imaginary parts."""
    return gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


@gluon_jit
def _angles(like, angles, f_smem, chunk):
    """The angles of a chunk's components, for positions that begin at `angles`; in the layout of a half of `like`."""
    half, _ = _halves(like)
    L: gl.constexpr = half.type.layout
    n = gl.arange(0, half.shape[0], layout=gl.SliceLayout(1, L))
    f = f_smem.index(chunk).load(gl.SliceLayout(0, L))
    at = (angles.to(gl.int64) + 4 * n.to(gl.int64))[:, None] + 4 * f.to(gl.int64)[None, :]
    return gl.load(at.to(gl.pointer_type(gl.int32)))


@gluon_jit
def _rotated(x, word, b_smem, chunk, K: gl.constexpr, dtype: gl.constexpr):
    """Components x [N, 2 · P] and their bias, rotated by angles [N, P]."""
    real, imaginary = _halves(x)
    L: gl.constexpr = gl.SliceLayout(0, real.type.layout)
    real += b_smem.index(chunk).load(L)[None, :]
    imaginary += b_smem.index(K + chunk).load(L)[None, :]
    if dtype == gl.float16:
        cos = word.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
        sin = (word >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    else:
        cos, sin = (word << 16).to(gl.float32, bitcast=True), word.to(gl.float32, bitcast=True)
    a = (real * cos - imaginary * sin).to(dtype)
    b = (imaginary * cos + real * sin).to(dtype)
    return gl.reshape(gl.permute(gl.join(a, b), (0, 2, 1)), [x.shape[0], x.shape[1]])


@gluon_jit
def _biased(s, n, slope, table, head, last, origin, scale, table_width, BIAS: gl.constexpr, FROM_START: gl.constexpr):
    """Add the position bias to logits s [positions n, queries]; `BIAS` as in `_attend_kernel`."""
    if BIAS == 1:
        s += (n - last + 1).to(gl.float32)[:, None] * slope[None, :]
    if BIAS == 2:
        position = n
        if FROM_START:
            position = n - origin
        near = position.to(gl.float32).to(gl.bfloat16).to(gl.float32)
        s += (near[:, None] * slope[None, :]).to(gl.bfloat16).to(gl.float32) * scale
    if BIAS == 3:
        distance = gl.minimum(gl.maximum(last - 1 - n, 0), table_width - 1)
        s += gl.load(table + (head * table_width)[None, :] + distance[:, None])
    return s


@gluon_jit
def _attended(
    GROUP: gl.constexpr, smem, full, empty, angles, low, high, last, origin, blocks, slopes, table, m0, H, scale,
    table_width,
    R: gl.constexpr, K: gl.constexpr, PLAIN: gl.constexpr, M: gl.constexpr, N: gl.constexpr, P: gl.constexpr,
    SLOTS: gl.constexpr, QUERIES: gl.constexpr, BIAS: gl.constexpr, FROM_START: gl.constexpr,
):  # fmt: skip
    """Attention of one warpgroup to its N positions of each block: Σ 2^s c [R, M], Σ 2^s, and the largest s, which is
    subtracted from all s.
    """
    c_smem, u_smem, q_smem, p_smem, f_smem, b_smem, plain_smem = smem
    c_full, u_full, q_full = full
    c_empty, u_empty, q_empty = empty
    dtype: gl.constexpr = c_smem.dtype
    X: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 2 * P, 16])
    SL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, M, 16])
    largest = gl.full([M], -1e30, gl.float32, layout=gl.SliceLayout(0, SL))
    total = gl.full([M], 0.0, gl.float32, layout=gl.SliceLayout(0, SL))
    out = gl.full([R, M], 0.0, gl.float32, layout=SL)
    no_key = gl.full([N, 2 * P], 0.0, gl.float32, layout=X)
    head = (m0 + gl.arange(0, M, layout=gl.SliceLayout(0, SL))) % H
    slope = gl.full([M], 0.0, gl.float32, layout=gl.SliceLayout(0, SL))
    if BIAS == 1 or BIAS == 2:
        slope = gl.load(slopes + head)
    u = 0
    for block in range(0, blocks):
        first = low + (2 * block + GROUP) * N
        slot = GROUP * SLOTS + block % SLOTS
        held = c_smem.index(slot)
        mbarrier.wait(c_full.index(slot), block // SLOTS & 1)
        s = gl.full([N, M], 0.0, gl.float32, layout=SL)
        if PLAIN:
            s = warpgroup_mma(held, plain_smem.permute([1, 0]), s, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
        if K > 0:
            c = held.load(gl.DotOperandLayout(0, X, 2))
            for chunk in range(0, K):
                mbarrier.wait(u_full.index(u % 2), u // 2 & 1)
                x = warpgroup_mma(c, u_smem.index(u % 2).permute([1, 0]), no_key, use_acc=False, is_async=True)
                word = _angles(no_key, angles + first, f_smem, chunk)
                x = warpgroup_mma_wait(0, deps=[x])
                gl.thread_barrier()
                mbarrier.arrive(u_empty.index(u % 2), count=1)
                keys = gl.convert_layout(_rotated(x, word, b_smem, chunk, K, dtype), gl.DotOperandLayout(0, SL, 2))
                mbarrier.wait(q_full.index(u % QUERIES), u // QUERIES & 1)
                s = warpgroup_mma(keys, q_smem.index(u % QUERIES).permute([1, 0]), s, is_async=True)
                s = warpgroup_mma_wait(0, deps=[s])
                gl.thread_barrier()
                mbarrier.arrive(q_empty.index(u % QUERIES), count=1)
                u += 1
        n = first + gl.arange(0, N, layout=gl.SliceLayout(1, SL))
        s = _biased(s * scale, n, slope, table, head, last, origin, scale, table_width, BIAS, FROM_START)
        s = gl.where((n < high)[:, None], s * 1.4426950408889634, float("-inf"))
        more = gl.maximum(largest, gl.max(s, 0))
        p = gl.exp2(s - more[None, :])
        shrink = gl.exp2(largest - more)
        largest = more
        total = total * shrink + gl.sum(p, 0)
        mixture = p_smem.index(GROUP)
        mixture.store(p.to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        out = warpgroup_mma(held.permute([1, 0]), mixture, out * shrink[None, :], is_async=True)
        out = warpgroup_mma_wait(0, deps=[out])
        gl.thread_barrier()
        mbarrier.arrive(c_empty.index(slot), count=1)
    return out, total, largest


@gluon_jit
def _first_group(
    smem, full, empty, o_smem, t_smem, angles, low, high, last, origin, blocks, slopes, table, m0, H, scale,
    table_width,
    R: gl.constexpr, K: gl.constexpr, PLAIN: gl.constexpr, M: gl.constexpr, N: gl.constexpr, P: gl.constexpr,
    SLOTS: gl.constexpr, QUERIES: gl.constexpr, BIAS: gl.constexpr, FROM_START: gl.constexpr,
):  # fmt: skip
    return _attended(
        0, smem, full, empty, angles, low, high, last, origin, blocks, slopes, table, m0, H, scale, table_width,
        R, K, PLAIN, M, N, P, SLOTS, QUERIES, BIAS, FROM_START,
    )  # fmt: skip


@gluon_jit
def _second_group(
    smem, full, empty, o_smem, t_smem, angles, low, high, last, origin, blocks, slopes, table, m0, H, scale,
    table_width,
    R: gl.constexpr, K: gl.constexpr, PLAIN: gl.constexpr, M: gl.constexpr, N: gl.constexpr, P: gl.constexpr,
    SLOTS: gl.constexpr, QUERIES: gl.constexpr, BIAS: gl.constexpr, FROM_START: gl.constexpr,
):  # fmt: skip
    """Leave the result in shared memory, in place of the warpgroup's last latents."""
    out, total, largest = _attended(
        1, smem, full, empty, angles, low, high, last, origin, blocks, slopes, table, m0, H, scale, table_width,
        R, K, PLAIN, M, N, P, SLOTS, QUERIES, BIAS, FROM_START,
    )  # fmt: skip
    o_smem.store(out)
    t_smem.index(0).store(total)
    t_smem.index(1).store(largest)


@gluon_jit
def _attend_latent_hopper_kernel(
    wide, plain, latents, scales, offsets, weight, bias, angles, frequency, positions, out, partial, statistics,
    length, start, rows, slopes, table,
    scale, splits, S, H, B, latent_row, wide_row, wide_head, plain_row, plain_head, angles_row, rows_row, length_step,
    table_width,
    R: gl.constexpr, W: gl.constexpr, PLAIN: gl.constexpr, BITS: gl.constexpr, FOLD: gl.constexpr,
    WINDOW: gl.constexpr, HAS_START: gl.constexpr, HAS_ROWS: gl.constexpr, BIAS: gl.constexpr,
    FROM_START: gl.constexpr, SPLIT: gl.constexpr,
    M: gl.constexpr, P: gl.constexpr, SLOTS: gl.constexpr, QUERIES: gl.constexpr, PIECE: gl.constexpr,
    BRINGERS: gl.constexpr, MAPPERS: gl.constexpr, MANY: gl.constexpr, FEW: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One program: M of the queries of one cache row, over one share of its positions, 64 per warpgroup at once.

    Shared memory holds `SLOTS` blocks of latents per warpgroup and `QUERIES` chunks of queries; `BRINGERS` warps load
    latents. A thread has `MANY` registers if it attends and `FEW` if it loads. `BIAS`, `SPLIT`, `out`, `partial` and
    `statistics` are those of `_attend_kernel` with `SPLIT` 0 or 1.
    """
    N: gl.constexpr = 64
    C: gl.constexpr = W // 2
    K: gl.constexpr = C // P
    dtype: gl.constexpr = out.dtype.element_ty
    row, split, m0 = gl.program_id(0), gl.program_id(1), gl.program_id(2) * M
    c_smem = gl.allocate_shared_memory(
        dtype, [2 * SLOTS, N, R], gl.NVMMASharedLayout.get_default_for([N, R], dtype)
    )  # fmt: skip
    p_smem = gl.allocate_shared_memory(dtype, [2, N, M], gl.NVMMASharedLayout.get_default_for([N, M], dtype))
    t_smem = gl.allocate_shared_memory(gl.float32, [2, M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    c_full = gl.allocate_shared_memory(gl.int64, [2 * SLOTS, 1], mbarrier.MBarrierLayout())
    c_empty = gl.allocate_shared_memory(gl.int64, [2 * SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2 * SLOTS):
        mbarrier.init(c_full.index(slot), count=32 * BRINGERS if BITS == 16 else 1)
        mbarrier.init(c_empty.index(slot), count=1)
    # Existing buffers are placeholders for unused ones.
    u_smem, q_smem, plain_smem, f_smem, b_smem = c_smem, c_smem, c_smem, t_smem, t_smem
    u_full, u_empty, q_full, q_empty = c_full, c_full, c_full, c_full
    if PLAIN:
        plain_smem = gl.allocate_shared_memory(dtype, [M, R], gl.NVMMASharedLayout.get_default_for([M, R], dtype))
    if K > 0:
        u_smem = gl.allocate_shared_memory(
            dtype, [2, 2 * P, R], gl.NVMMASharedLayout.get_default_for([2 * P, R], dtype)
        )  # fmt: skip
        q_smem = gl.allocate_shared_memory(
            dtype, [QUERIES, M, 2 * P], gl.NVMMASharedLayout.get_default_for([M, 2 * P], dtype)
        )  # fmt: skip
        f_smem = gl.allocate_shared_memory(gl.int32, [K, P], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        b_smem = gl.allocate_shared_memory(gl.float32, [2 * K, P], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        u_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        u_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        q_full = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], mbarrier.MBarrierLayout())
        q_empty = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2):
            mbarrier.init(u_full.index(i), count=32 * MAPPERS)
            mbarrier.init(u_empty.index(i), count=2)
        for i in gl.static_range(QUERIES):
            mbarrier.init(q_full.index(i), count=32 * MAPPERS)
            mbarrier.init(q_empty.index(i), count=2)

    if PDL:
        gdc_launch_dependents()
    last = gl.load(length + row * length_step)
    low = 0
    if HAS_START:
        low = gl.load(start + row)
    origin = low
    if WINDOW > 0:
        low = gl.maximum(low, last - WINDOW)
    share = gl.cdiv(gl.cdiv(last - low, splits), 2 * N) * (2 * N)
    low += split * share
    high = gl.minimum(low + share, last)
    blocks = gl.cdiv(gl.maximum(high - low, 0), 2 * N)
    if K > 0:
        pair = gl.arange(0, P, layout=gl.BlockedLayout([1], [32], [4], [0]))
        for chunk in range(0, K):
            f_smem.index(chunk).store(gl.load(frequency + chunk * P + pair) * angles_row)
            b_smem.index(chunk).store(gl.load(bias + chunk * P + pair))
            b_smem.index(K + chunk).store(gl.load(bias + C + chunk * P + pair))
    rows += row * rows_row
    if not HAS_ROWS:
        latents += row.to(gl.int64) * latent_row
    if PDL:
        gdc_wait()
    if K > 0:
        wide += row.to(gl.int64) * wide_row
        angles += gl.load(positions + row).to(gl.int32) - last + 1  # maps a cache index to a position
    if PLAIN:
        L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // R, R // 8], [4, 1], [1, 0])
        k = gl.arange(0, R, layout=gl.SliceLayout(0, L))
        m = gl.minimum(m0 + gl.arange(0, M, layout=gl.SliceLayout(1, L)), H * FOLD - 1)
        query = (row * FOLD + m // H) * plain_row + m % H * plain_head
        plain_smem.store(gl.load(plain + query[:, None] + k[None, :]))
        fence_async_shared()
    gl.thread_barrier()

    o_smem = c_smem.index(SLOTS)._reinterpret(gl.float32, [R, M], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    mixed, total, largest = gl.warp_specialize(
        [
            (
                _first_group,
                (
                    (c_smem, u_smem, q_smem, p_smem, f_smem, b_smem, plain_smem), (c_full, u_full, q_full),
                    (c_empty, u_empty, q_empty), o_smem, t_smem, angles, low, high, last, origin, blocks, slopes,
                    table, m0, H, scale, table_width, R, K, PLAIN, M, N, P, SLOTS, QUERIES, BIAS, FROM_START,
                ),
            ),
            (
                _second_group,
                (
                    (c_smem, u_smem, q_smem, p_smem, f_smem, b_smem, plain_smem), (c_full, u_full, q_full),
                    (c_empty, u_empty, q_empty), o_smem, t_smem, angles, low, high, last, origin, blocks, slopes,
                    table, m0, H, scale, table_width, R, K, PLAIN, M, N, P, SLOTS, QUERIES, BIAS, FROM_START,
                ),
            ),
            (
                _bring_latents,
                (
                    c_smem, c_full, c_empty, latents, scales, offsets, rows, row, low, high, blocks, S, latent_row,
                    R, N, SLOTS, BITS, HAS_ROWS, PIECE,
                ),
            ),
            (
                _bring_map,
                (
                    u_smem, q_smem, u_full, u_empty, q_full, q_empty, weight, wide, m0, H, wide_head, blocks,
                    C, R, K, M, P, QUERIES,
                ),
            ),
        ],
        [4, BRINGERS, MAPPERS], [MANY, FEW, FEW],
    )  # fmt: skip

    SL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, M, 16])
    ML: gl.constexpr = gl.SliceLayout(0, SL)
    other = t_smem.index(1).load(ML)
    more = gl.maximum(largest, other)
    mine, theirs = gl.exp2(largest - more), gl.exp2(other - more)
    total = total * mine + t_smem.index(0).load(ML) * theirs
    mixed = (mixed * mine[None, :] + o_smem.load(SL) * theirs[None, :]) / gl.where(total > 0, total, 1.0)[None, :]
    m = m0 + gl.arange(0, M, layout=ML)
    k = gl.arange(0, R, layout=gl.SliceLayout(1, SL))
    place = row * FOLD * H + m
    if SPLIT:
        place += split * B * H
        gl.store(partial + place[None, :] * R + k[:, None], mixed, mask=(m < H * FOLD)[None, :])
        gl.store(statistics + place, gl.where(total > 0, more + gl.log2(total), float("-inf")), mask=m < H * FOLD)
    else:
        gl.store(out + place[None, :] * R + k[:, None], mixed.to(dtype), mask=(m < H * FOLD)[None, :])
