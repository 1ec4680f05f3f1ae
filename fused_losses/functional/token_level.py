"""Token losses token by token, and per-token statistics."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fused_losses.backends import Objective, lines
from fused_losses.functional.observe import report_stats, statistics_wanted
from fused_losses.functional.options import Options
from fused_losses.functional.reduction import mean_factor
from fused_losses.functional.sources import Source
from fused_losses.functional.tokens import Tokens
from fused_losses.stats import TokenStats


def run_token_level(
    source: Source, target: Any, ref_logps: Any, value: Any, o: Objective, options: Options
) -> Tensor:
    """Equations (5)-(7) per token, then the reduction."""
    tokens = source.tokens(target)
    ref, offset = tokens.reference(ref_logps), tokens.value(value)
    if not o.loss.uses_reference:
        ref = offset = None
    weight = tokens.weight(options.token_weight)
    entropy = statistics_wanted()
    if options.reduction == "none":
        loss, rows = source.token_loss(tokens, o, ref, offset, entropy)
        if weight is not None:
            loss = loss * weight.to(loss.dtype)
        loss = tokens.restore(loss)
    else:
        factor = mean_factor(tokens.counted.sum(), options)
        loss, rows = source.token_loss_sum(tokens, o, ref, offset, weight, factor, entropy)
    report_stats(stats_of(rows, tokens, entropy=entropy))
    return loss


def run_statistics(source: Source, target: Any, *, entropy: bool) -> TokenStats:
    """Log-probs, log-normaliser, entropy and top-1 of every token."""
    tokens = source.tokens(target)
    return stats_of(source.statistics(tokens, entropy=entropy), tokens, entropy=entropy)


def stats_of(rows: Tensor, tokens: Tokens, *, entropy: bool) -> TokenStats:
    """Put the row results in target's shape."""
    return TokenStats(
        tokens.restore(rows[lines.LOGP]),
        tokens.restore(rows[lines.LSE]),
        tokens.restore(rows[lines.ENTROPY]) if entropy else None,
        tokens.restore(rows[lines.TOP1]) != 0.0,
    )
