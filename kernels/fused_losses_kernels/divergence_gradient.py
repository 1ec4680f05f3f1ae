"""The gradient of a divergence of two rows of logits; ``row_divergence`` has the algorithm."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_losses_kernels import lines
from fused_losses_kernels.divergence_words import side, words
from fused_losses_kernels.elementary import exp
from fused_losses_kernels.row_common import (
    read,
    read_tail,
    row_offset,
    write,
    write_tail,
    write_zeros,
)
from fused_losses_kernels.row_sums import LEAST

_ENTROPY, _REST = (tl.constexpr(line) for line in (lines.ENTROPY, lines.REST))


@triton.jit
def _per_row(ptr, n, ACC: tl.constexpr, NEUTRAL: tl.constexpr):
    """A row's number, or what stands for it."""
    x = tl.full((), NEUTRAL, ACC)
    if ptr is not None:
        x = tl.load(ptr + n).to(ACC)
    return x


@triton.jit
def _entry(logp, s, share, of_p, weight, mean, dentropy, entropy, ENTROPY_GRAD: tl.constexpr):
    """The gradient of a transformed logit, with ``of_p`` in front of p."""
    if ENTROPY_GRAD:
        of_p -= dentropy * (tl.maximum(logp, LEAST) + entropy)
    return (exp(logp) * of_p + s * share) * weight + mean


# What differs from call to call makes no kernel of its own; what bounds an access does: C, strides.
@triton.jit(do_not_specialize=["N", "T", "teacher_T", "ignore_index"])
def divergence_gradient_kernel(
    z_ptr,  # (B, T, V) any strides
    t_ptr,  # the teacher's, (B, T, V) of another T maybe, any strides
    y_ptr,  # (N,)
    rows_ptr,  # (LINES, N) from the row pass over z
    teacher_rows_ptr,  # (LINES, N) from that over the teacher's
    out_ptr,  # (N,) out, sum of c; or None
    total_ptr,  # (N,) S; or None: slope_sum
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
    dz_ptr,  # z's shape, rows contiguous, out; may be z
    share_ptr,  # (N,) or None: 1
    weight_ptr,  # (N,) or None: 1
    dlogp_ptr,  # (N,) or None, and then all that follow are
    dlse_ptr,
    dmean_ptr,
    dentropy_ptr,
    stride_db,
    stride_dt,
    slope_sum: tl.float64,
    TERM: tl.constexpr,
    PARAMETRISED: tl.constexpr,
    ACC: tl.constexpr,
    TEACHER_ACC: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEACHER_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write the gradient of a row and, where S is known beforehand, its sum of c."""
    n = tl.program_id(0).to(tl.int64)
    y = tl.load(y_ptr + n).to(tl.int64)
    dz_ptr += row_offset(n, T, stride_db, stride_dt)
    if y == ignore_index:
        write_zeros(dz_ptr, C, BLOCK_V)
        if out_ptr is not None:
            tl.store(out_ptr + n, 0.0)
    else:
        mine = side(rows_ptr, n, N, pre, cap, ACC)
        theirs = side(teacher_rows_ptr, n, N, teacher_pre, teacher_cap, TEACHER_ACC)
        # Scalars come as fp64; a compiled branch may not change a variable's type.
        number = tl.full((), parameter, ACC)
        z_ptr += row_offset(n, T, stride_zb, stride_zt)
        t_ptr += row_offset(n, teacher_T, stride_tb, stride_tt)
        # The label's logits, read by all before the first of them writes.
        here = (y >= 0) & (y < C)
        raw_y = tl.load(z_ptr + y * stride_zv, mask=here, other=0.0).to(ACC)
        teacher_y = tl.load(t_ptr + y * stride_tv, mask=here, other=0.0).to(TEACHER_ACC)
        tl.debug_barrier()

        factor = tl.full((), pre * cap if SOFTCAP else pre, ACC)
        weight = factor * _per_row(weight_ptr, n, ACC, 1.0)
        share = _per_row(share_ptr, n, ACC, 1.0)
        total = tl.full((), slope_sum, ACC)
        if total_ptr is not None:
            total = tl.load(total_ptr + n)
        dlogp = _per_row(dlogp_ptr, n, ACC, 0.0)
        dentropy = _per_row(dentropy_ptr, n, ACC, 0.0)
        mean = weight * (_per_row(dmean_ptr, n, ACC, 0.0) / C)
        of_label = _per_row(dlse_ptr, n, ACC, 0.0) - total * share
        of_p = of_label - dlogp
        step = tl.full((), N, tl.int64)
        entropy = tl.load(rows_ptr + n + _ENTROPY * step)
        rest = tl.load(rows_ptr + n + _REST * step)
        cols = tl.arange(0, BLOCK_V).to(tl.int64)
        offsets, teacher_offsets = cols * stride_zv, cols * stride_tv
        found = tl.zeros((BLOCK_V,), ACC)
        z_block, t_block, dz_block = z_ptr, t_ptr, dz_ptr
        for _ in range(C // BLOCK_V):
            raw = read(z_block + offsets, ACC)
            teacher_raw = read(t_block + teacher_offsets, TEACHER_ACC)
            logp, jacobian, c, s = words(
                raw, teacher_raw, mine, theirs, number,
                TERM, PARAMETRISED, SOFTCAP, TEACHER_SOFTCAP,
            )  # fmt: skip
            if out_ptr is not None:
                found += c
            dz = _entry(
                logp, s, share, of_p, weight, mean, dentropy, entropy, dentropy_ptr is not None
            )
            write(dz_block + cols, dz * jacobian if SOFTCAP else dz)
            z_block += tl.full((), BLOCK_V, tl.int64) * stride_zv
            t_block += tl.full((), BLOCK_V, tl.int64) * stride_tv
            dz_block += BLOCK_V
        stop = tl.full((), C // BLOCK_V, tl.int64) * BLOCK_V
        if stop < C:
            cols += stop
            there = cols < C
            raw = read_tail(z_ptr + cols * stride_zv, there, ACC)
            teacher_raw = read_tail(t_ptr + cols * stride_tv, there, TEACHER_ACC)
            logp, jacobian, c, s = words(
                raw, teacher_raw, mine, theirs, number,
                TERM, PARAMETRISED, SOFTCAP, TEACHER_SOFTCAP,
            )  # fmt: skip
            if out_ptr is not None:
                found += tl.where(there, c, 0.0)
            dz = _entry(
                logp, s, share, of_p, weight, mean, dentropy, entropy, dentropy_ptr is not None
            )
            write_tail(dz_ptr + cols, dz * jacobian if SOFTCAP else dz, there)
        if out_ptr is not None:
            tl.store(out_ptr + n, tl.sum(found, axis=0))

        if dlogp_ptr is not None:
            # The label's entry over what its block left there.
            logp, jacobian, c, s = words(
                raw_y, teacher_y, mine, theirs, number,
                TERM, PARAMETRISED, SOFTCAP, TEACHER_SOFTCAP,
            )  # fmt: skip
            p_y = exp(logp)
            # 1 - p_y, of the sum without the label where the difference would round it away.
            away = dlogp * tl.where(p_y > 0.5, rest, 1.0 - p_y)
            dz = _entry(
                logp, s, share, of_label, weight, mean + weight * away, dentropy, entropy,
                dentropy_ptr is not None,
            )  # fmt: skip
            tl.debug_barrier()  # after the loop's store to the same place, by another thread
            dz = dz * jacobian if SOFTCAP else dz
            tl.store(dz_ptr + y, dz.to(dz_ptr.dtype.element_ty), here)
