"""Pearson chi-squared: f(u) = (u - 1)^2, phi(r) = r - r^2 / 4, weight 1 - r / 2.

The weight falls linearly, is 0 at r = 2 and negative beyond: a token rewarded past r = 2 is pulled
back toward the reference. On u >= 0 the exact weight is max(0, 1 - r / 2); keeping 1 - r / 2 on all
r has the same solution. The weight grows only linearly on the left: no continuation is needed.
"""

from __future__ import annotations

from torch import Tensor

from fused_losses.token_losses.base import TokenLoss
from fused_losses_kernels.language import device_function, tl  # noqa: F401  (the interpreter looks tl up here)


@device_function
def _device(r):
    return r * (1.0 - 0.25 * r), 1.0 - 0.5 * r


def _torch(r: Tensor) -> tuple[Tensor, Tensor]:
    return r * (1.0 - 0.25 * r), 1.0 - 0.5 * r


pearson = TokenLoss(
    name="pearson",
    device_fn=_device,
    torch_fn=_torch,
)
