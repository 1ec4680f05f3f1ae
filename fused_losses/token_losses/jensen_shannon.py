"""Jensen-Shannon: f(u) = u log u - (1 + u) log((1 + u) / 2), phi(r) = log(2 - exp(-r)).

Weight 1 / (2 exp(r) - 1), defined for r > -log 2; the continuation starts at
r0 = log((1 + 1 / G) / 2). phi is computed as log1p(-expm1(-r)), which does not cancel near r = 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_losses.token_losses.base import TokenLoss
from fused_losses_kernels.elementary import expm1, log1p
from fused_losses_kernels.language import device_function, tl  # noqa: F401  (the interpreter looks tl up here)


@device_function
def _device(r):
    x = -expm1(-r)  # 1 - exp(-r)
    # exp(-r) / (2 - exp(-r)): the form without exp(r) does not overflow at large r.
    return log1p(x), (1.0 - x) / (1.0 + x)


def _torch(r: Tensor) -> tuple[Tensor, Tensor]:
    x = -torch.expm1(-r)  # 1 - exp(-r)
    # exp(-r) / (2 - exp(-r)): the form without exp(r) does not overflow at large r.
    return torch.log1p(x), (1.0 - x) / (1.0 + x)


jensen_shannon = TokenLoss(
    name="jensen_shannon",
    device_fn=_device,
    torch_fn=_torch,
    r0=lambda max_weight: math.log(0.5 + 0.5 / max_weight),
)
