"""A weighted sum of token losses from hidden states, its gradients included, as an operator.

A token's weight is known as soon as its row is, so gradients are formed in forward, by whichever
route is the cheapest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_losses.backends import Weight, weight_at
from fused_losses.engine.call import decode
from fused_losses.engine.gradients import GradientSums, fake_gradients
from fused_losses.engine.handover import scale_saved
from fused_losses.engine.once import once_differentiable
from fused_losses.engine.planned import PlannedCall
from fused_losses.engine.ranges import hidden_gradient, recompute, seen_chunks
from fused_losses.engine.rows import lines, new_rows
from fused_losses.engine.whole_rows import strips_of
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
    factor: Tensor | None,
    changing: Tensor | None,
    encoded: str,
    divisor: float,
) -> tuple[Tensor, list[Tensor]]:
    """Return ``factor * sum(token_weight * loss) / divisor``, and what else is wanted.

    ``x`` (N, D), ``w`` (V, D), ``y`` (N,); ``factor`` 0-d, or None for 1; a ``divisor`` of 0 stands
    for the number of labels that count. Only the sum is differentiable. Beside it come, each if it
    is wanted, dx, dw, db, dvalue, and rows (LINES, N) where the call asks for an entropy.
    """
    call = decode(encoded, changing)
    routes = routes_for(call.shape(x, w), known=True)
    planned = PlannedCall.of(x, w, bias, y, call, routes)
    planned.keep_rows = call.entropy or value is not None or planned.plan.route == "recompute"
    known = _factor(planned, factor, divisor)
    in_row = 1.0 if call.linear.deferred else known
    if token_weight is not None:
        in_row = token_weight.to(planned.rows_dtype) * in_row
    with torch.autocast(x.device.type, enabled=False):
        total, sums = _run(planned, in_row, ref=ref, value=value)
        if sums is not None:
            sums.complete()
    if call.linear.deferred:
        total = total * known
    gradients = (None,) * 3 if sums is None else (sums.dx, *sums.head_gradients(w, bias))
    dvalue = None
    if value is not None and call.objective is not None:
        dvalue = (1.0 + planned.rows[lines.DLOGP]) / call.objective.beta
        dvalue = torch.where(y == call.ignore_index, 0.0, in_row * dvalue).to(value.dtype)
    rows = planned.rows if call.entropy else None
    return total, [t for t in (*gradients, dvalue, rows) if t is not None]


def _factor(planned: PlannedCall, factor: Tensor | None, divisor: float) -> Weight:
    """Return what the sum is multiplied by: a number, or 0-d in the dtype of the rows."""
    if divisor == 0.0 and planned.masked:
        # Nobody may look how many rows count.
        counted = (planned.y != planned.call.ignore_index).sum(dtype=planned.rows_dtype)
        return counted.reciprocal().nan_to_num(posinf=0.0)
    known = 1.0 / (divisor or planned.plan.tokens or math.inf)
    return known if factor is None else factor.to(planned.rows_dtype) * known


def _run(
    planned: PlannedCall, weight: Weight, *, ref: Tensor | None, value: Tensor | None
) -> tuple[Tensor, GradientSums | None]:
    """Return the weighted sum of the losses and its gradients, by the route of the plan."""
    route, objective, top1 = planned.plan.route, planned.call.objective, planned.call.entropy
    total = _Total(planned, weight)
    if objective is None or route in ("forward", "recompute"):
        for seen in seen_chunks(planned, ref=ref, value=value, top1=top1):
            total.add(seen.rows, weight_at(weight, seen.at))
        if objective is None or route == "forward":
            return total.value, None
        c = objective.coefficients(weight, planned.rows)
        return total.value, recompute(planned, planned.rows, c)
    sums = GradientSums(planned)
    if route == "frozen":
        for seen in seen_chunks(planned, keep=True, ref=ref, value=value, top1=top1):
            mine = weight_at(weight, seen.at)
            total.add(seen.rows, mine)
            if sums.dx is not None and seen.kept is not None:
                c = objective.coefficients(mine, seen.rows)
                head, call = planned.head.weight, planned.call
                dx = hidden_gradient(seen.kept, seen.y, seen.rows, c, head, call)
                sums.dx[seen.at] = dx.to(sums.dx.dtype)
        return total.value, sums
    for strip in strips_of(planned, sums):
        mine = weight_at(weight, strip.at)
        strip.row_pass(ref=ref, value=value, weight=mine, top1=top1)
        total.add(strip.rows, mine)
    return total.value, sums


class _Total:
    """The weighted sum of the losses, chunk by chunk; one weight of all is applied at the end."""

    def __init__(self, planned: PlannedCall, weight: Weight) -> None:
        self._planned = planned
        self._sum: Tensor | None = None
        self._of_all = None if isinstance(weight, Tensor) and weight.dim() else weight

    def add(self, rows: Tensor, weight: Weight) -> None:
        """Add a chunk, with the weights of its rows."""
        loss = rows[lines.LOSS]
        found = (loss if self._of_all is not None else weight * loss).sum()
        self._sum = found if self._sum is None else self._sum + found

    @property
    def value(self) -> Tensor:
        """The sum, 0-d."""
        if self._sum is None:
            return self._planned.y.new_zeros((), dtype=self._planned.rows_dtype)
        return self._sum if self._of_all is None else self._sum * self._of_all


@linear_loss_sum.register_fake
def _(x, w, bias, y, ref, value, token_weight, factor, changing, encoded, divisor):
    call = decode(encoded, None)
    head = call.linear
    rows = new_rows(y, head.logits_dtype)
    waiting = torch.float32 if head.deferred else None
    found = [*fake_gradients((x, w, bias), head.needs, dtype=waiting)]
    if value is not None and call.objective is not None:
        found.append(value.new_empty(y.shape))
    return rows.new_empty(()), [*found, *([rows] if call.entropy else [])]


def _setup_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Sequence[Tensor]]) -> None:
    x, w, bias, _y, _ref, value, _token_weight, factor, _changing, encoded, _divisor = inputs
    call = decode(encoded, None)
    ctx.head = call.linear
    ctx.wanted = [*call.linear.needs, value is not None and call.objective is not None]
    _, found = output
    ctx.save_for_backward(x, w, bias, value, factor, *found[: sum(ctx.wanted)])
    ctx.mark_non_differentiable(*found)
    ctx.set_materialize_grads(False)


def _backward_sum(ctx: Any, dtotal: Tensor | None, _: Any) -> tuple[Any, ...]:
    x, w, bias, value, factor, *found = ctx.saved_tensors
    if dtotal is None:
        return (None,) * 11
    saved = [found.pop(0) if want else None for want in ctx.wanted]
    saved[3] = saved[3] if ctx.needs_input_grad[5] else None
    with torch.no_grad():
        scale = dtotal * factor if ctx.head.deferred else dtotal
    scaled = scale_saved(saved, [x, w, bias, value], scale)
    dx, dw, db, dvalue = once_differentiable(scaled, [dtotal, x, w, bias, value])
    return dx, dw, db, None, None, dvalue, *(None,) * 5


linear_loss_sum.register_autograd(_backward_sum, setup_context=_setup_sum)
