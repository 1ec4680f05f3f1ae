"""Per-row results and per-row gradient coefficients, shared by the logits and the linear path."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.backends import Coefficients, lines
from fused_losses.engine.call import Call
from fused_losses.stats import TokenStats

__all__ = ["Coefficients", "coefficients", "lines", "new_rows", "stats_of"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Row maths run in fp32, in fp64 for fp64 logits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def new_rows(y: Tensor, dtype: torch.dtype, *, zero: bool = False) -> Tensor:
    """Return a (LINES, N) tensor for the results of a row pass over logits of ``dtype``."""
    make = torch.zeros if zero else torch.empty
    return make(lines.LINES, y.numel(), dtype=accumulation_dtype(dtype), device=y.device)


def stats_of(rows: Tensor, *, entropy: bool) -> TokenStats:
    """Return the statistics among row results, (N,) each."""
    return TokenStats(
        rows[lines.LOGP],
        rows[lines.LSE],
        rows[lines.ENTROPY] if entropy else None,
        rows[lines.TOP1] != 0.0,
    )


def coefficients(
    y: Tensor,
    rows: Tensor,
    dloss: Tensor | None,
    drows: Tensor | None,
    call: Call,
) -> tuple[Coefficients, Tensor]:
    """Combine the upstream gradients of the per-token loss and of the row statistics.

    Returns the coefficients of the logits' gradient, and the gradient of ``value`` (N,).
    """
    nothing, objective = torch.zeros_like(rows[0]), call.objective
    c, dvalue = Coefficients(nothing), nothing
    if dloss is not None and objective is not None:
        c = objective.coefficients(dloss, rows)
        # Equation (7). Ignored rows have no loss, whatever comes from upstream.
        dvalue = (1.0 + rows[lines.DLOGP]) / objective.beta
        dvalue = torch.where(y == call.ignore_index, 0.0, dloss * dvalue)
    if drows is not None:
        dlse = drows[lines.LSE] if c.dlse is None else c.dlse + drows[lines.LSE]
        dentropy = drows[lines.ENTROPY] if call.entropy else None
        c = Coefficients(c.dlogp + drows[lines.LOGP], dlse, c.dmean, dentropy)
    return c, dvalue
