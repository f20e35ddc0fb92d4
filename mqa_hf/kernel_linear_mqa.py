"""A projection of a few rows, fused with the norm before it, the activation after it and the residual.

M rows, N outputs and K inputs of the projection
"""

import torch
from torch import nn

from .kernel_launch_mqa import gdc_launch_dependents, gdc_wait, jit, launch, power, tl, triton
from .kernel_norm_mqa import ACTIVATIONS, activated, naive_activate, naive_normalise

MAX_SMALL_ROWS = 32


@jit
def _linear_kernel(
    x, weight, bias, residual, norm_weight, norm_bias, out, N, K, eps, x_row,
    NORM: tl.constexpr, NORM_WEIGHT: tl.constexpr, NORM_BIAS: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One row: out [N] = act(norm(x [K]) · weight [N, K]ᵀ + bias) + residual; `GATED`: act(first N) · (next N).

    `NORM`: 0 none, 1 root mean square, 2 layer norm. Each program normalises the row itself.
    """
    n, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    inside = n < N
    rows = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    rows_up = weight + (n.to(tl.int64) + N)[:, None] * K + k[None, :]
    if PDL:  # load the first weights while the previous kernel still runs
        gdc_launch_dependents()
    w = tl.load(rows, mask=inside[:, None] & (k < K)[None, :], other=0.0)
    if GATED:
        w_up = tl.load(rows_up, mask=inside[:, None] & (k < K)[None, :], other=0.0)
    if PDL:
        gdc_wait()
    mean, spread = 0.0, 1.0
    if NORM > 0:
        wide = tl.arange(0, WIDTH)
        all = tl.load(x + wide, mask=wide < K, other=0.0).to(tl.float32)
        if NORM == 2:
            mean = tl.sum(all, 0) / K
            all = tl.where(wide < K, all - mean, 0.0)
        spread = tl.rsqrt(tl.sum(all * all, 0) / K + eps)
    accumulated = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    accumulated_up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for first in range(0, K, BLOCK_K):
        at = first + k
        y = tl.load(x + at, mask=at < K, other=0.0).to(tl.float32)
        if NORM > 0:
            y = (y - mean) * spread
            if NORM_WEIGHT:
                y *= tl.load(norm_weight + at, mask=at < K, other=0.0).to(tl.float32)
            if NORM_BIAS:
                y += tl.load(norm_bias + at, mask=at < K, other=0.0).to(tl.float32)
            y = tl.where(at < K, y, 0.0).to(x.dtype.element_ty).to(tl.float32)  # as a separate norm would round
        accumulated += w.to(tl.float32) * y[None, :]
        if GATED:
            accumulated_up += w_up.to(tl.float32) * y[None, :]
        more = inside[:, None] & (at + BLOCK_K < K)[None, :]
        w = tl.load(rows + first + BLOCK_K, mask=more, other=0.0)
        if GATED:
            w_up = tl.load(rows_up + first + BLOCK_K, mask=more, other=0.0)
    result = tl.sum(accumulated, 1)
    if BIAS:
        result += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    result = activated(result, ACT)
    if GATED:
        up = tl.sum(accumulated_up, 1)
        if BIAS:
            up += tl.load(bias + N + n, mask=inside, other=0.0).to(tl.float32)
        result *= up
    if RESIDUAL:
        result += tl.load(residual + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + n, result.to(out.dtype.element_ty), mask=inside)


@jit
def _linear_rows_kernel(
    x, weight, bias, residual, out, M, N, K, x_row, out_row,
    GATED: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A few rows: as `_linear_kernel` without the norm, with matrix products that have the weights on the left."""
    n, m, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    inside, asked = n < N, m < M
    rows = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    rows_up = weight + (n.to(tl.int64) + N)[:, None] * K + k[None, :]
    columns = x + m[None, :] * x_row + k[:, None]
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    accumulated = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    accumulated_up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for first in range(0, K, BLOCK_K):
        more = (first + k) < K
        w = tl.load(rows + first, mask=inside[:, None] & more[None, :], other=0.0)
        y = tl.load(columns + first, mask=more[:, None] & asked[None, :], other=0.0)
        accumulated = tl.dot(w, y, accumulated, input_precision=precision)
        if GATED:
            up = tl.load(rows_up + first, mask=inside[:, None] & more[None, :], other=0.0)
            accumulated_up = tl.dot(up, y, accumulated_up, input_precision=precision)
    if BIAS:
        accumulated += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[:, None]
    result = activated(accumulated, ACT)
    if GATED:
        if BIAS:
            accumulated_up += tl.load(bias + N + n, mask=inside, other=0.0).to(tl.float32)[:, None]
        result *= accumulated_up
    place = m[None, :] * out_row + n[:, None]
    kept = inside[:, None] & asked[None, :]
    if RESIDUAL:
        result += tl.load(residual + place, mask=kept, other=0.0).to(tl.float32)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=kept)


def fused_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: str | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 0.0,
    *,
    activation: str | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    blocks: tuple[int, int, int, int] | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """act(norm(x) · weightᵀ + bias) + residual for a few rows.

    Args:
        x: [M, K], M at most `MAX_SMALL_ROWS`; `norm` is for one row.
        weight: [N, K], or [2N, K] if `gated`: the activation of the first N outputs times the others.
        norm: "rms_norm" or "layer_norm", with `norm_weight`, `norm_bias` [K] and `eps`.
        activation: a key of `ACTIVATIONS`.
        residual: [M, N].
        blocks: outputs and inputs a program takes at once, warps, stages. Default: by size.
        out: where to write the result.

    Returns:
        [M, N].
    """
    M, K = x.shape
    N = weight.shape[0] // (2 if gated else 1)
    out = x.new_empty(M, N) if out is None else out
    act = ACTIVATIONS[activation] if activation else 0
    if blocks is None:
        blocks = linear_blocks(M, K, x.dtype == torch.float32)
    block_n, block_k, warps, stages = blocks
    some = x
    fixed: dict[str, object] = {
        "GATED": gated, "ACT": act, "BIAS": bias is not None, "RESIDUAL": residual is not None,
        "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip
    bias, residual = some if bias is None else bias, some if residual is None else residual
    grid = (triton.cdiv(N, block_n),)
    if M == 1:
        kind = {None: 0, "rms_norm": 1, "layer_norm": 2}[norm]
        launch(_linear_kernel, grid,
            x, weight, bias, residual, some if norm_weight is None else norm_weight,
            some if norm_bias is None else norm_bias, out, N, K, eps, x.stride(0),
            NORM=kind, NORM_WEIGHT=norm_weight is not None, NORM_BIAS=norm_bias is not None, WIDTH=power(K), **fixed,
        )  # fmt: skip
    else:
        launch(_linear_rows_kernel, grid,
            x, weight, bias, residual, out, M, N, K, x.stride(0), out.stride(0),
            EXACT=x.dtype == torch.float32, BLOCK_M=max(16, power(M)), **fixed,
        )  # fmt: skip
    return out


def naive_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: str | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 0.0,
    *,
    activation: str | None = None,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    blocks: tuple[int, int, int, int] | None = None,
) -> torch.Tensor:
    """[`fused_linear`] in float64; `blocks` has no effect."""
    y = x.double() if norm is None else naive_normalise(x, norm, norm_weight, norm_bias, eps)
    y = nn.functional.linear(y, weight.double(), None if bias is None else bias.double())
    if activation is not None:
        y = naive_activate(y, activation, gated)
    elif gated:
        first, second = y.chunk(2, -1)
        y = first * second
    return y if residual is None else y + residual.double()


def linear_blocks(M: int, K: int, exact: bool) -> tuple[int, int, int, int]:
    """Choose `blocks` by size: the fastest of 25 choices on an H100 with the shapes of a 7B model."""
    if M == 1:
        block_k = min(1024, power(K))
        return 2048 // block_k, block_k, 4, 1
    return 64, min(128, max(16, power(K))), 4, 2 if exact else 4
