"""Latents in 8 or 4 bits per number: integer codes, with a scale and an offset per latent.

    number = code · scale + offset

One scale is enough because all numbers of a fitted latent have similar size. Scale and offset have the type of the
latent. With 4 bits, byte i of each 32 numbers holds the codes of numbers i (low half) and 16 + i.
"""

from typing import Any

import torch

from .configuration_checks_mqa import LATENT_BLOCK

Packed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def pack_latent(x: torch.Tensor, bits: int) -> Packed:
    """Pack latents x [..., r] -> codes uint8 [..., r · bits / 8], scales and offsets [...]; `bits` is 8 or 4."""
    numbers = x.float()
    least, most = numbers.amin(-1), numbers.amax(-1)
    offsets = least.to(x.dtype)
    # Not a division by the number of steps: PyTorch multiplies by the reciprocal on a GPU but not on a CPU.
    scales = ((most - offsets.float()) * (1 / (2**bits - 1))).clamp(min=1e-7).to(x.dtype)
    codes = ((numbers - offsets.float()[..., None]) / scales.float()[..., None]).round().clamp(0, 2**bits - 1)
    codes = codes.to(torch.uint8)
    if bits == 4:
        low, high = codes.unflatten(-1, (-1, LATENT_BLOCK)).chunk(2, dim=-1)
        codes = (low | (high << 4)).flatten(-2)
    return codes, scales, offsets


def unpack_latent(codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack latents [..., r], up to rounding."""
    if bits == 4:
        blocks = codes.unflatten(-1, (-1, LATENT_BLOCK // 2))
        codes = torch.cat((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    numbers = codes.float() * scales.float()[..., None] + offsets.float()[..., None]
    return numbers.to(scales.dtype)


class _Rounding(torch.autograd.Function):
    """Packing and unpacking, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bits: int) -> torch.Tensor:
        return unpack_latent(*pack_latent(x, bits), bits)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


def rounded_latent(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Latents exactly as after packing and unpacking; the gradient is that of the identity."""
    return x if bits == 16 else _Rounding.apply(x, bits)
