"""The row passes that the engine calls, per backend; the choice of backend."""

from fused_losses.backends.base import (
    Backend,
    Coefficients,
    Objective,
    RowMaths,
    RowPasses,
    Sides,
    Weight,
    weight_at,
)
from fused_losses.backends.select import load_backend, resolve_backend
from fused_losses_kernels import lines

__all__ = [
    "Backend",
    "Coefficients",
    "Objective",
    "RowMaths",
    "RowPasses",
    "Sides",
    "Weight",
    "lines",
    "load_backend",
    "resolve_backend",
    "weight_at",
]
