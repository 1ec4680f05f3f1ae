"""Squared Hellinger: f(u) = (sqrt(u) - 1)^2, phi(r) = r / (1 + r), weight 1 / (1 + r)^2.

Tokens below the reference are weighted up, tokens already lifted are weighted down. phi has a
pole at r = -1; the continuation starts at r0 = G^(-1/2) - 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.token_losses.base import TokenLoss
from fused_losses_kernels.language import device_function, tl


@device_function
def _device(r):
    q = 1.0 / (1.0 + r)
    # 1 - q where r is large: r * q would be inf * 0 at r = inf.
    return tl.where(r > 1.0, 1.0 - q, r * q), q * q


def _torch(r: Tensor) -> tuple[Tensor, Tensor]:
    q = 1.0 / (1.0 + r)
    # 1 - q where r is large: r * q would be inf * 0 at r = inf.
    return torch.where(r > 1.0, 1.0 - q, r.clamp(max=1.0) * q), q * q


hellinger = TokenLoss(
    name="hellinger",
    device_fn=_device,
    torch_fn=_torch,
    r0=lambda max_weight: max_weight**-0.5 - 1.0,
)
