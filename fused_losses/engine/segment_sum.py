"""Deterministic sums over consecutive tokens, as a custom operator with a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.backends import load_backend


@torch.library.custom_op("fused_losses::segment_sum", mutates_args=())
def segment_sum(x: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """Return the sums of ``x[offsets[i] : offsets[i + 1]]``: (M,), (S + 1,) int64 -> (S,)."""
    return load_backend(backend).segment_sum(x, offsets)


@segment_sum.register_fake
def _(x: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return x.new_empty(offsets.shape[0] - 1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offsets, _ = inputs
    ctx.save_for_backward(offsets)
    ctx.shape = x.shape


def _backward(ctx: Any, dsums: Tensor) -> tuple[Tensor, None, None]:
    (offsets,) = ctx.saved_tensors
    # The segment of every token; tokens outside all segments get 0.
    at = torch.arange(ctx.shape[0], device=offsets.device)
    segment = torch.searchsorted(offsets, at, right=True) - 1
    inside = (segment >= 0) & (segment < dsums.shape[0])
    if dsums.shape[0] == 0:
        return dsums.new_zeros(ctx.shape), None, None
    taken = dsums[segment.clamp(0, dsums.shape[0] - 1)]
    return torch.where(inside, taken, 0.0), None, None


segment_sum.register_autograd(_backward, setup_context=_setup_context)
