"""Maximum likelihood: phi(r) = r, weight 1.

The reference and the value cancel, and the loss is ``-logp``: this is where ordinary SFT loses its
KL tie to the reference model (4). phi(r) = r on all r is the exact conjugate of 'policy = experts'.
Total variation, f(u) = |u - 1| / 2, has phi(r) = min(r, 1/2) on r >= -1/2; it shares MLE's solution
while beta * (max - min of log pi_E / pi_ref) <= 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.token_losses.base import TokenLoss
from fused_losses_kernels.language import device_function, tl


@device_function
def _device(r):
    return r, tl.zeros_like(r) + 1.0


def _torch(r: Tensor) -> tuple[Tensor, Tensor]:
    return r, torch.ones_like(r)


mle = TokenLoss(
    name="mle",
    device_fn=_device,
    torch_fn=_torch,
    uses_reference=False,
)
