"""Divergences of rows of logits, a student's and a teacher's, and their gradients, in torch.

The row passes have found the log-normalisers of both sides. What is left is elementwise, and two
sums of a row; it runs a block of rows at a time, so that what is made on the way stays small.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses.backends import RowMaths, lines, load_backend
from fused_losses.chunk_bytes import divergence_block
from fused_losses.divergences import Divergence
from fused_losses.engine.logits_step import raw_gradient, transformed
from fused_losses.engine.once import once_differentiable
from fused_losses.engine.rows import new_rows


@dataclass(frozen=True)
class DivergenceCall:
    """What a divergence of two models asks for.

    Attributes:
        divergence: Of teacher and student.
        mle_weight: Weight of the label's surprise beside it.
        z_loss: lambda of ``lambda * lse**2`` of the student.
        maths: Transform of the student's logits.
        teacher_maths: Transform of the teacher's logits.
        ignore_index: Label of rows that do not count.
        backend: Name of the backend.
    """

    divergence: Divergence
    mle_weight: float
    z_loss: float
    maths: RowMaths
    teacher_maths: RowMaths
    ignore_index: int
    backend: str

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


class Sides(NamedTuple):
    """Student and teacher, of some rows: raw logits (R, V) and row results (LINES, R)."""

    z: Tensor
    teacher_z: Tensor
    rows: Tensor
    teacher_rows: Tensor

    def at(self, place: slice) -> Sides:
        """Take some of the rows."""
        return Sides(
            self.z[place], self.teacher_z[place], self.rows[:, place], self.teacher_rows[:, place]
        )


def losses(sides: Sides, call: DivergenceCall) -> Tensor:
    """Return the losses of some rows, (R,), as wide as the student's row results."""
    rows = sides.rows
    logp, logq = _log_probs(sides, call)
    term, _ = _term_and_slope(call.divergence, logp, logq)
    loss = term.sum(-1)
    if call.mle_weight:
        loss = loss - call.mle_weight * rows[lines.LOGP]
    return loss + call.z_loss * rows[lines.LSE].square() if call.z_loss else loss


def losses_and_gradient(
    sides: Sides, y: Tensor, weight: Tensor, call: DivergenceCall
) -> tuple[Tensor, Tensor]:
    """Return the losses of some rows, (R,), and the gradient of their weighted sum, (R, V)."""
    z, rows = sides.z, sides.rows
    logp, logq = _log_probs(sides, call)
    term, slope = _term_and_slope(call.divergence, logp, logq)
    loss = term.sum(-1)
    del term, logq
    # In front of p: what slopes add up to; the label's surprise and the normaliser's square.
    of_p = -slope.sum(-1)
    if call.mle_weight:
        loss = loss - call.mle_weight * rows[lines.LOGP]
        of_p = of_p + call.mle_weight
    if call.z_loss:
        loss = loss + call.z_loss * rows[lines.LSE].square()
        of_p = of_p + 2.0 * call.z_loss * rows[lines.LSE]
    dz = logp.exp_().mul_(of_p[:, None]).add_(slope)
    if call.mle_weight:
        # A label outside the vocabulary, which a GPU does not look for, is NaN in its row's loss.
        at = y.to(torch.int64).clamp(0, dz.shape[1] - 1)[:, None]
        dz.scatter_add_(1, at, dz.new_full((), -call.mle_weight).expand(at.shape))
    dz.mul_(weight[:, None])
    if call.maths == RowMaths():
        return loss, dz
    return loss, raw_gradient(dz, transformed(z, call.maths, dz.dtype), call.maths)


def _log_probs(sides: Sides, call: DivergenceCall) -> tuple[Tensor, Tensor]:
    logp = _log_softmax(sides.z, sides.rows, call.maths)
    logq = _log_softmax(sides.teacher_z, sides.teacher_rows, call.teacher_maths)
    return logp, logq.to(logp.dtype)


def _log_softmax(z: Tensor, rows: Tensor, maths: RowMaths) -> Tensor:
    # Not minus lse, which is as large as the logits and rounded as they are.
    shifted = transformed(z, maths, rows.dtype) - rows[lines.SHIFT, :, None]
    return shifted.sub_(rows[lines.SUM, :, None].log())


def _term_and_slope(divergence: Divergence, logp: Tensor, logq: Tensor) -> tuple[Tensor, Tensor]:
    found = divergence.torch_fn(logp, logq)
    good = isinstance(found, tuple) and len(found) == 2
    if not good or any(not isinstance(t, Tensor) or t.shape != logp.shape for t in found):
        raise ValueError(
            f"torch_fn of divergence {divergence.name!r} must return (c, s), two tensors of the "
            f"shape of log p, {tuple(logp.shape)}: each word's part and its derivative"
        )
    return found


def row_blocks(rows: int, columns: int, dtype: torch.dtype, backend: str) -> Iterator[slice]:
    """Blocks of rows of logits, taken one at a time."""
    size = max(1, divergence_block(backend) // (max(columns, 1) * max(dtype.itemsize, 4)))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


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
        each = torch.zeros_like(rows[0])
        for _, at, sides in _selected(z, teacher_z, y, rows, teacher_rows, call):
            found = losses(sides, call)
            each[at] = found.masked_fill(y[at] == call.ignore_index, 0.0)
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
            dz = z.detach() if ctx.inplace else z.new_zeros(z.shape)
            for places, at, sides in _selected(
                z.detach(), teacher_z, y, rows, teacher_rows, ctx.call, everything=ctx.inplace
            ):
                _, found = losses_and_gradient(sides, y[at], deach[at], ctx.call)
                ignored = y[at] == ctx.call.ignore_index
                dz[places] = found.masked_fill_(ignored[:, None], 0.0).to(dz.dtype)
            if ctx.inplace:
                # A second backward must find out that the logits are gone.
                torch.autograd.graph.increment_version(z)
        return (*once_differentiable([dz], [z, deach]), *(None,) * 5)


def _selected(
    z: Tensor,
    teacher_z: Tensor,
    y: Tensor,
    rows: Tensor,
    teacher_rows: Tensor,
    call: DivergenceCall,
    *,
    everything: bool = False,
) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor, Sides]]:
    """Blocks of rows: where they are in z, and among the rows; and both sides.

    Those that count or, where finding them would wait for a GPU, everything.
    """
    if everything or y.device.type != "cpu":
        positions = torch.arange(y.numel(), device=y.device)
    else:
        positions = (y != call.ignore_index).nonzero()[:, 0]
    for block in row_blocks(positions.numel(), z.shape[-1], z.dtype, call.backend):
        at = positions[block]
        places = (at // z.shape[1], at % z.shape[1])
        yield places, at, Sides(z[places], teacher_z[places], rows[:, at], teacher_rows[:, at])


def fill(
    sides: Sides, y: Tensor, weight: Tensor, call: DivergenceCall, dz: Tensor | None
) -> Tensor:
    """Return the losses of a chunk's rows, (R,); fill dz, maybe the student's logits themselves."""
    each = torch.empty_like(sides.rows[0])
    R, V = sides.z.shape
    for at in row_blocks(R, V, sides.z.dtype, call.backend):
        if dz is None:
            each[at] = losses(sides.at(at), call)
        else:
            each[at], found = losses_and_gradient(sides.at(at), y[at], weight[at], call)
            dz[at] = found
    return each
