"""The row pass: all that a loss needs from one row of logits, in one read.

One program owns one row and reads it in blocks of BLOCK_V columns. Exponentials are relative to a
shift k per row, the maximum of the first block and of the target's logit:

    E_v = exp(z_v - k),   s_rest = sum_{v != y} E_v,   s = s_rest + E_y
    logp = -log1p(s_rest / E_y),   lse = k + log s,   1 - p_y = s_rest / s

The sum leaves the target out, so confident targets keep their relative accuracy. k need not be the
maximum, but exp(z - k) is the more exact the smaller its argument: a row that exceeds k by more
than ``_ROOM`` is gone through again, from its maximum (``row_sums``). From logp the program
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

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_losses_kernels import lines
from fused_losses_kernels.elementary import exp
from fused_losses_kernels.launch import row_launch
from fused_losses_kernels.operands import check_per_row, check_rows, check_written
from fused_losses_kernels.row_common import (
    accumulator,
    row_offset,
    strides,
    transform,
    write_zeros,
)
from fused_losses_kernels.row_results import write_results
from fused_losses_kernels.row_sums import LEAST, again, first_block, gather

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
    W: tl.constexpr,  # columns of a lane's piece of a block
):
    R: tl.constexpr = BLOCK_V // W
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
        z_y = tl.load(z_ptr + y_here * stride_zv, mask=here, other=float("nan")).to(ACC)
        z_y, slope_y = transform(z_y, pre, cap, SOFTCAP)

        # The piece that holds the target, before any of it is overwritten.
        y_at = tl.where(here, y_here // W, -1).to(tl.int32)
        y_in = tl.where(here, y_here % W, 0).to(tl.int32)
        piece = tl.arange(0, W)
        cols = tl.where(here, y_here - y_in, C) + piece
        x_piece = tl.load(z_ptr + cols * stride_zv, mask=cols < C, other=0.0).to(ACC)
        x_piece, _ = transform(x_piece, pre, cap, SOFTCAP)
        x_piece = tl.where(cols < C, x_piece, float("-inf"))

        s_rest = tl.zeros((), ACC)
        s_log = tl.zeros((), ACC)  # sum of E log E, target included
        total = tl.zeros((), ACC)  # sum of z - k
        largest = tl.full((), float("-inf"), ACC)
        top1 = tl.zeros((), ACC)
        if FIRST:
            # As ever NaN loses.
            k = tl.maximum(z_y, first_block(z_ptr, C, stride_zv, pre, cap, ACC, SOFTCAP, R, W))
        else:
            z_y = tl.where(here, z_y, tl.load(rows_ptr + _TARGET * step))
            k = tl.load(rows_ptr + _SHIFT * step)
            s_rest = tl.load(rows_ptr + _SUM * step)
            s_log = tl.load(rows_ptr + _ENTROPY * step)
            total = tl.load(rows_ptr + _TOTAL * step)
            largest = tl.load(rows_ptr + _LARGEST * step)
            top1 = tl.load(rows_ptr + _TOP1 * step)
        tl.debug_barrier()  # all have read what the first will overwrite

        shift = tl.where(k == float("-inf"), 0.0, k)
        limit = k + _ROOM
        s, s_e, taken, d, most, ahead = gather(
            z_ptr, e_ptr, C, stride_zv, pre, cap, y_at, shift, limit,
            ACC, SOFTCAP, SMOOTHED, ENTROPY_WANTED, TOP1_WANTED, R, W,
        )  # fmt: skip
        top = tl.max(most, axis=0)
        if SMOOTHED:
            total += tl.sum(d, axis=0)
        if TOP1_WANTED:
            if y_at >= 0:
                before = tl.max(tl.where(piece < y_in, x_piece, float("-inf")), axis=0)
                before = tl.maximum(tl.maximum(before, tl.max(ahead, axis=0)), largest)
                top1 = (before < z_y).to(ACC)
            largest = tl.maximum(largest, top)
            top1 = tl.where(largest > z_y, 0.0, top1)
        if top > limit:
            # The difference of two numbers of the row, so that the sums follow k exactly however
            # far from 0 they are; 0 if all before was -inf.
            if SMOOTHED:
                total -= (first_column + C) * (top - shift)
            moved = tl.where(limit == float("-inf"), 0.0, top - shift)
            factor = tl.exp(-moved)
            if ENTROPY_WANTED:
                seen = (y >= 0) & (y_here < 0)
                e_y = tl.where(seen, exp(z_y - shift), 0.0)
                s_log = factor * (s_log - (s_rest + e_y) * moved)
                s_e = factor * (s_e - s * moved)
            s_rest *= factor
            shift = top
            limit = top + _ROOM
            tl.debug_barrier()
            s, s_e = again(
                z_ptr, e_ptr, C, stride_zv, pre, cap, y_at, shift, factor, s * factor, s_e, taken,
                ACC, SOFTCAP, ENTROPY_WANTED, R, W,
            )  # fmt: skip
        d = x_piece - shift
        e = exp(d)
        # NaN reaches the result through this sum; tl.max drops it.
        s_rest += tl.sum(s, axis=0) + tl.sum(tl.where(piece == y_in, 0.0, e), axis=0)
        if ENTROPY_WANTED:
            s_log += tl.sum(s_e, axis=0) + tl.sum(e * tl.maximum(d, LEAST), axis=0)

        if e_ptr is not None:
            d_y = tl.zeros((), ACC)
            if FIRST and LAST:
                d_y -= tl.where(s_rest == float("inf"), float("nan"), s_rest)
                if SOFTCAP:
                    d_y *= slope_y
            tl.debug_barrier()  # after the loop's store to the same place, by another thread
            e_ptr += y_at.to(tl.int64) * W + y_in
            tl.store(e_ptr, d_y.to(e_ptr.dtype.element_ty), mask=y_at >= 0)

        if LAST:
            write_results(
                rows_ptr, step, z_y, shift, s_rest, s_log, total / V, top1,
                None if ref_ptr is None else ref_ptr + n,
                None if value_ptr is None else value_ptr + n,
                beta, r0, tl.full((), smoothing, ACC), tl.full((), z_loss, ACC),
                PHI, ACC, CONTINUED, SMOOTHED, ENTROPY_WANTED,
            )  # fmt: skip
        else:
            tl.store(rows_ptr + _TARGET * step, z_y)
            # -inf, not 0, where all was: any logit of the next range then exceeds it.
            k = tl.where(limit == float("-inf"), limit, shift)
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
    settings = row_launch(C)
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
        **settings,
        W=min(2 if z.dtype == torch.float64 else 8, settings["BLOCK_V"]),
    )
