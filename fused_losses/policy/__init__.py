"""Policy losses: plain torch on the log-probs of sampled sequences, token by token.

Each loss is one entry of ``POLICY_LOSSES``: a small function of the ratio to the old policy, and
what its mean counts. The fused loss and the reference call the same functions, so the maths of a
token exist once.
"""

from fused_losses.policy.loss import policy_loss, policy_terms, policy_total, token_losses
from fused_losses.policy.losses import POLICY_LOSSES, PolicyType, RatioLevel
from fused_losses.policy.options import parse_policy_options, policy_factors
from fused_losses.policy.rollouts import PolicyOptions, Rollouts, Terms

__all__ = [
    "POLICY_LOSSES",
    "PolicyOptions",
    "PolicyType",
    "RatioLevel",
    "Rollouts",
    "Terms",
    "parse_policy_options",
    "policy_factors",
    "policy_loss",
    "policy_terms",
    "policy_total",
    "token_losses",
]
