"""Row passes over a vocabulary that the ranks of a process group share.

Each rank holds some columns of the logits and passes over them as ever, with labels of its own: one
that another rank holds is *absent*, a column that is never here. What the ranks know of their rows
is then gathered, and every rank makes the same results of it, as if it had seen whole rows: with
shifts k_p and sums s_p of the ranks p,

    k = max_p k_p,   f_p = exp(k_p - k),   s = sum_p f_p s_p
    sum E log E = sum_p f_p (t_p + (k_p - k) (s_p + E_y,p))

in the order of the ranks. From there losses, weights and sums over responses are computed on all
ranks alike, and a rank's columns of the gradient need nothing more. Only the hidden states'
gradient is a sum over the ranks, reduced once per call, in fp32 at least.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from fused_losses.backends import (
    Coefficients,
    Objective,
    RowMaths,
    RowPasses,
    Weight,
    lines,
    load_backend,
)
from fused_losses.backends.torch_statistics import conclude

# Labels of rows that do not count, and of those outside the vocabulary, once they are local.
IGNORED, BAD = -100, -1

_groups: WeakValueDictionary[str, Any] = WeakValueDictionary()


@dataclass(frozen=True)
class VocabularyShard:
    """The columns of this rank, as torch shards a dimension: all but the last parts are alike.

    Attributes:
        group: Name of the process group.
        rank: Of this process in the group.
        ranks: Processes of the group.
        vocabulary: Columns of all of them together.
    """

    group: str
    rank: int
    ranks: int
    vocabulary: int

    @staticmethod
    def of(group: Any, rank: int, ranks: int, vocabulary: int) -> VocabularyShard:
        """Describe the part of a rank; the group stays known for as long as it lives."""
        _groups[group.group_name] = group
        return VocabularyShard(group.group_name, rank, ranks, vocabulary)

    @property
    def largest(self) -> int:
        """Columns of the largest part: every rank plans with it, so that all cut alike."""
        return -(-self.vocabulary // self.ranks)

    def size_of(self, rank: int) -> int:
        """Columns of a rank."""
        return min(self.largest, max(self.vocabulary - rank * self.largest, 0))

    @property
    def size(self) -> int:
        """Columns of this rank."""
        return self.size_of(self.rank)

    @property
    def absent(self) -> int:
        """Local label of a column that another rank holds: beyond this one's, and not the next."""
        return self.size + 1

    def local(self, y: Tensor, ignore_index: int) -> Tensor:
        """Turn labels (N,) into local ones."""
        at = y.to(torch.int64) - self.rank * self.largest
        here = (at >= 0) & (at < self.size)
        local = torch.where(here, at, self.absent)
        local = torch.where((y >= 0) & (y < self.vocabulary), local, BAD)
        return torch.where(y == ignore_index, IGNORED, local)

    def gather(self, own: Tensor) -> Tensor:
        """Return what all ranks hold, (ranks, ...), in their order."""
        found = own.new_empty((self.ranks, *own.shape))
        if own.numel():
            dist.all_gather(list(found.unbind(0)), own.contiguous(), _groups[self.group])
        return found

    def sum(self, own: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        dist.all_reduce(own, group=_groups[self.group])
        return own


def passes_of(backend: str, shard: VocabularyShard | None) -> RowPasses:
    """Return the row passes of a backend, over a whole vocabulary or a shard of it."""
    passes = load_backend(backend)
    return passes if shard is None else ShardedRows(passes, shard)


class ShardedRows:
    """The row passes of a backend over the columns of one rank, with local labels.

    ``vocabulary`` and ``first_column`` are local too. The pass over the last range gathers what all
    ranks know, and makes the results of it; but not where exponentials were asked for: these are
    relative to this rank's own SHIFT, so ``merge`` waits until they have been used.
    """

    def __init__(self, passes: RowPasses, shard: VocabularyShard) -> None:
        self.name, self._passes, self._shard = passes.name, passes, shard

    def row_pass(
        self,
        z: Tensor,
        y: Tensor,
        rows: Tensor,
        *,
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
        maths: RowMaths,
    ) -> None:
        """See :class:`fused_losses.backends.RowPasses`."""
        self._passes.row_pass(
            z,
            y,
            rows,
            maths=maths,
            ignore_index=ignore_index,
            objective=objective,
            exponentials=exponentials,
            entropy=entropy,
            top1=top1,
            overwrite=overwrite and gradient is None,
            first_column=first_column,
            vocabulary=self._never_last,
        )
        if exponentials is not None or first_column + z.shape[-1] < self._shard.size:
            return
        self.merge(
            y,
            rows,
            ignore_index=ignore_index,
            objective=objective,
            ref=ref,
            value=value,
            entropy=entropy,
            top1=top1,
        )
        if gradient is not None and objective is not None and weight is not None:
            c = objective.coefficients(weight, rows)
            self.row_gradient(z, y, rows, c, maths=maths, ignore_index=ignore_index, dz=gradient)

    def row_gradient(
        self,
        z: Tensor,
        y: Tensor,
        rows: Tensor,
        c: Coefficients,
        *,
        ignore_index: int,
        dz: Tensor,
        first_column: int = 0,
        vocabulary: int | None = None,
        maths: RowMaths,
    ) -> None:
        """See :class:`fused_losses.backends.RowPasses`; ``rows`` are results of whole rows."""
        if c.dmean is not None:
            # The backend divides by the vocabulary that it is told.
            c = replace(c, dmean=c.dmean * (self._never_last / self._shard.vocabulary))
        self._passes.row_gradient(
            z,
            y,
            rows,
            c,
            maths=maths,
            ignore_index=ignore_index,
            dz=dz,
            first_column=first_column,
            vocabulary=self._never_last,
        )

    @property
    def _never_last(self) -> int:
        """Columns that make no range the last one, with room for the absent label."""
        return self._shard.absent + 1

    def merge(
        self,
        y: Tensor,
        rows: Tensor,
        *,
        ignore_index: int,
        objective: Objective | None,
        ref: Tensor | None,
        value: Tensor | None,
        entropy: bool,
        top1: bool,
    ) -> None:
        """Make results of what all ranks know so far of the rows (LINES, N), in place."""
        smoothed = objective is not None and objective.label_smoothing != 0.0
        asked = [lines.SHIFT, lines.SUM, lines.SO_FAR_TARGET]
        asked += [lines.ENTROPY] * entropy + [lines.SO_FAR_TOTAL] * smoothed
        asked += [lines.SO_FAR_LARGEST, lines.TOP1] * top1
        gathered = self._shard.gather(rows[asked])
        known = {line: gathered[:, i] for i, line in enumerate(asked)}  # (ranks, N) each

        shifts, sums, targets = (known[line] for line in asked[:3])
        shift = shifts.amax(0)
        moved = torch.where(shifts == shift, 0.0, shifts - shift)
        factors = moved.exp()
        # Who holds the target knows its logit, the others NaN; of a bad label all do.
        held = ~targets.isnan()
        target = torch.where(held, targets, 0.0).sum(0)
        if entropy:
            own = torch.where(shifts == -torch.inf, 0.0, shifts)
            terms = sums + torch.where(held, (targets - own).exp(), 0.0)
            terms = torch.where(moved == -torch.inf, 0.0, moved * terms)
            rows[lines.ENTROPY] = (factors * (known[lines.ENTROPY] + terms)).sum(0)
        if smoothed:
            sizes = [self._shard.size_of(rank) for rank in range(self._shard.ranks)]
            columns = torch.tensor(sizes, dtype=rows.dtype, device=rows.device)
            total = (known[lines.SO_FAR_TOTAL] + columns[:, None] * moved).sum(0)
            rows[lines.SO_FAR_TOTAL] = total
        if top1:
            # The first rank of those that hold the largest, as the first column of these counts.
            first = known[lines.SO_FAR_LARGEST].argmax(0, keepdim=True)
            rows[lines.TOP1] = known[lines.TOP1].gather(0, first)[0]
        rows[lines.SHIFT] = shift
        rows[lines.SUM] = (factors * sums).sum(0)
        rows[lines.SO_FAR_TARGET] = torch.where(held.any(0), target, torch.nan)
        conclude(rows, objective, ref=ref, value=value, entropy=entropy, V=self._shard.vocabulary)
        rows.masked_fill_(y == ignore_index, 0.0)
