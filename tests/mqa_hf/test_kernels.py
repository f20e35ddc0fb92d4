"""Every kernel against its reference in float64, over shapes drawn at random; `pytest -m gpu` on a CUDA device.

With `TRITON_INTERPRET=1` and Triton, those of the cache run on a CPU: plain `pytest`, without bfloat16, to which the
interpreter does not round but truncates. What is not in use of a cache is NaN, and so is memory that nothing was
written to.
"""

import os
import random
from itertools import product

import pytest
import torch

from mqa_hf import MQAConfig
from mqa_hf.cache_mqa import FLOAT8, to_float8
from mqa_hf.experts_mqa import MQAMixture
from mqa_hf.kernel_append_mqa import append, naive_append
from mqa_hf.kernel_attend_mqa import attend, naive_attend
from mqa_hf.kernel_experts_mqa import chosen_experts, naive_chosen_experts, route, sort_pairs
from mqa_hf.kernel_linear_mqa import fused_linear, naive_linear
from mqa_hf.kernel_norm_mqa import ACTIVATIONS, activate, naive_activate, naive_normalise, normalise

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
BOUNDS = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = [dtype for dtype in BOUNDS if not (INTERPRETED and dtype == torch.bfloat16)]

NORMS = [None, *product(("rms_norm", "layer_norm"), (False, True), (False, True))]  # kind, joint, after the rotation


def kernel(test):
    return test if INTERPRETED else pytest.mark.gpu(test)


def distance(out, expected):
    assert out.isfinite().all()
    return float((out.double() - expected).norm() / expected.norm())


@kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(40 if INTERPRETED else 30))
def test_attention(seed, dtype):
    choose = random.Random(seed)
    torch.manual_seed(seed)
    G = choose.choice([1, 1, 2, 3, 8])
    H = G * choose.choice([1, 2, 5, 8, 32])
    D, DV = choose.choice([16, 40, 64, 80, 96, 128, 256, 100]), choose.choice([8, 64, 80, 128, 200, 512])
    R, fold = choose.choice([1, 2, 5, 17]), choose.choice([1, 1, 1, 3, 4])
    S = choose.choice([17, 64, 200, 1000, 3000])
    if INTERPRETED:
        H, D, DV, R, S = min(H, 5 * G), min(D, 100), min(DV, 80), min(R, 3), min(S, 200)
    B = R * fold
    longest = choose.randint(1, S)
    length = torch.tensor([longest], dtype=torch.int32, device=DEVICE)
    if fold > 1:
        length = torch.randint(1, longest + 1, (R,), dtype=torch.int32, device=DEVICE)
    start = None
    if choose.random() < 0.5:
        start = (torch.rand(R, device=DEVICE) * length).int()
    rows = None
    if fold == 1 and choose.random() < 0.3:
        rows = torch.randint(0, R, (B, S), dtype=torch.int32, device=DEVICE)
    window = choose.choice([None, None, 1, 20, 300])
    bias = choose.choice(["", "slopes", "table", *([] if INTERPRETED else ["rounded"])])
    slopes = torch.rand(H, device=DEVICE).bfloat16().float() if bias in ("slopes", "rounded") else None
    rounded = choose.random() < 0.5 if bias == "rounded" else None
    table = torch.randn(H, choose.choice([1, 9, 200]), device=DEVICE) if bias == "table" else None
    q = torch.randn(B, H, D, device=DEVICE, dtype=dtype)
    k, v = torch.randn(R, G, S, D, device=DEVICE, dtype=dtype), torch.randn(R, G, S, DV, device=DEVICE, dtype=dtype)
    beside, within = choose.random() < 0.3, choose.random() < 0.5
    if beside:  # keys and values of one buffer, values that are a part of keys
        both = torch.cat((k, v), -1)
        k, v = both if within else both[..., :D], both[..., D:]
        q = torch.randn(B, H, k.shape[-1], device=DEVICE, dtype=dtype)
    k[:, :, longest:], v[:, :, longest:] = torch.nan, torch.nan
    scale, scales = k.shape[-1] ** -0.5, {}
    if choose.random() < 0.3 and not beside:
        (k, key_scales), (v, value_scales) = to_float8(k), to_float8(v)
        scales = {"key_scales": key_scales, "value_scales": value_scales}
    softcap = choose.choice([None, None, 0.8, 30.0])
    sinks = None
    if choose.random() < 0.5:  # some outweigh all keys, some none
        sinks = (torch.randn(H, device=DEVICE) * choose.choice([1.0, 8.0])).to(dtype)
    options = {
        "capacity": S, "start": start, "rows": rows, "fold": fold, "window": window, "slopes": slopes,
        "bfloat16_from_start": rounded, "table": table, "softcap": softcap, "sinks": sinks, **scales,
    }  # fmt: skip
    expected = naive_attend(q, k, v, length, scale, **options)
    counters = torch.zeros(R * H, dtype=torch.int32, device=DEVICE)
    ways = [{"splits": 1}, {"splits": choose.randint(2, 20)}]
    if INTERPRETED:
        ways = [{**way, "blocks": (choose.choice([16, 32]), 4, 1)} for way in ways]
    else:
        ways += [{}, {"splits": choose.randint(2, 16), "counters": counters}]
    for way in ways:
        out = attend(q, k, v, length, scale, **options, **way)
        assert distance(out, expected) < BOUNDS[dtype] * (2 if scales else 1)
    assert not counters.any()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "width", "biased", "float8"),
    [
        (128, 128, True, False),
        (64, 256, True, False),
        (64, 512, False, False),
        (64, 512, True, False),
        (64, 512, False, True),
    ],
)
def test_many_queries_of_a_head_fit_in_shared_memory(heads, width, biased, float8):
    torch.manual_seed(0)
    q = torch.randn(2, heads, width, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(2, 1, 700, width, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    scales = {}
    if float8:
        (k, key_scales), (v, value_scales) = to_float8(k), to_float8(v)
        scales = {"key_scales": key_scales, "value_scales": value_scales}
    table = torch.randn(heads, 200, device="cuda") if biased else None
    length = torch.tensor([700], dtype=torch.int32, device="cuda")
    options = {"capacity": 700, "table": table, **scales}
    scale = width**-0.5
    expected = naive_attend(q, k, v, length, scale, **options)
    for splits in (None, 1):
        assert distance(attend(q, k, v, length, scale, splits=splits, **options), expected) < 2e-2


@pytest.mark.gpu
def test_shares_that_are_merged_at_once_do_not_race():
    """The same input, many times over, beside other work: the same result to the bit."""
    torch.manual_seed(0)
    q = torch.randn(16, 32, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(16, 1, 4000, 128, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    length = torch.tensor([3999], dtype=torch.int32, device="cuda")
    counters = torch.zeros(16 * 32, dtype=torch.int32, device="cuda")
    expected = naive_attend(q, k, v, length, 0.1, capacity=4000)
    first = attend(q, k, v, length, 0.1, capacity=4000, splits=13, counters=counters)
    assert distance(first, expected) < 1e-2
    for _ in range(300):
        out = attend(q, k, v, length, 0.1, capacity=4000, splits=13, counters=counters)
        assert torch.equal(out, first)


@kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(10 * len(NORMS) if INTERPRETED else 5 * len(NORMS)))
def test_norm_rotation_and_the_write_to_the_cache(seed, dtype):
    norm, choose = NORMS[seed % len(NORMS)], random.Random(seed)
    torch.manual_seed(seed)
    B, G, S = choose.choice([1, 3, 40]), choose.choice([1, 2, 4]), 50
    H = G * choose.choice([1, 3, 8])
    head = choose.choice([8, 64, 80, 128])
    D, DV = head * choose.choice([1, 2, 3]), choose.choice([8, 100, 256])
    if INTERPRETED:
        B = min(B, 3)
    kind = choose.choice(["none", "whole", "part", "chosen", "chosen of each block"])
    angles = {"none": 0, "whole": head, "part": head // 2}.get(kind, head)
    cos, sin = torch.randn(60, angles, device=DEVICE, dtype=dtype), torch.randn(60, angles, device=DEVICE, dtype=dtype)
    frequency = None
    if kind.startswith("chosen"):
        most = min(D, 2 * (head // 4)) if kind == "chosen" else choose.choice([head, head // 2])
        frequency = torch.randint(0, angles, (most,), device=DEVICE)
    positions = torch.randint(0, 60, (B,), device=DEVICE)
    length = torch.tensor([choose.randint(1, S)], dtype=torch.int32, device=DEVICE)
    joined = torch.randn(B, H * D + G * (D + DV), device=DEVICE, dtype=dtype) + 0.5
    store = FLOAT8 if choose.random() < 0.4 else dtype
    keys = torch.zeros(B, G, S, D, device=DEVICE).to(store)
    values = torch.zeros(B, G, S, DV, device=DEVICE).to(store)
    scales = {}
    if store == FLOAT8:
        scales = {n: torch.zeros(B, G, S, device=DEVICE) for n in ("key_scales", "value_scales")}
    if choose.random() < 0.3:  # side by side in one buffer
        keys, values = torch.zeros(B, G, S, D + DV, device=DEVICE).to(store).split((D, DV), -1)
    options = {"head": D if kind == "chosen" else head}
    if kind != "none":
        options.update(cos=cos, sin=sin, positions=positions, frequency=frequency)
    if norm is not None:
        weight, bias = torch.randn(2, H + G, D, device=DEVICE, dtype=dtype)
        options.update(norm=norm, eps=choose.choice([1e-6, 0.1]))
        options.update(choose.choice([{}, {"norm_weight": weight}, {"norm_weight": weight, "norm_bias": bias},
                                      {"norm_bias": bias}]))  # fmt: skip
    q = naive_append(joined, H, k := keys.double(), v := values.double(), length, **options)
    query = append(joined, H, keys, values, length, **options, **scales)
    at = int(length) - 1
    bound = BOUNDS[dtype]
    if store == FLOAT8:  # numbers that round up to a power of two become half of it in Triton's interpreter
        bound = 0.15 if INTERPRETED else 4e-2
    assert distance(query, q) < BOUNDS[dtype]
    for held, name, expected in ((keys, "key_scales", k), (values, "value_scales", v)):
        new = held[:, :, at].float()
        if scales:
            new = new * scales[name][:, :, at, None]
        assert distance(new, expected[:, :, at]) < bound
        others = torch.arange(S, device=DEVICE) != at
        assert not held[:, :, others].float().any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(30))
def test_projection(seed, dtype):
    choose = random.Random(seed)
    torch.manual_seed(seed)
    device = "cuda"
    M = choose.choice([1, 1, 2, 7, 16, 32])
    N, K = choose.choice([1, 33, 576, 3000, 20000]), choose.choice([16, 100, 576, 1536, 4096])
    gated, act = choose.random() < 0.5, choose.choice([None, *ACTIVATIONS])
    norm = choose.choice([None, "rms_norm", "layer_norm"]) if M == 1 else None
    x = torch.randn(M, K, device=device, dtype=dtype)
    weight = torch.randn((2 if gated else 1) * N, K, device=device, dtype=dtype) * K**-0.5
    bias = torch.randn(len(weight), device=device, dtype=dtype) if choose.random() < 0.5 else None
    residual = torch.randn(M, N, device=device, dtype=dtype) if choose.random() < 0.5 else None
    norm_weight = torch.randn(K, device=device, dtype=dtype) if norm and choose.random() < 0.8 else None
    norm_bias = norm_weight if norm == "layer_norm" and choose.random() < 0.5 else None
    given = x, weight, bias, norm, norm_weight, norm_bias, 1e-5
    options = {"activation": act, "gated": gated, "residual": residual}
    assert distance(fused_linear(*given, **options), naive_linear(*given, **options)) < BOUNDS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [16, 100, 4096, 9000])
def test_norm(K, dtype):
    x, weight = torch.randn(7, K, device="cuda", dtype=dtype), torch.randn(K, device="cuda", dtype=dtype)
    for given in (("rms_norm", weight, None), ("layer_norm", weight, weight), ("layer_norm", None, None)):
        assert distance(normalise(x, *given, 1e-5), naive_normalise(x, *given, 1e-5)) < BOUNDS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name, gated, dtype):
    x = torch.randn(5, 3002, device="cuda", dtype=dtype) * 3
    assert distance(activate(x, name, gated), naive_activate(x, name, gated)) < BOUNDS[dtype]


@kernel
@pytest.mark.parametrize(
    ("rows", "k", "E"),
    [(1, 1, 1), (1, 8, 128), (3, 2, 8), (40, 5, 7), (300, 8, 200), *([] if INTERPRETED else [(8192, 4, 32)])],
)
def test_pairs_are_sorted_by_expert(rows, k, E):
    torch.manual_seed(rows)
    chosen = torch.rand(rows, E).argsort(-1)[:, :k].contiguous().to(DEVICE)
    order, ends = sort_pairs(chosen, E)
    flat = chosen.flatten()
    assert order.tolist() == flat.argsort(stable=True).tolist()
    assert ends.tolist() == torch.bincount(flat, minlength=E).cumsum(0).tolist()


@kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(8 if INTERPRETED else 20))
def test_chosen_experts(seed, dtype):
    choose = random.Random(seed)
    torch.manual_seed(seed)
    E = choose.choice([1, 4, 8, 60, 128])
    k, rows = min(E, choose.choice([1, 2, 4, 8])), choose.choice([1, 2, 7, 33, 200])
    d, f = choose.choice([64, 100, 512, 1024]), choose.choice([24, 64, 100, 768])
    if INTERPRETED:
        E, rows, d, f = min(E, 8), min(rows, 7), min(d, 100), min(f, 64)
        k = min(k, E)
    options = {"device": DEVICE, "dtype": dtype}
    x = torch.randn(rows, 2 * d, **options)[:, :d]
    gate_up, down = torch.randn(E, 2 * f, d, **options) / d**0.5, torch.randn(E, d, f, **options) / f**0.5
    chosen = torch.rand(rows, E, device=DEVICE).argsort(-1)[:, :k].contiguous()
    if choose.random() < 0.3:
        chosen[:] = chosen[:1]  # all rows choose the same
    weights = torch.rand(rows, k, **options)
    activation = choose.choice(list(ACTIVATIONS))
    arguments = x, gate_up, down, chosen, weights, activation
    blocks = dict.fromkeys(("inner_blocks", "outer_blocks"), (16, 32, 64, 4, 1)) if INTERPRETED else {}
    beside = {}
    if choose.random() < 0.5:
        beside |= {"gate_up_bias": torch.randn(E, 2 * f, **options), "down_bias": torch.randn(E, d, **options)}
    if choose.random() < 0.5:
        beside["limit"] = choose.choice([0.7, 7.0])
    expected = naive_chosen_experts(*arguments, **beside)
    assert distance(chosen_experts(*arguments, **beside, **blocks), expected) < BOUNDS[dtype]


@kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(12 if INTERPRETED else 30))
def test_the_experts_of_a_row_are_those_of_the_mixture(seed, dtype):
    choose = random.Random(seed)
    torch.manual_seed(seed)
    groups = choose.choice([1, 1, 2, 4, 8])
    E, rows, d = groups * choose.choice([2, 3, 16, 40]), choose.choice([1, 3, 50]), choose.choice([24, 64, 700])
    kept = choose.randint(1, groups)
    k = choose.randint(1, min(8, kept * E // groups))
    scores = choose.choice(["softmax", "sigmoid"] if groups > 1 else ["softmax", "sigmoid", "sparsemixer"])
    plain = scores != "sparsemixer"
    fields = {
        "num_experts": E, "num_experts_per_tok": k, "hidden_size": d, "num_attention_heads": 1,
        "expert_intermediate_size": 8, "router_scores": scores, "router_jitter": choose.choice([0.01, 0.2]),
        "router_renormalise": plain and choose.random() < 0.5, "router_scale": choose.choice([1.0, 2.5]),
        "router_correction": plain and choose.random() < 0.5, "router_groups": groups, "router_groups_kept": kept,
        "router_bias": choose.random() < 0.4, "router_choice": choose.choice(["scores", "logits"]),
    }  # fmt: skip
    mixture = MQAMixture(MQAConfig(**fields)).to(DEVICE, dtype)
    mixture.router.weight.data.normal_(0, 2 * d**-0.5)
    if mixture.router_correction is not None:
        mixture.router_correction.data.normal_()
    if mixture.router.bias is not None:
        mixture.router.bias.data.normal_()
    x = torch.randn(rows, 2 * d, device=DEVICE, dtype=dtype)[:, :d]
    expected_weights, expected = mixture.route(x)
    weights, found = route(
        x, mixture.router.weight, k, bias=mixture.router.bias, scores=scores, choice=mixture.choice, gap=mixture.gap,
        correction=mixture.router_correction, renormalise=mixture.renormalise, scale=mixture.scale, groups=groups,
        groups_kept=kept,
    )  # fmt: skip
    # Logits of different sums differ in their last bits, and so may the order of scores that are nearly equal.
    (found, order), (expected, other) = found.long().sort(-1), expected.sort(-1)
    assert (found == expected).float().mean() > 0.99
    same = (found == expected).all(-1)
    ours, theirs = weights.gather(1, order)[same], expected_weights.gather(1, other)[same]
    torch.testing.assert_close(ours, theirs, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])
