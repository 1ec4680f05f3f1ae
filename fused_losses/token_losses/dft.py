"""Dynamic fine-tuning (DFT): loss -p log p, weight p, where p is the label's own probability.

A likelihood whose tokens weigh what the policy gives them: ``phi(r) = r exp(r)`` with r = log p,
and the weight is exp(r) alone, for the probability is a constant to the gradient (arXiv 2508.05629,
eq. 9). There is no reference. At level "sequence" p is the probability of the whole sequence, which
the paper replaces by the tokens' because it vanishes for long ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.token_losses.base import TokenLoss
from fused_losses_kernels.language import device_function, tl


@device_function
def _device(r):
    p = tl.exp(r)
    # 0 log 0 is 0: r * p would be -inf * 0.
    return tl.where(p > 0.0, r, 0.0) * p, p


def _torch(r: Tensor) -> tuple[Tensor, Tensor]:
    p = r.detach().exp()
    # 0 log 0 is 0: r * p would be -inf * 0.
    return torch.where(p > 0.0, r, 0.0) * p, p


dft = TokenLoss(
    name="dft",
    device_fn=_device,
    torch_fn=_torch,
    uses_reference=False,
)
