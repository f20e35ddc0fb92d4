"""Norms and activations of rows.

M rows, K or N columns
"""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .kernel_launch_mqa import gdc_launch_dependents, gdc_wait, jit, launch, power, tl, triton

ACTIVATIONS = {
    "silu": 1, "swish": 1, "gelu": 2, "gelu_new": 3, "gelu_pytorch_tanh": 3, "gelu_fast": 3, "relu": 4,
    "quick_gelu": 5, "relu2": 6,
}  # fmt: skip


@jit
def _norm_kernel(
    x, weight, bias, out, K, eps, x_row,
    LAYER: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row of x [M, K]: root mean square norm, or layer norm if `LAYER`."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    if WEIGHT:
        w = tl.load(weight + at, mask=at < K, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    y = tl.load(x + row * x_row + at, mask=at < K, other=0.0).to(tl.float32)
    if LAYER:
        y = tl.where(at < K, y - tl.sum(y, 0) / K, 0.0)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / K + eps)
    if WEIGHT:
        y *= w
    if BIAS:
        y += tl.load(bias + at, mask=at < K, other=0.0).to(tl.float32)
    tl.store(out + row * K + at, y.to(out.dtype.element_ty), mask=at < K)


@jit
def activated(x, ACT: tl.constexpr):
    """The activation with index `ACT` in `ACTIVATIONS`, in float32."""
    if ACT == 1:
        x = x / (1.0 + tl.exp(-x))
    if ACT == 2:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if ACT == 3:  # tanh(a) = 2 / (1 + exp(-2a)) - 1
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x / (1.0 + tl.exp(-2.0 * inner))
    if ACT == 4:
        x = tl.maximum(x, 0.0)
    if ACT == 5:
        x = x / (1.0 + tl.exp(-1.702 * x))
    if ACT == 6:
        x = tl.maximum(x, 0.0)
        x = x * x
    return x


@jit
def _activation_kernel(
    x, out, width, x_row, out_row, GATED: tl.constexpr, ACT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """out[row] = act(x[row, :width]), times x[row, width:] if `GATED`."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    a = tl.load(x + row * x_row + at, mask=at < width, other=0.0).to(tl.float32)
    a = activated(a, ACT)
    if GATED:
        a *= tl.load(x + row * x_row + width + at, mask=at < width, other=0.0).to(tl.float32)
    tl.store(out + row * out_row + at, a.to(out.dtype.element_ty), mask=at < width)


def normalise(
    x: torch.Tensor, kind: str, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """The norm of each row of x [M, K]: "rms_norm" or "layer_norm"."""
    M, K = x.shape
    out = x.new_empty(M, K)
    launch(
        _norm_kernel, (M,), x, x if weight is None else weight, x if bias is None else bias, out, K, eps, x.stride(0),
        LAYER=kind == "layer_norm", WEIGHT=weight is not None, BIAS=bias is not None, WIDTH=power(K),
        num_warps=4 if K <= 2048 else 8,
    )  # fmt: skip
    return out


def naive_normalise(
    x: torch.Tensor, kind: str, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """[`normalise`] in float64."""
    weight, bias = (p if p is None else p.double() for p in (weight, bias))
    if kind == "layer_norm":
        return nn.functional.layer_norm(x.double(), x.shape[1:], weight, bias, eps)
    return nn.functional.rms_norm(x.double(), x.shape[1:], weight, eps)


def activate(x: torch.Tensor, activation: str, gated: bool) -> torch.Tensor:
    """[M, 2N or N] -> [M, N]: the activation of the first N columns, times the others if `gated`."""
    M, N = x.shape
    width = N // 2 if gated else N
    out = x.new_empty(M, width)
    launch(
        _activation_kernel,
        (M, triton.cdiv(width, 1024)),
        x,
        out,
        width,
        x.stride(0),
        out.stride(0),
        GATED=gated,
        ACT=ACTIVATIONS[activation],
        BLOCK=1024,
    )
    return out


def naive_activate(x: torch.Tensor, activation: str, gated: bool) -> torch.Tensor:
    """[`activate`] in float64."""
    first, *second = x.double().chunk(2, -1) if gated else (x.double(),)
    return ACT2FN[activation](first) * (second[0] if gated else 1.0)
