"""Latents in 8 and 4 bits."""

import pytest
import torch

from mqa_hf.packing_mqa import pack_latent, rounded_latent, unpack_latent


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_numbers_are_rounded_to_the_nearest_step_of_their_latent(bits, dtype):
    x = (torch.randn(3, 5, 96) * torch.tensor([1e-3, 1.0, 300.0])[:, None, None]).to(dtype)
    codes, scales, offsets = pack_latent(x, bits)
    assert (codes.dtype, codes.shape[-1], scales.dtype) == (torch.uint8, 96 * bits // 8, dtype)
    rounded = unpack_latent(codes, scales, offsets, bits)
    assert torch.equal(rounded, rounded_latent(x, bits))
    numbers = x.double()
    step = (numbers.amax(-1) - numbers.amin(-1)) / (2**bits - 1)
    off = (rounded.double() - numbers).abs().amax(-1)
    size = numbers.abs().amax(-1)
    # Half a step, and what the scale, which the largest code multiplies, and the sum are rounded by.
    assert (off <= step * (0.5 + 2**bits * torch.finfo(dtype).eps) + size * torch.finfo(dtype).eps).all()
    assert (off > 0.3 * step).any()


def test_equal_numbers_stay_what_they_are():
    for value in (0.0, -3.0, 1e-5):
        x = torch.full((2, 32), value, dtype=torch.float16)
        assert torch.equal(rounded_latent(x, 4), x)


def test_two_codes_share_a_byte_across_the_halves_of_a_block():
    x = torch.arange(16.0).repeat(4)
    x[16:32] = x[16:32].flip(0)
    codes, scales, offsets = pack_latent(x, 4)
    low = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(codes[:16], low + (15 - low) * 16)
    assert torch.equal(codes[16:], low * 17)
    assert torch.equal(scales, torch.tensor(1.0))
    assert torch.equal(offsets, torch.tensor(0.0))
    assert torch.equal(unpack_latent(codes, scales, offsets, 4), x)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_the_gradient_passes_as_if_nothing_was_rounded(bits):
    x = torch.randn(2, 64, requires_grad=True)
    weight = torch.randn(2, 64)
    (rounded_latent(x, bits) * weight).sum().backward()
    assert torch.equal(x.grad, weight)
