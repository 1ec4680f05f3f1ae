"""What launchers ask of their operands: kernels read by position, whatever a tensor's strides say.

A few attributes per launch. What comes out wrong here is a caller's mistake, never a user's: users'
tensors are checked, and made contiguous, where a call begins.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from fused_losses_kernels import lines

_FLOATS = (torch.float32, torch.float64)


def check_rows(
    z: Tensor, y: Tensor, rows: Tensor, first_column: int, V: int, *, of: str = ""
) -> None:
    """Check logits, labels and row results against each other; ``of`` goes before their names.

    Raises:
        ValueError: Labels that are no contiguous int32 or int64 vector, row results that are not
            (LINES, N), contiguous and float32 or float64, logits of another number of rows, or
            columns outside the vocabulary.
    """
    N, C = y.numel(), z.shape[-1]
    if y.dim() != 1 or y.dtype not in (torch.int64, torch.int32) or not y.is_contiguous():
        _refuse("y", "a contiguous (N,) of int64 or int32", y)
    if rows.shape != (lines.LINES, N) or rows.dtype not in _FLOATS or not rows.is_contiguous():
        _refuse(f"{of}rows", f"a contiguous ({lines.LINES}, {N}) of float32 or float64", rows)
    if z.dim() not in (2, 3) or z.numel() != N * C:
        _refuse(f"{of}z", f"(N, V) or (B, T, V) of {N} rows", z)
    if not 0 <= first_column <= V - C:
        raise ValueError(f"z holds {C} columns from {first_column} on, beyond a vocabulary of {V}")


def check_per_row(N: int, **operands: Tensor | None) -> None:
    """Check numbers per row, (N,) each; None is not there.

    Raises:
        ValueError: One that is no contiguous vector of N floats.
    """
    for name, t in operands.items():
        if t is not None and not (
            t.dim() == 1 and t.numel() == N and t.is_contiguous() and t.is_floating_point()
        ):
            _refuse(name, f"a contiguous ({N},) of floats", t)


def check_written(name: str, t: Tensor, shape: torch.Size | tuple[int, ...]) -> None:
    """Check what a kernel writes by rows.

    Raises:
        ValueError: Another shape, or rows that are not contiguous.
    """
    if t.shape != shape or (t.stride(-1) != 1 and t.shape[-1] > 1):
        _refuse(name, f"{tuple(shape)} with contiguous rows", t)


def _refuse(name: str, expected: str, t: Tensor) -> NoReturn:
    raise ValueError(
        f"{name} must be {expected}, got {tuple(t.shape)} of {t.dtype} with strides {t.stride()}"
    )
