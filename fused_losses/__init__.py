"""Fused losses of LLM post-training: MLE, f-divergence SFT and DPO, without the logits.

From logits (``mle_loss`` ...) or from hidden states and the head's weight (``linear_mle_loss``
...), with gradients, in bounded memory. ``fused_losses.reference`` is the same in plain torch: the
specification.
"""

from fused_losses import reference
from fused_losses.functional import (
    CommonOptions,
    LinearOptions,
    PairStats,
    PolicyStats,
    SharedLinearOptions,
    SharedOptions,
    dpo_loss,
    explain,
    hellinger_loss,
    linear_dpo_loss,
    linear_hellinger_loss,
    linear_loss,
    linear_mle_loss,
    linear_pearson_loss,
    linear_policy_loss,
    linear_token_loss,
    linear_token_stats,
    mle_loss,
    pearson_loss,
    token_loss,
    token_stats,
    with_stats,
)
from fused_losses.modules import (
    DPOLoss,
    HellingerLoss,
    LinearDPOLoss,
    LinearHellingerLoss,
    LinearLoss,
    LinearMLELoss,
    LinearPearsonLoss,
    LinearPolicyLoss,
    LinearTokenLoss,
    LinearTokenStatistics,
    MLELoss,
    PearsonLoss,
    PolicyLoss,
    PreferenceLoss,
    TokenLossModule,
    TokenStatistics,
)
from fused_losses.plan import Plan
from fused_losses.policy import policy_loss
from fused_losses.preference import preference_loss
from fused_losses.stats import TokenStats
from fused_losses.token_losses import TOKEN_LOSSES, TokenLoss

__version__ = "0.1.0"

__all__ = [
    "TOKEN_LOSSES",
    "CommonOptions",
    "DPOLoss",
    "HellingerLoss",
    "LinearDPOLoss",
    "LinearHellingerLoss",
    "LinearLoss",
    "LinearMLELoss",
    "LinearOptions",
    "LinearPearsonLoss",
    "LinearPolicyLoss",
    "LinearTokenLoss",
    "LinearTokenStatistics",
    "MLELoss",
    "PairStats",
    "PearsonLoss",
    "Plan",
    "PolicyLoss",
    "PolicyStats",
    "PreferenceLoss",
    "SharedLinearOptions",
    "SharedOptions",
    "TokenLoss",
    "TokenLossModule",
    "TokenStatistics",
    "TokenStats",
    "dpo_loss",
    "explain",
    "hellinger_loss",
    "linear_dpo_loss",
    "linear_hellinger_loss",
    "linear_loss",
    "linear_mle_loss",
    "linear_pearson_loss",
    "linear_policy_loss",
    "linear_token_loss",
    "linear_token_stats",
    "mle_loss",
    "pearson_loss",
    "policy_loss",
    "preference_loss",
    "reference",
    "token_loss",
    "token_stats",
    "with_stats",
]
