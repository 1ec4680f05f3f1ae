"""Deterministic sums over runs of equal ids, with a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch

from fused_losses.backends import load_backend


def segment_sum(
    x: Tensor, ids: Tensor, count: int, backend: str, offsets: Tensor | None = None
) -> Tensor:
    """Sum the entries of each id.

    Args:
        x: (M,).
        ids: (M,) integers in [0, count), ascending.
        count: Number of sums.
        backend: Resolved name.
        offsets: (count + 1,) where each id's entries begin, if that is known.

    Returns:
        (count,), 0 for an id without entries; differentiable any number of times.
    """
    batched = not torch.compiler.is_compiling() and functorch.is_batchedtensor(x)
    form = _BatchedSegmentSum if batched else _SegmentSum
    return form.apply(x, ids, count, backend, offsets)


def _sum_of(x: Tensor, ids: Tensor, count: int, backend: str, offsets: Tensor | None) -> Tensor:
    if offsets is None:
        wanted = torch.arange(count + 1, device=ids.device, dtype=ids.dtype)
        offsets = torch.searchsorted(ids.contiguous(), wanted)
    return sum_between(x, offsets, backend)


# The operator's own autograd takes longer than both passes of the sum.
class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ids: Tensor, count: int, backend: str, offsets: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(ids)
        return _sum_of(x, ids, count, backend, offsets)

    @staticmethod
    def backward(ctx: Any, dsums: Tensor) -> tuple[Tensor, None, None, None, None]:
        (ids,) = ctx.saved_tensors
        return dsums[ids], None, None, None, None


class _BatchedSegmentSum(torch.autograd.Function):
    """In the form that ``torch.func.vmap`` asks for, whose calls take twice as long."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, ids: Tensor, count: int, backend: str, offsets: Tensor | None) -> Tensor:
        return _sum_of(x, ids, count, backend, offsets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    backward = _SegmentSum.backward


@torch.library.custom_op("fused_losses::segment_sum", mutates_args=())
def sum_between(x: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """Return the sums of ``x[offsets[i] : offsets[i + 1]]``: (M,), (S + 1,) int64 -> (S,)."""
    return load_backend(backend).segment_sum(x, offsets)


@sum_between.register_fake
def _(x: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return x.new_empty(offsets.shape[0] - 1)
