"""The specification: every public function in plain torch, with the same names and arguments.

It makes the logits and all, runs on any device and float dtype (float32 inside, float64 for
float64) and leaves every gradient to autograd, so it can be differentiated twice. Slow and clear on
purpose: the fused functions are tested against it.
"""

from fused_losses.policy import policy_loss
from fused_losses.preference import preference_loss
from fused_losses.reference.divergences import (
    divergence_loss,
    linear_divergence_loss,
    linear_sparse_divergence_loss,
)
from fused_losses.reference.kto import kto_loss
from fused_losses.reference.linear import (
    linear_dpo_loss,
    linear_hellinger_loss,
    linear_kto_loss,
    linear_loss,
    linear_mle_loss,
    linear_pearson_loss,
    linear_policy_loss,
    linear_token_loss,
    linear_token_stats,
)
from fused_losses.reference.losses import (
    hellinger_loss,
    mle_loss,
    pearson_loss,
    token_loss,
)
from fused_losses.reference.pairs import dpo_loss
from fused_losses.reference.stats import token_stats

__all__ = [
    "divergence_loss",
    "dpo_loss",
    "hellinger_loss",
    "kto_loss",
    "linear_divergence_loss",
    "linear_dpo_loss",
    "linear_hellinger_loss",
    "linear_kto_loss",
    "linear_loss",
    "linear_mle_loss",
    "linear_pearson_loss",
    "linear_policy_loss",
    "linear_sparse_divergence_loss",
    "linear_token_loss",
    "linear_token_stats",
    "mle_loss",
    "pearson_loss",
    "policy_loss",
    "preference_loss",
    "token_loss",
    "token_stats",
]
