"""Divergences of two heads' distributions from hidden states: both logits of a chunk at a time.

A chunk's logits of the teacher are made beside the student's, without a gradient, and give way to
those of the next chunk: 2 + 2 + 4 N D V FLOPs for heads alike, 2 + 2 + 2 with the student's frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_losses.engine.call import Call
from fused_losses.engine.divergence_rows import DivergenceCall, Sides, fill
from fused_losses.engine.gradients import GradientSums
from fused_losses.engine.head import Head
from fused_losses.engine.logits_sum import Step, run_steps
from fused_losses.engine.once import once_differentiable
from fused_losses.engine.planned import PlannedCall
from fused_losses.engine.unit_sum import UnitChunk, UnitLayout
from fused_losses.engine.whole_rows import Chunk
from fused_losses.plan import Plan


@dataclass
class Teacher:
    """A teacher's hidden states (N, D') and head, and memory for a chunk's logits."""

    x: Tensor
    head: Head
    _memory: list[Tensor] = field(default_factory=list)

    def logits(self, at: Tensor) -> Tensor:
        """Return the raw logits of some positions, (R, V), in memory that the next call reuses."""
        R, V = at.numel(), self.head.vocabulary
        if not self._memory or self._memory[0].numel() < R * V:
            self._memory[:] = []  # before more is asked for
            self._memory.append(self.x.new_empty(R * V, dtype=self.head.logits_dtype))
        z = self._memory[0][: R * V].view(R, V)
        self.head.logits(self.x[at].to(self.head.compute_dtype), z)
        return z


def divergence_step(
    teacher: Teacher, weight: Tensor, each: Tensor, call: DivergenceCall, *, gradient: bool
) -> Step:
    """Make a step that fills in the losses of its tokens, and gives their weighted sum.

    Args:
        teacher: The other side.
        weight: (N,) of each token's loss.
        each: (N,) where the losses go.
        call: What is asked for.
        gradient: Whether chunks get the gradient of the weighted sum.
    """

    def step(chunk: Chunk, units: UnitChunk) -> Tensor:
        at = units.positions
        with torch.no_grad(), torch.autocast(chunk.z.device.type, enabled=False):
            teacher_z = teacher.logits(at)
            teacher_rows = call.row_pass(teacher_z, chunk.y, teacher=True)
            sides = Sides(chunk.z, teacher_z, chunk.rows, teacher_rows)
            mine = weight[at].to(chunk.rows.dtype)
            loss = fill(sides, chunk.y, mine, call, chunk.dz if gradient else None)
            each[at] = loss
            return (mine * loss).sum()

    return step


# Makes a step from the tokens' weights and a place for their losses.
MakeStep = Callable[[Tensor, Tensor, bool], Step]


def each_divergence(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    layout: UnitLayout,
    call: Call,
    plans: tuple[Plan, Plan],
    make_step: MakeStep,
) -> tuple[Tensor, Tensor]:
    """Return per-token losses (N,), differentiable, and rows; backward makes both logits again.

    ``plans``: of forward, and of backward.
    """
    return _EachDivergence.apply(x, w, bias, y, layout, call, plans, make_step)


class _EachDivergence(torch.autograd.Function):
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
