"""The chosen experts of a few rows: each weight of a chosen expert is read once for all rows that chose it.

N rows, k experts per row, P = N · k pairs of a row and an expert, E experts, d hidden size, f width of an expert

The pairs are sorted by expert. One program computes a few outputs of one expert for all of its pairs, so that the
experts that no row chose cost nothing but an empty program.
"""

import torch
from torch import nn

from .kernel_launch_mqa import gdc_launch_dependents, gdc_wait, jit, launch, power, shared_memory, tl, triton
from .kernel_norm_mqa import ACTIVATIONS, activated, naive_activate

MAX_PAIRS = 32768  # sorting compares each pair with all others
FEW_ROWS = 32  # up to this many, a program per row and some experts computes their logits
Blocks = tuple[int, int, int, int, int]  # pairs, outputs and inputs of a block; warps; stages


@jit
def _logits_kernel(
    x, weight, bias, out, E, d, x_row, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, BIASED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out [N, E] = x [N, d] · weight [E, d]ᵀ + bias [E] in float32."""
    row, e, at = (
        tl.program_id(0).to(tl.int64),
        tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E),
        tl.arange(0, BLOCK_D),
    )
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    found = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    for first in range(0, d, BLOCK_D):
        y = tl.load(x + row * x_row + first + at, mask=first + at < d, other=0.0).to(tl.float32)
        inside = (e < E)[:, None] & (first + at < d)[None, :]
        w = tl.load(weight + e[:, None] * d + (first + at)[None, :], mask=inside, other=0.0).to(tl.float32)
        found += y[None, :] * w
    logits = tl.sum(found, 1)
    if BIASED:
        logits += tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)
    tl.store(out + row * E + e, logits, mask=e < E)


@jit
def _choose_kernel(
    logits, correction, chosen, weights, E, scale, gap,
    K: tl.constexpr, SCORES: tl.constexpr, BY_LOGITS: tl.constexpr, CORRECTED: tl.constexpr, RENORMALISE: tl.constexpr,
    GROUPS: tl.constexpr, KEPT: tl.constexpr, EXPERTS: tl.constexpr, PLACES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row: the `K` experts with the largest scores and their weights; see `MQAMixture.route`."""
    row, e, places = tl.program_id(0), tl.arange(0, EXPERTS), tl.arange(0, PLACES)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(logits + row * E + e, mask=e < E, other=float("-inf"))
    scores = x
    if SCORES == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-x))
    if SCORES == "softmax":
        scores = tl.exp(x - tl.max(x, 0))
        scores = scores / tl.sum(scores, 0)
    choice = x if BY_LOGITS else scores
    if CORRECTED:
        choice += tl.load(correction + e, mask=e < E, other=0.0).to(tl.float32)
    choice = tl.where(e < E, choice, float("-inf"))
    if KEPT < GROUPS:
        group = e // (E // GROUPS)
        by_group = tl.full([EXPERTS], float("-inf"), tl.float32)
        for g in range(0, GROUPS):
            own = tl.where(group == g, choice, float("-inf"))
            best = tl.max(own, 0)
            first = tl.min(tl.where(own == best, e, EXPERTS), 0)
            second = tl.max(tl.where(e == first, float("-inf"), own), 0)
            by_group = tl.where(group == g, best + second, by_group)
        kept = e < 0
        for _ in range(0, KEPT):
            left = tl.where(kept | (e >= E), float("-inf"), by_group)
            first = tl.min(tl.where(left == tl.max(left, 0), e, EXPERTS), 0)
            kept = kept | (group == first // (E // GROUPS))
        choice = tl.where(kept, choice, float("-inf"))
    found = tl.zeros([PLACES], tl.int32)
    factors = tl.zeros([PLACES], tl.float32)
    for i in range(0, K):
        first = tl.min(tl.where(choice == tl.max(choice, 0), e, E - 1), 0)  # the last one if all are NaN
        found = tl.where(places == i, first, found)
        factor = tl.sum(tl.where(e == first, scores, 0.0), 0)
        if SCORES == "sparsemixer":
            best = tl.max(choice, 0)
            far = (best - x) / tl.maximum(tl.abs(x), best) > gap
            factor = 1.0 / tl.sum(tl.where(far, 0.0, tl.exp(choice - best)), 0)
        factors = tl.where(places == i, factor, factors)
        choice = tl.where(e == first, float("-inf"), choice)
    if RENORMALISE:
        factors = factors / tl.maximum(tl.sum(factors, 0), 1e-20)
    tl.store(chosen + row * K + places, found, mask=places < K)
    tl.store(weights + row * K + places, (factors * scale).to(weights.dtype.element_ty), mask=places < K)


@jit
def _sort_kernel(
    chosen, order, ends, P, E, BLOCK: tl.constexpr, CHUNK: tl.constexpr, SORTERS: tl.constexpr, PDL: tl.constexpr
):
    """`order` [P], the pairs by expert, and `ends` [E], the end of each expert's pairs in it. The first `SORTERS`
    programs place `BLOCK` pairs each, the others count those of `BLOCK` experts."""
    program = tl.program_id(0)
    at = (program % SORTERS if program < SORTERS else program - SORTERS) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    placing = program < SORTERS
    mine = at
    if placing:
        mine = tl.load(chosen + at, mask=at < P, other=0).to(tl.int32)
    place = tl.zeros([BLOCK], tl.int32)
    for first in range(0, P, CHUNK):
        other = first + tl.arange(0, CHUNK)
        its = tl.load(chosen + other, mask=other < P, other=2147483647).to(tl.int32)
        before = its[None, :] < mine[:, None]
        same = its[None, :] == mine[:, None]
        if placing:
            before = before | (same & (other[None, :] < at[:, None]))
        else:
            before = before | same
        place += tl.sum(before.to(tl.int32), 1)
    if placing:
        tl.store(order + place, at, mask=at < P)
    else:
        tl.store(ends + at, place, mask=at < E)


@jit
def _pairs(ends, expert):
    """The pairs [first, last) of an expert, in their sorted order."""
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    return first, tl.load(ends + expert)


@jit
def _inner_kernel(
    x, weight, bias, order, ends, out, d, f, x_row, limit,
    K: tl.constexpr, ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BIASED: tl.constexpr, LIMITED: tl.constexpr, EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [P, f] = act(x · gateᵀ) · (x · upᵀ), in the sorted order; weight [E, 2 f, d] and bias [E, 2 f], gates first.
    `LIMITED`: as `MQAExperts` with a limit."""
    expert = tl.program_id(0)
    n, k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    gate = weight + (expert.to(tl.int64) * 2 * f + n)[:, None] * d + k[None, :]
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    first, last = _pairs(ends, expert)
    for block in range(first, last, BLOCK_M):
        at = block + tl.arange(0, BLOCK_M)
        row = tl.load(order + at, mask=at < last, other=0) // K
        a, b = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, d, BLOCK_K):
            inside = (n < f)[:, None] & (start + k < d)[None, :]
            y = tl.load(
                x + row.to(tl.int64)[:, None] * x_row + (start + k)[None, :],
                mask=(at < last)[:, None] & (start + k < d)[None, :], other=0.0,
            )  # fmt: skip
            w = tl.load(gate + start, mask=inside, other=0.0)
            a = tl.dot(y, tl.trans(w), a, input_precision=precision)
            w = tl.load(gate + start + f * d, mask=inside, other=0.0)
            b = tl.dot(y, tl.trans(w), b, input_precision=precision)
        if BIASED:
            own = bias + expert.to(tl.int64) * 2 * f + n
            a += tl.load(own, mask=n < f, other=0.0).to(tl.float32)[None, :]
            b += tl.load(own + f, mask=n < f, other=0.0).to(tl.float32)[None, :]
        # Rounded as the outputs of a separate product are.
        a, b = a.to(out.dtype.element_ty).to(tl.float32), b.to(out.dtype.element_ty).to(tl.float32)
        if LIMITED:
            a, b = tl.minimum(a, limit), tl.minimum(tl.maximum(b, -limit), limit) + 1.0
            y = a / (1.0 + tl.exp(-1.702 * a)) * b
        else:
            y = activated(a, ACT).to(out.dtype.element_ty).to(tl.float32) * b
        to = out + at.to(tl.int64)[:, None] * f + n[None, :]
        tl.store(to, y.to(out.dtype.element_ty), mask=(at < last)[:, None] & (n < f)[None, :])


@jit
def _outer_kernel(
    x, weight, bias, factors, order, ends, out, d, f,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BIASED: tl.constexpr, EXACT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out [P, d], by pair: (x [P, f] · downᵀ + bias) times the pair's factor, x in the sorted order; weight [E, d, f]
    and bias [E, d]."""
    expert = tl.program_id(0)
    n, k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    down = weight + (expert.to(tl.int64) * d + n)[:, None] * f + k[None, :]
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    first, last = _pairs(ends, expert)
    for block in range(first, last, BLOCK_M):
        at = block + tl.arange(0, BLOCK_M)
        a = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, f, BLOCK_K):
            y = tl.load(
                x + at.to(tl.int64)[:, None] * f + (start + k)[None, :],
                mask=(at < last)[:, None] & (start + k < f)[None, :], other=0.0,
            )  # fmt: skip
            w = tl.load(down + start, mask=(n < d)[:, None] & (start + k < f)[None, :], other=0.0)
            a = tl.dot(y, tl.trans(w), a, input_precision=precision)
        if BIASED:
            a += tl.load(bias + expert.to(tl.int64) * d + n, mask=n < d, other=0.0).to(tl.float32)[None, :]
        pair = tl.load(order + at, mask=at < last, other=0)
        factor = tl.load(factors + pair, mask=at < last, other=0.0).to(tl.float32)
        a = a.to(out.dtype.element_ty).to(tl.float32) * factor[:, None]
        to = out + pair.to(tl.int64)[:, None] * d + n[None, :]
        tl.store(to, a.to(out.dtype.element_ty), mask=(at < last)[:, None] & (n < d)[None, :])


def route(
    x: torch.Tensor,
    router: torch.Tensor,
    k: int,
    *,
    bias: torch.Tensor | None = None,
    scores: str = "softmax",
    choice: str = "scores",
    gap: float = 0.0,
    correction: torch.Tensor | None = None,
    renormalise: bool = True,
    scale: float = 1.0,
    groups: int = 1,
    groups_kept: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the experts of each row, as [`MQAMixture.route`] does.

    Args:
        x: [N, d].
        router: [E, d], contiguous.
        k: experts per row.
        bias: [E], of the logits.
        scores, choice: as `router_scores` and `router_choice` in the configuration.
        gap: relative distance of the logits that "sparsemixer" leaves out.
        correction: [E], added to the scores or logits for the choice.
        renormalise, scale, groups, groups_kept: as in the configuration.

    Returns:
        The weights [N, k] and the experts, int32 [N, k].
    """
    (N, d), E = x.shape, len(router)
    if N <= FEW_ROWS:
        logits, some = torch.empty(N, E, dtype=torch.float32, device=x.device), 8
        launch(_logits_kernel, (N, triton.cdiv(E, some)),
            x, router, router if bias is None else bias, logits, E, d, x.stride(0),
            BLOCK_E=some, BLOCK_D=min(power(d), 512), BIASED=bias is not None, num_warps=4,
        )  # fmt: skip
    else:
        logits = nn.functional.linear(x.float(), router.float(), None if bias is None else bias.float())
    chosen = torch.empty(N, k, dtype=torch.int32, device=x.device)
    weights = x.new_empty(N, k)
    launch(_choose_kernel, (N,),
        logits, logits if correction is None else correction, chosen, weights, E, scale, gap,
        K=k, SCORES=scores, BY_LOGITS=choice == "logits", CORRECTED=correction is not None, RENORMALISE=renormalise,
        GROUPS=groups, KEPT=groups_kept, EXPERTS=power(E), PLACES=power(k), num_warps=1 if E <= 256 else 4,
    )  # fmt: skip
    return weights, chosen


def sort_pairs(chosen: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort pairs by expert.

    Args:
        chosen: the experts of each row, integers [N, k].
        experts: E.

    Returns:
        The pairs by expert, int32 [P], those of an expert in ascending order, and the end of each expert's pairs [E].
    """
    P, block = chosen.numel(), 32
    order, ends = (torch.empty(n, dtype=torch.int32, device=chosen.device) for n in (P, experts))
    sorters = triton.cdiv(P, block)
    launch(_sort_kernel, (sorters + triton.cdiv(experts, block),),
        chosen, order, ends, P, experts,
        BLOCK=block, CHUNK=min(max(power(P), 16), 128), SORTERS=sorters, num_warps=4,
    )  # fmt: skip
    return order, ends


def chosen_experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    activation: str,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    limit: float | None = None,
    inner_blocks: Blocks | None = None,
    outer_blocks: Blocks | None = None,
) -> torch.Tensor:
    """Σ_e w_e · down_e(act(gate_e(x)) · up_e(x)) over each row's experts.

    Args:
        x: [N, d].
        gate_up, down: [E, 2 f, d], gates first, and [E, d, f], contiguous.
        chosen, weights: the experts of each row and their factors, [N, k], contiguous; at most `MAX_PAIRS` pairs.
        activation: name of an activation in `ACTIVATIONS`.
        gate_up_bias, down_bias: [E, 2 f] and [E, d].
        limit: `expert_limit` of the configuration.
        inner_blocks, outer_blocks: how each product is divided. Default: by size.

    Returns:
        [N, d].
    """
    (N, d), (E, _, f), k = x.shape, down.shape, chosen.shape[1]
    order, ends = sort_pairs(chosen, E)
    inner, outer = x.new_empty(N * k, f), x.new_empty(N * k, d)
    exact = x.dtype == torch.float32
    # Pairs of an expert on average, if rows choose independently.
    pairs = N * k / min(E, N * k)
    m, n, block_k, warps, stages = inner_blocks or expert_blocks(pairs, d, 2, exact, shared_memory(x.device))
    launch(_inner_kernel, (E, triton.cdiv(f, n)),
        x, gate_up, gate_up if gate_up_bias is None else gate_up_bias, order, ends, inner, d, f, x.stride(0),
        limit or 0.0, K=k, ACT=ACTIVATIONS[activation], BLOCK_M=m, BLOCK_N=n, BLOCK_K=block_k,
        BIASED=gate_up_bias is not None, LIMITED=limit is not None, EXACT=exact,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    m, n, block_k, warps, stages = outer_blocks or expert_blocks(pairs, f, 1, exact, shared_memory(x.device))
    launch(_outer_kernel, (E, triton.cdiv(d, n)),
        inner, down, down if down_bias is None else down_bias, weights, order, ends, outer, d, f,
        BLOCK_M=m, BLOCK_N=n, BLOCK_K=block_k, BIASED=down_bias is not None, EXACT=exact,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return outer.view(N, k, d).sum(1)


def expert_blocks(pairs: float, inputs: int, products: int, exact: bool, memory: int) -> Blocks:
    """Blocks for experts with this many pairs on average; measured on an H200.

    Args:
        inputs: inputs of each output.
        products: products that a program computes at once.
        exact: whether they are in float32.
        memory: bytes of shared memory.
    """
    if exact:
        return 16, 32, 32, 4, 2
    # Twice the average, as an expert with more pairs than a block reads its weights once more.
    m = next((m for m in (16, 32, 64) if 2 * pairs <= m), 128)
    n = {16: 32, 32: 64, 64: 64, 128: 128}[m] if products > 1 else {16: 64, 32: 64, 64: 128, 128: 128}[m]
    k = 256 if m == 16 and inputs >= 4096 and (products == 1 or pairs <= 1) else 128 if m <= 32 else 64
    while (stages := min(4, (memory - 8192) // (2 * k * (m + products * n)))) < 2:
        k //= 2
    return m, n, k, 4 if m <= 32 else 8, stages


def naive_chosen_experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    activation: str,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    limit: float | None = None,
) -> torch.Tensor:
    """[`chosen_experts`] in float64, one pair at a time."""
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for row, (experts, factors) in enumerate(zip(chosen.tolist(), weights.double().tolist())):
        for e, factor in zip(experts, factors):
            inner, outer = (None if b is None else b[e].double() for b in (gate_up_bias, down_bias))
            y = nn.functional.linear(x[row : row + 1].double(), gate_up[e].double(), inner)
            if limit is None:
                y = naive_activate(y, activation, True)
            else:
                gate, up = y.chunk(2, dim=-1)
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
                y = gate * (1.702 * gate).sigmoid() * (up + 1.0)
            out[row] += factor * nn.functional.linear(y, down[e].double(), outer)[0]
    return out
