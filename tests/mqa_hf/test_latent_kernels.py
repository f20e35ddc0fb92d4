"""The kernels of attention to latents against their references in float64, and these against the model.

`pytest -m gpu` on a CUDA device. With `TRITON_INTERPRET=1` and Triton, the kernel for all devices runs on a CPU: plain
`pytest`, without bfloat16, which NumPy does not have.
"""

import os
import random

import pytest
import torch

from mqa_hf import MQAConfig
from mqa_hf.kernel_latent_append_mqa import append_latent, naive_append_latent, read_latent
from mqa_hf.kernel_latent_mqa import attend_latent, latent_angles, naive_attend_latent, unpacked_angles
from mqa_hf.kernel_latent_plan_mqa import LAYOUTS, hopper_sizes, latent_blocks
from mqa_hf.kernel_launch_mqa import hopper
from mqa_hf.layer_mqa import MQADecoderLayer
from mqa_hf.packing_mqa import pack_latent, unpack_latent
from mqa_hf.positions_mqa import MQARotaryEmbedding

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
BOUNDS = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = [dtype for dtype in BOUNDS if not (INTERPRETED and dtype == torch.bfloat16)]
HOPPER = 227 * 1024  # bytes of shared memory of a program


def kernel(test):
    return test if INTERPRETED else pytest.mark.gpu(test)


def distance(out, expected):
    assert out.isfinite().all()
    return float((out.double() - expected).norm() / expected.norm())


def rotation(positions, frequencies, dtype, scale=1.1):
    """Cosines and signed sines as [`MQARotaryEmbedding`] gives them, with the scaling of a rope type."""
    angles = torch.arange(positions)[:, None] * (0.7 ** torch.arange(frequencies))
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat((cos, cos), -1).to(DEVICE, dtype), torch.cat((-sin, sin), -1).to(DEVICE, dtype)


def components(C, H, B, r, dtype, angles, positions):
    """What is asked of rebuilt components, at random."""
    return {
        "wide": torch.randn(B, H, 2 * C, device=DEVICE, dtype=dtype),
        "weight": torch.randn(2 * C, r, device=DEVICE, dtype=dtype) * r**-0.5,
        "bias": torch.randn(2 * C, device=DEVICE),
        "angles": latent_angles(*angles, dtype),
        "frequency": torch.randint(0, angles[0].shape[1] // 2, (C,), device=DEVICE, dtype=torch.int32),
        "positions": positions,
    }


def cached(R, S, r, bits, dtype):
    """Latents and, of packed ones, their scales and offsets."""
    latents = torch.randn(R, S, r, device=DEVICE, dtype=dtype)
    if bits == 16:
        return latents, {}
    codes, scales, offsets = pack_latent(latents, bits)
    return codes, {"scales": scales, "offsets": offsets}


@kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(10 if INTERPRETED else 40))
def test_attention(seed, dtype):
    choose = random.Random(seed)
    torch.manual_seed(seed)
    r, bits = choose.choice([32, 64, 128, 192, 256]), choose.choice([16, 16, 8, 4])
    C = choose.choice([0, 0, 12, 48, 64, 96, 256])
    fold = choose.choice([1, 3]) if C == 0 else 1
    H, R = choose.choice([3, 8, 20, 32, 40]), choose.choice([1, 2, 5])
    S = choose.choice([17, 64, 150]) if INTERPRETED else choose.choice([17, 64, 200, 1000, 3000])
    if INTERPRETED:
        r, H, C = min(r, 64), min(H, 8), min(C, 48)
    B, longest = R * fold, choose.randint(1, S)
    latents, packed = cached(R, S, r, bits, dtype)
    length = torch.tensor([longest], dtype=torch.int32, device=DEVICE)
    if fold > 1:
        length = torch.randint(1, longest + 1, (R,), dtype=torch.int32, device=DEVICE)
    if bits == 16:
        latents[:, longest:] = torch.nan
    options = {"fold": fold, "window": choose.choice([None, None, 1, 20, 300]), "capacity": S, **packed}
    if choose.random() < 0.5:
        options["start"] = (torch.rand(R, device=DEVICE) * length).int()
    if fold == 1 and choose.random() < 0.3:
        options["rows"] = torch.randint(0, R, (B, S), dtype=torch.int32, device=DEVICE)
    if C:
        positions = longest - 1 + torch.randint(0, 9, (B,), device=DEVICE)
        options.update(components(C, H, B, r, dtype, rotation(S + 9, 8, torch.float32), positions))
    if C == 0 or choose.random() < 0.4:  # strided, as a product by head leaves it
        options["plain"] = torch.randn(H, B, r, device=DEVICE, dtype=dtype).transpose(0, 1)
    bias = choose.choice(["", "slopes", "rounded", "table"]) if C == 0 else ""
    if bias in ("slopes", "rounded"):
        options["slopes"] = torch.rand(H, device=DEVICE).bfloat16().float()
    if bias == "rounded":
        options["bfloat16_from_start"] = choose.random() < 0.5
    if bias == "table":
        options["table"] = torch.randn(H, choose.choice([1, 9, 200]), device=DEVICE)
    if choose.random() < 0.3:
        options["softcap"] = choose.choice([0.8, 30.0])
    if choose.random() < 0.3:  # some outweigh all keys, some none
        options["sinks"] = (torch.randn(H, device=DEVICE) * choose.choice([1.0, 8.0])).to(dtype)
    expected = naive_attend_latent(latents, length, r**-0.5, **options)
    counters = torch.zeros(R * H, dtype=torch.int32, device=DEVICE)
    few, all_devices = choose.randint(2, 9), {"blocks": (16, 16, 4, 1) if INTERPRETED else (64, 16, 4, 2)}
    ways = [{**all_devices, "splits": 1}, {**all_devices, "splits": few}]
    if not INTERPRETED:
        ways += [{}, {"splits": 1}, {"splits": few}, {**all_devices, "splits": 2, "counters": counters}]
    for way in ways:
        if "blocks" in way and dtype == torch.float32:
            way["blocks"] = (16, 16, 4, 1)
        assert distance(attend_latent(latents, length, r**-0.5, **options, **way), expected) < BOUNDS[dtype]
    assert not counters.any()


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize(("r", "M", "P"), [(r, *layout) for r in (64, 128, 256) for layout in LAYOUTS])
def test_every_layout_for_hopper(r, M, P, bits):
    if not hopper(torch.device("cuda")):
        pytest.skip("of Hopper only")
    C, H, B, S = 3 * P, M - 3, 2, 700
    sizes = hopper_sizes(r, 2 * C, bits, H, False, torch.bfloat16, HOPPER)
    if sizes is None or (sizes["M"], sizes["P"]) != (M, P):
        pytest.skip("not taken for this width")
    latents, packed = cached(B, S, r, bits, torch.bfloat16)
    length = torch.tensor([S - 5], dtype=torch.int32, device=DEVICE)
    positions = torch.tensor([S - 6, S + 1], device=DEVICE)
    options = {
        "capacity": S, **packed,
        **components(C, H, B, r, torch.bfloat16, rotation(S + 9, 8, torch.float32), positions),
    }  # fmt: skip
    expected = naive_attend_latent(latents, length, r**-0.5, **options)
    first = attend_latent(latents, length, r**-0.5, splits=3, **options)
    assert distance(first, expected) < 1e-2
    for _ in range(100):  # what one warp hands to another is not read before it is there
        assert torch.equal(attend_latent(latents, length, r**-0.5, splits=3, **options), first)


@kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_queries_and_the_write_to_the_cache(seed, dtype):
    choose = random.Random(seed)
    torch.manual_seed(seed)
    G, S, B = choose.choice([1, 2, 6]), 12, choose.choice([1, 3])
    H, bits = G * choose.choice([1, 1, 3]), choose.choice([16, 16, 8, 4])
    r = choose.choice([32, 96, 256]) if bits < 16 else choose.choice([20, 64, 100])
    D, part = choose.choice([8, 16, 80]), choose.choice(["all", "half", "none"])
    rotated, C = {"all": D, "half": D // 2, "none": 0}[part], choose.choice([3, 40, 300])
    latents, packed = cached(B, S, r, bits, dtype)
    for buffer in (latents, *packed.values()):
        buffer.zero_()
    options = {"r": r}
    if rotated:
        cos, sin = rotation(50, rotated // 2, dtype)
        options |= {
            "factors": torch.randn(2, G, C, device=DEVICE, dtype=dtype),
            "frequency": torch.randint(0, rotated // 2, (C,), device=DEVICE, dtype=torch.int32),
            "cos": cos, "sin": sin, "positions": torch.randint(0, 50, (B,), device=DEVICE),
        }  # fmt: skip
    if rotated < D:
        options["k_up"] = torch.randn(G, D - rotated, r, device=DEVICE, dtype=dtype)
    joined = torch.randn(B, H * D + r, device=DEVICE, dtype=dtype)
    length = torch.tensor([choose.randint(1, S)], dtype=torch.int32, device=DEVICE)
    known = [buffer.clone() for buffer in (latents, *packed.values())]
    expected = naive_append_latent(joined, H, known[0], length, **options, **dict(zip(packed, known[1:])))
    found = append_latent(joined, H, latents, length, **options, **packed)
    for one, other in zip(found, expected):
        assert (one is None) == (other is None)
        if one is not None:
            assert distance(one, other) < BOUNDS[dtype]
    for one, other in zip((latents, *packed.values()), known):
        assert torch.equal(one, other)  # to the bit, as the model rounds


def test_angles_are_packed_to_the_precision_of_the_model():
    cos, sin = (x.cpu() for x in rotation_on_cpu(300, 16))
    expected = torch.stack((cos[:, :16], sin[:, 16:]), -1).transpose(0, 1)
    for dtype, bound in ((torch.float32, 1e-7), (torch.float16, 2**-11), (torch.bfloat16, 2**-8)):
        angles = latent_angles(cos, sin, dtype)
        found = unpacked_angles(angles, dtype)[:, :300]
        assert (found - expected).abs().max() < bound * 1.2
        assert angles.shape[1] > 300 + 127  # a block of positions reaches past the end


def rotation_on_cpu(positions, frequencies):
    angles = torch.arange(positions)[:, None] * (0.7 ** torch.arange(frequencies))
    cos, sin = angles.cos() * 1.1, angles.sin() * 1.1
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


STACK = {
    "vocab_size": 9, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 1, "num_hidden_layers": 1,
    "kv_latent_dim": 32, "v_head_dim": 5, "attention_scale": 0.4,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 100.0}
MODELS = {
    "rotary": {
        "kv_latent_heads": 6, "qk_head_dim": 12, "rope_frequencies": [[0, 0, 1, 2, 3, 3]], "rope_parameters": ROPE,
    },
    "half of a head": {
        "kv_latent_heads": 2, "qk_head_dim": 8, "rope_frequencies": [[0, 0, 1, 1]],
        "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
    },
    "yarn": {
        "kv_latent_heads": 3, "qk_head_dim": 6, "rope_frequencies": [[0, 1, 3]],
        "rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "none": {"kv_latent_heads": 3, "qk_head_dim": 0, "position_embedding": "none"},
}  # fmt: skip


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_references_compute_what_the_model_does(name, bits):
    """The last of eleven tokens, the first two of one row padding, in float64."""
    config = MQAConfig(**STACK, **MODELS[name], kv_latent_bits=bits)
    config._attn_implementation = "eager"
    attention = MQADecoderLayer(config, 0).double().self_attn
    for parameter in attention.parameters():
        parameter.normal_()
    H, T, r = 6, 11, 32
    x = torch.randn(2, T, 48, dtype=torch.float64)
    mask = torch.full((T, T), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1).repeat(2, 1, 1, 1)
    mask[1, :, :, :2] = torch.finfo(torch.float64).min
    rotary, options = attention.rotary, {}
    angles = None
    if rotary:
        table = MQARotaryEmbedding(config)(torch.empty(0, dtype=torch.float64), torch.arange(20)[None])
        cos, sin = (part[0, 0] for part in table)
        angles = tuple(part[:, :, 3 : 3 + T] for part in table)  # the text begins at position 3
        options = {
            "factors": attention.query_factors, "cos": cos, "sin": sin, "positions": torch.tensor([T + 2, T + 2]),
            "frequency": attention.rotated[: attention.qk_head_dim // 2].int(),
        }  # fmt: skip
    expected = attention(x, angles, mask)[0][:, -1]

    made = attention.kv_proj(x)
    latents, packed = made.clone(), {}
    if bits < 16:
        latents, *others = pack_latent(made, bits)
        packed = dict(zip(("scales", "offsets"), others))
    length, newest = torch.tensor([T], dtype=torch.int32), [buffer.clone() for buffer in (latents, *packed.values())]
    for buffer in (latents, *packed.values()):
        buffer[:, -1] = 0  # is written by what is tested
    joined = torch.cat((attention.q_proj(x[:, -1]), made[:, -1]), -1)
    k_up = None if attention.k_up is None else attention.k_up.weight
    wide, plain = naive_append_latent(joined, H, latents, length, r=r, k_up=k_up, **options, **packed)
    for buffer, new in zip((latents, *packed.values()), newest):
        assert torch.equal(buffer, new)
    if rotary:
        options = {
            "wide": wide, "weight": attention.k_proj.weight, "bias": attention.k_proj.bias,
            "angles": torch.stack((cos[:, : cos.shape[1] // 2], sin[:, cos.shape[1] // 2 :]), -1).transpose(0, 1),
            "frequency": options["frequency"], "positions": options["positions"],
        }  # fmt: skip
    start = torch.tensor([0, 2], dtype=torch.int32)
    mixed = naive_attend_latent(
        latents, length, config.attention_scale, capacity=T, start=start, plain=plain, **options, **packed
    )
    found = attention.o_proj(read_latent(mixed, attention.v_up.weight))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("groups", [6, 2])
@torch.no_grad()
def test_heads_read_what_einsum_reads(groups):
    mixed, v_up = torch.randn(3, 6, 16), torch.randn(groups, 5, 16)
    expected = torch.einsum("bhr,hvr->bhv", mixed, v_up.repeat_interleave(6 // groups, 0)).flatten(1)
    torch.testing.assert_close(read_latent(mixed, v_up), expected)


def test_the_layouts_for_hopper_fit():
    """Never are both products of one shape, and what is chosen fits in the memory that there is."""
    assert all(M != 2 * P for M, P in LAYOUTS)
    for r, C, H, plain in [(256, 1024, 32, False), (256, 256, 32, True), (128, 512, 64, True), (64, 48, 5, False)]:
        sizes = hopper_sizes(r, 2 * C, 16, H, plain, torch.bfloat16, HOPPER)
        M, P = sizes["M"], sizes["P"]
        held = 2 * 2 * 64 * r + 2 * 64 * M + plain * M * r + 2 * 2 * P * r + 3 * M * 2 * P
        assert 2 * held + 12 * C < HOPPER
        assert C % P == 0
    assert hopper_sizes(96, 512, 16, 32, False, torch.bfloat16, HOPPER) is None
    assert hopper_sizes(256, 0, 16, 64, True, torch.bfloat16, HOPPER) is None  # would read the cache twice


@pytest.mark.parametrize("memory", [HOPPER, 163 * 1024, 99 * 1024])
def test_larger_latents_are_handled_in_smaller_blocks(memory):
    held = []
    for r in (64, 128, 256, 512):
        n, pairs, _, stages = latent_blocks(r, 512, 32, 2, memory, False)
        held.append(n)
        assert (n + stages * 2 * pairs) * r * 2 < memory
    assert held == sorted(held, reverse=True)


def test_packed_latents_are_those_of_the_cache():
    """`naive_attend_latent` takes the bits from the sizes."""
    latents, plain = torch.randn(1, 5, 64), torch.randn(1, 2, 64)
    length = torch.tensor([5], dtype=torch.int32)
    for bits in (8, 4):
        codes, scales, offsets = pack_latent(latents, bits)
        options = {"capacity": 5, "plain": plain}
        found = naive_attend_latent(codes, length, 0.1, scales=scales, offsets=offsets, **options)
        rounded = unpack_latent(codes, scales, offsets, bits)
        torch.testing.assert_close(found, naive_attend_latent(rounded, length, 0.1, **options))
