"""Sums over whole responses: the sequences of a batch, or both sides of its pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses.engine.segment_sum import segment_sum
from fused_losses.engine.unit_sum import UnitChunk
from fused_losses.functional.tokens import Tokens, expand


@dataclass(frozen=True)
class Responses:
    """Which response every row belongs to, and which responses make a unit.

    Attributes:
        tokens: The rows.
        backend: Resolved name of the backend, which sums.
        of_row: (N,) response of each row, in [0, count).
        count: Responses; an upper bound where segments are packed, whose number is data.
        sides: Responses of a unit, ``count // sides`` apart: 2 for pairs, else 1.
        order: (N,) rows sorted by response, None if they are.
    """

    tokens: Tokens
    backend: str
    of_row: Tensor
    count: int
    sides: int = 1
    order: Tensor | None = None

    @staticmethod
    def of(tokens: Tokens, backend: str, segment_ids: Tensor | None = None) -> Responses:
        """Each row of a (B, T) target is a response, or each segment inside a row.

        ``segment_ids`` are per row of the logits (N,), and local to a row of the target.

        Raises:
            ValueError: A 1-D target without segment_ids.
        """
        T = tokens.shape[-1] if len(tokens.shape) else 1
        row = torch.arange(tokens.y.numel(), device=tokens.y.device) // max(T, 1)
        if segment_ids is None:
            if len(tokens.shape) < 2:
                raise ValueError(
                    "level='sequence' takes the rows of a (B, T) target as sequences; a target of "
                    f"shape {tuple(tokens.shape)} needs segment_ids"
                )
            return Responses(tokens, backend, row, tokens.shape[:-1].numel())
        # Sorted by row and id, a segment is a run: no count is needed.
        by_id = torch.argsort(segment_ids, stable=True)
        order = by_id[torch.argsort(row[by_id], stable=True)]
        ids, row = segment_ids[order], row[order]
        starts = torch.ones_like(row)
        starts[1:] = ((ids[1:] != ids[:-1]) | (row[1:] != row[:-1])).to(row.dtype)
        run = starts.cumsum(0) - 1
        of_row = torch.empty_like(run).scatter_(0, order, run)
        return Responses(tokens, backend, of_row, of_row.numel(), order=order)

    @property
    def units(self) -> int:
        """Number of units."""
        return self.count // self.sides

    @property
    def unit_of(self) -> Tensor:
        """(N,) unit of each row."""
        return self.of_row if self.sides == 1 else self.of_row % max(self.units, 1)

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

    def lengths(self) -> Tensor:
        """Counted tokens of each response, (units, sides)."""
        counted = self.tokens.counted
        if self.order is not None:
            return self.sums(counted.double()).to(torch.int64)
        per_row = counted.view(self.count, self.tokens.shape[-1]).sum(1)
        return per_row.view(self.sides, self.units).t()

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
            counted = self.tokens.counted
            mine = torch.where(counted, ref, 0.0) if units is None else ref[units.positions]
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
        # A chunk's tokens come unit after unit, and in a unit side after side.
        local = units.unit_at
        if self.sides > 1:
            side = self.of_row[units.positions] // max(self.units, 1)
            local = self.sides * local + side
        count = self.sides * units.ids.numel()
        return segment_sum(x, local, count, self.backend).view(-1, self.sides)
