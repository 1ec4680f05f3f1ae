"""Per-row results and per-row gradient coefficients, shared by the logits and the linear path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_losses.backends import lines
from fused_losses.engine.registry import unpack

__all__ = ["Coefficients", "accumulation_dtype", "coefficients", "lines", "new_rows"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Row maths run in fp32, in fp64 for fp64 logits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def new_rows(y: Tensor, dtype: torch.dtype, *, zero: bool = False) -> Tensor:
    """Return a (LINES, N) tensor for the results of a row pass over logits of ``dtype``."""
    make = torch.zeros if zero else torch.empty
    return make(lines.LINES, y.numel(), dtype=accumulation_dtype(dtype), device=y.device)


@dataclass(frozen=True)
class Coefficients:
    """What each row's gradient is made of, (N,) each; None is zero."""

    dlogp: Tensor
    dlse: Tensor | None = None
    dmean: Tensor | None = None
    dentropy: Tensor | None = None

    def at(self, place: slice | Tensor) -> Coefficients:
        """Take those of some rows."""
        return self.map(lambda t: t[place])

    def map(self, fn: Callable[[Tensor], Tensor]) -> Coefficients:
        """Apply a function to those that are there."""
        optional = (self.dlse, self.dmean, self.dentropy)
        return Coefficients(fn(self.dlogp), *(None if t is None else fn(t) for t in optional))

    def largest(self) -> Tensor:
        """The largest magnitude of all, 0-d, positive."""
        given = [t for t in (self.dlogp, self.dlse, self.dmean, self.dentropy) if t is not None]
        largest = torch.stack([t.abs().amax() for t in given]).amax()
        return largest.clamp(min=torch.finfo(largest.dtype).tiny)


def coefficients(
    y: Tensor,
    rows: Tensor,
    dloss: Tensor | None,
    drows: Tensor | None,
    loss: str,
    options: list[float],
    ignore_index: int,
    entropy: bool,
) -> tuple[Coefficients, Tensor]:
    """Combine the upstream gradients of the per-token loss and of the row statistics.

    Returns the coefficients of the logits' gradient, and the gradient of ``value`` (N,).
    """
    _, objective = unpack(loss, options)
    dlogp = dlse = dmean = dentropy = None
    dvalue = torch.zeros_like(rows[0])
    if dloss is not None and objective is not None:
        dlogp = dloss * rows[lines.DLOGP]
        # Equation (7). Ignored rows have no loss, whatever comes from upstream.
        dvalue = (1.0 + rows[lines.DLOGP]) / objective.beta
        dvalue = torch.where(y == ignore_index, 0.0, dloss * dvalue)
        if objective.label_smoothing:
            dmean = -objective.label_smoothing * dloss
        if objective.label_smoothing or objective.z_loss:
            dlse = dloss * rows[lines.DLSE]
    if drows is not None:
        dlogp = _plus(dlogp, drows[lines.LOGP])
        dlse = _plus(dlse, drows[lines.LSE])
        dentropy = drows[lines.ENTROPY] if entropy else None
    if dlogp is None:
        dlogp = torch.zeros_like(rows[0])
    return Coefficients(dlogp, dlse, dmean, dentropy), dvalue


def _plus(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b
