"""The row passes in plain torch, for CPUs and whatever Triton does not serve.

The same algorithm as the kernels, a few rows at a time: a block of rows is read from memory once
and all elementwise steps run while it sits in the cache. That, and not the number of steps, is what
makes it as fast as torch's fused log-softmax on a CPU. What concerns numbers per row waits until
all blocks have passed, where it can: a call of torch costs as much for 16 rows as for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_losses.backends.base import (
    BLOCK_BYTES,
    Coefficients,
    Objective,
    RowMaths,
    Weight,
    weight_at,
)
from fused_losses.backends.torch_divergence import row_divergence
from fused_losses.backends.torch_statistics import (
    Seen,
    Targets,
    exp_,
    exponentiate,
    take_in,
)
from fused_losses.backends.torch_statistics import conclude as conclude_rows
from fused_losses_kernels import lines

__all__ = ["name", "row_divergence", "row_gradient", "row_pass", "segment_sum"]

name = "torch"

_IDENTITY = RowMaths()


def row_pass(
    z: Tensor,
    y: Tensor,
    rows: Tensor,
    *,
    maths: RowMaths,
    ignore_index: int,
    objective: Objective | None = None,
    ref: Tensor | None = None,
    value: Tensor | None = None,
    exponentials: Tensor | None = None,
    gradient: Tensor | None = None,
    weight: Weight | None = None,
    entropy: bool = False,
    top1: bool = False,
    overwrite: bool = False,
    first_column: int = 0,
    vocabulary: int | None = None,
) -> None:
    """See :class:`fused_losses.backends.Backend`."""
    written = exponentials if gradient is None else gradient
    overwrite = overwrite or (written is not None and written.data_ptr() == z.data_ptr())
    scratch = None if overwrite and _is_scratch(z, rows.dtype) else _scratch(z, rows.dtype)
    V = vocabulary or z.shape[-1]
    smoothed = objective is not None and objective.label_smoothing != 0.0
    targets = Targets.of(y, first_column, z.shape[-1], V)
    ignored = _ignored(y, ignore_index)
    before = None if first_column == 0 else rows[lines.SHIFT].clone()
    seen = Seen.empty(rows, top1=top1, entropy=entropy, total=smoothed)

    def conclude(at: slice) -> None:
        out, t = rows[:, at], targets[at]
        take_in(out, seen[at], t, first_column=first_column)
        if t.last:
            conclude_rows(
                out,
                objective,
                ref=None if ref is None else ref[at],
                value=None if value is None else value[at],
                entropy=entropy,
                V=V,
            )
        if ignored is not None:
            # Not a product with a mask: NaN in an ignored row must not get out.
            out.masked_fill_(ignored[at], 0.0)

    for block, at in _row_blocks(z, rows.dtype):
        E = block if scratch is None else scratch[: block.shape[0]]
        x, jacobian = _transformed(block, maths, E, slope=written is not None)
        exponentiate(x, E, seen[at], targets[at], None if before is None else before[at])
        if gradient is not None and objective is not None and weight is not None:
            # The weight of a row is known as soon as the row is.
            conclude(at)
            c = objective.coefficients(weight_at(weight, at), rows[:, at])
            _Slopes.of(rows[:, at], c, targets[at], maths, V).apply(E, targets[at])
        elif exponentials is not None and targets.whole:
            # Whole rows know the target's entry already.
            E.scatter_(1, targets.at[at], -seen.rest[at, None])
        if written is not None:
            _store(E, written[at], None if ignored is None else ignored[at], jacobian)
    if gradient is None:
        conclude(slice(None))


def row_gradient(
    z: Tensor,
    y: Tensor,
    rows: Tensor,
    c: Coefficients,
    *,
    maths: RowMaths,
    ignore_index: int,
    dz: Tensor,
    first_column: int = 0,
    vocabulary: int | None = None,
) -> None:
    """See :class:`fused_losses.backends.Backend`."""
    V = vocabulary or z.shape[-1]
    scratch = None if _is_scratch(dz, rows.dtype) else _scratch(z, rows.dtype)
    targets = Targets.of(y, first_column, z.shape[-1], V)
    slopes = _Slopes.of(rows, c.map(lambda t: t.to(rows.dtype)), targets, maths, V)
    ignored = _ignored(y, ignore_index)
    shift = rows[lines.SHIFT, :, None]
    above = (rows[lines.ENTROPY] - rows[lines.SUM].log())[:, None]
    written = (block for block, _ in _row_blocks(dz, rows.dtype))
    for (block, at), target in zip(_row_blocks(z, rows.dtype), written, strict=True):
        E = target if scratch is None else scratch[: block.shape[0]]
        x, jacobian = _transformed(block, maths, E, slope=True)
        torch.sub(x, shift[at], out=E)
        surprise = None if slopes.tilt is None else E + above[at]
        slopes[at].apply(exp_(E), targets[at], surprise)
        _store(E, target, None if ignored is None else ignored[at], jacobian)


def segment_sum(x: Tensor, offsets: Tensor) -> Tensor:
    """See :class:`fused_losses.backends.Backend`; summed in fp64, so the order does not show."""
    return torch.segment_reduce(x.double(), "sum", offsets=offsets, initial=0.0).to(x.dtype)


def _row_blocks(z: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, slice]]:
    """Yield blocks (R, V) of z's rows as views, with the rows' places in the flat order."""
    R = _block_rows(z, dtype)
    # Batches are walked one by one: flattening a strided (B, T, V) would copy it.
    first = 0
    for part in (z,) if z.dim() == 2 else z.unbind(0):
        for start in range(0, part.shape[0], R):
            block = part[start : start + R]
            yield block, slice(first + start, first + start + block.shape[0])
        first += part.shape[0]


def _block_rows(z: Tensor, dtype: torch.dtype) -> int:
    return max(1, BLOCK_BYTES // (z.shape[-1] * dtype.itemsize))


def _is_scratch(t: Tensor, dtype: torch.dtype) -> bool:
    """Whether all steps can run in a tensor itself.

    Steps over rows that lie apart round a few elements otherwise: the ends of vectors.
    """
    return t.dtype == dtype and t.stride()[-2:] == (t.shape[-1], 1)


def _scratch(z: Tensor, dtype: torch.dtype) -> Tensor:
    """Return memory for a block of rows, which all blocks of a pass use in turn."""
    rows = min(_block_rows(z, dtype), z.shape[:-1].numel())
    return z.new_empty((rows, z.shape[-1]), dtype=dtype)


def _transformed(
    block: Tensor, maths: RowMaths, out: Tensor, *, slope: bool
) -> tuple[Tensor, Tensor | None]:
    """Transform a block into ``out``; return the block itself where there is nothing to do.

    Also returns d x / d raw divided by its constant factor, if asked for and where that is not all.
    """
    if block.dtype == out.dtype and maths == _IDENTITY:
        return block, None
    # Contiguous, whatever the strides of the logits: the same to the bit.
    if out.data_ptr() != block.data_ptr():
        out.copy_(block)
    if maths.pre != 1.0:
        out.mul_(maths.pre)
    if maths.cap is None:
        return out, None
    out.tanh_()
    jacobian = out.square().neg_().add_(1.0) if slope else None
    return out.mul_(maths.cap), jacobian


@dataclass(frozen=True)
class _Slopes:
    """What makes exponentials exp(z - SHIFT) the gradient of the raw logits, (R,) each.

    Attributes:
        scale: Factor on a row.
        target: What stands at the target instead.
        mean: Added to a row, or None.
        tilt: Factor on exponentials times ``surprise``, z - lse + entropy, or None.
    """

    scale: Tensor
    target: Tensor
    mean: Tensor | None
    tilt: Tensor | None

    @staticmethod
    def of(out: Tensor, c: Coefficients, t: Targets, maths: RowMaths, V: int) -> _Slopes:
        c = c.map(lambda d: d * maths.factor)
        dlogp = torch.where(t.good, c.dlogp, torch.nan)
        alpha = -dlogp if c.dlse is None else c.dlse - dlogp
        # alpha p_y + dlogp, written with 1 - p_y so that a confident target is not rounded away.
        target = -alpha * out[lines.REST]
        if c.dlse is not None:
            target = target + c.dlse
        tilt = None
        if c.dentropy is not None:
            tilt = c.dentropy / out[lines.SUM]
            logp = out[lines.LOGP]
            p_y = logp.exp()
            tilted = c.dentropy * p_y * (logp + out[lines.ENTROPY])
            target = target - torch.where(p_y == 0.0, 0.0, tilted)
        mean = None if c.dmean is None else c.dmean / V
        return _Slopes(alpha / out[lines.SUM], target, mean, tilt)

    def __getitem__(self, at: slice) -> _Slopes:
        optional = [None if t is None else t[at] for t in (self.mean, self.tilt)]
        return _Slopes(self.scale[at], self.target[at], *optional)

    def apply(self, E: Tensor, t: Targets, surprise: Tensor | None = None) -> None:
        """Turn E (R, C) into the gradient."""
        tilted = None
        if self.tilt is not None and surprise is not None:
            # Kept finite: 0 * -inf is NaN.
            least = torch.finfo(E.dtype).min
            tilted = surprise.clamp_(min=least).mul_(E).mul_(self.tilt[:, None])
        E.mul_(self.scale[:, None])
        if tilted is not None:
            E.sub_(tilted)
        t.put(E, self.target[:, None])
        if self.mean is not None:
            E.add_(self.mean[:, None])


def _ignored(y: Tensor, ignore_index: int) -> Tensor | None:
    """Which rows to blank; None where a look, free on a CPU, finds none."""
    ignored = y == ignore_index
    return ignored if not ignored.is_cpu or bool(ignored.any()) else None


def _store(x: Tensor, target: Tensor, ignored: Tensor | None, jacobian: Tensor | None) -> None:
    """Finish a block: the transform's derivative, zeros in ignored rows, the target's dtype."""
    if jacobian is not None:
        x.mul_(jacobian)
    if ignored is not None:
        x.masked_fill_(ignored[:, None], 0.0)
    if x.data_ptr() != target.data_ptr():
        target.copy_(x)
