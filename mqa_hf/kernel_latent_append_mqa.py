"""The steps around attention to latents in a decode step: map queries to latents, write the latent to the cache, and
compute the heads' values from mixtures of latents.

    B rows, S allocated cache positions, H query heads, G heads that the latent replaces, D query head width, R rotated
    components of it, r latent width, W key width (C = W / 2 complex components), Dv value head width
"""

import torch

from .configuration_checks_mqa import LATENT_BLOCK
from .kernel_append_mqa import turned
from .kernel_launch_mqa import gdc_launch_dependents, gdc_wait, jit, launch, power, tl, triton
from .packing_mqa import pack_latent


@jit
def _append_latent_kernel(
    projected, wide, factors, frequency, cos, sin, positions, latents, scales, offsets, length,
    H, g, S, tiles, projected_row, latent_row, angles_row,
    D: tl.constexpr, C: tl.constexpr, F: tl.constexpr, R: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The first `tiles` programs of a row rotate `HEADS` of its queries in `projected` [B, H·D + R] by F angles and
    multiply component `frequency` [C] of each with the conjugate factors [2, H/g, C] of its head: `wide` [B, H, 2·C].
    Another program, if present, writes the latent to the cache at position `length` - 1.
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if tile < tiles:
        head = tile * HEADS + tl.arange(0, HEADS)
        position = tl.load(positions + row) * angles_row
        for first in range(0, C, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            known = c < C
            f = tl.load(frequency + c, mask=known, other=0)
            inside = (head < H)[:, None] & known[None, :]
            x = projected + row * projected_row + head[:, None] * D + f[None, :]
            a, b = (
                tl.load(x, mask=inside, other=0.0).to(tl.float32),
                tl.load(x + F, mask=inside, other=0.0).to(tl.float32),
            )
            angle = position + f
            real = a * tl.load(cos + angle, mask=known, other=0.0).to(tl.float32)[None, :]
            real += b * tl.load(sin + angle, mask=known, other=0.0).to(tl.float32)[None, :]
            imaginary = b * tl.load(cos + angle + F, mask=known, other=0.0).to(tl.float32)[None, :]
            imaginary += a * tl.load(sin + angle + F, mask=known, other=0.0).to(tl.float32)[None, :]
            factor = factors + (head // g)[:, None] * C + c[None, :]
            p = tl.load(factor, mask=inside, other=0.0).to(tl.float32)
            q = tl.load(factor + tl.cdiv(H, g) * C, mask=inside, other=0.0).to(tl.float32)
            to = wide + (row * H + head)[:, None] * (2 * C) + c[None, :]
            tl.store(to, (p * real + q * imaginary).to(wide.dtype.element_ty), mask=inside)
            tl.store(to + C, (p * imaginary - q * real).to(wide.dtype.element_ty), mask=inside)
    else:
        token = tl.load(length) - 1
        new = projected + row * projected_row + H * D
        if BITS == 16:
            k = tl.arange(0, BLOCK_R)
            tl.store(latents + row * latent_row + token * R + k, tl.load(new + k, mask=k < R), mask=k < R)
        else:
            half: tl.constexpr = BLOCK // 2
            j, i = tl.arange(0, BLOCK_R // BLOCK), tl.arange(0, half)
            inside = (j < R // BLOCK)[:, None]
            x = new + j[:, None] * BLOCK + i[None, :]
            stand_in = tl.load(new).to(tl.float32)  # for numbers past the end
            low = tl.where(inside, tl.load(x, mask=inside, other=0.0).to(tl.float32), stand_in)
            high = tl.where(inside, tl.load(x + half, mask=inside, other=0.0).to(tl.float32), stand_in)
            kind = scales.dtype.element_ty
            most: tl.constexpr = 2**BITS - 1
            offset = tl.min(tl.min(tl.minimum(low, high), 1), 0).to(kind)
            largest = tl.max(tl.max(tl.maximum(low, high), 1), 0)
            scale = tl.maximum((largest - offset.to(tl.float32)) * (1.0 / most), 1e-7).to(kind)
            tl.store(scales + row * S + token, scale)
            tl.store(offsets + row * S + token, offset)
            step = tl.zeros([BLOCK_R // BLOCK, half], tl.float32) + scale.to(tl.float32)
            low = _code(low - offset.to(tl.float32), step, most)
            high = _code(high - offset.to(tl.float32), step, most)
            to = latents + row * latent_row + token * (R * BITS // 8) + j[:, None] * (BLOCK * BITS // 8) + i[None, :]
            if BITS == 8:
                tl.store(to, low.to(tl.uint8), mask=inside)
                tl.store(to + half, high.to(tl.uint8), mask=inside)
            else:
                tl.store(to, (low | (high << 4)).to(tl.uint8), mask=inside)


@jit
def _code(x, step, most: tl.constexpr):
    """x / step, rounded to the nearest of 0 … `most`, ties to even, by adding a large number."""
    x = tl.minimum(tl.maximum(tl.div_rn(x, step), 0.0), most * 1.0)
    return ((x + 12582912.0) - 12582912.0).to(tl.int32)


def append_latent(
    projected: torch.Tensor,
    H: int,
    latents: torch.Tensor | None,
    length: torch.Tensor,
    *,
    r: int = 0,
    factors: torch.Tensor | None = None,
    frequency: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    k_up: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Make the queries for [`attend_latent`], and write the latent to the cache at position `length` - 1.

    Args:
        projected: [B, H·D + r], the outputs of the projections of queries and of the latent.
        latents: [B, S, r], or packed codes uint8 [B, S, r · bits / 8] with `scales` and `offsets` [B, S], all written
            in place; `None` if there is nothing to write (attention to an encoder's output), then r is 0.
        length: int32 [1], positions in use, the new one included.
        r: latent width.
        factors: [2, G, C], real and imaginary parts of each head's factors on the rebuilt components.
        frequency: int32 [C], the index of each component's frequency among the R / 2.
        cos, sin: [positions, R] of all positions; the first half of `sin` is negated.
        positions: int64 [B], the position of each row's query.
        k_up: [G, N, r], the map to the last N components of a head's keys, which are not rotated.

    Returns:
        `wide` [B, H, 2·C], queries for the rebuilt components, real parts first (`None` without `factors`), and
        `plain` [B, H, r], queries for the latent (`None` without `k_up`).
    """
    B, D = projected.shape[0], (projected.shape[1] - r) // H
    C = 0 if frequency is None else len(frequency)
    wide = projected.new_empty(B, H, 2 * C) if C else None
    bits = 16 if latents is None or scales is None else latents.shape[2] * 8 // r
    heads, some = max(1, min(8, power(H))), length
    tiles = triton.cdiv(H, heads) if C else 0
    if tiles or latents is not None:
        launch(_append_latent_kernel, (B, tiles + (latents is not None)),
            projected, projected if wide is None else wide, projected if factors is None else factors,
            some if frequency is None else frequency, projected if cos is None else cos,
            projected if sin is None else sin, some if positions is None else positions,
            projected if latents is None else latents, projected if scales is None else scales,
            projected if offsets is None else offsets, length,
            H, 1 if factors is None else H // factors.shape[1], 0 if latents is None else latents.shape[1], tiles,
            projected.stride(0), 0 if latents is None else latents.stride(0), 0 if cos is None else cos.stride(0),
            D=D, C=C, F=0 if cos is None else cos.shape[1] // 2, R=r, BITS=bits, BLOCK=LATENT_BLOCK, HEADS=heads,
            BLOCK_C=min(256, power(max(C, 1))), BLOCK_R=max(power(max(r, 1)), LATENT_BLOCK), num_warps=4,
        )  # fmt: skip
    return wide, None if k_up is None else absorbed(projected[:, : H * D].view(B, H, D), k_up)


def absorbed(query: torch.Tensor, k_up: torch.Tensor) -> torch.Tensor:
    """The last N components of queries [B, H, D] times the map [G, N, r] of their heads: [B, H, r]."""
    B, H, _ = query.shape
    G, N, r = k_up.shape
    x = query[..., -N:]
    if G == H:
        return torch.bmm(x.transpose(0, 1), k_up).transpose(0, 1)
    x = x.reshape(B, G, H // G, N).transpose(0, 1).reshape(G, -1, N)
    return torch.bmm(x, k_up).view(G, B, H // G, r).transpose(0, 1).reshape(B, H, r)


def read_latent(mixed: torch.Tensor, v_up: torch.Tensor) -> torch.Tensor:
    """Compute the heads' values from mixtures of latents [B, H, r] and maps [G, Dv, r] -> [B, H·Dv]; no gradient."""
    B, H, r = mixed.shape
    G, Dv, _ = v_up.shape
    out = mixed.new_empty(B, H, Dv)
    if G == H:
        torch.bmm(mixed.transpose(0, 1), v_up.transpose(1, 2), out=out.transpose(0, 1))
    else:
        x = mixed.view(B, G, H // G, r).transpose(0, 1).reshape(G, -1, r)
        read = torch.bmm(x, v_up.transpose(1, 2)).view(G, B, H // G, Dv)
        out.view(B, G, H // G, Dv).copy_(read.transpose(0, 1))
    return out.flatten(1)


def naive_append_latent(
    projected: torch.Tensor,
    H: int,
    latents: torch.Tensor | None,
    length: torch.Tensor,
    *,
    r: int = 0,
    factors: torch.Tensor | None = None,
    frequency: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    k_up: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """[`append_latent`] in float64 and complex numbers; it writes in the cache's type."""
    B = projected.shape[0]
    query, new = projected.split([projected.shape[1] - r, r], -1)
    at = int(length) - 1
    if latents is not None and scales is not None and offsets is not None:
        latents[:, at], scales[:, at], offsets[:, at] = pack_latent(new, latents.shape[2] * 8 // r)
    elif latents is not None:
        latents[:, at] = new
    q = query.double().view(B, H, -1)
    wide = plain = None
    if factors is not None:
        assert frequency is not None
        assert cos is not None
        assert sin is not None
        rotated = turned(q, cos[positions].double()[:, None], sin[positions].double()[:, None])
        pairs = torch.complex(*rotated[..., : cos.shape[1]].chunk(2, -1))  # [B, H, F]
        weights = torch.complex(*factors.double()).repeat_interleave(H // factors.shape[1], 0)  # [H, C]
        expanded = weights.conj() * pairs[..., frequency.long()]
        wide = torch.cat((expanded.real, expanded.imag), -1)
    if k_up is not None:
        maps = k_up.double().repeat_interleave(H // len(k_up), 0)
        plain = torch.einsum("bhn,hnr->bhr", q[..., -maps.shape[1] :], maps)
    return wide, plain
