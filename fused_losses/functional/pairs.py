"""DPO and its kin: pair losses of the summed log-ratios of two responses (9)-(11)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_losses.arguments import check_num_items, check_number, plain, warn_of_empty
from fused_losses.backends import lines
from fused_losses.engine.units import UnitChunk, UnitLayout
from fused_losses.functional.observe import PairStats, report_stats, statistics_wanted
from fused_losses.functional.options import Options
from fused_losses.functional.responses import Responses
from fused_losses.functional.sources import Source
from fused_losses.functional.tokens import (
    Tokens,
    check_device,
    check_reference,
    mean_factor,
    times,
)
from fused_losses.preference import (
    PairOptions,
    Pairs,
    pair_loss,
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
class _Batch:
    """Pairs of a call, before their log-probs are known.

    Attributes:
        responses: Both sides of each pair; what is per response is (B, 2), chosen and rejected.
        ref: (N,) reference log-probs of the rows, or None.
        ref_sums: (B, 2) those of whole responses, where they came so, or None.
        o: Options of the pair loss.
    """

    responses: Responses
    ref: Tensor | None
    ref_sums: Tensor | None
    o: PairOptions

    @staticmethod
    def of(tokens: Tokens, backend: str, ref_logps: Any, o: PairOptions) -> _Batch:
        """Check that rows are [chosen; rejected], and the references."""
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
        responses = Responses.of(tokens, backend, sides=2)
        ref, ref_sums = _reference(ref_logps, tokens)
        if ref_sums is not None:
            # An empty response has log-ratio 0, whatever its reference.
            ref_sums = torch.where(responses.lengths > 0, ref_sums, 0.0)
        return _Batch(responses, ref, ref_sums, o)

    @property
    def present(self) -> Tensor:
        """(B,): pairs with a counted token; another one has no loss, and no mean counts it."""
        return self.responses.lengths.any(1)

    @property
    def whole(self) -> bool:
        """Whether a pair's loss depends on the other pairs."""
        return pair_loss(self.o.loss_type).whole_batch

    def pairs(self, logps: Tensor, units: UnitChunk | None = None) -> Pairs:
        """Return the pairs of a chunk, or all, from log-probs as ``Responses.sums`` takes them."""
        sums = self.responses.log_ratio_sums(logps, self.ref, units)
        lengths, given = self.responses.lengths, self.ref_sums
        empty = units is None or units.has_empty
        present = self.present if empty else None
        if units is not None:
            lengths = units.of_units(lengths)
            given = None if given is None else units.of_units(given)
            present = None if present is None else units.of_units(present)
        if given is not None:
            sums = sums - given.to(sums.dtype)
        chosen, rejected = sums.unbind(1)
        chosen_lengths, rejected_lengths = lengths.unbind(1)
        return Pairs(
            chosen,
            rejected,
            self.o,
            chosen_lengths,
            rejected_lengths,
            reference_margin=self._reference_margin() if self.whole else None,
            present=present,
        )

    def _reference_margin(self) -> Tensor | None:
        sums = self.ref_sums
        if self.ref is not None:
            sums = self.responses.sums(torch.where(self.responses.counted, self.ref, 0.0))
        return None if sums is None else sums[:, 0] - sums[:, 1]


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
    batch = _Batch.of(tokens, source.backend, ref_logps, o)
    responses = batch.responses
    warn_of_empty("target", responses.lengths.t(), "their log-prob is taken as 0")
    sft_factor = _sft_factor(sft, batch, options)
    entropy = statistics_wanted()

    def total(stats: TokenStats, units: UnitChunk | None) -> Tensor:
        logps = stats.logps
        factor = responses.factor(options, None if batch.whole else units)
        if batch.whole and units is not None:
            # One unit holds all pairs, but of their tokens only those that count.
            logps = logps.new_zeros(tokens.y.shape).index_copy(0, units.positions, logps)
            units = None
        loss = times(score(batch.pairs(logps, units)).sum(), factor)
        if sft_factor is None:
            return loss
        chosen = responses.sums(logps, units)[:, 0]
        return loss - chosen.sum() * sft_factor.to(loss.dtype)

    if options.reduction == "none":
        rows = source.statistics(tokens, entropy=entropy, entropy_gradient=False)
        loss = score(batch.pairs(rows[lines.LOGP]))
    else:
        # Both responses of a pair are in one chunk: the pair is the unit, or the whole batch is.
        one = partial(UnitLayout.of_one, tokens.y, tokens.ignore_index)
        lay_out = one if batch.whole else responses.layout
        loss, rows = source.unit_sum(tokens, lay_out, total, entropy=entropy)
    report_stats(lambda: _stats(rows.detach(), batch))
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


def _sft_factor(sft: SFTTerm, batch: _Batch, options: Options) -> Tensor | None:
    """Return what the summed negative log-likelihood is multiplied by; None: there is no term."""
    if sft.weight == 0.0:
        return None
    tokens = batch.responses.lengths[:, 0].sum()
    found = sft.weight * mean_factor(tokens, replace(options, num_items=sft.num_items))
    if options.num_items is not None and sft.num_items is None:
        # Of an accumulated batch this one is so large a part.
        pairs = batch.present.sum()
        found = found * pairs * mean_factor(pairs, options)
    return found


def _stats(rows: Tensor, batch: _Batch) -> PairStats:
    logps = rows[lines.LOGP]
    per_token = batch.responses.tokens.stats(rows, entropy=True)
    sums = batch.responses.sums(logps)
    return PairStats(*per_token, sums[:, 0], sums[:, 1], *rewards(batch.pairs(logps)))


def _reference(ref_logps: Any, tokens: Tokens) -> tuple[Tensor | None, Tensor | None]:
    """Return references per token (N,), or per response (B, 2), or neither."""
    if ref_logps is None:
        return None, None
    check_reference(ref_logps)
    if ref_logps.shape == tokens.shape[:1]:
        check_device("ref_logps", ref_logps, "target", tokens.y)
        return None, ref_logps.detach().reshape(2, -1).t()
    if ref_logps.shape != tokens.shape:
        raise ValueError(
            f"ref_logps must be per token, {tuple(tokens.shape)}, or per sequence, "
            f"{tuple(tokens.shape[:1])}, got {tuple(ref_logps.shape)}"
        )
    return tokens.reference(ref_logps), None
