"""Sums over whole responses: the sequences of a batch, or both sides of its pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses.arguments import refuse_cut_sequences
from fused_losses.engine.segment_sum import segment_sum
from fused_losses.engine.units import UnitChunk, UnitLayout
from fused_losses.functional.options import Options
from fused_losses.functional.tokens import Tokens, expand, factor_of


@dataclass(frozen=True)
class Responses:
    """Which response every row belongs to, and which responses make a unit.

    Attributes:
        tokens: The rows.
        backend: Resolved name of the backend, which sums.
        counted: (N,) bool: rows whose label counts.
        lengths: (units, sides) counted tokens of each response.
        count: Responses; an upper bound where segments are packed, whose number is data.
        sides: Responses of a unit, ``count // sides`` apart: 2 for pairs, else 1.
        segment_of: (N,) response of each row, in [0, count); None: the rows of the target.
        order: (N,) rows sorted by response, None if they are.
    """

    tokens: Tokens
    backend: str
    counted: Tensor
    lengths: Tensor
    count: int
    sides: int = 1
    segment_of: Tensor | None = None
    order: Tensor | None = None

    @staticmethod
    def of(
        tokens: Tokens, backend: str, segment_ids: Tensor | None = None, *, sides: int = 1
    ) -> Responses:
        """Each row of a (B, T) target is a response, or each segment inside a row.

        ``segment_ids`` are per row of the logits (N,), and local to a row of the target.

        Raises:
            ValueError: A 1-D target without segment_ids.
        """
        refuse_cut_sequences("a loss of whole sequences or pairs")
        counted = tokens.counted
        if segment_ids is None:
            if len(tokens.shape) < 2:
                raise ValueError(
                    "level='sequence' takes the rows of a (B, T) target as sequences; a target of "
                    f"shape {tuple(tokens.shape)} needs segment_ids"
                )
            count = tokens.shape[:-1].numel()
            lengths = counted.view(count, tokens.shape[-1]).sum(1).view(sides, count // sides).t()
            return Responses(tokens, backend, counted, lengths, count, sides)
        row = _rows_of(tokens)
        # Sorted by row and id, a segment is a run: no count is needed.
        by_id = torch.argsort(segment_ids, stable=True)
        order = by_id[torch.argsort(row[by_id], stable=True)]
        ids, row = segment_ids[order], row[order]
        starts = torch.ones_like(row)
        starts[1:] = ((ids[1:] != ids[:-1]) | (row[1:] != row[:-1])).to(row.dtype)
        run = starts.cumsum(0) - 1
        of_row = torch.empty_like(run).scatter_(0, order, run)
        count = of_row.numel()
        lengths = segment_sum(counted[order].double(), run, count, backend).to(torch.int64)[:, None]
        return Responses(tokens, backend, counted, lengths, count, segment_of=of_row, order=order)

    @property
    def units(self) -> int:
        """Number of units."""
        return self.count // self.sides

    @property
    def of_row(self) -> Tensor:
        """(N,) response of each row, in [0, count)."""
        return _rows_of(self.tokens) if self.segment_of is None else self.segment_of

    def layout(self) -> UnitLayout:
        """Lay the units out for chunks."""
        if self.segment_of is not None:
            return UnitLayout.of_ids(self.tokens.y, self.segment_of, self.tokens.ignore_index)
        shape = (self.sides, self.units, self.tokens.shape[-1])
        return UnitLayout.of_rows(self.counted.view(shape), self.lengths)

    def value(self, offset: Tensor | None) -> Tensor | None:
        """Expand a checked offset to the responses: (count,).

        Raises:
            ValueError: It does not broadcast to them.
        """
        if offset is None:
            return None
        if self.order is None:
            return expand("value", offset, self.tokens.shape[:-1], "the sequences'").reshape(-1)
        # The number of segments is data: one value for all, or one each, by row and id.
        if offset.numel() == 1:
            return offset.reshape(1).expand(self.count)
        if offset.dim() != 1 or offset.numel() > self.count:
            raise ValueError(
                "value must be a number or hold one entry per sequence, ordered by row and "
                f"segment id, got shape {tuple(offset.shape)}"
            )
        return F.pad(offset, (0, self.count - offset.numel()))

    def where_counted(self, per_unit: Tensor, units: UnitChunk | None) -> Tensor:
        """Put 0 for units of a chunk, or all, that have no counted token."""
        if units is not None and not units.has_empty:
            return per_unit
        present = (self.lengths > 0).any(1)
        return torch.where(present if units is None else units.of_units(present), per_unit, 0.0)

    def factor(self, options: Options, units: UnitChunk | None) -> Tensor | float:
        """Return what the sum over all units is multiplied by; a chunk of some knows how many."""
        known = None if units is None else units.layout.present
        return factor_of(options, lambda: (self.lengths > 0).any(1).sum(), known)

    def log_ratio_sums(
        self, logps: Tensor, ref: Tensor | None, units: UnitChunk | None = None
    ) -> Tensor:
        """Sum log-ratios, equation (9): per-token differences first, then their sums.

        Args:
            logps: Log-probs of all rows (N,), 0 where nothing counts; or of the tokens of a chunk.
            ref: Reference log-probs of all rows (N,), never read where nothing counts, or None.
            units: The chunk.

        Returns:
            (units, sides).
        """
        if ref is not None:
            mine = torch.where(self.counted, ref, 0.0) if units is None else ref[units.positions]
            logps = logps - mine.to(logps.dtype)
        return self.sums(logps, units)

    def sums(self, x: Tensor, units: UnitChunk | None = None) -> Tensor:
        """Sum what all rows have (N,), or the tokens of a chunk, per response: (units, sides)."""
        if units is None:
            of_row = self.of_row
            if self.order is not None:
                x, of_row = x[self.order], of_row[self.order]
            sums = segment_sum(x, of_row, self.count, self.backend)
            return sums.view(self.sides, self.units).t()
        return units.sums(x, self.backend)


def _rows_of(tokens: Tokens) -> Tensor:
    """(N,) row of the target of each of its positions."""
    T = tokens.shape[-1] if len(tokens.shape) else 1
    return torch.arange(tokens.y.numel(), device=tokens.y.device) // max(T, 1)
