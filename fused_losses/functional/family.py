"""Every member of the family of token losses, token by token or summed over sequences first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses.arguments import (
    check_choice,
    check_max_weight,
    check_number,
    refuse_unserved,
)
from fused_losses.backends import Objective, lines
from fused_losses.engine.unit_sum import UnitChunk
from fused_losses.functional.observe import report_stats, statistics_wanted
from fused_losses.functional.options import Level, Options, check_token_loss, mean_factor
from fused_losses.functional.responses import Responses
from fused_losses.functional.sources import Source
from fused_losses.functional.tokens import Tokens, check_device, check_float, check_offset, expand
from fused_losses.stats import TokenStats
from fused_losses.token_losses import TokenLoss


@dataclass(frozen=True)
class Family:
    """A member of the family with everything that is its own."""

    loss: str | TokenLoss = "mle"
    beta: float = 1.0
    value: float | Tensor = 0.0
    level: Level = "token"
    max_weight: float = 4.0
    segment_ids: Tensor | None = None

    def objective(self, options: Options, ref_logps: Any) -> Objective:
        """Check what belongs to the loss.

        Raises:
            ValueError: An option out of range, a missing reference, smoothing of a ratio loss.
        """
        loss = check_token_loss(self.loss)
        beta = check_number("beta", self.beta, low=0.0)
        max_weight = check_max_weight(self.max_weight)
        check_choice("level", self.level, get_args(Level))
        if self.level == "token" and self.segment_ids is not None:
            raise ValueError("segment_ids belongs to level='sequence', got level='token'")
        if loss.uses_reference:
            if ref_logps is None:
                raise ValueError(
                    f"ref_logps is required by loss={loss.name!r}: log-probs of the target under "
                    "the reference model, e.g. linear_token_stats(...).logps under torch.no_grad()"
                )
            if options.label_smoothing:
                raise ValueError(
                    f"label_smoothing belongs to loss='mle', loss={loss.name!r} does not take it"
                )
            return Objective(loss, beta, max_weight, 0.0, options.z_loss)
        # The reference cancels, and beta with it (6).
        return Objective(loss, 1.0, max_weight, options.label_smoothing, options.z_loss)


def run_family(
    source: Source, options: Options, target: Any, ref_logps: Any, family: Family
) -> Tensor:
    """Run a member of the family at its level."""
    o = family.objective(options, ref_logps)
    tokens = source.tokens(target)
    ref = tokens.reference(ref_logps)
    if family.level == "sequence":
        return _run_sequences(source, tokens, ref, o, options, family)
    if o.loss.device_fn is None and source.backend == "triton":
        raise ValueError(
            f"loss={o.loss.name!r} has no device_fn, which backend='triton' needs; "
            "give the TokenLoss one, or use backend='torch'"
        )
    return _run_tokens(source, tokens, ref, o, options, family)


def _run_tokens(
    source: Source,
    tokens: Tokens,
    ref: Tensor | None,
    o: Objective,
    options: Options,
    family: Family,
) -> Tensor:
    """Equations (5)-(7) per token, then the reduction."""
    value = tokens.value(family.value)
    if not o.loss.uses_reference:
        ref = value = None
    weight = tokens.weight(options.token_weight)
    entropy = statistics_wanted()
    if options.reduction == "none":
        loss, rows = source.losses(tokens, o, ref, value, entropy=entropy)
        if weight is not None:
            loss = loss * weight.to(loss.dtype)
        loss = tokens.restore(loss)
    else:
        factor = mean_factor(tokens.counted.sum(), options)
        loss, rows = source.loss_sum(tokens, o, ref, value, weight, factor, entropy=entropy)
    report_stats(lambda: tokens.stats(rows, entropy=entropy))
    return loss


def _run_sequences(
    source: Source,
    tokens: Tokens,
    ref: Tensor | None,
    o: Objective,
    options: Options,
    family: Family,
) -> Tensor:
    """Equations (5)-(7) per sequence, then the reduction."""
    options.refuse("at level='sequence'", token_weight=None, z_loss=0.0, label_smoothing=0.0)
    responses = _sequences(tokens, source.backend, family.segment_ids)
    if options.reduction == "none" and family.segment_ids is not None:
        raise ValueError("reduction='none' is not taken with segment_ids; use 'mean' or 'sum'")
    value = _value_of(responses, family.value)
    if not o.loss.uses_reference:
        ref = value = None
    present = responses.lengths()[:, 0] > 0
    entropy = statistics_wanted()

    def losses(logps: Tensor, units: UnitChunk | None) -> Tensor:
        ratio = responses.log_ratio_sums(logps, ref, units)[:, 0]
        mine = value if value is None or units is None else value[units.ids]
        loss = sequence_loss(ratio, None if mine is None else mine.to(ratio.dtype), o)
        return loss if units is not None else torch.where(present, loss, 0.0)

    def total(logps: Tensor, units: UnitChunk | None) -> Tensor:
        return losses(logps, units).sum() * factor.to(logps.dtype)

    factor = mean_factor(present.sum(), options)
    # The offset's gradient and per-sequence results need autograd's own graph.
    if options.reduction == "none" or (value is not None and value.requires_grad):
        rows = source.statistics(tokens, entropy=entropy, entropy_gradient=False)
        if options.reduction == "none":
            loss = losses(rows[lines.LOGP], None).view(tokens.shape[:-1])
        else:
            loss = total(rows[lines.LOGP], None)
    else:

        def of_stats(stats: TokenStats, units: UnitChunk | None) -> Tensor:
            return total(stats.logps, units)

        loss, rows = source.unit_sum(tokens, responses.unit_of, of_stats, entropy=entropy)
    report_stats(lambda: tokens.stats(rows, entropy=entropy))
    return loss


def sequence_loss(log_ratio: Tensor, value: Tensor | None, o: Objective) -> Tensor:
    """Equations (5) and (6) on summed log-ratios, any shape."""
    r = o.beta * log_ratio if value is None else o.beta * log_ratio + value
    phi, _ = o.loss.phi_and_weight(r, o.max_weight)
    return ((0.0 if value is None else value) - phi) / o.beta


def _sequences(tokens: Tokens, backend: str, segment_ids: Any) -> Responses:
    if segment_ids is not None:
        return Responses.segments_of(tokens, backend, segment_ids)
    if len(tokens.shape) < 2:
        raise ValueError(
            "level='sequence' takes the rows of a (B, T) target as sequences; a target of shape "
            f"{tuple(tokens.shape)} needs segment_ids"
        )
    return Responses.rows_of(tokens, backend)


def _value_of(sequences: Responses, value: Any) -> Tensor | None:
    """Expand the offset to the sequences: (count,), or None for 0."""
    tokens = sequences.tokens
    if not isinstance(value, Tensor):
        value = check_offset(value, tokens.y.device)
        if value is None:
            return None
    check_float("value", value)
    refuse_unserved("value", value)
    check_device("value", value, "target", tokens.y)
    if sequences.order is None:
        return expand("value", value, tokens.shape[:-1], "the sequences'").reshape(-1)
    # The number of segments is data: one value for all, or one each, in the order of row and id.
    if value.numel() == 1:
        return value.reshape(1).expand(sequences.count)
    if value.dim() != 1 or value.numel() > sequences.count:
        raise ValueError(
            "value must be a number or hold one entry per sequence, ordered by row and "
            f"segment id, got shape {tuple(value.shape)}"
        )
    return F.pad(value, (0, sequences.count - value.numel()))
