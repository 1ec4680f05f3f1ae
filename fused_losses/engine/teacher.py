"""Divergences of two heads' distributions from hidden states: both logits of a strip at a time.

A strip's logits of the teacher are made beside the student's, without a gradient, and give way to
those of the next one: 2 + 2 + 4 N D V FLOPs for heads alike, 2 + 2 + 2 with the student's frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fused_losses.backends import Coefficients, Sides, lines
from fused_losses.chunk_bytes import row_stride
from fused_losses.engine.call import Call
from fused_losses.engine.divergence_rows import DivergenceCall
from fused_losses.engine.head import Head
from fused_losses.engine.unit_sum import Step, autocast_of, call_loss
from fused_losses.engine.units import UnitChunk
from fused_losses.engine.whole_rows import Strip
from fused_losses.stats import TokenStats


@dataclass
class Teacher:
    """A teacher's hidden states (N, D') and head, and memory for a strip's logits."""

    x: Tensor
    head: Head
    _memory: list[Tensor] = field(default_factory=list)

    @property
    def shape(self) -> dict[str, Any]:
        """What the planner is to know of it: see ``LinearShape``."""
        return {"teacher_hidden": self.x.shape[-1], "teacher_dtype": self.head.compute_dtype}

    def logits(self, at: Tensor, backend: str) -> Tensor:
        """Return the raw logits of some positions, (R, V), in memory that the next call reuses."""
        R, V = at.numel(), self.head.vocabulary
        stride = row_stride(V, backend)
        if not self._memory or self._memory[0].numel() < R * stride:
            self._memory[:] = []  # before more is asked for
            self._memory.append(self.x.new_empty(R * stride, dtype=self.head.logits_dtype))
        z = self._memory[0][: R * stride].view(R, stride)[:, :V]
        self.head.logits(self.x[at].to(self.head.compute_dtype), z)
        return z


def _sides(teacher: Teacher, strip: Strip, at: Tensor, call: DivergenceCall) -> Sides:
    z = teacher.logits(at, call.backend)
    return Sides(strip.z, z, strip.rows, call.row_pass(z, strip.y, teacher=True))


def divergence_step(
    teacher: Teacher,
    weight: Tensor,
    each: Tensor,
    call: DivergenceCall,
    *,
    gradient: bool,
    seen: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> Step:
    """Make a step that fills in the losses of its tokens, and gives their weighted sum.

    Args:
        teacher: The other side.
        weight: (N,) of each token's loss.
        each: (N,) where the losses go.
        call: What is asked for.
        gradient: Whether strips get the gradient of the weighted sum.
        seen: Is told of each strip: positions (R,), divergences (R,), row results (LINES, R).
    """

    def step(strip: Strip, units: UnitChunk) -> Tensor:
        at = units.positions
        with torch.no_grad():
            sides = _sides(teacher, strip, at, call)
            mine = weight[at].to(strip.rows.dtype)
            loss, found = call.fill(sides, strip.y, mine, strip.dz if gradient else None)
            each[at] = loss
            if seen is not None:
                seen(at, found, strip.rows)
            return (mine * loss).sum()

    return step


def step_beside_a_divergence(
    teacher: Teacher,
    loss_fn: Callable[[TokenStats, UnitChunk, Tensor], Tensor],
    call: Call,
    asked: DivergenceCall,
    *,
    gradient: bool,
    seen: Callable[[Tensor, Tensor], None],
) -> Step:
    """Make a step of a function of log-probs and divergences, under the autocast of now.

    Args:
        teacher: The other side.
        loss_fn: ``(stats, units, divergences) -> 0-d loss``, linear in the divergences: what each
            of them weighs is known before they are, and one pass makes them and the gradient.
        call: What the row passes are asked for.
        asked: The divergence.
        gradient: Whether strips get the gradient of the loss.
        seen: Is told of each strip: positions (R,), divergences (R,).
    """
    user_autocast = autocast_of(teacher.x.device.type)

    def step(strip: Strip, units: UnitChunk) -> Tensor:
        at = units.positions
        with torch.no_grad():
            sides = _sides(teacher, strip, at, asked)
            found = None if gradient else asked.divergences(sides, strip.y)
        also = torch.zeros_like(strip.rows[0]) if found is None else found
        with user_autocast:
            loss, c, weight = call_loss(
                loss_fn, strip.rows, units, call, gradient=gradient, own=False, also=also
            )
        if found is None:
            found = _with_gradient(strip, sides, asked, c, weight)
            loss = loss if weight is None else loss + (weight * found).sum()
        seen(at, found)
        return loss

    return step


def step_of_both(
    teacher: Teacher, weight: Tensor, each: Tensor, call: Call, asked: DivergenceCall,
    *, gradient: bool,
) -> Step:  # fmt: skip
    """Make a step that fills in log-probs, entropies and divergences, ``each`` (3, N).

    ``weight`` (3, N) is what the gradient is to weigh them by; the step's own loss is 0.
    """

    def step(strip: Strip, units: UnitChunk) -> Tensor:
        at = units.positions
        rows = strip.rows
        with torch.no_grad():
            sides = _sides(teacher, strip, at, asked)
            if gradient:
                dlogp, dentropy, share = weight[:, at].to(rows.dtype)
                c = Coefficients(dlogp, dentropy=dentropy if call.linear.entropy_gradient else None)
                found = _with_gradient(strip, sides, asked, c, share)
            else:
                found = asked.divergences(sides, strip.y)
            each[:, at] = torch.stack([rows[lines.LOGP], rows[lines.ENTROPY], found])
        return found.new_zeros(())

    return step


def _with_gradient(
    strip: Strip, sides: Sides, asked: DivergenceCall, c: Coefficients, weight: Tensor | None
) -> Tensor:
    """Return divergences (R,), and fill in the gradient of them, weighted, and of the rows."""
    if weight is not None:
        return asked.divergences(sides, strip.y, gradient=strip.dz, c=c, share=weight)
    found = asked.divergences(sides, strip.y)  # before the gradient takes the logits' place
    strip.differentiate(c)
    return found
