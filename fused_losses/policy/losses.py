"""The policy losses, the levels of their ratio, and the tables that name them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fused_losses.policy.rollouts import Rollouts, Surrogate

PolicyType = Literal["grpo", "bnpo", "dapo", "dr_grpo", "gspo", "cispo"]
RatioLevel = Literal["token", "sequence", "sequence_token"]


def _clipped(ratios: Tensor, rollouts: Rollouts) -> Tensor:
    """PPO's: the worse of the ratio and the clipped ratio, each times the advantage."""
    o, advantages = rollouts.options, rollouts.advantages
    clipped = ratios.clamp(1.0 - o.epsilon, 1.0 + o.epsilon_high)
    return -torch.minimum(ratios * advantages, clipped * advantages)


def _clips(ratios: Tensor, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    o, advantages = rollouts.options, rollouts.advantages
    low = (ratios < 1.0 - o.epsilon) & (advantages < 0)
    return low, (ratios > 1.0 + o.epsilon_high) & (advantages > 0)


def _cispo(ratios: Tensor, rollouts: Rollouts) -> Tensor:
    """REINFORCE whose tokens weigh their ratio, capped and constant: none loses its gradient."""
    weights = ratios.detach().clamp(max=rollouts.options.epsilon_high)
    return -weights * rollouts.advantages * rollouts.logps


def _caps(ratios: Tensor, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    high = (ratios > rollouts.options.epsilon_high) & (rollouts.advantages > 0)
    return torch.zeros_like(high), high


def _token(log_ratios: Tensor, _: Rollouts) -> Tensor:
    return log_ratios


def _sequence(log_ratios: Tensor, rollouts: Rollouts) -> Tensor:
    """GSPO: the sequence's geometric mean, for all its tokens."""
    return rollouts.spread(rollouts.mean(log_ratios))


def _sequence_token(log_ratios: Tensor, rollouts: Rollouts) -> Tensor:
    """GSPO-token: the sequence's value with the token's gradient, as advantages per token want."""
    value = rollouts.spread(rollouts.mean(log_ratios.detach()))
    return value + (log_ratios - log_ratios.detach())


RATIO_LEVELS: dict[str, Callable[[Tensor, Rollouts], Tensor]] = {
    "token": _token,
    "sequence": _sequence,
    "sequence_token": _sequence_token,
}

POLICY_LOSSES: dict[str, Surrogate] = {
    "grpo": Surrogate(_clipped, _clips, per="sequence"),
    "bnpo": Surrogate(_clipped, _clips, per="token"),
    "dapo": Surrogate(_clipped, _clips, per="token"),
    "dr_grpo": Surrogate(_clipped, _clips, per="max_length"),
    "gspo": Surrogate(
        _clipped, _clips, per="sequence", ratio_levels=("sequence", "sequence_token")
    ),
    "cispo": Surrogate(_cispo, _caps, per="token", epsilon_high=5.0),
}
