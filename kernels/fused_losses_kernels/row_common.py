"""What the row kernels share: reading a row, and turning it into its gradient.

With per-row coefficients of logp, lse, entropy H and of the mean logit, and p the softmax of the
row,

    dz_v = p_v (dlse - dlogp - dH (z_v - lse + H)) + dlogp [v = y] + dmean / V

times the derivative of the transform (scale, softcap, temperature); the entry at the target is
formed from 1 - p_y, so that a confident target is not rounded away.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fused_losses_kernels.elementary import tanh_and_slope


@triton.jit
def row_offset(n, T, stride_b, stride_t):
    """Offset of row n of a (B, T, V) tensor, in int64."""
    return (n // T) * stride_b + (n % T) * stride_t


@triton.jit
def transformed(ptr, cols, stride_v, V, pre, cap, ACC: tl.constexpr, SOFTCAP: tl.constexpr):
    """Load a block of a row and transform it; the tail is -inf after every transform.

    Also returns the derivative of tanh, which nothing may read without a softcap.
    """
    # Up to ACC before any arithmetic: the interpreter's bf16 arithmetic is wrong.
    x = tl.load(ptr + cols * stride_v, mask=cols < V, other=0.0).to(ACC) * pre
    slope = x
    if SOFTCAP:
        x, slope = tanh_and_slope(x)
        x *= cap
    return tl.where(cols < V, x, float("-inf")), slope


@triton.jit
def write_zeros(dz_ptr, V, BLOCK_V: tl.constexpr):
    """The gradient of an ignored row: zeros, whatever its logits hold."""
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V).to(tl.int64)
        zeros = tl.zeros((BLOCK_V,), dtype=dz_ptr.dtype.element_ty)
        tl.store(dz_ptr + cols, zeros, mask=cols < V)


@triton.jit
def write_gradient(
    z_ptr,  # (V,) a row of logits
    dz_ptr,  # (V,) contiguous; may be the same memory
    y,
    V,
    stride_zv,
    pre,
    cap,
    shift,
    s,
    rest,  # 1 - p_y
    dlogp,
    dlse,
    dmean,
    dentropy,
    entropy,
    ACC: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One read of a row, one write of its gradient."""
    alpha = dlse - dlogp
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V).to(tl.int64)
        x, slope = transformed(z_ptr, cols, stride_zv, V, pre, cap, ACC, SOFTCAP)
        p = tl.exp(x - shift) / s
        dz = tl.where(cols == y, dlse - alpha * rest, alpha * p) + dmean
        if ENTROPY_GRAD:
            dz -= tl.where(p == 0.0, 0.0, dentropy * p * ((x - shift) - tl.log(s) + entropy))
        if SOFTCAP:
            dz *= cap * pre * slope
        else:
            dz *= pre
        tl.store(dz_ptr + cols, dz.to(dz_ptr.dtype.element_ty), mask=cols < V)


def strides(t: Tensor) -> tuple[int, int, int, int]:
    """Return T and the strides over batch, time and the last axis, of (N, V) as of (B, T, V)."""
    if t.dim() == 2:
        return max(t.shape[0], 1), 0, t.stride(0), t.stride(1)
    return t.shape[1], t.stride(0), t.stride(1), t.stride(2)


def accumulator(rows: Tensor) -> Any:
    """Triton's dtype of the row maths."""
    return tl.float64 if rows.element_size() == 8 else tl.float32
