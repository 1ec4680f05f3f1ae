"""What the operators of the linear path share: planning a call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_losses.backends import RowMaths
from fused_losses.engine.head import Head
from fused_losses.engine.head_call import HeadCall, counted_positions
from fused_losses.plan import LinearShape, Route, plan_linear

Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype]  # of computing, logits, dw's accumulator


def linear_shape(
    w: Tensor,
    maths: RowMaths,
    dtypes: Dtypes,
    backend: str,
    needs: list[bool],
    *,
    label_smoothing: float = 0.0,
    entropy: bool,
    entropy_gradient: bool = False,
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
        smoothing=label_smoothing != 0.0,
        entropy=entropy,
        entropy_gradient=entropy_gradient,
    )


def open_call(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    maths: RowMaths,
    ignore_index: int,
    dtypes: Dtypes,
    budget: int,
    shape: LinearShape,
    routes: Sequence[Route],
) -> HeadCall:
    """Plan a call over the labels that count."""
    positions = counted_positions(y, ignore_index)
    tokens = y.numel() if positions is None else positions.numel()
    plan = plan_linear(routes, tokens, shape, budget)
    return HeadCall(x, y, positions, plan, Head(w, bias, *dtypes[:2]), maths, ignore_index)


def or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    """Operators return tensors always; what is not wanted is empty."""
    return like.new_empty(0) if t is None else t


def deferred(compute_dtype: torch.dtype) -> bool:
    """Whether the factor 1 / count is applied in backward: fp16 dz would be flushed by it."""
    return compute_dtype == torch.float16
