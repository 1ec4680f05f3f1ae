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


Count = Tensor | float


def policy_factors(
    o: PolicyOptions,
    tokens: Count,
    sequences: Count,
    reduction: str,
    num_items: float | Tensor | None,
) -> tuple[Count, Count]:
    """Return what the summed losses, and the summed entropies, are multiplied by: 0-d fp64.

    Numbers, if all that they are made of is known as such.

    Args:
        o: Options of the loss.
        tokens: How many count.
        sequences: How many have a counted token.
        reduction: ``mean`` or ``sum``.
        num_items: Replaces the number of sequences, or of tokens, in the mean. The mean entropy is
            then weighted by this batch's share of them.
    """
    per = POLICY_LOSSES[o.loss_type].per
    factor: Count = 1.0
    entropy_factor: Count = 1.0
    if reduction == "mean":
        items = tokens if per == "token" else sequences
        divisor = items
        if isinstance(num_items, Tensor):
            divisor = num_items.detach().double()
        elif num_items is not None:
            # Beside a tensor one too: a compiler would begin anew for each number.
            divisor = torch.ones_like(items) * num_items if isinstance(items, Tensor) else num_items
        factor = _inverse(divisor)
        if isinstance(factor, Tensor) and isinstance(tokens, Tensor):
            factor = factor.to(tokens.device, non_blocking=True)
        largest = tokens.clamp(min=1.0) if isinstance(tokens, Tensor) else max(tokens, 1.0)
        entropy_factor = items * factor / largest
    if o.max_length is not None:
        factor = factor / o.max_length
    return factor, entropy_factor


def _inverse(divisor: Count) -> Count:
    """One over it, 0 where it is 0."""
    if not isinstance(divisor, Tensor):
        return 1.0 / divisor if divisor else 0.0
    return divisor.reciprocal().nan_to_num(nan=torch.nan, posinf=0.0, neginf=0.0)
