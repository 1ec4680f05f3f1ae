"""What a pass over the logits tells about every token."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenStats(NamedTuple):
    """Per-token statistics, each of target's shape; 0 (``is_top1``: False) at ignored positions.

    Attributes:
        logps: log-probability of the target, nats, fp32 (fp64 for fp64 input). Differentiable.
        lse: log-normaliser of the (transformed) logits, same dtype. Differentiable.
        entropy: entropy of the predicted distribution (14), nats, same dtype, or None if it was
            not asked for. Differentiable.
        is_top1: bool; the target is the first maximum of its row.
    """

    logps: Tensor
    lse: Tensor
    entropy: Tensor | None
    is_top1: Tensor
