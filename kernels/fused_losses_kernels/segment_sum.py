"""Sums of consecutive values: one program per segment, in a fixed order, no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_losses_kernels.operands import check_per_row

_BLOCK = 1024


@triton.jit
def _segment_sum_kernel(x_ptr, offsets_ptr, out_ptr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    segment = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets_ptr + segment)
    end = tl.load(offsets_ptr + segment + 1)
    total = tl.zeros((BLOCK,), ACC)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK).to(tl.int64)
        total += tl.load(x_ptr + at, mask=at < end, other=0.0).to(ACC)
    tl.store(out_ptr + segment, tl.sum(total, axis=0))


def segment_sum(
    x: Tensor,  # (M,) contiguous
    offsets: Tensor,  # (S + 1,) int64, ascending
    out: Tensor,  # (S,)
) -> None:
    """Write ``out[i] = x[offsets[i] : offsets[i + 1]].sum()``.

    Raises:
        ValueError: Operands that the kernel would read or write at wrong places.
    """
    check_per_row(x.numel(), x=x)
    check_per_row(offsets.numel() - 1, out=out)
    if offsets.dim() != 1 or offsets.dtype != torch.int64 or not offsets.is_contiguous():
        raise ValueError(
            f"offsets must be a contiguous vector of int64, got {tuple(offsets.shape)} of "
            f"{offsets.dtype} with strides {offsets.stride()}"
        )
    if out.numel():
        acc = tl.float64 if x.element_size() == 8 else tl.float32
        _segment_sum_kernel[(out.numel(),)](x, offsets, out, ACC=acc, BLOCK=_BLOCK)
