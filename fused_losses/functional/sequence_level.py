"""Token losses on whole sequences: log-ratios are summed before equations (5)-(7) apply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses.arguments import check_ids, refuse_unserved
from fused_losses.backends import Objective, lines
from fused_losses.engine.segments import segment_sum
from fused_losses.engine.units import UnitChunk
from fused_losses.functional.linear_source import LinearSource
from fused_losses.functional.observe import report_stats, statistics_wanted
from fused_losses.functional.options import Options
from fused_losses.functional.reduction import mean_factor
from fused_losses.functional.sources import Source
from fused_losses.functional.token_level import stats_of
from fused_losses.functional.tokens import (
    Tokens,
    check_device,
    check_float,
    check_offset,
    expand,
)
from fused_losses.functional.units import runs_whole_units, sum_over_units
from fused_losses.stats import TokenStats


@dataclass(frozen=True)
class Sequences:
    """Which sequence every row belongs to.

    Attributes:
        shape: Shape of per-sequence results, None for packed rows (their number is data).
        of_row: (N,) sequence of each row, in [0, count).
        count: Upper bound of the number of sequences.
        order: (N,) rows sorted by sequence, None if they are.
    """

    shape: torch.Size | None
    of_row: Tensor
    count: int
    order: Tensor | None

    @staticmethod
    def of(tokens: Tokens, segment_ids: Any) -> Sequences:
        """The rows of a (..., T) target, or the segments inside them.

        Raises:
            TypeError: segment_ids are not integers.
            ValueError: A 1-D target without segment_ids, or shapes that differ.
        """
        T = tokens.shape[-1] if len(tokens.shape) else 1
        row = torch.arange(tokens.y.numel(), device=tokens.y.device) // max(T, 1)
        if segment_ids is None:
            if len(tokens.shape) < 2:
                raise ValueError(
                    "level='sequence' takes the rows of a (B, T) target as sequences; a target of "
                    f"shape {tuple(tokens.shape)} needs segment_ids"
                )
            shape = tokens.shape[:-1]
            return Sequences(shape, row, shape.numel(), None)
        check_ids("segment_ids", segment_ids)
        ids = tokens.flat("segment_ids", segment_ids).to(torch.int64)
        # Ids are local to a row. Sorted by row and id, a sequence is a run: no count is needed.
        by_id = torch.argsort(ids, stable=True)
        order = by_id[torch.argsort(row[by_id], stable=True)]
        ids, row = ids[order], row[order]
        starts = torch.ones_like(ids)
        starts[1:] = ((ids[1:] != ids[:-1]) | (row[1:] != row[:-1])).to(ids.dtype)
        run = starts.cumsum(0) - 1
        of_row = torch.empty_like(run).scatter_(0, order, run)
        return Sequences(None, of_row, of_row.numel(), order)

    def sum(self, x: Tensor, backend: str) -> Tensor:
        """Sum (N,) rows per sequence, deterministically: (count,)."""
        of_row = self.of_row
        if self.order is not None:
            x, of_row = x[self.order], of_row[self.order]
        return segment_sum(x, offsets_of(of_row, self.count), backend)


def offsets_of(sorted_ids: Tensor, count: int) -> Tensor:
    """Return where each of the segments 0 .. count begins in ascending ids: (count + 1,)."""
    wanted = torch.arange(count + 1, device=sorted_ids.device, dtype=sorted_ids.dtype)
    return torch.searchsorted(sorted_ids.contiguous(), wanted)


def sequence_loss(log_ratio: Tensor, value: Tensor | None, o: Objective) -> Tensor:
    """Equations (5) and (6) on summed log-ratios, any shape."""
    r = o.beta * log_ratio if value is None else o.beta * log_ratio + value
    phi, _ = o.loss.phi_and_weight(r, o.max_weight)
    return ((0.0 if value is None else value) - phi) / o.beta


def run_sequence_level(
    source: Source,
    target: Any,
    ref_logps: Any,
    value: Any,
    segment_ids: Any,
    o: Objective,
    options: Options,
) -> Tensor:
    """Equations (5)-(7) per sequence, then the reduction."""
    options.refuse("at level='sequence'", token_weight=None, z_loss=0.0, label_smoothing=0.0)
    tokens = source.tokens(target)
    sequences = Sequences.of(tokens, segment_ids)
    if options.reduction == "none" and sequences.shape is None:
        raise ValueError("reduction='none' is not taken with segment_ids; use 'mean' or 'sum'")
    ref = tokens.reference(ref_logps)
    offset = _sequence_value(value, sequences, tokens.y.device)
    if not o.loss.uses_reference:
        ref = offset = None
    counts = sequences.sum(tokens.counted.double(), source.backend)
    entropy = statistics_wanted()
    # What runs whole units eagerly; the offset's gradient and per-sequence results need autograd.
    fused = options.reduction != "none" and runs_whole_units(tokens)
    fused &= offset is None or not offset.requires_grad
    if fused and isinstance(source, LinearSource):
        factor = mean_factor((counts > 0).sum(), options)
        loss, rows = _sum_over_sequences(source, tokens, sequences, ref, offset, factor, o, entropy)
    else:
        rows = source.statistics(tokens, entropy=entropy, entropy_gradient=False)
        ratio = log_ratios(rows[lines.LOGP], ref, tokens.counted)
        sums = sequences.sum(ratio, source.backend)
        loss = sequence_loss(sums, None if offset is None else offset.to(sums.dtype), o)
        loss = torch.where(counts > 0, loss, 0.0)
        if options.reduction == "none":
            loss = loss.view(tokens.shape[:-1])
        else:
            loss = loss.sum() * mean_factor((counts > 0).sum(), options).to(loss.dtype)
    report_stats(stats_of(rows, tokens, entropy=entropy))
    return loss


def log_ratios(logps: Tensor, ref: Tensor | None, counted: Tensor) -> Tensor:
    """Per-token log-ratios, subtracted before any sum; ignored references are never read."""
    return logps if ref is None else logps - torch.where(counted, ref, 0.0).to(logps.dtype)


def _sum_over_sequences(
    source: LinearSource,
    tokens: Tokens,
    sequences: Sequences,
    ref: Tensor | None,
    offset: Tensor | None,
    factor: Tensor,
    o: Objective,
    entropy: bool,
) -> tuple[Tensor, Tensor]:

    def loss_of(stats: TokenStats, units: UnitChunk) -> Tensor:
        ratio = stats.logps
        if ref is not None:
            ratio = ratio - ref[units.positions].to(ratio.dtype)
        # The chunk's tokens come sequence after sequence: its own segments, in order.
        local = torch.searchsorted(units.ids, sequences.of_row[units.positions])
        sums = segment_sum(ratio, offsets_of(local, units.ids.numel()), source.backend)
        value = None if offset is None else offset[units.ids].to(sums.dtype)
        return sequence_loss(sums, value, o).sum() * factor.to(sums.dtype)

    return sum_over_units(source, tokens, sequences.of_row, loss_of, entropy=entropy)


def _sequence_value(value: Any, sequences: Sequences, device: torch.device) -> Tensor | None:
    """Expand the offset to the sequences: (count,), or None for 0."""
    if not isinstance(value, Tensor):
        value = check_offset(value, device)
        if value is None:
            return None
    check_float("value", value)
    refuse_unserved("value", value)
    check_device("value", value, "target", sequences.of_row)
    if sequences.shape is None:
        # Their number is data: one value for all, or one each, in the order of row and id.
        if value.numel() == 1:
            return value.reshape(1).expand(sequences.count)
        if value.dim() != 1 or value.numel() > sequences.count:
            raise ValueError(
                "value must be a number or hold one entry per sequence, ordered by row and "
                f"segment id, got shape {tuple(value.shape)}"
            )
        return F.pad(value, (0, sequences.count - value.numel()))
    return expand("value", value, sequences.shape, "the sequences'").reshape(-1)
