"""Options of policy losses: what each may be, which loss takes it, and what a mean divides by."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from fused_losses.arguments import check_choice, check_number
from fused_losses.policy.losses import POLICY_LOSSES, PolicyType, RatioLevel
from fused_losses.policy.rollouts import PolicyOptions


def parse_policy_options(
    loss_type: Any,
    ratio_level: Any,
    *,
    epsilon: Any,
    epsilon_high: Any,
    beta: Any,
    entropy_weight: Any,
    sampler_cap: Any,
    max_length: Any,
) -> PolicyOptions:
    """Check the options of a policy loss and fill in what was left to the loss.

    Raises:
        TypeError: An option that must be a number is none.
        ValueError: An unknown loss or level, an option out of range or of another loss.
    """
    check_choice("loss_type", loss_type, get_args(PolicyType))
    loss = POLICY_LOSSES[loss_type]
    epsilon = check_number("epsilon", epsilon, low=0.0, high=1.0)
    if epsilon_high is None:
        epsilon_high = epsilon if loss.epsilon_high is None else loss.epsilon_high
    return PolicyOptions(
        loss_type,
        _level(loss_type, ratio_level),
        epsilon,
        check_number("epsilon_high", epsilon_high, low=0.0),
        check_number("beta", beta, low=0.0, closed=True),
        check_number("entropy_weight", entropy_weight, low=0.0, closed=True),
        check_number("sampler_cap", sampler_cap, low=0.0),
        _max_length(loss_type, max_length),
    )


def _level(loss_type: str, ratio_level: Any) -> str:
    levels = POLICY_LOSSES[loss_type].ratio_levels
    if ratio_level is None:
        return levels[0]
    check_choice("ratio_level", ratio_level, get_args(RatioLevel))
    if ratio_level not in levels:
        raise ValueError(
            f"ratio_level={ratio_level!r} is not taken by loss_type={loss_type!r}, which has one "
            f"ratio per sequence: use one of {', '.join(map(repr, levels))}, or loss_type='grpo'"
        )
    return str(ratio_level)


def _max_length(loss_type: str, max_length: Any) -> float | None:
    wanted = POLICY_LOSSES[loss_type].per == "max_length"
    if max_length is None and wanted:
        raise ValueError(
            f"max_length is required by loss_type={loss_type!r}, whose sequences are divided by "
            "this constant: give the longest completion that the sampler may make, in tokens"
        )
    if max_length is None:
        return None
    if not wanted:
        raise ValueError(
            f"max_length belongs to loss_type='dr_grpo'; leave it None for {loss_type!r}, "
            f"got {max_length}"
        )
    return check_number("max_length", max_length, low=0.0)


def policy_factors(
    o: PolicyOptions, lengths: Tensor, reduction: str, num_items: float | Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return what the summed losses, and the summed entropies, are multiplied by: 0-d fp64.

    Args:
        o: Options of the loss.
        lengths: (S,) counted tokens of all sequences.
        reduction: ``mean`` or ``sum``.
        num_items: Replaces the number of sequences, or of tokens, in the mean. The mean entropy is
            then weighted by this batch's share of them.
    """
    tokens = lengths.sum().double()
    per = POLICY_LOSSES[o.loss_type].per
    factor = entropy_factor = torch.ones_like(tokens)
    if reduction == "mean":
        items = tokens if per == "token" else (lengths > 0).sum().double()
        divisor = items
        if isinstance(num_items, Tensor):
            divisor = num_items.detach().to(tokens.device, torch.float64, non_blocking=True)
        elif num_items is not None:
            divisor = torch.ones_like(tokens) * num_items
        factor = torch.where(divisor == 0.0, 0.0, 1.0 / divisor)
        entropy_factor = items * factor / tokens.clamp(min=1.0)
    if o.max_length is not None:
        factor = factor / o.max_length
    return factor, entropy_factor
