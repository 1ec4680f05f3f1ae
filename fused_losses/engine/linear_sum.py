"""A weighted sum of token losses from hidden states, its gradients included, as an operator.

A token's weight is known as soon as its row is, so gradients are formed in forward, by whichever
route is the cheapest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.engine.call import decode
from fused_losses.engine.gradients import GradientSums, fake_gradients, or_empty
from fused_losses.engine.handover import scale_saved
from fused_losses.engine.once import once_differentiable
from fused_losses.engine.planned import PlannedCall
from fused_losses.engine.ranges import hidden_gradient, recompute, seen_chunks
from fused_losses.engine.rows import lines, new_rows
from fused_losses.engine.whole_rows import add_chunk, chunks_of
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
    encoded: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ``factor * sum(token_weight * loss)``, rows (LINES, N), and dx, dw, db, dvalue.

    ``x`` (N, D), ``w`` (V, D), ``y`` (N,), ``factor`` 0-d. Only the sum is differentiable.
    """
    call = decode(encoded, changing)
    planned = PlannedCall.of(x, w, bias, y, call, routes_for(call.shape(x, w), known=True))
    rows = planned.rows
    weight = _row_weight(token_weight, factor, y, rows.dtype)
    in_row = weight
    if call.linear.deferred:
        in_row = _row_weight(token_weight, torch.ones_like(factor), y, rows.dtype)
    with torch.autocast(x.device.type, enabled=False):
        sums = _run(planned, in_row, ref=ref, value=value)
        if sums is not None:
            sums.complete()
    gradients = (None,) * 3 if sums is None else (sums.dx, *sums.head_gradients(w, bias))
    total = (weight * rows[lines.LOSS]).sum()
    dvalue = None
    if value is not None and call.objective is not None:
        dvalue = (1.0 + rows[lines.DLOGP]) / call.objective.beta
        dvalue = torch.where(y == call.ignore_index, 0.0, in_row * dvalue).to(value.dtype)
    dx, dw, db, dvalue = (or_empty(t, rows) for t in (*gradients, dvalue))
    return total, rows, dx, dw, db, dvalue


def _run(
    planned: PlannedCall, weight: Tensor, *, ref: Tensor | None, value: Tensor | None
) -> GradientSums | None:
    """Fill ``planned.rows`` and return the gradients, by the route of the plan."""
    route, objective, top1 = planned.plan.route, planned.call.objective, planned.call.entropy
    if objective is None or route in ("forward", "recompute"):
        for _ in seen_chunks(planned, ref=ref, value=value, top1=top1):
            pass
        if objective is None or route == "forward":
            return None
        return recompute(planned, planned.rows, objective.coefficients(weight, planned.rows))
    sums = GradientSums(planned)
    if route == "frozen":
        for seen in seen_chunks(planned, keep=True, ref=ref, value=value, top1=top1):
            if sums.dx is not None and seen.kept is not None:
                c = objective.coefficients(weight[seen.at], seen.rows)
                head, call = planned.head.weight, planned.call
                dx = hidden_gradient(seen.kept, seen.y, seen.rows, c, head, call)
                sums.dx[seen.at] = dx.to(sums.dx.dtype)
        return sums
    for chunk in chunks_of(planned):
        chunk.row_pass(ref=ref, value=value, weight=weight, top1=top1)
        add_chunk(sums, chunk)
    return sums


def _row_weight(
    token_weight: Tensor | None, factor: Tensor, y: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the weight of each row's loss, (N,)."""
    factor = factor.to(dtype)
    return factor.expand(y.shape) if token_weight is None else token_weight.to(dtype) * factor


@linear_loss_sum.register_fake
def _(x, w, bias, y, ref, value, token_weight, factor, changing, encoded):
    head = decode(encoded, None).linear
    rows = new_rows(y, head.logits_dtype)
    waiting = torch.float32 if head.deferred else None
    gradients = fake_gradients((x, w, bias), head.needs, rows, dtype=waiting)
    dvalue = rows.new_empty(0) if value is None else value.new_empty(y.shape)
    return rows.new_empty(()), rows, *gradients, dvalue


def _setup_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w, bias, _y, _ref, value, _token_weight, factor, _changing, encoded = inputs
    ctx.save_for_backward(x, w, bias, value, factor, *output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.head = decode(encoded, None).linear


def _backward_sum(ctx: Any, dtotal: Tensor | None, *_: Any) -> tuple[Any, ...]:
    x, w, bias, value, factor, *gradients = ctx.saved_tensors
    if dtotal is None:
        return (None,) * 10
    wanted = [*ctx.head.needs, ctx.needs_input_grad[5]]
    saved = [t if want else None for t, want in zip(gradients, wanted, strict=True)]
    with torch.no_grad():
        scale = dtotal * factor if ctx.head.deferred else dtotal
    scaled = scale_saved(saved, [x, w, bias, value], scale)
    dx, dw, db, dvalue = once_differentiable(scaled, [dtotal, x, w, bias, value])
    return dx, dw, db, None, None, dvalue, None, None, None, None


linear_loss_sum.register_autograd(_backward_sum, setup_context=_setup_sum)
