"""DPO and its kin: pair losses of the summed log-ratios of two responses (9)-(11)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_losses.backends import lines
from fused_losses.engine.segments import segment_sum
from fused_losses.engine.units import UnitChunk
from fused_losses.functional.linear_source import LinearSource
from fused_losses.functional.observe import PairStats, report_stats, statistics_wanted
from fused_losses.functional.options import Options
from fused_losses.functional.reduction import mean_factor
from fused_losses.functional.sequence_level import log_ratios, offsets_of
from fused_losses.functional.sources import Source
from fused_losses.functional.token_level import stats_of
from fused_losses.functional.tokens import Tokens, check_device, check_reference
from fused_losses.functional.units import sum_over_units
from fused_losses.preference import preference_loss
from fused_losses.stats import TokenStats


@dataclass(frozen=True)
class PairLossOptions:
    """What ``preference_loss`` is told; it checks them."""

    beta: float
    loss_type: Any
    label_smoothing: float


@dataclass(frozen=True)
class _Reference:
    """References per token (N,), or per sequence (2B,), or neither."""

    token: Tensor | None = None
    sequence: Tensor | None = None


def run_dpo(
    source: Source, target: Any, ref_logps: Any, o: PairLossOptions, options: Options
) -> Tensor:
    """Pair loss of rows [chosen; rejected], reduced over pairs."""
    options.refuse("by pair losses", token_weight=None, z_loss=0.0)
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
    B = tokens.shape[0] // 2
    ref = _reference(ref_logps, tokens)
    # Say what is wrong with beta, loss_type or label_smoothing before anything is computed.
    zero = torch.zeros(1)
    _losses(zero, zero, zero, zero, o)
    lengths = tokens.counted.view(tokens.shape).sum(1)
    _warn_of_empty(lengths)
    # A pair without any counted token has no loss, and the mean does not count it.
    present = lengths[:B] + lengths[B:] > 0
    factor = mean_factor(present.sum(), options)
    entropy = statistics_wanted()
    fused = options.reduction != "none" and not torch.compiler.is_compiling()
    if fused and isinstance(source, LinearSource):
        loss, rows = _sum_over_pairs(source, tokens, ref, lengths, factor, o, entropy)
    else:
        rows = source.statistics(tokens, entropy=entropy, entropy_gradient=False)
        ratios = _ratios(rows[lines.LOGP], ref, tokens, lengths, source.backend)
        loss = _losses(*_split(ratios), *_split(lengths.to(ratios.dtype)), o)
        loss = torch.where(present, loss, 0.0)
        if options.reduction != "none":
            loss = loss.sum() * factor.to(loss.dtype)
    if entropy:
        _report(rows.detach(), tokens, ref, lengths, o, source.backend)
    return loss


def _losses(
    chosen: Tensor, rejected: Tensor, chosen_n: Tensor, rejected_n: Tensor, o: PairLossOptions
) -> Tensor:
    """Losses of pairs by their log-ratios: the references are inside already."""
    losses, _, _ = preference_loss(
        chosen,
        rejected,
        beta=o.beta,
        loss_type=o.loss_type,
        label_smoothing=o.label_smoothing,
        chosen_lengths=chosen_n,
        rejected_lengths=rejected_n,
    )
    return losses


def _split(t: Tensor) -> tuple[Tensor, Tensor]:
    B = t.shape[0] // 2
    return t[:B], t[B:]


def _ratios(
    logps: Tensor, ref: _Reference, tokens: Tokens, lengths: Tensor, backend: str
) -> Tensor:
    """Summed log-ratios of all responses, (2B,); 0 for an empty one, whatever its reference."""
    ratio = log_ratios(logps, ref.token, tokens.counted)
    sums = segment_sum(ratio, _row_offsets(tokens), backend)
    if ref.sequence is None:
        return sums
    return sums - torch.where(lengths > 0, ref.sequence, 0.0).to(sums.dtype)


def _row_offsets(tokens: Tokens) -> Tensor:
    rows, T = tokens.shape
    return torch.arange(rows + 1, device=tokens.y.device) * T


def _sum_over_pairs(
    source: LinearSource,
    tokens: Tokens,
    ref: _Reference,
    lengths: Tensor,
    factor: Tensor,
    o: PairLossOptions,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    """The pair is the unit: both responses of a pair are in one chunk."""
    rows, T = tokens.shape
    B = rows // 2
    # Sort by pair, then chosen before rejected: responses are runs.
    sequence = torch.arange(tokens.y.numel(), device=tokens.y.device) // max(T, 1)
    pair = sequence % max(B, 1)

    def loss_of(stats: TokenStats, units: UnitChunk) -> Tensor:
        at, ids = units.positions, units.ids
        ratio = stats.logps
        if ref.token is not None:
            ratio = ratio - ref.token[at].to(ratio.dtype)
        # Tokens of a pair keep their order, so its chosen response comes first.
        response = 2 * torch.searchsorted(ids, pair[at]) + (sequence[at] >= B)
        sums = segment_sum(ratio, offsets_of(response, 2 * ids.numel()), source.backend)
        both = torch.stack([ids, ids + B], 1).reshape(-1)
        if ref.sequence is not None:
            given = torch.where(lengths[both] > 0, ref.sequence[both], 0.0)
            sums = sums - given.to(sums.dtype)
        n = lengths[both].to(sums.dtype)
        return _losses(sums[::2], sums[1::2], n[::2], n[1::2], o).sum() * factor.to(sums.dtype)

    return sum_over_units(source, tokens, pair, loss_of, entropy=entropy)


def _report(
    rows: Tensor,
    tokens: Tokens,
    ref: _Reference,
    lengths: Tensor,
    o: PairLossOptions,
    backend: str,
) -> None:
    logps = segment_sum(rows[lines.LOGP], _row_offsets(tokens), backend)
    rewards = o.beta * _ratios(rows[lines.LOGP], ref, tokens, lengths, backend)
    per_token = stats_of(rows, tokens, entropy=True)
    report_stats(PairStats(*per_token, *_split(logps), *_split(rewards)))


def _reference(ref_logps: Any, tokens: Tokens) -> _Reference:
    if ref_logps is None:
        return _Reference()
    check_reference(ref_logps)
    if ref_logps.shape == tokens.shape[:1]:
        check_device("ref_logps", ref_logps, "target", tokens.y)
        return _Reference(sequence=ref_logps.detach())
    if ref_logps.shape != tokens.shape:
        raise ValueError(
            f"ref_logps must be per token, {tuple(tokens.shape)}, or per sequence, "
            f"{tuple(tokens.shape[:1])}, got {tuple(ref_logps.shape)}"
        )
    return _Reference(token=tokens.reference(ref_logps))


def _warn_of_empty(lengths: Tensor) -> None:
    """Warn of responses without a counted token, where looking costs no synchronisation."""
    if lengths.device.type != "cpu" or torch.compiler.is_compiling() or bool((lengths > 0).all()):
        return
    rows = (lengths == 0).nonzero()[:, 0].tolist()
    warnings.warn(
        f"target rows {rows[:8]} have no counted token: their log-prob is taken as 0",
        stacklevel=4,
    )
