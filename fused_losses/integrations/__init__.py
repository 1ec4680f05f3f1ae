"""The losses inside models and trainers of other libraries; nothing is patched at import.

``fuse_lm_head`` gives any causal LM of transformers a forward that hands hidden states and head to
a loss; ``fused_losses.integrations.trl`` runs TRL's trainers on it; ``fail_together`` ends one of
several processes whose error a loop has caught. Needs transformers.
"""

from fused_losses.integrations.fail_together import fail_together
from fused_losses.integrations.lm_head import fuse_lm_head, unfuse_lm_head

__all__ = ["fail_together", "fuse_lm_head", "unfuse_lm_head"]
