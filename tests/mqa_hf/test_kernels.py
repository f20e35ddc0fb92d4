"""Every kernel against the same in float64, over shapes drawn at random; `pytest -m gpu` on a CUDA device.

What is not in use of a cache is NaN, and so is memory that nothing was written to.
"""

import random

import pytest
import torch
from torch import nn

from mqa_hf import kernels_mqa as kernels
from mqa_hf.cache_mqa import FLOAT8, to_float8

pytestmark = pytest.mark.gpu

BOUNDS = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = list(BOUNDS)


def distance(out, expected):
    assert out.isfinite().all()
    return float((out.double() - expected).norm() / expected.norm())


def attention(q, k, v, length, scale, start, rows, fold, window, slopes, rounded, table):
    """[B, H, D] against [R, G, S, D] and [R, G, S, Dv] in float64, one row at a time."""
    B, H, _ = q.shape
    G, out = k.shape[1], []
    for b in range(B):
        r = b // fold
        last = int(length[r] if len(length) > 1 else length[0])
        origin = 0 if start is None else int(start[r])
        first = max(origin, last - window) if window else origin
        at = torch.arange(first, last, device=q.device)
        row = torch.full_like(at, r) if rows is None else rows[b, first:last].long()
        keys, values = k[row, :, at].double(), v[row, :, at].double()  # [n, G, D]
        keys, values = (x.repeat_interleave(H // G, 1) for x in (keys, values))
        logits = torch.einsum("hd,nhd->hn", q[b].double(), keys) * scale
        if table is not None:
            logits += table[:, (last - 1 - at).clamp(max=table.shape[1] - 1)].double()
        if slopes is not None and rounded is None:
            logits += slopes.double()[:, None] * (at - last + 1)
        elif slopes is not None:
            place = at - origin if rounded else at
            logits += (slopes.bfloat16()[:, None] * place).double() * scale
        out.append(torch.einsum("hn,nhd->hd", logits.softmax(-1), values))
    return torch.stack(out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(24))
def test_attention(seed, dtype):
    choose = random.Random(seed)
    torch.manual_seed(seed)
    device = "cuda"
    G = choose.choice([1, 1, 2, 3, 8])
    H = G * choose.choice([1, 2, 5, 8, 32])
    D, DV = choose.choice([16, 40, 64, 80, 96, 128, 256, 100]), choose.choice([8, 64, 80, 128, 200, 512])
    R, fold = choose.choice([1, 2, 5, 17]), choose.choice([1, 1, 1, 3, 4])
    S = choose.choice([17, 64, 200, 1000, 3000])
    B = R * fold
    longest = choose.randint(1, S)
    length = torch.tensor([longest], dtype=torch.int32, device=device)
    if fold > 1:
        length = torch.randint(1, longest + 1, (R,), dtype=torch.int32, device=device)
    start = None
    if choose.random() < 0.5:
        start = (torch.rand(R, device=device) * length).int()
    rows = None
    if fold == 1 and choose.random() < 0.3:
        rows = torch.randint(0, R, (B, S), dtype=torch.int32, device=device)
    window = choose.choice([None, None, 1, 20, 300])
    bias = choose.choice(["", "slopes", "rounded", "table"])
    slopes = torch.rand(H, device=device).bfloat16().float() if bias in ("slopes", "rounded") else None
    rounded = choose.random() < 0.5 if bias == "rounded" else None
    table = torch.randn(H, choose.choice([1, 9, 200]), device=device) if bias == "table" else None
    q = torch.randn(B, H, D, device=device, dtype=dtype)
    k, v = torch.randn(R, G, S, D, device=device, dtype=dtype), torch.randn(R, G, S, DV, device=device, dtype=dtype)
    k[:, :, longest:], v[:, :, longest:] = torch.nan, torch.nan
    scale = D**-0.5
    expected = attention(q, k, v, length, scale, start, rows, fold, window, slopes, rounded, table)
    scales = {}
    if choose.random() < 0.3:
        (k, key_scales), (v, value_scales) = to_float8(k), to_float8(v)
        scales = {"key_scales": key_scales, "value_scales": value_scales}
        stored = [(x.float() * s[..., None]).double() for x, s in ((k, key_scales), (v, value_scales))]
        expected = attention(q, *stored, length, scale, start, rows, fold, window, slopes, rounded, table)
    counters = torch.zeros(R * H, dtype=torch.int32, device=device)
    for splits, together in (
        (None, None),
        (1, None),
        (choose.randint(2, 20), None),
        (choose.randint(2, 16), counters),
    ):
        out = kernels.attend(
            q, k, v, length, scale, capacity=S, start=start, rows=rows, fold=fold, window=window, slopes=slopes,
            bfloat16_from_start=rounded, table=table, splits=splits, counters=together, **scales,
        )  # fmt: skip
        assert distance(out, expected) < BOUNDS[dtype] * (2 if scales else 1)
    assert not counters.any()


def test_shares_that_are_merged_at_once_do_not_race():
    """The same input, many times over, beside other work: the same result to the bit."""
    torch.manual_seed(0)
    q = torch.randn(16, 32, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(16, 1, 4000, 128, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    length = torch.tensor([3999], dtype=torch.int32, device="cuda")
    counters = torch.zeros(16 * 32, dtype=torch.int32, device="cuda")
    expected = attention(q, k, v, length, 0.1, None, None, 1, None, None, None, None)
    first = kernels.attend(q, k, v, length, 0.1, capacity=4000, splits=13, counters=counters)
    assert distance(first, expected) < 1e-2
    for _ in range(300):
        out = kernels.attend(q, k, v, length, 0.1, capacity=4000, splits=13, counters=counters)
        assert torch.equal(out, first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(15))
def test_rotation_and_the_write_to_the_cache(seed, dtype):
    choose = random.Random(seed)
    torch.manual_seed(seed)
    device = "cuda"
    B, G, S = choose.choice([1, 3, 40]), choose.choice([1, 2, 4]), 50
    H = G * choose.choice([1, 3, 8])
    head = choose.choice([8, 64, 80, 128])
    D, DV = head * choose.choice([1, 2, 3]), choose.choice([8, 100, 256])
    kind = choose.choice(["none", "whole", "part", "chosen"])
    angles = {"none": 0, "whole": head, "part": head // 2, "chosen": head}[kind]
    cos, sin = torch.randn(60, angles, device=device, dtype=dtype), torch.randn(60, angles, device=device, dtype=dtype)
    frequency = torch.randint(0, angles, (min(D, 2 * (head // 4)),), device=device) if kind == "chosen" else None
    positions = torch.randint(0, 60, (B,), device=device)
    length = torch.tensor([choose.randint(1, S)], dtype=torch.int32, device=device)
    joined = torch.randn(B, H * D + G * (D + DV), device=device, dtype=dtype)
    store = FLOAT8 if choose.random() < 0.4 else dtype
    keys = torch.zeros(B, G, S, D, device=device).to(store)
    values = torch.zeros(B, G, S, DV, device=device).to(store)
    scales = {}
    if store == FLOAT8:
        scales = {n: torch.zeros(B, G, S, device=device) for n in ("key_scales", "value_scales")}
    turned = {} if kind == "none" else {"cos": cos, "sin": sin, "positions": positions, "frequency": frequency}
    query = kernels.append(joined, H, keys, values, length, head=head, **turned, **scales)

    q, k, v = joined.double().split([H * D, G * D, G * DV], -1)
    q, k, v = q.view(B, H, D), k.view(B, G, D), v.view(B, G, DV)
    if kind != "none":
        c, s = (x[positions].double()[:, None] for x in (cos, sin))
        if frequency is not None:
            c, s = c[..., frequency], s[..., frequency]

        def rotate(x):
            width = D if frequency is not None else head
            x, n = x.unflatten(-1, (-1, width)), c.shape[-1]
            first = x[..., :n] * c.unsqueeze(-2) + x[..., :n].roll(n // 2, -1) * s.unsqueeze(-2)
            return torch.cat((first, x[..., n:]), -1).flatten(-2)

        q, k = rotate(q), rotate(k)
    at = int(length) - 1
    bound = 4e-2 if store == FLOAT8 else BOUNDS[dtype]
    assert distance(query, q) < BOUNDS[dtype]
    for held, name, expected in ((keys, "key_scales", k), (values, "value_scales", v)):
        new = held[:, :, at].float()
        if scales:
            new = new * scales[name][:, :, at, None]
        assert distance(new, expected) < bound
        others = torch.arange(S, device=device) != at
        assert not held[:, :, others].float().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(30))
def test_projection(seed, dtype):
    choose = random.Random(seed)
    torch.manual_seed(seed)
    device = "cuda"
    M = choose.choice([1, 1, 2, 7, 16, 32])
    N, K = choose.choice([1, 33, 576, 3000, 20000]), choose.choice([16, 100, 576, 1536, 4096])
    gated, act = choose.random() < 0.5, choose.choice([None, *kernels.ACTIVATIONS])
    norm = choose.choice([None, "rms_norm", "layer_norm"]) if M == 1 else None
    x = torch.randn(M, K, device=device, dtype=dtype)
    weight = torch.randn((2 if gated else 1) * N, K, device=device, dtype=dtype) * K**-0.5
    bias = torch.randn(len(weight), device=device, dtype=dtype) if choose.random() < 0.5 else None
    residual = torch.randn(M, N, device=device, dtype=dtype) if choose.random() < 0.5 else None
    norm_weight = torch.randn(K, device=device, dtype=dtype) if norm and choose.random() < 0.8 else None
    norm_bias = norm_weight if norm == "layer_norm" and choose.random() < 0.5 else None
    out = kernels.project(
        x, weight, bias, norm=norm, norm_weight=norm_weight, norm_bias=norm_bias, eps=1e-5, activation=act,
        gated=gated, residual=residual,
    )  # fmt: skip

    y = x.double()
    wide = [None if p is None else p.double() for p in (norm_weight, norm_bias)]
    if norm == "rms_norm":
        y = nn.functional.rms_norm(y, (K,), wide[0], 1e-5)
    elif norm == "layer_norm":
        y = nn.functional.layer_norm(y, (K,), *wide, 1e-5)
    y = nn.functional.linear(y, weight.double(), None if bias is None else bias.double())
    first, *second = y.chunk(2, -1) if gated else (y,)
    y = activated(first, act) * (second[0] if gated else 1.0)
    assert distance(out, y if residual is None else y + residual.double()) < BOUNDS[dtype]


def activated(x, name):
    from transformers.activations import ACT2FN

    return x if name is None else ACT2FN[name](x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [16, 100, 4096, 9000])
def test_norm(K, dtype):
    x, weight = torch.randn(7, K, device="cuda", dtype=dtype), torch.randn(K, device="cuda", dtype=dtype)
    wide = x.double(), (K,), weight.double()
    expected = nn.functional.rms_norm(*wide, 1e-5)
    assert distance(kernels.normalise(x, "rms_norm", weight, None, 1e-5), expected) < BOUNDS[dtype]
    expected = nn.functional.layer_norm(*wide, weight.double(), 1e-5)
    assert distance(kernels.normalise(x, "layer_norm", weight, weight, 1e-5), expected) < BOUNDS[dtype]
    expected = nn.functional.layer_norm(x.double(), (K,), None, None, 1e-5)
    assert distance(kernels.normalise(x, "layer_norm", None, None, 1e-5), expected) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", kernels.ACTIVATIONS)
def test_activation(name, gated, dtype):
    x = torch.randn(5, 3002, device="cuda", dtype=dtype) * 3
    first, *second = x.double().chunk(2, -1) if gated else (x.double(),)
    expected = activated(first, name) * (second[0] if gated else 1.0)
    assert distance(kernels.activate(x, name, gated), expected) < BOUNDS[dtype]
