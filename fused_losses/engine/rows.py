"""Per-row results and per-row gradient coefficients, shared by the logits and the linear path."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.backends import Coefficients, Objective, lines

__all__ = ["Coefficients", "accumulation_dtype", "coefficients", "lines", "new_rows"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Row maths run in fp32, in fp64 for fp64 logits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def new_rows(y: Tensor, dtype: torch.dtype, *, zero: bool = False) -> Tensor:
    """Return a (LINES, N) tensor for the results of a row pass over logits of ``dtype``."""
    make = torch.zeros if zero else torch.empty
    return make(lines.LINES, y.numel(), dtype=accumulation_dtype(dtype), device=y.device)


def coefficients(
    y: Tensor,
    rows: Tensor,
    dloss: Tensor | None,
    drows: Tensor | None,
    objective: Objective | None,
    ignore_index: int,
    entropy: bool,
) -> tuple[Coefficients, Tensor]:
    """Combine the upstream gradients of the per-token loss and of the row statistics.

    Returns the coefficients of the logits' gradient, and the gradient of ``value`` (N,).
    """
    nothing = torch.zeros_like(rows[0])
    c, dvalue = Coefficients(nothing), nothing
    if dloss is not None and objective is not None:
        c = objective.coefficients(dloss, rows)
        # Equation (7). Ignored rows have no loss, whatever comes from upstream.
        dvalue = (1.0 + rows[lines.DLOGP]) / objective.beta
        dvalue = torch.where(y == ignore_index, 0.0, dloss * dvalue)
    if drows is not None:
        dlse = drows[lines.LSE] if c.dlse is None else c.dlse + drows[lines.LSE]
        dentropy = drows[lines.ENTROPY] if entropy else None
        c = Coefficients(c.dlogp + drows[lines.LOGP], dlse, c.dmean, dentropy)
    return c, dvalue
