"""The loops over ranges of the vocabulary: row statistics, d logp / d x, and recomputation.

A row's statistics need no whole row: a row pass takes up where the one over the range before it
stopped. With a frozen head its exponentials are multiplied by the same range of the head at once,
as attention does with keys and values; the sum is the gradient of the log-prob, whatever the loss.
Where the head is trained the ranges are made again when the weights of the rows are known.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fused_losses.backends import RowMaths, lines
from fused_losses.engine.call import Call
from fused_losses.engine.gradients import GradientSums
from fused_losses.engine.planned import Place, PlannedCall
from fused_losses.engine.rows import Coefficients
from fused_losses.engine.sharded_rows import ShardedRows
from fused_losses.engine.workspace import Tiles


class SeenChunk:
    """Some counted tokens of a call, once all ranges of the vocabulary have been seen.

    Attributes:
        at: Where its tokens are among the rows of the call.
        y: (R,) labels.
        rows: (LINES, R) row results.
        kept: (R, D) -d logp / d x, fp32 at least, or None; the next chunk uses its memory.
    """

    def __init__(self, at: Place, y: Tensor, rows: Tensor, kept: Tensor | None) -> None:
        self.at, self.y, self.rows, self.kept = at, y, rows, kept


def seen_chunks(
    planned: PlannedCall,
    *,
    keep: bool = False,
    ref: Tensor | None,
    value: Tensor | None,
    top1: bool,
) -> Iterator[SeenChunk]:
    """Fill ``planned.rows`` chunk by chunk; ``keep``: with the gradients of the log-probs.

    ``ref`` and ``value`` are those of all rows of the call (N,).
    """
    call, head = planned.call, planned.head
    with planned.workspace() as tile:
        wide = torch.promote_types(head.compute_dtype, torch.float32)
        size = (max(planned.plan.chunks, default=0), planned.x.shape[1])
        sums = planned.x.new_empty(size, dtype=wide) if keep else None
        for at in planned.places():
            y, x = planned.labels_and_hidden(at)
            rows = planned.new_rows(y)
            kept = None if sums is None else sums[: len(y)]
            for columns in planned.columns():
                z, e = tile(len(y), columns.stop - columns.start)
                head.logits(x, z, columns)
                before = rows[lines.SHIFT].clone() if keep and columns.start else None
                planned.backend.row_pass(
                    z,
                    y,
                    rows,
                    maths=call.maths,
                    ignore_index=call.ignore_index,
                    objective=call.objective,
                    ref=None if ref is None else ref[at],
                    value=None if value is None else value[at],
                    exponentials=e if keep else None,
                    entropy=call.entropy,
                    top1=top1,
                    overwrite=True,
                    first_column=columns.start,
                    vocabulary=head.vocabulary,
                )
                if kept is not None:
                    if before is not None:
                        _follow(kept, before, rows[lines.SHIFT])
                    head.dx(e, kept, columns, accumulate=columns.start > 0)
            if kept is not None:
                if isinstance(planned.backend, ShardedRows):
                    before = rows[lines.SHIFT].clone()
                    planned.backend.merge(
                        y,
                        rows,
                        ignore_index=call.ignore_index,
                        objective=call.objective,
                        ref=None if ref is None else ref[at],
                        value=None if value is None else value[at],
                        entropy=call.entropy,
                        top1=top1,
                    )
                    _follow(kept, before, rows[lines.SHIFT])
                _finish(kept, planned, y, rows)
            planned.put_rows(at, rows)
            yield SeenChunk(at, y, rows, kept)


def _follow(sums: Tensor, before: Tensor, shift: Tensor) -> None:
    """Bring sums of exponentials from one shift of their rows to a later one."""
    # Before anything but -inf was seen, the sums are 0 under any shift.
    factor = torch.where(before == shift, 1.0, (before - shift).exp())
    if factor.is_cpu and bool((factor == 1.0).all()):
        return
    sums.mul_(factor[:, None])


def _finish(kept: Tensor, planned: PlannedCall, y: Tensor, rows: Tensor) -> None:
    """Turn sums of exponentials times the head's rows into -d logp / d x."""
    call = planned.call
    if len(planned.plan.columns) > 1 or call.shard is not None:
        slope = target_slope(rows, call.maths)
        # Ranges leave the target out; subtracted from 1 - p_y, not from 1, nothing cancels.
        factor = call.maths.factor
        at_y = rows[lines.REST] * rows[lines.SUM] * slope / factor
        at_y = call.held(at_y, y)
        kept.addcmul_(target_rows(planned.head.weight, y), at_y[:, None], value=-1.0)
    scale = call.maths.factor / rows[lines.SUM]
    if planned.masked:
        scale = scale.masked_fill(y == call.ignore_index, 0.0)
    kept.mul_(scale[:, None])


def target_slope(rows: Tensor, maths: RowMaths) -> Tensor:
    """Return d z_y / d raw_y of each row, (N,)."""
    slope = torch.full_like(rows[lines.LOGP], maths.factor)
    if maths.cap is not None:
        tanh = (rows[lines.LOGP] + rows[lines.LSE]) / maths.cap
        slope = slope * (1.0 - tanh * tanh)
    return slope


def target_rows(weight: Tensor, y: Tensor) -> Tensor:
    """Return the rows of the head that belong to labels, any row for a bad one, (N, D)."""
    good = (y >= 0) & (y < weight.shape[0])
    return weight[torch.where(good, y, 0)]


def hidden_gradient(
    kept: Tensor, y: Tensor, rows: Tensor, c: Coefficients, head: Tensor, call: Call
) -> Tensor:
    """Turn -d logp / d x (N, D) into the gradient of a loss, in place, by its rows' coefficients.

    logp = z_y - lse, so d lse / d x is the target's row of the head, transformed, minus d logp / d
    x; the mean logit's is the mean row. Of a head that ranks share it is this rank's part.
    """
    scale = -c.dlogp if c.dlse is None else c.dlse - c.dlogp
    dx = kept.mul_(scale[:, None])
    if c.dlse is not None:
        at_y = c.dlse * target_slope(rows, call.maths)
        # Rows without a target have no slope either, and 0 * NaN is not 0.
        at_y = call.held(torch.where(c.dlse == 0.0, 0.0, at_y), y)
        dx.addcmul_(target_rows(head, y), at_y[:, None])
    if c.dmean is not None:
        V = head.shape[0] if call.shard is None else call.shard.vocabulary
        mean = head.sum(0, dtype=dx.dtype) * (call.maths.pre / V)
        dx.addcmul_(c.dmean[:, None], mean)
    return dx


def recompute(planned: PlannedCall, rows: Tensor, c: Coefficients) -> GradientSums:
    """Make the logits again and sum the gradients, from row results (LINES, N) and coefficients."""
    sums = GradientSums(planned)
    with planned.workspace() as tile:
        for at in planned.places():
            _recompute_chunk(planned, tile, at, rows[:, at].contiguous(), c.at(at), sums)
    return sums


def _recompute_chunk(
    planned: PlannedCall, tile: Tiles, at: Place, rows: Tensor, c: Coefficients, sums: GradientSums
) -> None:
    call, head = planned.call, planned.head
    y, x = planned.labels_and_hidden(at)
    dx = sums.dx_of(at, x)
    for columns in planned.columns():
        z, dz = tile(len(y), columns.stop - columns.start)
        head.logits(x, z, columns)
        planned.backend.row_gradient(
            z,
            y,
            rows,
            c,
            maths=call.maths,
            ignore_index=call.ignore_index,
            dz=dz,
            first_column=columns.start,
            vocabulary=head.vocabulary,
        )
        if dx is not None:
            head.dx(dz, dx, columns, accumulate=columns.start > 0)
        sums.add_head(dz, x, columns=columns)
    if dx is not None:
        sums.put_dx(at, dx)
