"""How the kernels of attention to latents divide their work."""

from functools import cache

import torch

# Queries M and components P of a program, the fastest first. M and 2 · P must differ: with both products of the same
# shape, ptxas (CUDA 12.8 and 12.9) overwrites the registers of latents, which the next chunk needs, with keys.
LAYOUTS = ((64, 64), (32, 64), (32, 32), (16, 64), (16, 32), (16, 16))


def hopper_sizes(
    r: int, W: int, bits: int, queries: int, plain: bool, dtype: torch.dtype, memory: int
) -> dict[str, int] | None:
    """Layout of the kernel for `queries` of a cache row in `memory` bytes of shared memory; `None` for sizes that it
    does not support.

    A product has at least 64 rows, so r must be 64, 128 or 256. If nothing is rebuilt, a program must hold all
    queries, or they would read the cache again.
    """
    C = W // 2
    if r not in (64, 128, 256) or dtype not in (torch.float16, torch.bfloat16):
        return None
    if W == 0:
        layouts = [(M, 32) for M in (16, 32) if queries <= M][:1]
    else:
        layouts = [(M, P) for M, P in LAYOUTS if 2 * max(queries, 16) > M and C % P == 0 and (P < 64 or r < 256)]
    for M, P in layouts:
        needed = 2 * 2 * 64 * r * 2 + 2 * 64 * M * 2 + plain * M * r * 2 + 2048
        if W:
            needed += 2 * 2 * P * r * 2 + 3 * M * 2 * P * 2 + 12 * C
        if needed <= memory and (M < 64 or r < 256):
            break
    else:
        return None
    if W or bits == 16:
        warps = {"BRINGERS": 2, "MAPPERS": 2, "MANY": 216, "FEW": 64}
    else:
        warps = {"BRINGERS": 4, "MAPPERS": 4, "MANY": 168, "FEW": 88}
    # A thread unpacks 32 bytes of latents at once, or 64 if it has the registers.
    piece = warps["BRINGERS"] * 32 * (32 if W else 64) * 8 // (r * bits)
    return {"M": M, "P": P, "SLOTS": 2, "QUERIES": 3 if W else 1, **warps, "PIECE": min(64, piece)}


@cache
def hopper_splits(programs: int, span: int, position: float, size: int, merged: int, multiprocessors: int) -> int:
    """Choose how many programs share the positions of a row, for the least time. Without sharing there are
    `programs`; a position takes one multiprocessor `position` seconds and has `size` bytes; each share adds `merged`
    numbers to merge.

    Measured on an H200: one multiprocessor reads 20 GB/s beside all others and 1.6 times as much alone; starting takes
    2 µs, and merging 3 µs plus the reading.
    """

    def seconds(s: int) -> float:
        alone = min(1.6, max(1.0, multiprocessors / (programs * s)))
        rounds = -(-programs * s // multiprocessors)
        each = max(position, size / 20e9 / alone)
        return rounds * (-(-span // (128 * s)) * 128 * each + 2e-6) + (s > 1) * (3e-6 + s * merged * 8 / 2.5e12)

    return min(range(1, max(1, min(span // 128, 128)) + 1), key=seconds)


def hopper_seconds(r: int, W: int, bits: int, queries: int) -> float:
    """Seconds that a position takes one multiprocessor, without reading: the larger of the tensor cores' time, at
    3.2 · 10^12 operations per second, and that of unpacking.
    """
    return max(2 * (r * W + queries * (W + r)) / 3.2e12, (bits < 16) * r * 0.11e-9)


def latent_bytes(r: int, bits: int, dtype: torch.dtype) -> int:
    """Bytes of one latent in the cache."""
    return r * dtype.itemsize if bits == 16 else r * bits // 8 + 2 * dtype.itemsize


@cache
def latent_blocks(
    block_r: int, W: int, queries: int, itemsize: int, memory: int, exact: bool
) -> tuple[int, int, int, int]:
    """Positions and complex components that a program of the kernel for all devices handles at once for `queries`
    queries, its warps and its stages: the largest that fit in `memory` bytes of shared memory. Products in float32
    (`exact`) need much of it themselves.
    """
    if exact:
        return 16, 16, 4, 1
    row, spare = block_r * itemsize, queries * block_r * itemsize + 16384
    choices = (
        [(128, 32, 8, 3), (64, 32, 4, 2), (64, 16, 4, 2), (32, 16, 4, 2)] if W else [(128, 16, 8, 3), (64, 16, 4, 3)]
    )
    for n, pairs, warps, stages in choices:
        held = 2 * n + stages * 2 * pairs if W else stages * n
        if held * row + (stages * 2 * queries * pairs * itemsize if W else 0) + spare <= memory:
            return n, pairs, warps, stages
    return 16 if W else 32, 16, 4, 2
