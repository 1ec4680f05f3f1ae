"""The backward half of a row pass alone, for gradients that are known only after it.

One program owns one row: one read of the logits, one write of their gradient. No atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fused_losses_kernels import lines
from fused_losses_kernels.launch import row_launch
from fused_losses_kernels.operands import check_per_row, check_rows, check_written
from fused_losses_kernels.row_common import (
    accumulator,
    row_offset,
    strides,
    write_gradient,
    write_zeros,
)

# Triton reads globals only as constexpr.
_ENTROPY, _SHIFT, _SUM, _REST = (
    tl.constexpr(line) for line in (lines.ENTROPY, lines.SHIFT, lines.SUM, lines.REST)
)


# What differs from call to call makes no kernel of its own; what bounds an access does: C, strides.
@triton.jit(do_not_specialize=["N", "T", "V", "first_column", "ignore_index"])
def _row_gradient_kernel(
    z_ptr,  # (B, T, V) any strides
    dz_ptr,  # (N, V) out, rows contiguous; may be z
    y_ptr,  # (N,)
    rows_ptr,  # (LINES, N) from the row pass
    dlogp_ptr,  # (N,)
    dlse_ptr,  # (N,) or None
    dmean_ptr,  # (N,) or None
    dentropy_ptr,  # (N,) or None
    N,
    T,
    C,  # columns of z
    V,  # columns of the whole vocabulary
    first_column,
    stride_zb,
    stride_zt,
    stride_zv,
    stride_db,
    stride_dt,
    ignore_index,
    pre: tl.float64,
    cap: tl.float64,
    ACC: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    y = tl.load(y_ptr + n).to(tl.int64)
    dz_ptr += row_offset(n, T, stride_db, stride_dt)
    if y == ignore_index:
        write_zeros(dz_ptr, C, BLOCK_V)
    else:
        rows_ptr += n
        step = tl.full((), N, tl.int64)
        dlogp = tl.load(dlogp_ptr + n).to(ACC)
        dlogp = tl.where((y >= 0) & (y < V), dlogp, float("nan"))
        dlse = tl.zeros((), ACC)
        if dlse_ptr is not None:
            dlse = tl.load(dlse_ptr + n).to(ACC)
        dmean = tl.zeros((), ACC)
        if dmean_ptr is not None:
            dmean = tl.load(dmean_ptr + n).to(ACC) / V
        dentropy = tl.zeros((), ACC)
        if dentropy_ptr is not None:
            dentropy = tl.load(dentropy_ptr + n).to(ACC)
        write_gradient(
            z_ptr + row_offset(n, T, stride_zb, stride_zt),
            dz_ptr,
            y - first_column,
            C,
            stride_zv,
            tl.full((), pre, ACC),
            tl.full((), cap, ACC),
            tl.load(rows_ptr + _SHIFT * step),
            tl.load(rows_ptr + _SUM * step),
            tl.load(rows_ptr + _REST * step),
            dlogp,
            dlse,
            dmean,
            dentropy,
            tl.load(rows_ptr + _ENTROPY * step),
            ACC,
            SOFTCAP,
            dentropy_ptr is not None,
            BLOCK_V,
        )


def row_gradient(
    z: Tensor,  # (N, V) or (B, T, V), any strides
    y: Tensor,  # (N,) contiguous
    rows: Tensor,  # (LINES, N) from the row pass over the same logits
    *,
    dlogp: Tensor,
    dlse: Tensor | None,
    dmean: Tensor | None,
    dentropy: Tensor | None,
    dz: Tensor,
    ignore_index: int,
    pre: float,
    cap: float | None,
    first_column: int,
    V: int,
) -> None:
    """Fill ``dz``, of z's shape with contiguous rows; it may be z itself.

    z may hold the columns from ``first_column`` on of V.

    Raises:
        ValueError: Operands that the kernel would read or write at wrong places.
    """
    N = y.numel()
    check_rows(z, y, rows, first_column, V)
    check_per_row(N, dlogp=dlogp, dlse=dlse, dmean=dmean, dentropy=dentropy)
    check_written("dz", dz, z.shape)
    if N == 0:
        return
    C = z.shape[-1]
    T, stride_zb, stride_zt, stride_zv = strides(z)
    _, stride_db, stride_dt, _ = strides(dz)
    _row_gradient_kernel[(N,)](
        z,
        dz,
        y,
        rows,
        dlogp,
        dlse,
        dmean,
        dentropy,
        N,
        T,
        C,
        V,
        first_column,
        stride_zb,
        stride_zt,
        stride_zv,
        stride_db,
        stride_dt,
        ignore_index,
        pre,
        cap or 0.0,
        ACC=accumulator(rows),
        SOFTCAP=cap is not None,
        **row_launch(C),
    )
