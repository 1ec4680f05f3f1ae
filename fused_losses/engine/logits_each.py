"""Per-token losses of a chunk's logits: backward makes the logits again, once weights are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_losses.engine.call import Call
from fused_losses.engine.gradients import GradientSums
from fused_losses.engine.once import once_differentiable
from fused_losses.engine.planned import PlannedCall
from fused_losses.engine.unit_sum import Step, run_steps
from fused_losses.engine.units import UnitLayout
from fused_losses.plan import Plan

# Makes a step from the tokens' weights and a place for their losses, of one shape.
MakeStep = Callable[[Tensor, Tensor, bool], Step]


def logits_each(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    layout: UnitLayout,
    call: Call,
    plans: tuple[Plan, Plan],
    make_step: MakeStep,
    ref: Tensor | None = None,
    value: Tensor | None = None,
    *,
    numbers: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return per-token losses (N,), differentiable, and rows; backward makes the logits again.

    ``plans``: of forward, and of backward. ``ref`` and ``value`` as for ``unit_sum``. ``numbers``:
    how many the step makes of a token, (numbers, N) instead of (N,).
    """
    return _LogitsEach.apply(x, w, bias, y, layout, call, plans, make_step, numbers, ref, value)


class _LogitsEach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        y: Tensor,
        layout: UnitLayout,
        call: Call,
        plans: tuple[Plan, Plan],
        make_step: MakeStep,
        numbers: int | None,
        ref: Tensor | None,
        value: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        planned = PlannedCall(x, w, bias, y, layout.positions, call, plans[0])
        each = torch.zeros_like(planned.rows[0 if numbers is None else slice(numbers)])
        step = make_step(torch.zeros_like(each), each, False)
        run_steps(planned, layout, step, None, ref, value)
        ctx.save_for_backward(x, w, bias, y, ref, value)
        ctx.layout, ctx.call, ctx.plan, ctx.make_step = layout, call, plans[1], make_step
        ctx.mark_non_differentiable(planned.rows)
        ctx.set_materialize_grads(False)
        return each, planned.rows

    @staticmethod
    def backward(ctx: Any, deach: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        x, w, bias, y, ref, value = ctx.saved_tensors
        if deach is None:
            return (None,) * 11
        with torch.no_grad():
            # Upstream gradients hold 1 / count: brought near 1 while fp16 holds them.
            size = torch.ones_like(deach[:1].sum())
            if ctx.call.linear.deferred and deach.numel():
                size = deach.abs().amax().clamp(min=torch.finfo(deach.dtype).tiny)
            planned = PlannedCall(x, w, bias, y, ctx.layout.positions, ctx.call, ctx.plan)
            sums = GradientSums(planned)
            step = ctx.make_step(deach / size, torch.empty_like(deach), True)
            run_steps(planned, ctx.layout, step, sums, ref, value)
            found: tuple[Tensor | None, ...] = (sums.dx, *sums.head_gradients(w, bias))
            if ctx.call.linear.deferred:
                found = tuple(
                    t if t is None or own is None else (t * size).to(own.dtype)
                    for t, own in zip(found, (x, w, bias), strict=True)
                )
        return (*once_differentiable(found, [deach, x, w, bias]), *(None,) * 8)
