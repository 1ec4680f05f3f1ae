"""Losses of a chunk's logits: whole rows of them go to a function, in the memory of one chunk.

The loop is that of whole units. What differs is what happens between a chunk's row pass and its
gradient products: a step sees the logits, and leaves their gradient in the chunk. So the cost is
that of a token loss, 6 N D V, and 4 with a frozen head, whatever is computed of the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_losses.backends import RowMaths
from fused_losses.engine.call import Call
from fused_losses.engine.gradients import GradientSums
from fused_losses.engine.handover import scale_saved
from fused_losses.engine.once import once_differentiable
from fused_losses.engine.planned import PlannedCall
from fused_losses.engine.unit_sum import UnitChunk, UnitLayout, autocast_of, call_loss
from fused_losses.engine.whole_rows import Chunk, add_chunk, chunks_of
from fused_losses.plan import Plan
from fused_losses.stats import TokenStats

# Gets the statistics of whole units, which units they are, and their logits (R, V).
LogitsLoss = Callable[[TokenStats, UnitChunk, Tensor], Tensor]
# Gets a chunk whose rows are known; returns its loss, 0-d, and puts the gradient of the logits into
# ``chunk.dz`` if the plan has one.
Step = Callable[[Chunk, UnitChunk], Tensor]

# Makes a step from the tokens' weights and a place for their losses.
MakeStep = Callable[[Tensor, Tensor, bool], Step]


def logits_sum(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    layout: UnitLayout,
    call: Call,
    plan: Plan,
    step: Step,
) -> tuple[Tensor, Tensor]:
    """Return the sum of a step's losses over all units, differentiable, and rows (LINES, N)."""
    if plan.has_gradient:
        return _LogitsSum.apply(x, w, bias, y, layout, call, plan, step)
    planned = PlannedCall(x, w, bias, y, layout.positions, call, plan)
    return run_steps(planned, layout, step, None), planned.rows


def run_steps(
    planned: PlannedCall, layout: UnitLayout, step: Step, sums: GradientSums | None
) -> Tensor:
    """Run a step on one chunk after another, and add up its losses and their gradients."""
    total = planned.rows.new_zeros(())
    user_autocast = autocast_of(planned.x.device.type)
    with torch.autocast(planned.x.device.type, enabled=False):
        chunks = layout.chunks(planned.plan.chunks)
        for chunk, units in zip(chunks_of(planned), chunks, strict=True):
            chunk.row_pass(top1=True)
            with user_autocast:
                total += step(chunk, units)
            if sums is not None:
                add_chunk(sums, chunk)
    return total


class _LogitsSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        y: Tensor,
        layout: UnitLayout,
        call: Call,
        plan: Plan,
        step: Step,
    ) -> tuple[Tensor, Tensor]:
        planned = PlannedCall(x, w, bias, y, layout.positions, call, plan)
        sums = GradientSums(planned)
        total = run_steps(planned, layout, step, sums)
        ctx.save_for_backward(x, w, bias, sums.dx, *sums.head_gradients(w, bias))
        ctx.mark_non_differentiable(planned.rows)
        ctx.set_materialize_grads(False)
        return total, planned.rows

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        x, w, bias, *gradients = ctx.saved_tensors
        if dtotal is None:
            return (None,) * 8
        scaled = scale_saved(gradients, [x, w, bias], dtotal)
        return (*once_differentiable(scaled, [dtotal, x, w, bias]), *(None,) * 5)


def logits_each(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    layout: UnitLayout,
    call: Call,
    plans: tuple[Plan, Plan],
    make_step: MakeStep,
) -> tuple[Tensor, Tensor]:
    """Return per-token losses (N,), differentiable, and rows; backward makes the logits again.

    ``plans``: of forward, and of backward.
    """
    return _LogitsEach.apply(x, w, bias, y, layout, call, plans, make_step)


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
    ) -> tuple[Tensor, Tensor]:
        planned = PlannedCall(x, w, bias, y, layout.positions, call, plans[0])
        each = torch.zeros_like(planned.rows[0])
        run_steps(planned, layout, make_step(torch.zeros_like(each), each, False), None)
        ctx.save_for_backward(x, w, bias, y)
        ctx.layout, ctx.call, ctx.plan, ctx.make_step = layout, call, plans[1], make_step
        ctx.mark_non_differentiable(planned.rows)
        ctx.set_materialize_grads(False)
        return each, planned.rows

    @staticmethod
    def backward(ctx: Any, deach: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        x, w, bias, y = ctx.saved_tensors
        if deach is None:
            return (None,) * 8
        with torch.no_grad():
            # Upstream gradients hold 1 / count: brought near 1 while fp16 holds them.
            size = torch.ones_like(deach[:1].sum())
            if ctx.call.linear.deferred and deach.numel():
                size = deach.abs().amax().clamp(min=torch.finfo(deach.dtype).tiny)
            planned = PlannedCall(x, w, bias, y, ctx.layout.positions, ctx.call, ctx.plan)
            sums = GradientSums(planned)
            step = ctx.make_step(deach / size, torch.empty_like(deach), True)
            run_steps(planned, ctx.layout, step, sums)
            found: tuple[Tensor | None, ...] = (sums.dx, *sums.head_gradients(w, bias))
            if ctx.call.linear.deferred:
                found = tuple(
                    t if t is None or own is None else (t * size).to(own.dtype)
                    for t, own in zip(found, (x, w, bias), strict=True)
                )
        return (*once_differentiable(found, [deach, x, w, bias]), *(None,) * 5)


def differentiated(loss_fn: LogitsLoss, call: Call, *, gradient: bool) -> Step:
    """Make a step of a function that torch differentiates."""

    def step(chunk: Chunk, units: UnitChunk) -> Tensor:
        logits = transformed(chunk.z, call.maths, chunk.rows.dtype)
        given = call_loss(loss_fn, chunk.rows, units, call, gradient=gradient, logits=logits)
        loss, c, dlogits = given
        if gradient:
            with torch.no_grad(), torch.autocast(loss.device.type, enabled=False):
                own = None if dlogits is None else raw_gradient(dlogits, logits, call.maths)
                # The statistics' part goes where the logits are, which it is the last to read.
                chunk.differentiate(c, out=chunk.z)
                if own is not None:
                    chunk.z.add_(own)
                if chunk.dz.dtype != chunk.z.dtype:
                    chunk.dz.copy_(chunk.z)
        return loss

    return step


def transformed(z: Tensor, maths: RowMaths, dtype: torch.dtype) -> Tensor:
    """Return ``softcap(scale * z) / temperature`` in a dtype; z itself if that is what it is."""
    if maths == RowMaths():
        return z.to(dtype)
    x = z * maths.pre if z.dtype == dtype else z.to(dtype).mul_(maths.pre)
    return x if maths.cap is None else x.tanh_().mul_(maths.cap)


def raw_gradient(dlogits: Tensor, logits: Tensor, maths: RowMaths) -> Tensor:
    """Return the gradient of the raw logits, from that of the transformed ones."""
    if maths == RowMaths():
        return dlogits
    own = dlogits * maths.factor
    if maths.cap is None:
        return own
    slope = (logits / maths.cap).square_().neg_().add_(1.0)
    return own.mul_(slope)
