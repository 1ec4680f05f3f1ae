"""The transform of a row of logits in plain torch, and the gradient through it."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.backends.base import RowMaths


def transformed(z: Tensor, maths: RowMaths, dtype: torch.dtype) -> Tensor:
    """Return ``softcap(scale * z) / temperature`` in a dtype; z itself if that is what it is."""
    if maths == RowMaths():
        return z.to(dtype)
    x = z * maths.pre if z.dtype == dtype else z.to(dtype).mul_(maths.pre)
    return x if maths.cap is None else x.tanh_().mul_(maths.cap)


def raw_gradient(dlogits: Tensor, logits: Tensor, maths: RowMaths) -> Tensor:
    """Return the gradient of the raw logits, from that of the transformed ones."""
    if maths == RowMaths():
        return dlogits
    own = dlogits * maths.factor
    if maths.cap is None:
        return own
    slope = (logits / maths.cap).square_().neg_().add_(1.0)
    return own.mul_(slope)
