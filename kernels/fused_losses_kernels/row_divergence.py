"""Divergences of two rows of logits, one program per row: sums, and the gradient.

A device function ``(log p, log q) -> (c, s)``, maybe of a further number, is handed to the kernels:
a word's part of the divergence, and its slope, the derivative with respect to log p. The
log-normalisers of both rows are known from the row passes. With per-row coefficients as in
``row_common``, and p the student's,

    out = sum_v c_v,    S = sum_v s_v
    dz_v = weight (share (s_v - p_v S) + p_v (dlse - dlogp - dH (log p_v + H)) + dlogp [v = y]
           + dmean / V)

times the derivative of the student's transform; the entry at the label is formed from 1 - p_y. Sums
and gradient are a read of both rows each; where S is the same for all rows the gradient's pass
sums c too, and is the only one. One write of the gradient, over the student's logits or elsewhere.
Sums are kept per lane and reduced once. No atomics.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fused_losses_kernels.divergence_gradient import divergence_gradient_kernel
from fused_losses_kernels.divergence_words import side, words
from fused_losses_kernels.launch import row_launch
from fused_losses_kernels.operands import check_per_row, check_rows, check_written
from fused_losses_kernels.row_common import accumulator, read, read_tail, row_offset, strides


@triton.jit(do_not_specialize=["N", "T", "teacher_T", "ignore_index"])  # see divergence_gradient
def _divergence_sums_kernel(
    z_ptr,  # (B, T, V) any strides
    t_ptr,  # the teacher's, (B, T, V) of another T maybe, any strides
    y_ptr,  # (N,)
    rows_ptr,  # (LINES, N) from the row pass over z
    teacher_rows_ptr,  # (LINES, N) from that over the teacher's
    out_ptr,  # (N,) out
    total_ptr,  # (N,) out, S; or None
    N,
    T,
    teacher_T,
    C,
    stride_zb,
    stride_zt,
    stride_zv,
    stride_tb,
    stride_tt,
    stride_tv,
    ignore_index,
    pre: tl.float64,
    cap: tl.float64,
    teacher_pre: tl.float64,
    teacher_cap: tl.float64,
    parameter: tl.float64,
    TERM: tl.constexpr,  # device function (log p, log q) -> (c, s)
    PARAMETRISED: tl.constexpr,  # whether it takes the parameter too
    ACC: tl.constexpr,
    TEACHER_ACC: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    if tl.load(y_ptr + n).to(tl.int64) == ignore_index:
        tl.store(out_ptr + n, 0.0)
        if total_ptr is not None:
            tl.store(total_ptr + n, 0.0)
    else:
        mine = side(rows_ptr, n, N, pre, cap, ACC)
        theirs = side(teacher_rows_ptr, n, N, teacher_pre, teacher_cap, TEACHER_ACC)
        # Scalars come as fp64; a compiled branch may not change a variable's type.
        number = tl.full((), parameter, ACC)
        z_ptr += row_offset(n, T, stride_zb, stride_zt)
        t_ptr += row_offset(n, teacher_T, stride_tb, stride_tt)
        cols = tl.arange(0, BLOCK_V).to(tl.int64)
        offsets, teacher_offsets = cols * stride_zv, cols * stride_tv
        found = tl.zeros((BLOCK_V,), ACC)
        total = tl.zeros((BLOCK_V,), ACC)
        z_block, t_block = z_ptr, t_ptr
        for _ in range(C // BLOCK_V):
            raw = read(z_block + offsets, ACC)
            teacher_raw = read(t_block + teacher_offsets, TEACHER_ACC)
            _logp, _jacobian, c, s = words(
                raw, teacher_raw, mine, theirs, number,
                TERM, PARAMETRISED, SOFTCAP, TEACHER_SOFTCAP,
            )  # fmt: skip
            found += c
            if total_ptr is not None:
                total += s
            z_block += tl.full((), BLOCK_V, tl.int64) * stride_zv
            t_block += tl.full((), BLOCK_V, tl.int64) * stride_tv
        stop = tl.full((), C // BLOCK_V, tl.int64) * BLOCK_V
        if stop < C:
            cols += stop
            there = cols < C
            raw = read_tail(z_ptr + cols * stride_zv, there, ACC)
            teacher_raw = read_tail(t_ptr + cols * stride_tv, there, TEACHER_ACC)
            _logp, _jacobian, c, s = words(
                raw, teacher_raw, mine, theirs, number,
                TERM, PARAMETRISED, SOFTCAP, TEACHER_SOFTCAP,
            )  # fmt: skip
            found += tl.where(there, c, 0.0)
            if total_ptr is not None:
                total += tl.where(there, s, 0.0)
        tl.store(out_ptr + n, tl.sum(found, axis=0))
        if total_ptr is not None:
            tl.store(total_ptr + n, tl.sum(total, axis=0))


def row_divergence(
    z: Tensor,  # (N, V) or (B, T, V), any strides
    teacher_z: Tensor,  # (N, V) or (B, T, V), any strides
    y: Tensor,  # (N,) contiguous
    rows: Tensor,  # (LINES, N) from the row pass over z
    teacher_rows: Tensor,  # (LINES, N) from that over teacher_z
    *,
    term: Any,
    slope_sum: float | None,
    parameter: float | None,
    out: Tensor,
    dz: Tensor | None,
    share: Tensor | None,
    weight: Tensor | None,
    dlogp: Tensor | None,
    dlse: Tensor | None,
    dmean: Tensor | None,
    dentropy: Tensor | None,
    ignore_index: int,
    pre: float,
    cap: float | None,
    teacher_pre: float,
    teacher_cap: float | None,
) -> None:
    """Fill ``out`` (N,) and, if given, ``dz``, of z's shape with contiguous rows; maybe z itself.

    ``slope_sum``: S where it is the same for all rows. ``parameter``: what ``term`` takes beside
    the log-probs, if it does.

    Raises:
        ValueError: Operands that the kernels would read or write at wrong places.
    """
    N, C = y.numel(), z.shape[-1]
    check_rows(z, y, rows, 0, C)
    check_rows(teacher_z, y, teacher_rows, 0, teacher_z.shape[-1], of="teacher_")
    check_per_row(N, out=out, share=share, weight=weight)
    check_per_row(N, dlogp=dlogp, dlse=dlse, dmean=dmean, dentropy=dentropy)
    if teacher_z.shape[-1] != C:
        raise ValueError(f"teacher_z must have the {C} columns of z, got {teacher_z.shape[-1]}")
    if out.dtype != rows.dtype:
        raise ValueError(f"out must have the dtype of rows, {rows.dtype}, got {out.dtype}")
    if dlogp is None and any(t is not None for t in (dlse, dmean, dentropy)):
        raise ValueError(
            "dlse, dmean and dentropy must come with dlogp: the label's entry is apart"
        )
    if dz is not None:
        check_written("dz", dz, z.shape)
    if N == 0:
        return
    T, *z_strides = strides(z)
    teacher_T, *teacher_strides = strides(teacher_z)
    settings = dict(
        TERM=term,
        PARAMETRISED=parameter is not None,
        ACC=accumulator(rows),
        TEACHER_ACC=accumulator(teacher_rows),
        SOFTCAP=cap is not None,
        TEACHER_SOFTCAP=teacher_cap is not None,
        **_launch(C),
    )
    sides = (z, teacher_z, y, rows, teacher_rows)
    sizes = (N, T, teacher_T, C, *z_strides, *teacher_strides, ignore_index)
    numbers = (pre, cap or 0.0, teacher_pre, teacher_cap or 0.0, float(parameter or 0.0))
    total = None
    if dz is None or slope_sum is None:
        total = None if dz is None else out.new_empty(N)
        _divergence_sums_kernel[(N,)](*sides, out, total, *sizes, *numbers, **settings)
    if dz is None:
        return
    _, stride_db, stride_dt, _ = strides(dz)
    divergence_gradient_kernel[(N,)](
        *sides,
        None if slope_sum is None else out,
        total,
        *sizes,
        *numbers,
        dz,
        share,
        weight,
        dlogp,
        dlse,
        dmean,
        dentropy,
        stride_db,
        stride_dt,
        float(slope_sum or 0.0),
        **settings,
    )


def _launch(C: int) -> dict[str, int]:
    """Half the columns of other row kernels: of two rows, as many accesses are in flight."""
    settings = row_launch(C)
    return settings | {"BLOCK_V": max(settings["BLOCK_V"] // 2, 1)}
