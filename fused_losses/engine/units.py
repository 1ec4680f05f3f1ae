"""Units: which tokens make one, where they are, and how chunks take them whole.

What planning needs of them, their sizes, is on the host; one copy of lengths or ids takes it there,
the one synchronisation of a call. All else stays on the device.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from fused_losses.engine.segment_sum import segment_sum

_NO_SEGMENTS = "these units are single tokens, which have no segments"


@dataclass(frozen=True)
class Segments:
    """Runs of a layout's tokens that losses sum over, as many in each unit.

    Attributes:
        of_token: (n,) segment of each token, ascending.
        offsets: (S + 1,) where each begins among the tokens.
        sides: How many a unit has.
    """

    of_token: Tensor
    offsets: Tensor
    sides: int


@dataclass(frozen=True)
class UnitLayout:
    """Counted tokens, sorted by unit.

    Attributes:
        positions: (n,) flat positions of the counted tokens, unit after unit.
        ends: How many tokens the units have up to the end of each, on the host.
        present: How many units have a counted token.
        ids: (U,) which units these are, ascending; None: all, in order.
        segments: What their losses sum over, or None.
    """

    positions: Tensor
    ends: Sequence[int]
    present: int
    ids: Tensor | None = None
    segments: Segments | None = None

    @staticmethod
    def of_tokens(y: Tensor, ignore_index: int) -> UnitLayout:
        """Make every counted token its own unit."""
        positions = (y != ignore_index).nonzero()[:, 0]
        n = positions.numel()
        return UnitLayout(positions, range(1, n + 1), n)

    @staticmethod
    def of_one(y: Tensor, ignore_index: int) -> UnitLayout:
        """Make one unit of all counted tokens."""
        positions = (y != ignore_index).nonzero()[:, 0]
        n = positions.numel()
        return UnitLayout(positions, [n], min(n, 1))

    @staticmethod
    def of_ids(y: Tensor, unit_of: Tensor, ignore_index: int) -> UnitLayout:
        """Lay out the tokens of units ``unit_of`` (N,), any ids; a unit is its one segment.

        Raises:
            ValueError: A counted token of a negative unit.
        """
        nowhere = torch.iinfo(torch.int64).max
        units = unit_of.to(torch.int64).masked_fill(y == ignore_index, nowhere)
        units, order = torch.sort(units, stable=True)
        known = units.cpu()
        n = int(torch.searchsorted(known, nowhere))
        if n and int(known[0]) < 0:
            raise ValueError(f"units must be >= 0 at counted positions, got {int(known[0])}")
        sizes = torch.unique_consecutive(known[:n], return_counts=True)[1].tolist()
        units = units[:n]
        unit_at = torch.diff(units, prepend=units[:1]).sign().cumsum(0)
        offsets = torch.searchsorted(unit_at, torch.arange(len(sizes) + 1, device=y.device))
        segments = Segments(unit_at, offsets, 1)
        ends, ids = list(accumulate(sizes)), units[offsets[:-1]]
        return UnitLayout(order[:n], ends, len(ends), ids, segments)

    @staticmethod
    def of_rows(counted: Tensor, lengths: Tensor) -> UnitLayout:
        """Lay out units of ``sides`` whole rows each.

        Args:
            counted: (sides, U, T) bool: the tokens that count, in the order of their flat
                positions.
            lengths: (U, sides) how many do in each row.
        """
        sides, U, T = counted.shape
        sizes = [sum(of_unit) for of_unit in lengths.tolist()]
        n = sum(sizes)
        unit, side, place = counted.transpose(0, 1).nonzero_static(size=n).unbind(1)
        positions, row = torch.add(place, unit, alpha=T), unit
        if sides > 1:
            positions = positions.add_(side, alpha=U * T)
            row = torch.add(side, unit, alpha=sides)
        row = row.contiguous()
        bounds = torch.arange(sides * U + 1, device=row.device)
        segments = Segments(row, torch.searchsorted(row, bounds), sides)
        present = len(sizes) - sizes.count(0)
        return UnitLayout(positions, list(accumulate(sizes)), present, None, segments)

    def cut(self) -> UnitLayout:
        """Make every token its own unit; ``present`` and segments stay those of the whole units."""
        return replace(self, ends=range(1, self.positions.numel() + 1), ids=None)

    def chunks(self, sizes: Sequence[int]) -> Iterator[UnitChunk]:
        """Split into chunks of so many tokens, each some whole units."""
        token = unit = 0
        for size in sizes:
            stop = bisect_right(self.ends, token + size)
            yield UnitChunk(self, slice(token, token + size), slice(unit, stop))
            token, unit = token + size, stop

    @property
    def whole(self) -> UnitChunk:
        """All of it as one chunk."""
        return UnitChunk(self, slice(0, self.positions.numel()), slice(0, len(self.ends)))


@dataclass(frozen=True)
class UnitChunk:
    """Whole units of one chunk.

    Attributes:
        layout: Whose units they are.
        tokens: Which of its tokens.
        units: Which of its units.
    """

    layout: UnitLayout
    tokens: slice
    units: slice

    @property
    def positions(self) -> Tensor:
        """(R,) flat positions of the tokens, unit after unit."""
        return self.layout.positions[self.tokens]

    @property
    def segment_of_token(self) -> Tensor:
        """(R,) segment of each token among all of the layout."""
        every = self.layout.segments
        if every is None:
            raise ValueError(_NO_SEGMENTS)
        return every.of_token[self.tokens]

    @property
    def has_empty(self) -> bool:
        """Whether a unit of the layout has no counted token."""
        return self.layout.present < len(self.layout.ends)

    def of_units(self, t: Tensor) -> Tensor:
        """Take what belongs to these units from what belongs to all that a call knows."""
        ids = self.layout.ids
        return t[self.units] if ids is None else t[ids[self.units]]

    def segments(self) -> Segments:
        """Their segments, counted from the first."""
        every = self.layout.segments
        if every is None:
            raise ValueError(_NO_SEGMENTS)
        first, stop = every.sides * self.units.start, every.sides * self.units.stop
        of_token, offsets = every.of_token[self.tokens], every.offsets[first : stop + 1]
        if first:
            of_token, offsets = of_token - first, offsets - self.tokens.start
        return Segments(of_token, offsets, every.sides)

    def sums(self, x: Tensor, backend: str) -> Tensor:
        """Sum what each token has (R,) over the segments: (units, sides)."""
        parts = self.segments()
        count = parts.offsets.numel() - 1
        sums = segment_sum(x, parts.of_token, count, backend, parts.offsets)
        return sums.view(-1, parts.sides)
