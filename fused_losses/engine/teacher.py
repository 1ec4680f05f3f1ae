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

from fused_losses.backends import Sides
from fused_losses.chunk_bytes import row_stride
from fused_losses.engine.divergence_rows import DivergenceCall
from fused_losses.engine.head import Head
from fused_losses.engine.unit_sum import Step
from fused_losses.engine.units import UnitChunk
from fused_losses.engine.whole_rows import Chunk


@dataclass
class Teacher:
    """A teacher's hidden states (N, D') and head, and memory for a chunk's logits."""

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
        gradient: Whether chunks get the gradient of the weighted sum.
        seen: Is told of each chunk: positions (R,), divergences (R,), row results (LINES, R).
    """

    def step(chunk: Chunk, units: UnitChunk) -> Tensor:
        at = units.positions
        with torch.no_grad():
            teacher_z = teacher.logits(at, call.backend)
            teacher_rows = call.row_pass(teacher_z, chunk.y, teacher=True)
            sides = Sides(chunk.z, teacher_z, chunk.rows, teacher_rows)
            mine = weight[at].to(chunk.rows.dtype)
            loss, found = call.fill(sides, chunk.y, mine, chunk.dz if gradient else None)
            each[at] = loss
            if seen is not None:
                seen(at, found, chunk.rows)
            return (mine * loss).sum()

    return step
