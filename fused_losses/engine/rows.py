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
    *,
    need_dvalue: bool = True,
) -> tuple[Coefficients, Tensor | None]:
    """Combine the upstream gradients of the per-token loss and of the row statistics.

    Returns the coefficients of the logits' gradient, and the gradient of ``value`` (N,) if it is
    needed.
    """
    objective, c, dvalue = call.objective, None, None
    if objective is not None and dloss is not None:
        c = objective.coefficients(dloss, rows)
        if need_dvalue:
            # Equation (7). Ignored rows have no loss, whatever comes from upstream.
            dvalue = (1.0 + rows[lines.DLOGP]) / objective.beta
            dvalue = torch.where(y == call.ignore_index, 0.0, dloss * dvalue)
    if drows is not None:
        dlogp, dlse = drows[lines.LOGP], drows[lines.LSE]
        dentropy = drows[lines.ENTROPY] if call.entropy else None
        if c is not None:
            dlogp, dlse = c.dlogp + dlogp, dlse if c.dlse is None else c.dlse + dlse
        c = Coefficients(dlogp, dlse, None if c is None else c.dmean, dentropy)
    if c is None:
        c = Coefficients(torch.zeros_like(rows[0]))
    if need_dvalue and dvalue is None:
        dvalue = torch.zeros_like(rows[0])
    return c, dvalue
