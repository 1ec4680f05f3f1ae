"""What the operators of the linear path share: a planned call and the loop over its chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_losses.backends import Objective, RowMaths
from fused_losses.engine.chunks import Chunk, ChunkedHead, GradientSums, counted_positions
from fused_losses.engine.head import Head
from fused_losses.engine.registry import unpack
from fused_losses.engine.rows import Coefficients, lines
from fused_losses.plan import LinearShape, Route, plan_linear

Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype]  # of computing, logits, dw's accumulator


def linear_shape(
    w: Tensor,
    maths: RowMaths,
    dtypes: Dtypes,
    backend: str,
    needs: list[bool],
    *,
    entropy: bool,
    exponentials: bool,
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
        exponentials=exponentials,
    )


def exponentials_serve(
    compute_dtype: torch.dtype, *, label_smoothing: float = 0.0, entropy_gradient: bool = False
) -> bool:
    """Whether the exponentials that a row pass leaves behind serve as the gradient of the logits.

    They do up to a factor per row, which the products take: not for label smoothing and entropies,
    whose gradients are no multiples. 16-bit operands would be rounded once more by that factor:
    measured in bf16, gradient errors of 2.8e-3 instead of 2.1e-3 where a bound of 2.5e-3 is
    promised.
    """
    return compute_dtype.itemsize >= 4 and not (label_smoothing or entropy_gradient)


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
    label_smoothing: float = 0.0,
) -> ChunkedHead:
    """Plan a call over the labels that count and set up its loop."""
    maths, _ = unpack("", options)
    positions = counted_positions(y, ignore_index)
    tokens = y.numel() if positions is None else positions.numel()
    exponentials = exponentials_serve(dtypes[0], label_smoothing=label_smoothing)
    shape = linear_shape(
        w, maths, dtypes, backend, needs, entropy=entropy, exponentials=exponentials
    )
    plan = plan_linear(route, tokens, shape, budget)
    head = Head(w, bias, *dtypes[:2])
    return ChunkedHead(x, y, positions, plan, head, maths, ignore_index)


def sum_gradients(
    call: ChunkedHead,
    needs: list[bool],
    accum_dtype: torch.dtype,
    differentiate: Callable[[Chunk], None],
) -> GradientSums:
    """Let ``differentiate`` fill ``dz`` of every chunk, and sum what the chunks contribute."""
    sums = GradientSums(call, needs, accum_dtype)
    for chunk in call:
        differentiate(chunk)
        sums.add(chunk)
    return sums


def or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    """Operators return tensors always; what is not wanted is empty."""
    return like.new_empty(0) if t is None else t


def deferred(compute_dtype: torch.dtype) -> bool:
    """Whether the factor 1 / count is applied in backward: fp16 dz would be flushed by it."""
    return compute_dtype == torch.float16


def run_row_pass(
    chunk: Chunk,
    objective: Objective | None,
    row_weight: Tensor | None,
    **options: Any,
) -> None:
    """Run a token loss over a chunk and, given its rows' weights (N,), differentiate it."""
    if row_weight is None or objective is None:
        chunk.row_pass(objective=objective, overwrite=True, **options)
        return
    eps = objective.label_smoothing
    exponentials = exponentials_serve(chunk.dz.dtype, label_smoothing=eps)
    chunk.row_pass(objective=objective, exponentials=exponentials, **options)
    w = row_weight[chunk.at]
    dlse = w * chunk.rows[lines.DLSE] if eps or objective.z_loss else None
    dmean = -eps * w if eps else None
    chunk.differentiate(Coefficients(w * chunk.rows[lines.DLOGP], dlse, dmean))
