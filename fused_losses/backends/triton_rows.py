"""The row passes as Triton kernels."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from fused_losses.backends.base import Coefficients, Objective, RowMaths, Sides, Weight
from fused_losses.backends.torch_divergence import row_divergence as in_torch
from fused_losses.divergences import Divergence
from fused_losses_kernels import row_divergence as divergence_kernel
from fused_losses_kernels import row_gradient as gradient_kernel
from fused_losses_kernels import row_pass as forward_kernel
from fused_losses_kernels import segment_sum as segment_kernel
from fused_losses_kernels.launch import INTERPRETED

name = "triton"
interpreted: bool = INTERPRETED


def row_pass(
    z: Tensor,
    y: Tensor,
    rows: Tensor,
    *,
    maths: RowMaths,
    ignore_index: int,
    objective: Objective | None = None,
    ref: Tensor | None = None,
    value: Tensor | None = None,
    exponentials: Tensor | None = None,
    gradient: Tensor | None = None,
    weight: Weight | None = None,
    entropy: bool = False,
    top1: bool = False,
    overwrite: bool = False,
    first_column: int = 0,
    vocabulary: int | None = None,
) -> None:
    """See :class:`fused_losses.backends.Backend`; needs no scratch, so ``overwrite`` is unused."""
    o = objective
    with _device_of(z):
        forward_kernel.row_pass(
            z,
            y,
            rows,
            ref=_contiguous(ref),
            value=_contiguous(value),
            exponentials=exponentials,
            phi=None if o is None else o.loss.device_fn,
            ignore_index=ignore_index,
            pre=maths.pre,
            cap=maths.cap,
            beta=1.0 if o is None else o.beta,
            r0=float("-inf") if o is None else o.loss.left_end(o.max_weight),
            label_smoothing=0.0 if o is None else o.label_smoothing,
            z_loss=0.0 if o is None else o.z_loss,
            entropy=entropy,
            top1=top1,
            first_column=first_column,
            V=vocabulary or z.shape[-1],
        )
    if gradient is not None and o is not None and weight is not None:
        c = o.coefficients(weight, rows)
        row_gradient(z, y, rows, c, maths=maths, ignore_index=ignore_index, dz=gradient)


def row_gradient(
    z: Tensor,
    y: Tensor,
    rows: Tensor,
    c: Coefficients,
    *,
    maths: RowMaths,
    ignore_index: int,
    dz: Tensor,
    first_column: int = 0,
    vocabulary: int | None = None,
) -> None:
    """See :class:`fused_losses.backends.Backend`."""
    with _device_of(z):
        gradient_kernel.row_gradient(
            z,
            y,
            rows,
            dlogp=c.dlogp.contiguous(),
            dlse=_contiguous(c.dlse),
            dmean=_contiguous(c.dmean),
            dentropy=_contiguous(c.dentropy),
            dz=dz,
            ignore_index=ignore_index,
            pre=maths.pre,
            cap=maths.cap,
            first_column=first_column,
            V=vocabulary or z.shape[-1],
        )


def row_divergence(
    sides: Sides,
    y: Tensor,
    *,
    divergence: Divergence,
    maths: RowMaths,
    teacher_maths: RowMaths,
    ignore_index: int,
    out: Tensor,
    gradient: Tensor | None = None,
    c: Coefficients | None = None,
    share: Tensor | None = None,
    weight: Tensor | None = None,
) -> None:
    """See :class:`fused_losses.backends.Backend`; without a device function, in torch."""
    if divergence.device_fn is None:
        in_torch(
            sides,
            y,
            divergence=divergence,
            maths=maths,
            teacher_maths=teacher_maths,
            ignore_index=ignore_index,
            out=out,
            gradient=gradient,
            c=c,
            share=share,
            weight=weight,
        )
        return
    with _device_of(sides.z):
        divergence_kernel.row_divergence(
            sides.z,
            sides.teacher_z,
            y,
            sides.rows.contiguous(),
            sides.teacher_rows.contiguous(),
            term=divergence.device_fn,
            slope_sum=divergence.slope_sum,
            parameter=divergence.parameter,
            out=out,
            dz=gradient,
            share=_contiguous(share),
            weight=_contiguous(weight),
            dlogp=None if c is None else c.dlogp.contiguous(),
            dlse=None if c is None else _contiguous(c.dlse),
            dmean=None if c is None else _contiguous(c.dmean),
            dentropy=None if c is None else _contiguous(c.dentropy),
            ignore_index=ignore_index,
            pre=maths.pre,
            cap=maths.cap,
            teacher_pre=teacher_maths.pre,
            teacher_cap=teacher_maths.cap,
        )


def segment_sum(x: Tensor, offsets: Tensor) -> Tensor:
    """See :class:`fused_losses.backends.Backend`."""
    out = x.new_empty(offsets.numel() - 1)
    with _device_of(x):
        segment_kernel.segment_sum(x.contiguous(), offsets, out)
    return out


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _device_of(t: Tensor) -> contextlib.AbstractContextManager:
    """Launch on the tensor's own GPU, which need not be the current one."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()
