"""Divergences of two rows of logits, and their gradient, in torch: a block of rows at a time.

The row passes have found the log-normalisers of both sides. What is left is elementwise, and two
sums of a row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fused_losses.backends.base import DIVERGENCE_BLOCK_BYTES, Coefficients, RowMaths, Sides
from fused_losses.backends.transform import raw_gradient, transformed
from fused_losses.divergences import Divergence
from fused_losses_kernels import lines

# 0 times this is 0, as it is not times the logarithm of 0.
_LEAST = -1e4


def row_divergence(
    sides: Sides,
    y: Tensor,
    *,
    divergence: Divergence,
    maths: RowMaths,
    teacher_maths: RowMaths,
    ignore_index: int,
    out: Tensor,
    gradient: Tensor | None = None,
    c: Coefficients | None = None,
    share: Tensor | None = None,
    weight: Tensor | None = None,
) -> None:
    """See :class:`fused_losses.backends.Backend`."""
    counted = y != ignore_index
    # Where a look at the labels is free, only rows that count are taken.
    chosen = None
    if y.device.type == "cpu" and not counted.all():
        chosen = counted.nonzero()[:, 0]
        out.zero_()
        if gradient is not None:
            gradient[_places((~counted).nonzero()[:, 0], gradient)] = 0.0
    for at in _blocks(y.numel() if chosen is None else chosen.numel(), sides.z):
        rows = at if chosen is None else chosen[at]
        place = _places(rows, sides.z)
        some = Sides(sides.z[place], sides.teacher_z[place], *(r[:, rows] for r in sides[2:]))
        logp = _log_softmax(some.z, some.rows, maths)
        logq = _log_softmax(some.teacher_z, some.teacher_rows, teacher_maths).to(logp.dtype)
        term, slope = _term_and_slope(divergence, logp, logq)
        found = term.sum(-1)
        del term, logq
        out[rows] = found if chosen is not None else found.masked_fill(~counted[rows], 0.0)
        if gradient is None:
            continue
        own = None if c is None else c.at(rows)
        factors = (None if t is None else t[rows] for t in (share, weight))
        dz = _gradient(logp, slope, y[rows], some.rows, own, *factors)
        if maths != RowMaths():
            dz = raw_gradient(dz, transformed(some.z, maths, dz.dtype), maths)
        if chosen is None:
            dz = dz.masked_fill_(~counted[rows, None], 0.0)
        gradient[place] = dz.to(gradient.dtype)


def _gradient(
    logp: Tensor,
    slope: Tensor,
    y: Tensor,
    rows: Tensor,
    c: Coefficients | None,
    share: Tensor | None,
    weight: Tensor | None,
) -> Tensor:
    """The gradient of transformed logits (R, V), over log p; see ``Backend.row_divergence``."""
    of_p = -slope.sum(-1)  # in front of p
    if share is not None:
        slope, of_p = slope * share[:, None], of_p * share
    if c is None:
        dz = logp.exp_().mul_(of_p[:, None]).add_(slope)
        return dz if weight is None else dz.mul_(weight[:, None])
    # A label outside the vocabulary, which a GPU does not look for, is NaN in its row's results.
    at = y.to(torch.int64).clamp(0, logp.shape[1] - 1)[:, None]
    if c.dentropy is not None:
        surprise = logp.clamp(min=_LEAST).add_(rows[lines.ENTROPY, :, None])
        slope = torch.addcmul(slope, logp.exp(), surprise.mul_(c.dentropy[:, None]), value=-1.0)
    if c.dlse is not None:
        of_p = of_p + c.dlse
    p = logp.exp_()
    p_y = p.gather(1, at)[:, 0]
    # 1 - p_y, of the sum without the target where the difference would round it away.
    rest = torch.where(p_y > 0.5, rows[lines.REST], 1.0 - p_y)
    target = p_y * of_p + slope.gather(1, at)[:, 0] + c.dlogp * rest
    dz = p.mul_((of_p - c.dlogp)[:, None]).add_(slope).scatter_(1, at, target[:, None])
    if c.dmean is not None:
        dz.add_((c.dmean / dz.shape[1])[:, None])
    return dz if weight is None else dz.mul_(weight[:, None])


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


def _blocks(rows: int, z: Tensor) -> Iterator[slice]:
    """Blocks of rows, taken one at a time."""
    size = max(1, DIVERGENCE_BLOCK_BYTES // (max(z.shape[-1], 1) * max(z.itemsize, 4)))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _places(rows: slice | Tensor, z: Tensor) -> slice | Tensor | tuple[Tensor, Tensor]:
    """Where rows of the flat order are in (N, V), or in (B, T, V)."""
    if z.dim() == 2:
        return rows
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=z.device)
    return rows // z.shape[1], rows % z.shape[1]
