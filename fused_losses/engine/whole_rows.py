"""The loop over whole rows: logits and row pass strip by strip, gradient products chunk by chunk.

Ignored tokens are dropped before the first product, so cost follows the supervised ones. Nothing of
size tokens x vocabulary is made: logits live in one workspace that the next ones reuse.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fused_losses.backends import Weight, lines
from fused_losses.engine.gradients import GradientSums
from fused_losses.engine.planned import Place, PlannedCall
from fused_losses.engine.rows import Coefficients


class Strip:
    """Some counted tokens of a call whose logits exist: a chunk, or a part of one.

    Args:
        planned: The call.
        at: Where its tokens are among the rows of the call.
        y: (R,) labels.
        x: (R, D) hidden states, in the compute dtype.
        z: (R, V) memory for the logits, which are made.
        dz: (R, V) memory for their gradient; maybe z's.

    Attributes:
        at, y: As they were given.
        z: (R, V) logits; gone once the chunk's gradient is used.
        dz: (R, V) gradient of the logits, once ``differentiate`` was called.
        scale: (R,) factor on dz's rows that is still to be applied, or None; always None where the
            gradient has memory of its own.
        rows: (LINES, R) row results.
    """

    def __init__(
        self, planned: PlannedCall, at: Place, y: Tensor, x: Tensor, z: Tensor, dz: Tensor
    ) -> None:
        self._planned = planned
        self.at, self.y = at, y
        self.z, self.dz = z, dz
        self.scale: Tensor | None = None
        self.rows = planned.new_rows(self.y)
        planned.head.logits(x, z)

    def row_pass(
        self,
        *,
        ref: Tensor | None = None,
        value: Tensor | None = None,
        weight: Weight | None = None,
        top1: bool,
    ) -> None:
        """Fill ``rows``, and ``dz`` with exponentials or, given weights, the gradient.

        ``ref`` and ``value`` are those of all rows of the call (N,), ``weight`` that of its own.
        """
        planned, call = self._planned, self._planned.call
        ref, value = (None if t is None else t[self.at] for t in (ref, value))
        exponentials = planned.plan.exponentials
        weighted = weight is not None and not exponentials
        planned.backend.row_pass(
            self.z,
            self.y,
            self.rows,
            maths=call.maths,
            ignore_index=call.ignore_index,
            objective=call.objective,
            ref=ref,
            value=value,
            exponentials=self.dz if exponentials else None,
            gradient=self.dz if weighted else None,
            weight=weight if weighted else None,
            entropy=call.entropy,
            top1=top1,
            overwrite=weighted,
        )
        planned.put_rows(self.at, self.rows)
        o = call.objective
        if weight is None or o is None or not exponentials:
            return
        if o.z_loss or isinstance(weight, Tensor):
            self.differentiate(o.coefficients(weight, self.rows))
        else:
            self._scale_by(self.rows[lines.DLOGP], -weight)

    def differentiate(self, c: Coefficients, out: Tensor | None = None) -> None:
        """Make ``scale * dz`` the gradient of the logits, from the coefficients of the rows (R,).

        Exponentials are there already up to a factor per row; else one more row pass writes it all,
        to ``out`` if that is to be more precise than dz.
        """
        planned, call = self._planned, self._planned.call
        if planned.plan.exponentials:
            self._scale_exponentials(c)
            return
        planned.backend.row_gradient(
            self.z,
            self.y,
            self.rows,
            c,
            maths=call.maths,
            ignore_index=call.ignore_index,
            dz=self.dz if out is None else out,
        )

    def _scale_exponentials(self, c: Coefficients) -> None:
        maths, s = self._planned.call.maths, self.rows[lines.SUM]
        alpha, sign = c.dlogp, -1.0
        if c.dlse is not None:
            alpha, sign = c.dlse - c.dlogp, 1.0
            # The target's entry also carries dlse, divided by alpha; keep away from 0 / 0, by no
            # more than a rounding of dlse.
            least = torch.finfo(alpha.dtype).eps * c.dlse.abs()
            alpha = torch.where(alpha.abs() < least, least, alpha)
            extra = torch.where(c.dlse == 0.0, 0.0, c.dlse / alpha * s)
            if maths.cap is not None:
                tanh_y = (self.rows[lines.LOGP] + self.rows[lines.LSE]) / maths.cap
                extra = extra * (1.0 - tanh_y * tanh_y)
            good = (self.y >= 0) & (self.y < self.dz.shape[1])
            at_y = torch.where(good, self.y, 0).to(torch.int64)[:, None]
            entry = self.dz.gather(1, at_y) + extra[:, None].to(self.dz.dtype)
            self.dz.scatter_(1, at_y, entry)
        self._scale_by(alpha, sign)

    def _scale_by(self, alpha: Tensor, factor: float) -> None:
        """Make ``factor * alpha`` (R,) of the rows the factor on their exponentials."""
        planned = self._planned
        scale = alpha * (factor * planned.call.maths.factor) / self.rows[lines.SUM]
        if planned.masked:
            scale = scale.masked_fill(self.y == planned.call.ignore_index, 0.0)
        self.scale = scale


def strips_of(planned: PlannedCall, sums: GradientSums | None = None) -> Iterator[Strip]:
    """Make the logits of one strip after another in the same workspace.

    By the time the next one is asked for, the last one's gradient must be there: with the last of a
    chunk's ``sums`` get what all of them give.
    """
    V = planned.head.vocabulary
    with planned.workspace() as tile:
        for at, parts in zip(planned.places(), planned.strips(), strict=True):
            y, x = planned.labels_and_hidden(at)
            dz = tile.gradient(len(y), V)
            for part in parts:
                place = _part(at, part)
                z = tile.logits(part.stop - part.start, V)
                strip = Strip(planned, place, y[part], x[part], z, dz[part])
                del z
                yield strip
            if sums is None:
                continue
            if len(planned.plan.chunks) == 1 < len(parts):
                # The head's gradient takes their memory.
                del strip.z
                tile.drop_logits()
            _add_chunk(sums, at, x, dz, strip.scale)


def _part(at: Place, part: slice) -> Place:
    """Take some of a chunk's tokens."""
    if isinstance(at, slice):
        return slice(at.start + part.start, at.start + part.stop)
    return at[part]


def _add_chunk(sums: GradientSums, at: Place, x: Tensor, dz: Tensor, scale: Tensor | None) -> None:
    """Add what a chunk's ``scale * dz`` contributes; it may overwrite ``x``."""
    sums.add_head(dz, x, scale)
    dx = sums.dx_of(at, x, overwrite=True)
    if dx is not None:
        sums.head.dx(dz, dx)
        if scale is not None:
            dx.mul_(scale[:, None])
        sums.put_dx(at, dx)
