"""Latents in 8 or 4 bits a number: integers, and a scale and an offset for each latent.

    number = code · scale + offset

One scale is enough where all numbers are of like size, as those of a fitted latent are. Scale and offset have the type
of the latent. Of 4-bit codes, byte i of each 32 numbers holds number i (low half) and 16 + i.
"""

from typing import Any

import torch

from .configuration_mqa import LATENT_BLOCK

Packed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def pack_latent(x: torch.Tensor, bits: int) -> Packed:
    """Codes uint8 [..., r · bits / 8], scales and offsets [...] of latents x [..., r]; `bits` is 8 or 4."""
    numbers = x.float()
    least, most = numbers.amin(-1), numbers.amax(-1)
    offsets = least.to(x.dtype)
    # Not divided by the number of steps: on a GPU, PyTorch takes the reciprocal of a number, and on a CPU it does not.
    scales = ((most - offsets.float()) * (1 / (2**bits - 1))).clamp(min=1e-7).to(x.dtype)
    codes = ((numbers - offsets.float()[..., None]) / scales.float()[..., None]).round().clamp(0, 2**bits - 1)
    codes = codes.to(torch.uint8)
    if bits == 4:
        low, high = codes.unflatten(-1, (-1, LATENT_BLOCK)).chunk(2, dim=-1)
        codes = (low | (high << 4)).flatten(-2)
    return codes, scales, offsets


def unpack_latent(codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor, bits: int) -> torch.Tensor:
    """The latents [..., r] that were packed, rounded."""
    if bits == 4:
        blocks = codes.unflatten(-1, (-1, LATENT_BLOCK // 2))
        codes = torch.cat((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    numbers = codes.float() * scales.float()[..., None] + offsets.float()[..., None]
    return numbers.to(scales.dtype)


class _Rounding(torch.autograd.Function):
    """Packing and unpacking, with the gradient of doing nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bits: int) -> torch.Tensor:
        return unpack_latent(*pack_latent(x, bits), bits)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


def rounded_latent(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Latents to the bit as they are after packing and unpacking; the gradient passes as if nothing was rounded."""
    return x if bits == 16 else _Rounding.apply(x, bits)
