"""TRL's trainers (1.16) on these losses: change one import.

    from fused_losses.integrations.trl import DPOTrainer, SFTTrainer   # instead of: from trl import
    SFTTrainer("model", train_dataset=data, loss="hellinger", beta=0.1).train()

Everything else is TRL's own code: data, generation, packing, PEFT, metrics. It asks its model for
per-token fields; here the model answers from the pass that also computes loss and gradients
(6 N D V FLOPs with a trained head, 4 with a frozen one, where TRL's recomputation takes 8 and 6).
"""

from fused_losses.integrations.trl.dpo import DPOTrainer
from fused_losses.integrations.trl.grpo import GRPOTrainer
from fused_losses.integrations.trl.kto import KTOTrainer
from fused_losses.integrations.trl.sft import SFTTrainer

__all__ = ["DPOTrainer", "GRPOTrainer", "KTOTrainer", "SFTTrainer"]
