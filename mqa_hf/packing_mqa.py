"""Latents in 8 or 4 bits a number: integers, and a scale and an offset for each group of them.

    number = code · scale + offset

Scale and offset have the type of the latent. Of 4-bit codes, byte i of a group of 32 holds numbers i (low half) and
16 + i (high half).
"""

from typing import Any

import torch

from .configuration_mqa import LATENT_GROUP

Packed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def pack_latent(x: torch.Tensor, bits: int) -> Packed:
    """Codes uint8 [..., r · bits / 8], scales and offsets [..., r / 32] of latents x [..., r]; `bits` is 8 or 4."""
    groups = x.unflatten(-1, (-1, LATENT_GROUP)).float()
    least, most = groups.amin(-1), groups.amax(-1)
    offsets = least.to(x.dtype)
    scales = ((most - offsets.float()) / (2**bits - 1)).clamp(min=1e-7).to(x.dtype)
    codes = ((groups - offsets.float()[..., None]) / scales.float()[..., None]).round().clamp(0, 2**bits - 1)
    codes = codes.to(torch.uint8)
    if bits == 4:
        low, high = codes.chunk(2, dim=-1)
        codes = low | (high << 4)
    return codes.flatten(-2), scales, offsets


def unpack_latent(codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The latents [..., r] that were packed, rounded; their bits follow from the sizes."""
    groups = codes.unflatten(-1, (scales.shape[-1], -1))
    if groups.shape[-1] < LATENT_GROUP:
        groups = torch.cat((groups & 15, groups >> 4), dim=-1)
    numbers = groups.float() * scales.float()[..., None] + offsets.float()[..., None]
    return numbers.to(scales.dtype).flatten(-2)


class _Rounding(torch.autograd.Function):
    """Packing and unpacking, with the gradient of doing nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bits: int) -> torch.Tensor:
        return unpack_latent(*pack_latent(x, bits))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


def rounded_latent(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Latents to the bit as they are after packing and unpacking; the gradient passes as if nothing was rounded."""
    return x if bits == 16 else _Rounding.apply(x, bits)
