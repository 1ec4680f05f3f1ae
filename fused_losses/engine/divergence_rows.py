"""Divergences of a student's rows of logits from a teacher's: what is asked for; from logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_losses.backends import Objective, RowMaths, Sides, lines, load_backend
from fused_losses.divergences import Divergence
from fused_losses.engine.once import once_differentiable
from fused_losses.engine.rows import Coefficients, new_rows


@dataclass(frozen=True)
class DivergenceCall:
    """A divergence of two models, and a loss of the label beside it.

    Attributes:
        divergence: Of teacher and student.
        maths: Transform of the student's logits.
        teacher_maths: Transform of the teacher's logits.
        ignore_index: Label of rows that do not count.
        backend: Name of the backend.
        weight: Of the divergence.
        objective: Token loss beside it, which the student's row results hold; or None, and then
        mle_weight: Weight of the label's surprise.
        z_loss: lambda of ``lambda * lse**2`` of the student.
    """

    divergence: Divergence
    maths: RowMaths
    teacher_maths: RowMaths
    ignore_index: int
    backend: str
    weight: float = 1.0
    objective: Objective | None = None
    mle_weight: float = 0.0
    z_loss: float = 0.0

    def row_pass(self, z: Tensor, y: Tensor, *, teacher: bool, entropy: bool = False) -> Tensor:
        """Return the row results (LINES, N) of one side's logits."""
        rows = new_rows(y, z.dtype)
        load_backend(self.backend).row_pass(
            z,
            y,
            rows,
            maths=self.teacher_maths if teacher else self.maths,
            ignore_index=self.ignore_index,
            entropy=entropy,
            top1=not teacher,
        )
        return rows

    def divergences(
        self,
        sides: Sides,
        y: Tensor,
        *,
        gradient: Tensor | None = None,
        c: Coefficients | None = None,
        share: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Return the divergence of each row, (N,); see ``Backend.row_divergence``."""
        out = torch.empty_like(sides.rows[0])
        load_backend(self.backend).row_divergence(
            sides,
            y,
            divergence=self.divergence,
            maths=self.maths,
            teacher_maths=self.teacher_maths,
            ignore_index=self.ignore_index,
            out=out,
            gradient=gradient,
            c=c,
            share=share,
            weight=weight,
        )
        return out

    def fill(
        self, sides: Sides, y: Tensor, weight: Tensor, gradient: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return losses and divergences of rows, (N,) each; fill their weighted sum's gradient."""
        c = share = None
        if gradient is not None:
            c = self._coefficients(sides.rows)
            share = None if self.weight == 1.0 else torch.full_like(sides.rows[0], self.weight)
        found = self.divergences(sides, y, gradient=gradient, c=c, share=share, weight=weight)
        return self._losses(found, sides.rows), found

    def _losses(self, divergences: Tensor, rows: Tensor) -> Tensor:
        loss = divergences if self.weight == 1.0 else self.weight * divergences
        if self.objective is not None:
            return loss + rows[lines.LOSS]
        if self.mle_weight:  # not 0 times what may be infinite
            loss = loss - self.mle_weight * rows[lines.LOGP]
        return loss + self.z_loss * rows[lines.LSE].square() if self.z_loss else loss

    def _coefficients(self, rows: Tensor) -> Coefficients | None:
        """What the losses beside the divergence give."""
        one = torch.ones_like(rows[0])
        if self.objective is not None:
            return self.objective.coefficients(one, rows)
        if not (self.mle_weight or self.z_loss):
            return None
        dlse = 2.0 * self.z_loss * rows[lines.LSE] if self.z_loss else None
        return Coefficients(-self.mle_weight * one, dlse)


def logits_divergence(
    z: Tensor,
    teacher_z: Tensor,
    y: Tensor,
    call: DivergenceCall,
    *,
    entropy: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """Return per-token losses (N,), differentiable, and the student's rows (LINES, N).

    ``z`` and ``teacher_z`` are (B, T, V) of any strides, ``y`` is (N,).
    """
    return _LogitsDivergence.apply(z, teacher_z, y, call, entropy, inplace)


class _LogitsDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        teacher_z: Tensor,
        y: Tensor,
        call: DivergenceCall,
        entropy: bool,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:
        rows = call.row_pass(z, y, teacher=False, entropy=entropy)
        teacher_rows = call.row_pass(teacher_z, y, teacher=True)
        sides = Sides(z, teacher_z, rows, teacher_rows)
        each, _ = call.fill(sides, y, rows[lines.SUM], None)
        ctx.call, ctx.inplace = call, inplace
        ctx.save_for_backward(z, teacher_z, y, rows, teacher_rows)
        ctx.mark_non_differentiable(rows)
        ctx.set_materialize_grads(False)
        return each, rows

    @staticmethod
    def backward(ctx: Any, deach: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        z, teacher_z, y, rows, teacher_rows = ctx.saved_tensors
        if deach is None or not ctx.needs_input_grad[0]:
            return (None,) * 6
        with torch.no_grad():
            given = z.detach()
            dz = given if ctx.inplace else given.new_empty(given.shape)
            sides = Sides(given, teacher_z, rows, teacher_rows)
            ctx.call.fill(sides, y, deach.to(rows.dtype).contiguous(), dz)
            if ctx.inplace:
                # A second backward must find out that the logits are gone.
                torch.autograd.graph.increment_version(z)
        return (*once_differentiable([dz], [z, deach]), *(None,) * 5)
