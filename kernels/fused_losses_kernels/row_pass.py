"""The row pass: all that a loss needs from one row of logits, and the row's gradient.

One program owns one row and reads it in blocks of BLOCK_V columns, keeping a running maximum m and
running sums relative to it (online softmax). The sum leaves the target out:

    s_rest = sum_{v != y} exp(z_v - m),   logp = -log1p(s_rest / exp(z_y - m)),   1 - p_y = s_rest /
    s

so confident targets keep their relative accuracy. From logp the program evaluates the token loss it
was given, a device function ``r -> (phi, weight)``; it knows no loss by name. Bytes: one read of
the logits; with a gradient wanted at once, a second read (of a row that was just read) and one
write.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fused_losses_kernels import lines
from fused_losses_kernels.elementary import log1p, tanh
from fused_losses_kernels.launch import row_launch
from fused_losses_kernels.row_common import (
    accumulator,
    row_offset,
    strides,
    transformed,
    write_gradient,
    write_zeros,
)

# Triton reads globals only as constexpr.
_LINES = tl.constexpr(lines.LINES)
_LOSS, _LOGP, _LSE, _ENTROPY = (
    tl.constexpr(line) for line in (lines.LOSS, lines.LOGP, lines.LSE, lines.ENTROPY)
)
_TOP1, _DLOGP, _DLSE = (tl.constexpr(line) for line in (lines.TOP1, lines.DLOGP, lines.DLSE))
_SHIFT, _SUM, _REST = (tl.constexpr(line) for line in (lines.SHIFT, lines.SUM, lines.REST))


@triton.jit
def _row_pass_kernel(
    z_ptr,  # (B, T, V) any strides
    y_ptr,  # (N,) int
    ref_ptr,  # (N,) or None
    value_ptr,  # (N,) or None
    weight_ptr,  # (N,) weight of each row's loss in the gradient; None without dz
    rows_ptr,  # (LINES, N) out, ACC
    dz_ptr,  # (N, V) out, rows contiguous; may be z; or None
    N,
    T,
    V,
    stride_zb,
    stride_zt,
    stride_zv,
    stride_dn,
    ignore_index,
    pre: tl.float64,
    cap: tl.float64,
    beta: tl.float64,
    r0: tl.float64,
    smoothing: tl.float64,
    z_loss: tl.float64,
    PHI: tl.constexpr,  # device function r -> (phi, weight), or None: statistics only
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
    if y == ignore_index:
        for line in tl.static_range(_LINES):
            tl.store(rows_ptr + line * step, 0.0)
        if dz_ptr is not None:
            write_zeros(dz_ptr + n * stride_dn, V, BLOCK_V)
    else:
        z_ptr += row_offset(n, T, stride_zb, stride_zt)
        # A bad label never reads outside its row, and its row is NaN.
        good = (y >= 0) & (y < V)
        z_y = tl.load(z_ptr + y * stride_zv, mask=good, other=float("nan")).to(ACC) * pre
        if SOFTCAP:
            z_y = cap * tanh(z_y)

        m = tl.full((), float("-inf"), ACC)
        shift = tl.zeros((), ACC)
        s_rest = tl.zeros((), ACC)
        s_log = tl.zeros((), ACC)  # sum of E log E, target included
        total = tl.zeros((), ACC)
        beaten = tl.zeros((), tl.int32)
        for start in range(0, V, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V).to(tl.int64)
            x = transformed(z_ptr, cols, stride_zv, V, pre, cap, ACC, SOFTCAP)
            m_new = tl.maximum(m, tl.max(x, axis=0))
            shift_new = tl.where(m_new == float("-inf"), 0.0, m_new)
            e = tl.exp(x - shift_new)
            grown = tl.where(m == float("-inf"), 0.0, m - shift_new)
            rescale = tl.exp(grown)
            if ENTROPY_WANTED:
                e_y = tl.where(y < start, tl.exp(z_y - shift), 0.0)
                s_log = rescale * (s_log + (s_rest + e_y) * grown)
                s_log += tl.sum(tl.where(e > 0.0, e * (x - shift_new), 0.0), axis=0)
            # NaN reaches the result through this sum; tl.max drops it.
            s_rest = s_rest * rescale + tl.sum(tl.where(cols == y, 0.0, e), axis=0)
            if SMOOTHED:
                total += tl.sum(tl.where(cols < V, x, 0.0), axis=0)
            if TOP1_WANTED:
                above = (x > z_y) | ((x == z_y) & (cols < y))
                beaten = tl.maximum(beaten, tl.max(above.to(tl.int32), axis=0))
            m = m_new
            shift = shift_new

        e_y = tl.exp(z_y - shift)
        s = s_rest + e_y
        log_s = tl.log(s)
        # The first form is exact for confident targets; its quotient overflows for hopeless ones.
        confident = e_y * 1024.0 > s_rest
        odds = s_rest / tl.where(confident, e_y, 1.0)
        logp = tl.where(confident, -log1p(odds), (z_y - shift) - log_s)
        lse = shift + log_s
        rest = s_rest / s
        entropy = tl.zeros((), ACC)
        if ENTROPY_WANTED:
            entropy = log_s - s_log / s
        tl.store(rows_ptr + _LOGP * step, logp)
        tl.store(rows_ptr + _LSE * step, lse)
        tl.store(rows_ptr + _ENTROPY * step, entropy)
        tl.store(rows_ptr + _TOP1 * step, (TOP1_WANTED & (beaten == 0) & (logp == logp)).to(ACC))
        tl.store(rows_ptr + _SHIFT * step, shift)
        tl.store(rows_ptr + _SUM * step, s)
        tl.store(rows_ptr + _REST * step, rest)

        if PHI is not None:
            r = logp
            if ref_ptr is not None:
                r -= tl.load(ref_ptr + n).to(ACC)
            r *= beta
            value = tl.zeros((), ACC)
            if value_ptr is not None:
                value = tl.load(value_ptr + n).to(ACC)
            r += value
            if CONTINUED:
                phi, weight = PHI(tl.where(r < r0, r0, r))
                phi += tl.where(r < r0, weight * (r - r0), 0.0)
            else:
                phi, weight = PHI(r)
            loss = (value - phi) / beta
            dlogp = tl.where(good, -weight, float("nan"))
            dlse = tl.zeros((), ACC)
            dmean = tl.zeros((), ACC)
            if SMOOTHED:
                eps = tl.full((), smoothing, ACC)
                loss = (1.0 - eps) * loss + eps * (lse - total / V)
                dlogp *= 1.0 - eps
                dlse += eps
                dmean -= eps / V
            lam = tl.full((), z_loss, ACC)
            loss += lam * lse * lse
            dlse += 2.0 * lam * lse
            tl.store(rows_ptr + _LOSS * step, loss)
            tl.store(rows_ptr + _DLOGP * step, dlogp)
            tl.store(rows_ptr + _DLSE * step, dlse)
            if dz_ptr is not None:
                w = tl.load(weight_ptr + n).to(ACC)
                write_gradient(
                    z_ptr,
                    dz_ptr + n * stride_dn,
                    y,
                    V,
                    stride_zv,
                    pre,
                    cap,
                    shift,
                    s,
                    rest,
                    w * dlogp,
                    w * dlse,
                    w * dmean,
                    0.0,
                    entropy,
                    ACC,
                    SOFTCAP,
                    False,
                    BLOCK_V,
                )
        else:
            zero = tl.zeros((), ACC)
            tl.store(rows_ptr + _LOSS * step, zero)
            tl.store(rows_ptr + _DLOGP * step, zero)
            tl.store(rows_ptr + _DLSE * step, zero)


def row_pass(
    z: Tensor,  # (N, V) or (B, T, V), any strides
    y: Tensor,  # (N,) contiguous
    rows: Tensor,  # (LINES, N) out
    *,
    ref: Tensor | None,
    value: Tensor | None,
    row_weight: Tensor | None,
    dz: Tensor | None,
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
) -> None:
    """Fill ``rows`` and, if given, ``dz`` (rows contiguous; it may be z itself)."""
    N = y.numel()
    if N == 0:
        return
    V = z.shape[-1]
    T, stride_zb, stride_zt, stride_zv = strides(z)
    _row_pass_kernel[(N,)](
        z,
        y,
        ref,
        value,
        row_weight,
        rows,
        dz,
        N,
        T,
        V,
        stride_zb,
        stride_zt,
        stride_zv,
        0 if dz is None else dz.stride(0),
        ignore_index,
        pre,
        cap or 0.0,
        beta,
        r0,
        label_smoothing,
        z_loss,
        PHI=phi,
        ACC=accumulator(rows),
        SOFTCAP=cap is not None,
        CONTINUED=r0 != float("-inf"),
        SMOOTHED=label_smoothing != 0.0,
        ENTROPY_WANTED=entropy,
        TOP1_WANTED=top1,
        **row_launch(V),
    )
