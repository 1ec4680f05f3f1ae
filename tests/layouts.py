"""The same numbers in other layouts of memory; between them stands what must not be read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def poison(t: Tensor, words: int) -> Tensor:
    """Return what is valid where it is read by mistake, and wrong."""
    if t.dtype == torch.bool:
        return ~t
    return torch.full_like(t, torch.nan) if t.is_floating_point() else (t.clamp(min=0) + 1) % words


def every_other(t: Tensor, words: int) -> Tensor:
    """Every other element of a row."""
    return torch.stack([t, poison(t, words)], -1)[..., 0]


def end_of_rows(t: Tensor, words: int) -> Tensor:
    """The last part of longer rows."""
    return torch.cat([poison(t, words), t], -1)[..., t.shape[-1] :]


def column(t: Tensor, words: int) -> Tensor:
    """A column of two."""
    return torch.stack([poison(t, words), t]).movedim(0, -1).contiguous()[..., 1]


def transpose(t: Tensor, words: int) -> Tensor:
    """The transpose of a contiguous tensor."""
    return t.mT.contiguous().mT if t.dim() > 1 else t


def one_value(t: Tensor, words: int) -> Tensor:
    """The first number for all; behind it is room, so that no foreign memory is read."""
    storage = torch.cat([t.reshape(-1)[:1], poison(t, words).reshape(-1)])
    return storage[0].expand(t.shape)


# Those that keep every number.
LAYOUTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "every other element": every_other,
    "a slice of the end": end_of_rows,
    "a column": column,
    "a transpose": transpose,
}
