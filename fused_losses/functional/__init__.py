"""The public functions: each checks its arguments, plans, runs, reduces."""

from fused_losses.functional.cluster import Cluster, ClusterPlan, Collective
from fused_losses.functional.divergence import divergence_loss, linear_divergence_loss
from fused_losses.functional.kto import kto_loss, linear_kto_loss
from fused_losses.functional.linear import (
    linear_dpo_loss,
    linear_hellinger_loss,
    linear_mle_loss,
    linear_pearson_loss,
    linear_token_loss,
)
from fused_losses.functional.logits import (
    dpo_loss,
    hellinger_loss,
    mle_loss,
    pearson_loss,
    token_loss,
)
from fused_losses.functional.observe import (
    AnchoredStats,
    KTOStats,
    PairStats,
    PolicyStats,
    explain,
    with_stats,
)
from fused_losses.functional.options import (
    AnchoredOptions,
    CommonOptions,
    LinearOptions,
    SharedLinearOptions,
    SharedOptions,
)
from fused_losses.functional.own_loss import linear_loss
from fused_losses.functional.policy import linear_policy_loss
from fused_losses.functional.sparse_divergence import linear_sparse_divergence_loss
from fused_losses.functional.statistics import linear_token_stats, token_stats

__all__ = [
    "AnchoredOptions",
    "AnchoredStats",
    "Cluster",
    "ClusterPlan",
    "Collective",
    "CommonOptions",
    "KTOStats",
    "LinearOptions",
    "PairStats",
    "PolicyStats",
    "SharedLinearOptions",
    "SharedOptions",
    "divergence_loss",
    "dpo_loss",
    "explain",
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
    "token_loss",
    "token_stats",
    "with_stats",
]
