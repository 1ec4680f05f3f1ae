"""Every member of the family of token losses, token by token or summed over sequences first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from fused_losses.arguments import check_choice, check_max_weight, check_number
from fused_losses.backends import Objective, lines
from fused_losses.engine.units import UnitChunk
from fused_losses.functional.observe import report_stats, statistics_wanted
from fused_losses.functional.options import Level, Options, check_token_loss
from fused_losses.functional.responses import Responses
from fused_losses.functional.sources import Source
from fused_losses.functional.tokens import Tokens, times
from fused_losses.stats import TokenStats
from fused_losses.token_losses import TOKEN_LOSSES, TokenLoss


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
        if options.label_smoothing and loss.name != "mle":
            raise ValueError(
                f"label_smoothing belongs to loss='mle', loss={loss.name!r} does not take it"
            )
        if loss.uses_reference:
            if ref_logps is None:
                raise ValueError(
                    f"ref_logps is required by loss={loss.name!r}: log-probs of the target under "
                    "the reference model, e.g. linear_token_stats(...).logps under torch.no_grad()"
                )
            return Objective(loss, beta, max_weight, 0.0, options.z_loss)
        # The reference cancels, and beta with it (6).
        return Objective(loss, 1.0, max_weight, options.label_smoothing, options.z_loss)


def check_device_function(o: Objective, backend: str) -> None:
    """Raise where a loss has no function for the kernels that would run it."""
    if o.loss.device_fn is None and backend == "triton":
        raise ValueError(
            f"loss={o.loss.name!r} has no device_fn, which backend='triton' needs; "
            "give the TokenLoss one, or use backend='torch'"
        )


def run_family(
    source: Source, options: Options, target: Any, ref_logps: Any, family: Family
) -> Tensor:
    """Run a member of the family at its level."""
    o = family.objective(options, ref_logps)
    tokens = source.tokens(target)
    ref, offset = tokens.reference(ref_logps), tokens.offset(family.value)
    entropy = statistics_wanted()
    if family.level == "sequence":
        options.refuse("at level='sequence'", token_weight=None, z_loss=0.0, label_smoothing=0.0)
        ids = tokens.ids("segment_ids", family.segment_ids)
        loss, rows = _sequences(source, tokens, ids, ref, offset, o, options, entropy=entropy)
    else:
        loss, rows = _tokens(source, tokens, ref, offset, o, options, entropy=entropy)
    report_stats(lambda: tokens.stats(rows, entropy=entropy))
    return loss


def _tokens(
    source: Source,
    tokens: Tokens,
    ref: Tensor | None,
    offset: Tensor | None,
    o: Objective,
    options: Options,
    *,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Equations (5)-(7) per token, then the reduction; and row results."""
    check_device_function(o, source.backend)
    value, weight = tokens.value(offset), tokens.weight(options.token_weight)
    if not o.loss.uses_reference:
        ref = value = None
    if options.reduction != "none":
        return source.loss_sum(tokens, o, ref, value, weight, entropy=entropy)
    loss, rows = source.losses(tokens, o, ref, value, entropy=entropy)
    return tokens.restore(loss if weight is None else loss * weight.to(loss.dtype)), rows


def _sequences(
    source: Source,
    tokens: Tokens,
    ids: Tensor | None,
    ref: Tensor | None,
    offset: Tensor | None,
    o: Objective,
    options: Options,
    *,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Equations (5)-(7) per sequence, then the reduction; and row results."""
    if options.reduction == "none" and ids is not None:
        raise ValueError("reduction='none' is not taken with segment_ids; use 'mean' or 'sum'")
    responses = Responses.of(tokens, source.backend, ids)
    value = responses.value(offset)
    if not o.loss.uses_reference:
        ref = value = None

    def losses(logps: Tensor, units: UnitChunk | None) -> Tensor:
        ratio = responses.log_ratio_sums(logps, ref, units)[:, 0]
        mine = value if value is None or units is None else units.of_units(value)
        loss = _sequence_loss(ratio, None if mine is None else mine.to(ratio.dtype), o)
        return responses.where_counted(loss, units)

    def total(stats: TokenStats, units: UnitChunk | None) -> Tensor:
        return times(losses(stats.logps, units).sum(), responses.factor(options, units))

    if options.reduction != "none" and (value is None or not value.requires_grad):
        own = o.loss not in TOKEN_LOSSES.values()  # whose torch_fn may have captured what trains
        return source.unit_sum(tokens, responses.layout, total, entropy=entropy, own=own)
    # The offset's gradient and per-sequence results need autograd's own graph.
    rows = source.statistics(tokens, entropy=entropy, entropy_gradient=False)
    each = losses(rows[lines.LOGP], None)
    if options.reduction == "none":
        return each.view(tokens.shape[:-1]), rows
    return times(each.sum(), responses.factor(options, None)), rows


def _sequence_loss(log_ratio: Tensor, value: Tensor | None, o: Objective) -> Tensor:
    """Equations (5) and (6) on summed log-ratios, any shape."""
    r = log_ratio if o.beta == 1.0 else o.beta * log_ratio
    phi, _ = o.loss.phi_and_weight(r if value is None else r + value, o.max_weight)
    loss = -phi if value is None else value - phi
    return loss if o.beta == 1.0 else loss / o.beta
