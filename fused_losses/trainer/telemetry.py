"""Metrics of the loss's own pass: summed on the device, fetched when they are logged."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from fused_losses import AnchoredStats, PairStats, TokenLoss, TokenStats
from fused_losses.trainer.finite import FiniteWatch
from fused_losses.trainer.sequences import IGNORE

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

    def take(self, gather: Callable[[list[Any]], list[Any]]) -> dict[str, tuple[float, float]]:
        """Return each metric's (sum, count) over all processes and start again.

        Args:
            gather: Returns the lists of all processes, joined. It is called once, whatever was
                added: a process without a batch waits for nobody.
        """
        own = {}
        if self._sums is not None:
            values = iter(self._sums.tolist())
            own = dict(zip(self._names, zip(values, values, strict=True), strict=True))
        self._sums = None
        found: dict[str, tuple[float, float]] = {}
        for sums in gather([own]):
            for name, (total, count) in sums.items():
                before = found.get(name, (0.0, 0.0))
                found[name] = (before[0] + total, before[1] + count)
        return found


class TrainingRecord(TrainerCallback, ExportableState):
    """What was seen since training began; another run, or a restart of one, begins anew.

    Attributes:
        sums: Metrics since the last log.
        losses: Losses that nobody has looked at.
        tokens: Tokens since they were last counted.
        num_tokens: Tokens of all processes until then. A checkpoint holds it.
    """

    def __init__(self) -> None:
        self.num_tokens = 0.0
        self._begin()

    def _begin(self) -> None:
        self.sums, self.losses, self.tokens = Telemetry(), FiniteWatch(), Telemetry()

    def count_tokens(self, gather: Callable[[list[Any]], list[Any]]) -> float:
        """Return the number of tokens up to here; ``gather`` as for :meth:`Telemetry.take`."""
        self.num_tokens += self.tokens.take(gather).get("num_tokens", (0.0, 0.0))[0]
        return self.num_tokens

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"args": {}, "attributes": {"num_tokens": self.num_tokens}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin anew, or go on from the checkpoint."""
        self._begin()
        self.num_tokens = 0.0
        name = type(self).__name__
        if state.global_step and name in state.stateful_callbacks:
            self.num_tokens = state.stateful_callbacks[name]["attributes"]["num_tokens"]
        elif state.global_step:  # a checkpoint that holds none: its last log has most of them
            past = (e["num_tokens"] for e in reversed(state.log_history) if "num_tokens" in e)
            self.num_tokens = next(past, 0.0)
        state.stateful_callbacks[name] = self.state()


def means(taken: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Divide sums by counts; what was never counted is left out."""
    return {name: total / count for name, (total, count) in taken.items() if count}


def token_sums(
    stats: TokenStats | AnchoredStats | PairStats,
    labels: Tensor,
    ref_logps: Tensor | None,
    beta: float,
) -> Sums:
    """Sum what every loss has per token (12)-(14)."""
    counted = labels != IGNORE
    n = counted.sum()
    sums = {
        "nll": (-stats.logps.double().sum(), n),
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


def log_ratios(
    stats: TokenStats | AnchoredStats | PairStats, counted: Tensor, ref_logps: Tensor
) -> Tensor:
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
    """Sum what TRL's DPOTrainer logs of pairs; accuracy over the chosen tokens, as there.

    So is ``nll``: that of rejected responses is no aim.
    """
    chosen, rejected = stats.chosen_rewards, stats.rejected_rewards
    B = chosen.numel()
    n = (labels != IGNORE).view(2, B, -1).any(2).any(0).sum()
    tokens = (labels[:B] != IGNORE).sum()
    return {
        "rewards/chosen": (chosen.sum(), n),
        "rewards/rejected": (rejected.sum(), n),
        "rewards/margins": ((chosen - rejected).sum(), n),
        "rewards/accuracies": ((chosen > rejected).sum(), n),
        "logps/chosen": (stats.chosen_logps.sum(), n),
        "logps/rejected": (stats.rejected_logps.sum(), n),
        "nll": (-stats.chosen_logps.double().sum(), tokens),
        "mean_token_accuracy": (stats.is_top1[:B].sum(), tokens),
    }
