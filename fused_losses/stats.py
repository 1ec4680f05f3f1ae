"""What a pass over the logits tells about every token."""

from __future__ import annotations

from collections.abc import Callable
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


def call_on_stats(loss_fn: Callable[..., Tensor], stats: TokenStats, *given: Tensor) -> Tensor:
    """Call a user's loss; if it trips over the entropy that was not asked for, say how to ask.

    Raises:
        TypeError: ``loss_fn`` computed with None, while ``stats.entropy`` is None.
    """
    try:
        return loss_fn(stats, *given)
    except (AttributeError, TypeError) as error:
        if stats.entropy is not None or "NoneType" not in str(error):
            raise
        raise TypeError(
            f"{error}, in loss_fn: stats.entropy is None unless linear_loss is given entropy=True"
        ) from error
