"""What the operators of the linear path share: a planned call and the loop over its chunks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_losses.backends import RowMaths
from fused_losses.engine.chunks import Chunk, ChunkedHead, GradientSums, counted_positions
from fused_losses.engine.head import Head
from fused_losses.engine.registry import unpack
from fused_losses.plan import LinearShape, Route, plan_linear

Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype]  # of computing, logits, dw's accumulator


def linear_shape(
    w: Tensor, maths: RowMaths, dtypes: Dtypes, backend: str, needs: list[bool], entropy: bool
) -> LinearShape:
    """Describe a call to the planner; ``needs``: gradients of input, weight, bias."""
    need_dx, need_dw, need_db = needs
    return LinearShape(
        hidden=w.shape[1],
        vocabulary=w.shape[0],
        compute_dtype=dtypes[0],
        logits_dtype=dtypes[1],
        backend=backend,
        need_dx=need_dx,
        need_dw=need_dw,
        need_db=need_db,
        softcap=maths.softcap is not None,
        entropy=entropy,
    )


def open_call(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    options: list[float],
    ignore_index: int,
    dtypes: Dtypes,
    budget: int,
    backend: str,
    *,
    route: Route,
    needs: list[bool],
    entropy: bool,
) -> ChunkedHead:
    """Plan a call over the labels that count and set up its loop."""
    maths, _ = unpack("", options)
    positions = counted_positions(y, ignore_index)
    tokens = y.numel() if positions is None else positions.numel()
    shape = linear_shape(w, maths, dtypes, backend, needs, entropy)
    plan = plan_linear(route, tokens, shape, budget)
    head = Head(w, bias, *dtypes[:2])
    return ChunkedHead(x, y, positions, plan, head, maths, ignore_index)


def sum_gradients(
    call: ChunkedHead,
    needs: list[bool],
    accum_dtype: torch.dtype,
    make_dz: Callable[[Chunk], None],
) -> GradientSums:
    """Let ``make_dz`` fill ``dz`` of every chunk, and sum what the chunks contribute."""
    sums = GradientSums(call, needs, accum_dtype)
    for chunk in call:
        make_dz(chunk)
        sums.add(chunk)
    return sums


def or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    """Operators return tensors always; what is not wanted is empty."""
    return like.new_empty(0) if t is None else t


def deferred(compute_dtype: torch.dtype) -> bool:
    """Whether the factor 1 / count is applied in backward: fp16 dz would be flushed by it."""
    return compute_dtype == torch.float16
