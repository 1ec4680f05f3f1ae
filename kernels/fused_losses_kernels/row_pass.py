"""The row pass: all that a loss needs from one row of logits, in one read.

One program owns one row and reads it in blocks of BLOCK_V columns. Exponentials are relative to a
shift k per row, the maximum of the first block and of the target's logit:

    E_v = exp(z_v - k),   s_rest = sum_{v != y} E_v,   s = s_rest + E_y
    logp = -log1p(s_rest / E_y),   lse = k + log s,   1 - p_y = s_rest / s

The sum leaves the target out, so confident targets keep their relative accuracy. k need not be the
maximum, but exp(z - k) is the more exact the smaller its argument: a row whose later block exceeds
k by more than ``_ROOM`` is scaled down and goes on from that block's maximum. From logp the program
evaluates the token loss that it was given, a device function ``r -> (phi, weight)``. A launch may
hold a range of the vocabulary's columns: what is known so far then waits in ``rows`` (see
``lines``) for the next range, and the last one makes the results.

On request a launch also writes E, one write per element, over the logits or elsewhere. With whole
rows the entry of the target is -s_rest: then (g / s) E is the gradient of any loss with d loss / d
logp = -g, before g is known: p - 1_y up to the factor, exact for confident targets. With a range of
columns it is 0, for s_rest is not known yet. With a softcap E is multiplied by the derivative of
tanh. No atomics, no host synchronisation; equal logits give equal bits at any stride.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fused_losses_kernels import lines
from fused_losses_kernels.elementary import tanh_and_slope
from fused_losses_kernels.launch import row_launch
from fused_losses_kernels.operands import check_per_row, check_rows, check_written
from fused_losses_kernels.row_common import (
    accumulator,
    row_offset,
    strides,
    transformed,
    write_zeros,
)
from fused_losses_kernels.row_results import write_results

# Triton reads globals only as constexpr.
_LINES = tl.constexpr(lines.LINES)
_ENTROPY, _TOP1, _SHIFT, _SUM = (
    tl.constexpr(line) for line in (lines.ENTROPY, lines.TOP1, lines.SHIFT, lines.SUM)
)
_TARGET, _LARGEST, _TOTAL = (
    tl.constexpr(line) for line in (lines.SO_FAR_TARGET, lines.SO_FAR_LARGEST, lines.SO_FAR_TOTAL)
)
# exp(4) is as wrong as eager's difference from the maximum, and fits fp16; less room, and what was
# written has to be scaled down more often.
_ROOM = tl.constexpr(4.0)


@triton.jit
def _scale_down(e_ptr, stop, factor, ACC: tl.constexpr, BLOCK_V: tl.constexpr):
    """Multiply the whole blocks written so far, columns below ``stop``."""
    tl.debug_barrier()
    for start in range(0, stop, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V).to(tl.int64)
        e = tl.load(e_ptr + cols).to(ACC)
        tl.store(e_ptr + cols, (e * factor).to(e_ptr.dtype.element_ty))
    tl.debug_barrier()


@triton.jit(do_not_specialize=["N", "T", "V", "first_column", "ignore_index"])  # see row_gradient
def _row_pass_kernel(
    z_ptr,  # (B, T, V) any strides
    y_ptr,  # (N,) int
    ref_ptr,  # (N,) or None
    value_ptr,  # (N,) or None
    rows_ptr,  # (LINES, N) out, ACC
    e_ptr,  # (N, V) out, rows contiguous; may be z; or None
    N,
    T,
    C,  # columns of z
    V,  # columns of all ranges together
    first_column,
    stride_zb,
    stride_zt,
    stride_zv,
    stride_en,
    ignore_index,
    pre: tl.float64,
    cap: tl.float64,
    beta: tl.float64,
    r0: tl.float64,
    smoothing: tl.float64,
    z_loss: tl.float64,
    PHI: tl.constexpr,  # device function r -> (phi, weight), or None: statistics only
    FIRST: tl.constexpr,  # z holds the first columns of the vocabulary
    LAST: tl.constexpr,  # z holds the last ones
    ACC: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CONTINUED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    ENTROPY_WANTED: tl.constexpr,
    TOP1_WANTED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    y = tl.load(y_ptr + n).to(tl.int64)
    rows_ptr += n
    step = tl.full((), N, tl.int64)
    # Scalars come as fp64. A compiled branch may not change a variable's type, so cast out here.
    pre = tl.full((), pre, ACC)
    cap = tl.full((), cap, ACC)
    beta = tl.full((), beta, ACC)
    r0 = tl.full((), r0, ACC)
    if e_ptr is not None:
        e_ptr += n * stride_en
    if y == ignore_index:
        for line in tl.static_range(_LINES):
            tl.store(rows_ptr + line * step, 0.0)
        if e_ptr is not None:
            write_zeros(e_ptr, C, BLOCK_V)
    else:
        z_ptr += row_offset(n, T, stride_zb, stride_zt)
        # A bad label never reads outside its row, and its row is NaN: no range holds its logit.
        y_here = y - first_column
        here = (y_here >= 0) & (y_here < C)
        z_y = tl.load(z_ptr + y_here * stride_zv, mask=here, other=float("nan")).to(ACC) * pre
        slope_y = z_y
        if SOFTCAP:
            z_y, slope_y = tanh_and_slope(z_y)
            z_y *= cap

        k = tl.where(z_y == z_y, z_y, float("-inf"))
        s_rest = tl.zeros((), ACC)
        s_log = tl.zeros((), ACC)  # sum of E log E, target included
        total = tl.zeros((), ACC)  # sum of z - k
        largest = tl.full((), float("-inf"), ACC)
        top1 = tl.zeros((), ACC)
        if not FIRST:
            z_y = tl.where(here, z_y, tl.load(rows_ptr + _TARGET * step))
            k = tl.load(rows_ptr + _SHIFT * step)
            s_rest = tl.load(rows_ptr + _SUM * step)
            s_log = tl.load(rows_ptr + _ENTROPY * step)
            total = tl.load(rows_ptr + _TOTAL * step)
            largest = tl.load(rows_ptr + _LARGEST * step)
            top1 = tl.load(rows_ptr + _TOP1 * step)
        for start in range(0, C, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V).to(tl.int64)
            x, slope = transformed(z_ptr, cols, stride_zv, C, pre, cap, ACC, SOFTCAP)
            m = tl.max(x, axis=0)
            is_first = False
            if FIRST:
                is_first = start == 0
            if is_first:
                k = tl.maximum(k, m)
            elif m > k + _ROOM:
                # The difference of two numbers of the row, so that the sums follow k exactly
                # however far from 0 they are; 0 if all before was -inf.
                first = k == float("-inf")
                moved = tl.where(first, 0.0, m - k)
                factor = tl.exp(-moved)
                if ENTROPY_WANTED:
                    seen = (y >= 0) & (y_here < start)
                    e_y = tl.where(seen, tl.exp(z_y - tl.where(first, 0.0, k)), 0.0)
                    s_log = factor * (s_log - (s_rest + e_y) * moved)
                if SMOOTHED:
                    total -= (first_column + start) * moved
                s_rest *= factor
                if e_ptr is not None:
                    _scale_down(e_ptr, start, factor, ACC, BLOCK_V)
                k = m
            shift = tl.where(k == float("-inf"), 0.0, k)
            e = tl.exp(x - shift)
            # NaN reaches the result through this sum; tl.max drops it.
            s_rest += tl.sum(tl.where(cols == y_here, 0.0, e), axis=0)
            if ENTROPY_WANTED:
                s_log += tl.sum(tl.where(e > 0.0, e * (x - shift), 0.0), axis=0)
            if SMOOTHED:
                total += tl.sum(tl.where(cols < C, x - shift, 0.0), axis=0)
            if TOP1_WANTED:
                # The first maximum of the row so far, and whether it is the target.
                at = tl.min(tl.where(x == m, cols, C), axis=0)
                top1 = tl.where(m > largest, (at == y_here).to(ACC), top1)
                largest = tl.maximum(largest, m)
            if e_ptr is not None:
                if SOFTCAP:
                    e *= slope
                # The target's entry too, overwritten at the end: a mask of single columns would
                # make every store one element wide.
                tl.store(e_ptr + cols, e.to(e_ptr.dtype.element_ty), mask=cols < C)

        if e_ptr is not None:
            d_y = tl.zeros((), ACC)
            if FIRST and LAST:
                d_y -= tl.where(s_rest == float("inf"), float("nan"), s_rest)
                if SOFTCAP:
                    d_y *= slope_y
            tl.debug_barrier()  # after the loop's store to the same place, by another thread
            tl.store(e_ptr + y_here, d_y.to(e_ptr.dtype.element_ty), mask=here)

        if LAST:
            write_results(
                rows_ptr,
                step,
                z_y,
                k,
                s_rest,
                s_log,
                total / V,
                top1,
                None if ref_ptr is None else ref_ptr + n,
                None if value_ptr is None else value_ptr + n,
                beta,
                r0,
                tl.full((), smoothing, ACC),
                tl.full((), z_loss, ACC),
                PHI,
                ACC,
                CONTINUED,
                SMOOTHED,
                ENTROPY_WANTED,
            )
        else:
            tl.store(rows_ptr + _TARGET * step, z_y)
            tl.store(rows_ptr + _SHIFT * step, k)
            tl.store(rows_ptr + _SUM * step, s_rest)
            tl.store(rows_ptr + _ENTROPY * step, s_log)
            tl.store(rows_ptr + _TOTAL * step, total)
            tl.store(rows_ptr + _LARGEST * step, largest)
            tl.store(rows_ptr + _TOP1 * step, top1)


def row_pass(
    z: Tensor,  # (N, V) or (B, T, V), any strides
    y: Tensor,  # (N,) contiguous
    rows: Tensor,  # (LINES, N) out
    *,
    ref: Tensor | None,
    value: Tensor | None,
    exponentials: Tensor | None,
    phi: Any,
    ignore_index: int,
    pre: float,
    cap: float | None,
    beta: float,
    r0: float,
    label_smoothing: float,
    z_loss: float,
    entropy: bool,
    top1: bool,
    first_column: int,
    V: int,
) -> None:
    """Fill ``rows`` and, if given, ``exponentials`` (rows contiguous; it may be z itself).

    z may hold the columns from ``first_column`` on of V; ranges come in order.

    Raises:
        ValueError: Operands that the kernel would read or write at wrong places.
    """
    N = y.numel()
    check_rows(z, y, rows, first_column, V)
    check_per_row(N, ref=ref, value=value)
    if exponentials is not None:
        check_written("exponentials", exponentials, (N, z.shape[-1]))
    if N == 0:
        return
    C = z.shape[-1]
    T, stride_zb, stride_zt, stride_zv = strides(z)
    _row_pass_kernel[(N,)](
        z,
        y,
        ref,
        value,
        rows,
        exponentials,
        N,
        T,
        C,
        V,
        first_column,
        stride_zb,
        stride_zt,
        stride_zv,
        0 if exponentials is None else exponentials.stride(0),
        ignore_index,
        pre,
        cap or 0.0,
        beta,
        r0,
        label_smoothing,
        z_loss,
        PHI=phi,
        FIRST=first_column == 0,
        LAST=first_column + C == V,
        ACC=accumulator(rows),
        SOFTCAP=cap is not None,
        CONTINUED=r0 != float("-inf"),
        SMOOTHED=label_smoothing != 0.0,
        ENTROPY_WANTED=entropy,
        TOP1_WANTED=top1,
        **row_launch(C),
    )
