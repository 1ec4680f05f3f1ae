"""KTO: responses judged one by one, desirable or not, against the policy's drift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_losses.arguments import check_number, refuse_gradient

KL_CURE = "the drift is a constant of the loss: compute it under torch.no_grad(), or detach it"


@dataclass(frozen=True)
class KTOOptions:
    """Checked options of KTO; ``parse_kto_options`` makes them."""

    beta: float
    desirable_weight: float
    undesirable_weight: float


def parse_kto_options(beta: Any, desirable_weight: Any, undesirable_weight: Any) -> KTOOptions:
    """Check the options of KTO.

    Raises:
        TypeError: An option is no number.
        ValueError: An option out of range.
    """
    return KTOOptions(
        check_number("beta", beta, low=0.0),
        check_number("desirable_weight", desirable_weight, low=0.0, closed=True),
        check_number("undesirable_weight", undesirable_weight, low=0.0, closed=True),
    )


def kto_losses(log_ratios: Tensor, desirable: Tensor, kl: float | Tensor, o: KTOOptions) -> Tensor:
    """Losses of responses, (S,): one minus the value of each, times the weight of its kind.

    Args:
        log_ratios: (S,) log-ratios policy / reference, summed over each response.
        desirable: (S,) bool.
        kl: The drift of the policy, a constant; ``drift_of`` makes it.
        o: Options.
    """
    margin = o.beta * (log_ratios - kl)
    good, bad = torch.sigmoid(-margin), torch.sigmoid(margin)
    return torch.where(desirable, o.desirable_weight * good, o.undesirable_weight * bad)


def drift_of(kl: Any, beside: Tensor) -> float | Tensor:
    """Return the estimate of KL(policy || reference), >= 0, from what the user gave as ``kl``.

    Args:
        kl: None for 0; a number; or a tensor, whose mean is taken.
        beside: A tensor whose device it must be on, if it is not 0-d.

    Raises:
        TypeError: Neither a number nor a tensor of floats.
        ValueError: An empty tensor, one on another device, or one that requires a gradient.
    """
    if kl is None:
        return 0.0
    if not isinstance(kl, Tensor):
        return max(check_number("kl", kl), 0.0)
    if not kl.is_floating_point():
        raise TypeError(f"kl must be a number or a tensor of floats, got {kl.dtype}")
    refuse_gradient("kl", kl, KL_CURE)
    if kl.numel() == 0:
        raise ValueError(
            f"kl must hold a log-ratio per mismatched response, got shape {tuple(kl.shape)}; give "
            "None for no drift"
        )
    if kl.dim() and kl.device != beside.device:
        raise ValueError(
            f"kl must be on target's device {str(beside.device)!r}, got {str(kl.device)!r}"
        )
    return kl.detach().mean().clamp(min=0.0)
