"""DPO and its kin: pair losses of the summed log-ratios of two responses (9)-(11)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_losses.arguments import check_number, has_data, plain
from fused_losses.backends import lines
from fused_losses.engine.segments import segment_sum
from fused_losses.engine.units import UnitChunk
from fused_losses.functional.linear_source import LinearSource
from fused_losses.functional.observe import PairStats, report_stats, statistics_wanted
from fused_losses.functional.options import Options, check_num_items
from fused_losses.functional.reduction import mean_factor
from fused_losses.functional.sequence_level import log_ratios, offsets_of
from fused_losses.functional.sources import Source
from fused_losses.functional.token_level import stats_of
from fused_losses.functional.tokens import Tokens, check_device, check_reference
from fused_losses.functional.units import runs_whole_units, sum_over_units
from fused_losses.preference import (
    PAIR_LOSSES,
    PairOptions,
    Pairs,
    refuse_reference,
    rewards,
    score,
)
from fused_losses.stats import TokenStats


@dataclass(frozen=True)
class SFTTerm:
    """The likelihood term beside the pair loss.

    Attributes:
        weight: Its weight, >= 0.
        num_items: Replaces the number of counted chosen tokens in its mean.
    """

    weight: float
    num_items: float | Tensor | None


@dataclass(frozen=True)
class _Reference:
    """References per token (N,), or per sequence (2B,), or neither."""

    token: Tensor | None = None
    sequence: Tensor | None = None


@dataclass(frozen=True)
class _Batch:
    """Pairs of a call, before their log-probs are known; all that is per response is (2B,)."""

    tokens: Tokens
    ref: _Reference
    lengths: Tensor
    o: PairOptions
    backend: str

    @property
    def present(self) -> Tensor:
        """(B,): pairs with a counted token; another one has no loss, and no mean counts it."""
        chosen, rejected = _split(self.lengths)
        return chosen + rejected > 0

    @property
    def row_offsets(self) -> Tensor:
        rows, T = self.tokens.shape
        return torch.arange(rows + 1, device=self.tokens.y.device) * T

    def sums(self, per_token: Tensor) -> Tensor:
        """Sum (N,) rows per response."""
        return segment_sum(per_token, self.row_offsets, self.backend)

    def without_reference(self, sums: Tensor, rows: Tensor | None = None) -> Tensor:
        """Subtract the references of responses ``rows``, where they came per sequence.

        An empty response has log-ratio 0, whatever its reference.
        """
        if self.ref.sequence is None:
            return sums
        given = torch.where(self.lengths > 0, self.ref.sequence, 0.0)
        return sums - (given if rows is None else given[rows]).to(sums.dtype)

    def pairs(self, logps: Tensor) -> Pairs:
        """All pairs of the batch, from log-probs (N,) that are 0 where nothing counts."""
        ratio = log_ratios(logps, self.ref.token, self.tokens.counted)
        ratios = self.without_reference(self.sums(ratio))
        margin = self._reference_margin() if PAIR_LOSSES[self.o.loss_type].whole_batch else None
        return Pairs(*_split(ratios), self.o, *_split(self.lengths), margin, present=self.present)

    def _reference_margin(self) -> Tensor | None:
        sums = None
        if self.ref.token is not None:
            sums = self.sums(torch.where(self.tokens.counted, self.ref.token, 0.0))
        elif self.ref.sequence is not None:
            sums = torch.where(self.lengths > 0, self.ref.sequence, 0.0)
        return None if sums is None else sums[: len(sums) // 2] - sums[len(sums) // 2 :]


def run_dpo(
    source: Source,
    target: Any,
    ref_logps: Any,
    o: PairOptions,
    sft: SFTTerm,
    options: Options,
) -> Tensor:
    """Pair loss of rows [chosen; rejected], reduced over pairs, and the likelihood term."""
    options.refuse("by pair losses", token_weight=None, z_loss=0.0)
    sft = _checked(sft, options)
    refuse_reference(o.loss_type, "ref_logps", ref_logps)
    tokens = source.tokens(target)
    if len(tokens.shape) < 2:
        raise ValueError(
            "target must be (2B, T) with rows [chosen; rejected], got a target of shape "
            f"{tuple(tokens.shape)}"
        )
    if tokens.shape[0] % 2:
        raise ValueError(
            "target must have an even number of rows, B chosen followed by B rejected, "
            f"got {tokens.shape[0]}"
        )
    if len(tokens.shape) > 2:
        raise ValueError(f"target must be (2B, T), got {tuple(tokens.shape)}")
    ref = _reference(ref_logps, tokens)
    lengths = tokens.counted.view(tokens.shape).sum(1)
    _warn_of_empty(lengths)
    batch = _Batch(tokens, ref, lengths, o, source.backend)
    factor = mean_factor(batch.present.sum(), options)
    sft_factor = _sft_factor(sft, batch, factor, options)
    entropy = statistics_wanted()
    fused = options.reduction != "none" and runs_whole_units(tokens)
    if fused and isinstance(source, LinearSource):
        loss, rows = _sum_over_pairs(source, batch, factor, sft_factor, entropy)
    else:
        rows = source.statistics(tokens, entropy=entropy, entropy_gradient=False)
        loss = score(batch.pairs(rows[lines.LOGP]))
        if options.reduction != "none":
            loss = loss.sum() * factor.to(loss.dtype)
            if sft_factor is not None:
                chosen, _ = _split(batch.sums(rows[lines.LOGP]))
                loss = loss - chosen.sum() * sft_factor.to(loss.dtype)
    if entropy:
        _report(rows.detach(), batch)
    return loss


def _checked(sft: SFTTerm, options: Options) -> SFTTerm:
    weight = check_number("sft_weight", sft.weight, low=0.0, closed=True)
    check_num_items("sft_num_items", sft.num_items, options.reduction)
    if weight and options.reduction == "none":
        raise ValueError(
            "sft_weight belongs to the batch's tokens, not to a pair: it is not taken with "
            "reduction='none'; use 'mean' or 'sum', or leave it at 0.0"
        )
    return SFTTerm(weight, plain(sft.num_items))


def _sft_factor(sft: SFTTerm, batch: _Batch, factor: Tensor, options: Options) -> Tensor | None:
    """Return what the summed negative log-likelihood is multiplied by; None: there is no term."""
    if sft.weight == 0.0:
        return None
    tokens = _split(batch.lengths)[0].sum()
    found = sft.weight * mean_factor(tokens, replace(options, num_items=sft.num_items))
    if options.num_items is not None and sft.num_items is None:
        # Of an accumulated batch this one is so large a part.
        found = found * batch.present.sum() * factor
    return found


def _split(t: Tensor) -> tuple[Tensor, Tensor]:
    B = t.shape[0] // 2
    return t[:B], t[B:]


def _sum_over_pairs(
    source: LinearSource,
    batch: _Batch,
    factor: Tensor,
    sft_factor: Tensor | None,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Both responses of a pair are in one chunk: the pair is the unit, or the whole batch is."""
    tokens, ref = batch.tokens, batch.ref
    rows, T = tokens.shape
    B = rows // 2
    # Sort by pair, then chosen before rejected: responses are runs.
    sequence = torch.arange(tokens.y.numel(), device=tokens.y.device) // max(T, 1)
    pair = sequence % max(B, 1)

    def total(pairs: Pairs, chosen_logps: Callable[[], Tensor]) -> Tensor:
        loss = score(pairs).sum() * factor.to(pairs.chosen.dtype)
        if sft_factor is None:
            return loss
        return loss - chosen_logps().sum() * sft_factor.to(loss.dtype)

    def loss_of_batch(stats: TokenStats, units: UnitChunk) -> Tensor:
        logps = stats.logps.new_zeros(tokens.y.shape).index_copy(0, units.positions, stats.logps)
        return total(batch.pairs(logps), lambda: _split(batch.sums(logps))[0])

    def loss_of_pairs(stats: TokenStats, units: UnitChunk) -> Tensor:
        at, ids = units.positions, units.ids
        ratio = stats.logps
        if ref.token is not None:
            ratio = ratio - ref.token[at].to(ratio.dtype)
        # Tokens of a pair keep their order, so its chosen response comes first.
        response = 2 * torch.searchsorted(ids, pair[at]) + (sequence[at] >= B)
        offsets = offsets_of(response, 2 * ids.numel())
        both = torch.stack([ids, ids + B], 1).reshape(-1)
        sums = batch.without_reference(segment_sum(ratio, offsets, batch.backend), both)
        n = batch.lengths[both]
        pairs = Pairs(sums[::2], sums[1::2], batch.o, n[::2], n[1::2])
        return total(pairs, lambda: segment_sum(stats.logps, offsets, batch.backend)[::2])

    if PAIR_LOSSES[batch.o.loss_type].whole_batch:
        unit = torch.zeros_like(pair)
        return sum_over_units(source, tokens, unit, loss_of_batch, entropy=entropy)
    return sum_over_units(source, tokens, pair, loss_of_pairs, entropy=entropy)


def _report(rows: Tensor, batch: _Batch) -> None:
    logps = batch.sums(rows[lines.LOGP])
    per_token = stats_of(rows, batch.tokens, entropy=True)
    report_stats(PairStats(*per_token, *_split(logps), *rewards(batch.pairs(rows[lines.LOGP]))))


def _reference(ref_logps: Any, tokens: Tokens) -> _Reference:
    if ref_logps is None:
        return _Reference()
    check_reference(ref_logps)
    if ref_logps.shape == tokens.shape[:1]:
        check_device("ref_logps", ref_logps, "target", tokens.y)
        return _Reference(sequence=ref_logps.detach().contiguous())
    if ref_logps.shape != tokens.shape:
        raise ValueError(
            f"ref_logps must be per token, {tuple(tokens.shape)}, or per sequence, "
            f"{tuple(tokens.shape[:1])}, got {tuple(ref_logps.shape)}"
        )
    return _Reference(token=tokens.reference(ref_logps))


def _warn_of_empty(lengths: Tensor) -> None:
    """Warn of responses without a counted token, where looking costs no synchronisation."""
    if lengths.device.type != "cpu" or torch.compiler.is_compiling() or not has_data(lengths):
        return
    if bool((lengths > 0).all()):
        return
    rows = (lengths == 0).nonzero()[:, 0].tolist()
    warnings.warn(
        f"target rows {rows[:8]} have no counted token: their log-prob is taken as 0",
        stacklevel=4,
    )
