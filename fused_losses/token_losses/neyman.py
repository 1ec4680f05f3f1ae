"""Neyman chi-squared: f(u) = (1 - u)^2 / u, phi(r) = 2 sqrt(1 + r) - 2, weight 1 / sqrt(1 + r).

Defined for r >= -1; the continuation starts at r0 = G^(-2) - 1. phi is computed as
2 r / (1 + sqrt(1 + r)), which does not cancel near r = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.token_losses.base import TokenLoss
from fused_losses_kernels.language import device_function, tl


@device_function
def _device(r):
    root = tl.sqrt(1.0 + r)
    # At r = inf the stable form is inf / inf.
    return tl.where(r > 1.0, 2.0 * root - 2.0, 2.0 * r / (1.0 + root)), 1.0 / root


def _torch(r: Tensor) -> tuple[Tensor, Tensor]:
    root = torch.sqrt(1.0 + r)
    # At r = inf the stable form is inf / inf.
    return torch.where(r > 1.0, 2.0 * root - 2.0, 2.0 * r.clamp(max=1.0) / (1.0 + root)), 1.0 / root


neyman = TokenLoss(
    name="neyman",
    device_fn=_device,
    torch_fn=_torch,
    r0=lambda max_weight: max_weight**-2.0 - 1.0,
)
