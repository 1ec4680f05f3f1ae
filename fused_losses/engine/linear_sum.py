"""A weighted sum of token losses from hidden states, its gradients included, as an operator.

A token's weight is known as soon as its row is, so gradients are formed in forward, by whichever
route is the cheapest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.backends import Objective
from fused_losses.engine.chunks import add_chunk, chunks_of
from fused_losses.engine.gradients import GradientSums
from fused_losses.engine.handover import scale_saved
from fused_losses.engine.head_call import HeadCall
from fused_losses.engine.linear_call import (
    deferred,
    linear_shape,
    open_call,
    or_empty,
)
from fused_losses.engine.once import once_differentiable
from fused_losses.engine.registry import unpack
from fused_losses.engine.rows import lines, new_rows
from fused_losses.engine.tiles import blocks_of, hidden_gradient, recompute
from fused_losses.plan import routes_for


@torch.library.custom_op("fused_losses::linear_loss_sum", mutates_args=())
def linear_loss_sum(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    ref: Tensor | None,
    value: Tensor | None,
    token_weight: Tensor | None,
    factor: Tensor,
    changing: Tensor | None,
    loss: str,
    options: list[float],
    ignore_index: int,
    entropy: bool,
    compute_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    accum_dtype: torch.dtype,
    budget: int,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ``factor * sum(token_weight * loss)``, rows (LINES, N), and dx, dw, db, dvalue.

    ``x`` (N, D), ``w`` (V, D), ``y`` (N,), ``factor`` 0-d; ``needs`` says which of dx, dw, db to
    make. Only the sum is differentiable.
    """
    dtypes = (compute_dtype, logits_dtype, accum_dtype)
    maths, objective = unpack(loss, options, changing)
    smoothing = 0.0 if objective is None else objective.label_smoothing
    shape = linear_shape(
        w, maths, dtypes, backend, needs, label_smoothing=smoothing, entropy=entropy
    )
    routes = routes_for(shape, known=True)
    call = open_call(x, w, bias, y, maths, ignore_index, dtypes, budget, shape, routes)
    dtype = call.rows.dtype
    weight = _row_weight(token_weight, factor, y, dtype)
    wait = deferred(compute_dtype)
    in_row = _row_weight(token_weight, torch.ones_like(factor), y, dtype) if wait else weight
    row_options = dict(objective=objective, ref=ref, value=value, entropy=entropy, top1=entropy)
    with torch.autocast(x.device.type, enabled=False):
        sums = _run(call, objective, in_row, needs, accum_dtype, row_options)
    dx, dw, db = (None,) * 3 if sums is None else (sums.dx, *sums.head_gradients(w, bias))
    rows = call.rows
    total = (weight * rows[lines.LOSS]).sum()
    dvalue = None
    if value is not None and objective is not None:
        dvalue = (1.0 + rows[lines.DLOGP]) / objective.beta
        dvalue = torch.where(y == ignore_index, 0.0, in_row * dvalue).to(value.dtype)
    dx, dw, db, dvalue = (or_empty(t, rows) for t in (dx, dw, db, dvalue))
    return total, rows, dx, dw, db, dvalue


def _run(
    call: HeadCall,
    objective: Objective | None,
    weight: Tensor,
    needs: list[bool],
    accum_dtype: torch.dtype,
    row_options: dict[str, Any],
) -> GradientSums | None:
    """Fill ``call.rows`` and return the gradients, by the route of the plan."""
    route = call.plan.route
    if route == "forward" or objective is None:
        for _ in blocks_of(call, **row_options):
            pass
        return None
    if route == "recompute":
        for _ in blocks_of(call, **row_options):
            pass
        c = objective.coefficients(weight, call.rows)
        return recompute(call, call.rows, c, needs, accum_dtype)
    sums = GradientSums(call, needs, accum_dtype)
    if route == "frozen":
        for block in blocks_of(call, keep=True, **row_options):
            if sums.dx is not None and block.kept is not None:
                c = objective.coefficients(weight[block.at], block.rows)
                head = call.head.weight
                dx = hidden_gradient(block.kept, block.y, block.rows, c, head, call.maths)
                sums.dx[block.at] = dx.to(sums.dx.dtype)
        return sums
    for chunk in chunks_of(call):
        if call.plan.exponentials:
            chunk.row_pass(exponentials=True, **row_options)
            chunk.differentiate(objective.coefficients(weight[chunk.at], chunk.rows))
        else:
            chunk.row_pass(weight=weight, **row_options)
        add_chunk(sums, chunk)
    return sums


def _row_weight(
    token_weight: Tensor | None, factor: Tensor, y: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the weight of each row's loss, (N,)."""
    factor = factor.to(dtype)
    return factor.expand(y.shape) if token_weight is None else token_weight.to(dtype) * factor


@linear_loss_sum.register_fake
def _(x, w, bias, y, ref, value, token_weight, factor, changing, loss, options, ignore_index,
      entropy, compute_dtype, logits_dtype, accum_dtype, budget, backend, needs):  # fmt: skip
    rows = new_rows(y, logits_dtype)
    waiting = torch.float32 if deferred(compute_dtype) else None
    gradients = (
        torch.empty_like(t, dtype=waiting, memory_format=torch.contiguous_format) if need else None
        for t, need in zip((x, w, bias), needs, strict=True)
    )
    dvalue = None if value is None else value.new_empty(y.shape)
    return rows.new_empty(()), rows, *(or_empty(t, rows) for t in (*gradients, dvalue))


def _setup_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (
        x,
        w,
        bias,
        _y,
        _ref,
        value,
        _tw,
        factor,
        *_,
        compute_dtype,
        _logits,
        _accum,
        _budget,
        _backend,
        needs,
    ) = inputs
    ctx.save_for_backward(x, w, bias, value, factor, *output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.needs, ctx.deferred = needs, deferred(compute_dtype)


def _backward_sum(ctx: Any, dtotal: Tensor | None, *_: Any) -> tuple[Any, ...]:
    x, w, bias, value, factor, *gradients = ctx.saved_tensors
    none = (None,) * 19
    if dtotal is None:
        return none
    wanted = [*ctx.needs, ctx.needs_input_grad[5]]
    saved = [t if want else None for t, want in zip(gradients, wanted, strict=True)]
    with torch.no_grad():
        scale = dtotal * factor if ctx.deferred else dtotal
    scaled = scale_saved(saved, [x, w, bias, value], scale)
    dx, dw, db, dvalue = once_differentiable(scaled, [dtotal, x, w, bias, value])
    return (dx, dw, db, None, None, dvalue, *none[6:])


linear_loss_sum.register_autograd(_backward_sum, setup_context=_setup_sum)
