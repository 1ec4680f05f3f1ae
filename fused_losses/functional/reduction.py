"""From per-item losses to what a caller asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.functional.options import Options, as_tensor


def mean_factor(count: Tensor, options: Options) -> Tensor:
    """Return what a sum is multiplied by, 0-d fp64: 1, or 1 / divisor; 0 for an empty batch.

    ``count`` is the number of counted items, 0-d; no host synchronisation.
    """
    if options.reduction == "sum":
        return torch.ones((), dtype=torch.float64, device=count.device)
    divisor: Tensor
    if options.num_items is None:
        divisor = count
    elif isinstance(options.num_items, Tensor):
        divisor = options.num_items.detach().to(count.device, non_blocking=True)
    else:
        divisor = as_tensor(options.num_items, count.device)
    divisor = divisor.double()
    return torch.where(divisor == 0.0, 0.0, 1.0 / divisor)
