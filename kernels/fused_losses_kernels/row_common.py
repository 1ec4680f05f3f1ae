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

from fused_losses_kernels.elementary import exp, tanh_and_slope


@triton.jit
def row_offset(n, T, stride_b, stride_t):
    """Offset of row n of a (B, T, V) tensor, in int64."""
    return (n // T) * stride_b + (n % T) * stride_t


@triton.jit
def transform(raw, pre, cap, SOFTCAP: tl.constexpr):
    """Return the logit of a raw one, and the derivative of tanh: without a softcap, anything."""
    x = raw * pre
    slope = x
    if SOFTCAP:
        x, slope = tanh_and_slope(x)
        x *= cap
    return x, slope


# Functions of their own, so that the kernel report can tell their accesses from each other.
@triton.jit
def read(ptrs, ACC: tl.constexpr):
    """Load a whole block, up to ACC before any arithmetic: the interpreter's of bf16 is wrong."""
    return tl.load(ptrs).to(ACC)


@triton.jit
def read_tail(ptrs, mask, ACC: tl.constexpr):
    """Load what a row has of a block; 0 beyond it."""
    return tl.load(ptrs, mask=mask, other=0.0).to(ACC)


@triton.jit
def write(ptrs, x):
    """Store a whole block."""
    tl.store(ptrs, x.to(ptrs.dtype.element_ty))


@triton.jit
def write_tail(ptrs, x, mask):
    """Store what a row has of a block."""
    tl.store(ptrs, x.to(ptrs.dtype.element_ty), mask=mask)


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
    # The target's logit, read by all before the first of them writes.
    here = (y >= 0) & (y < V)
    raw_y = tl.load(z_ptr + y * stride_zv, mask=here, other=0.0).to(ACC)
    tl.debug_barrier()
    level = entropy - tl.log(s)
    factor = pre * cap if SOFTCAP else pre
    scale = factor * ((dlse - dlogp) / s)
    tilt = factor * (dentropy / s)
    mean = factor * dmean
    cols = tl.arange(0, BLOCK_V).to(tl.int64)
    offsets = cols * stride_zv
    # Rows that move under fixed columns: offsets made anew for each block cost more.
    z_block, dz_block = z_ptr, dz_ptr
    for _ in tl.range(V // BLOCK_V, loop_unroll_factor=2):
        x, slope = transform(read(z_block + offsets, ACC), pre, cap, SOFTCAP)
        d = x - shift
        dz = exp(d) * _slope(d, scale, tilt, level, ENTROPY_GRAD) + mean
        write(dz_block + cols, dz * slope if SOFTCAP else dz)
        z_block += tl.full((), BLOCK_V, tl.int64) * stride_zv
        dz_block += BLOCK_V
    stop = tl.full((), V // BLOCK_V, tl.int64) * BLOCK_V
    if stop < V:
        cols += stop
        x, slope = transform(read_tail(z_ptr + cols * stride_zv, cols < V, ACC), pre, cap, SOFTCAP)
        d = x - shift
        dz = exp(d) * _slope(d, scale, tilt, level, ENTROPY_GRAD) + mean
        write_tail(dz_ptr + cols, dz * slope if SOFTCAP else dz, cols < V)

    # The target's entry, with 1 - p_y instead of p_y, over what its block left there.
    x_y, slope_y = transform(raw_y, pre, cap, SOFTCAP)
    dz_y = factor * (dlse - (dlse - dlogp) * rest) + mean
    if ENTROPY_GRAD:
        d = x_y - shift
        dz_y += exp(d) * _slope(d, 0.0, tilt, level, True)
    tl.debug_barrier()  # after the loop's store to the same place, by another thread
    tl.store(dz_ptr + y, (dz_y * slope_y if SOFTCAP else dz_y).to(dz_ptr.dtype.element_ty), here)


@triton.jit
def _slope(d, scale, tilt, level, ENTROPY_GRAD: tl.constexpr):
    """What exp(d) is multiplied by, but for the mean; finite where d is -inf and exp(d) 0."""
    if ENTROPY_GRAD:
        return scale - tilt * tl.maximum(d + level, -1e4)
    else:
        return scale


def strides(t: Tensor) -> tuple[int, int, int, int]:
    """Return T and the strides over batch, time and the last axis, of (N, V) as of (B, T, V)."""
    if t.dim() == 2:
        return max(t.shape[0], 1), 0, t.stride(0), t.stride(1)
    return t.shape[1], t.stride(0), t.stride(1), t.stride(2)


def accumulator(rows: Tensor) -> Any:
    """Triton's dtype of the row maths."""
    return tl.float64 if rows.element_size() == 8 else tl.float32
