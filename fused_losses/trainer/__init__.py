"""SFT and DPO on transformers' Trainer: cached references, telemetry of the loss's own pass.

Needs the optional dependencies of ``fused-losses[train]``; nothing in the library imports this.
"""

try:
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"fused_losses.trainer needs accelerate, datasets and transformers ({error}): "
        "pip install 'fused-losses[train]'"
    ) from error

from fused_losses.trainer.callbacks import RewardStabilizationCallback
from fused_losses.trainer.config import SFTConfig
from fused_losses.trainer.dpo import DPOTrainer
from fused_losses.trainer.dpo_config import DPOConfig
from fused_losses.trainer.evaluation import ValueAgreement, value_agreement
from fused_losses.trainer.reference import precompute_ref_logps
from fused_losses.trainer.sft import SFTTrainer

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "RewardStabilizationCallback",
    "SFTConfig",
    "SFTTrainer",
    "ValueAgreement",
    "precompute_ref_logps",
    "value_agreement",
]
