"""Kullback-Leibler: f(u) = u log u - u + 1, phi(r) = 1 - exp(-r), weight exp(-r).

Defined for all r, but the weight grows without bound on the left; the continuation starts at
r0 = -log G. With value = 0 and no cap its solution for one prompt is that of the full objective.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_losses.token_losses.base import TokenLoss
from fused_losses_kernels.elementary import expm1
from fused_losses_kernels.language import device_function, tl  # noqa: F401  (the interpreter looks tl up here)


@device_function
def _device(r):
    x = expm1(-r)
    return -x, 1.0 + x


def _torch(r: Tensor) -> tuple[Tensor, Tensor]:
    x = torch.expm1(-r)
    return -x, 1.0 + x


kl = TokenLoss(
    name="kl",
    device_fn=_device,
    torch_fn=_torch,
    r0=lambda max_weight: -math.log(max_weight),
)
