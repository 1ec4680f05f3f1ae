"""Metrics of the loss's own pass: summed on the device, fetched when they are logged."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fused_losses import PairStats, TokenLoss, TokenStats
from fused_losses.trainer.data import IGNORE

Sums = dict[str, tuple[Tensor, Tensor]]


class Telemetry:
    """Means over everything added since they were last taken; no host synchronisation until then.

    Each metric is a sum and a count, so means over unequal batches and ranks are exact.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None

    def add(self, sums: Sums) -> None:
        """Add each metric's sum and count, 0-d tensors."""
        pairs = [t for pair in sums.values() for t in pair]
        dtype = torch.float32 if pairs[0].device.type == "mps" else torch.float64
        batch = torch.stack([t.detach().to(dtype) for t in pairs])
        if self._sums is None:
            self._names, self._sums = list(sums), batch
        else:
            self._sums += batch

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, tuple[float, float]]:
        """Return each metric's (sum, count) and start again.

        Args:
            reduce: Sums a tensor over the processes.
        """
        if self._sums is None:
            return {}
        values = reduce(self._sums).tolist()
        self._sums = None
        return dict(zip(self._names, zip(values[::2], values[1::2], strict=True), strict=True))


def means(taken: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Divide sums by counts; what was never counted is left out."""
    return {name: total / count for name, (total, count) in taken.items() if count}


def token_sums(
    stats: TokenStats | PairStats, labels: Tensor, ref_logps: Tensor | None, beta: float
) -> Sums:
    """Sum what every loss has per token (12)-(14)."""
    counted = labels != IGNORE
    n = counted.sum()
    sums = {
        "mean_token_accuracy": (stats.is_top1.sum(), n),
        "values/mean": (beta * stats.lse.double().sum(), n),
    }
    if stats.entropy is not None:
        sums["entropy"] = (stats.entropy.sum(), n)
    if ref_logps is not None:
        ratio = log_ratios(stats, counted, ref_logps)
        sums["rewards/implicit"] = (beta * ratio.sum(), n)
        sums["drift"] = (ratio.abs().sum(), n)
    return sums


def log_ratios(stats: TokenStats | PairStats, counted: Tensor, ref_logps: Tensor) -> Tensor:
    """Return log-ratios of target's shape, 0 at ignored positions."""
    return torch.where(counted, stats.logps - ref_logps, 0.0)


def weight_sums(
    loss: TokenLoss, ratio: Tensor, present: Tensor, beta: float, max_weight: float
) -> Sums:
    """Count the weights on the continuation, and those that pull back (7).

    Args:
        loss: The member of the family.
        ratio: Log-ratios of tokens, or of whole sequences.
        present: Which of them count.
        beta: beta of (5).
        max_weight: Cap of the weight.
    """
    r = beta * ratio
    _, weight = loss.phi_and_weight(r, max_weight)
    n = present.sum()
    sums = {"weights/reversed": (((weight < 0) & present).sum(), n)}
    left = loss.left_end(max_weight)
    if left != -math.inf:
        sums["weights/capped"] = (((r < left) & present).sum(), n)
    return sums


def pair_sums(stats: PairStats, labels: Tensor) -> Sums:
    """Sum what TRL's DPOTrainer logs of pairs; accuracy over the chosen tokens, as there."""
    chosen, rejected = stats.chosen_rewards, stats.rejected_rewards
    B = chosen.numel()
    n = (labels != IGNORE).view(2, B, -1).any(2).any(0).sum()
    return {
        "rewards/chosen": (chosen.sum(), n),
        "rewards/rejected": (rejected.sum(), n),
        "rewards/margins": ((chosen - rejected).sum(), n),
        "rewards/accuracies": ((chosen > rejected).sum(), n),
        "logps/chosen": (stats.chosen_logps.sum(), n),
        "logps/rejected": (stats.rejected_logps.sum(), n),
        "mean_token_accuracy": (stats.is_top1[:B].sum(), (labels[:B] != IGNORE).sum()),
    }
