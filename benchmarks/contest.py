"""What all who take part share: losses in plain torch, divisors, and how a peer says it cannot."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import Case
from inputs import IGNORED, Batch
from torch import Tensor

BETA = {"pearson": 0.2, "hellinger": 0.2, "dpo": 0.1}
MAX_WEIGHT = 4.0
MIB = 2**20

Run = Callable[[], Tensor]
Prepare = Callable[[Case, Batch, int | None], Run]


class UnavailableError(Exception):
    """A peer that cannot run here, with the reason."""


def summed_loss(loss: str, logps: Tensor, ref: Tensor | None, y: Tensor) -> Tensor:
    """Sum of a loss over tokens, or over pairs, in plain torch, from log-probs (S, T)."""
    mask = y != IGNORED
    if loss == "mle":
        return -logps.masked_fill(~mask, 0.0).sum()
    ratio = (logps - ref).masked_fill(~mask, 0.0)
    if loss == "dpo":
        chosen, rejected = ratio.sum(1).chunk(2)
        return -F.logsigmoid(BETA[loss] * (chosen - rejected)).sum()
    r = BETA[loss] * ratio
    if loss == "pearson":
        phi = r - r * r / 4
    else:
        edge = MAX_WEIGHT**-0.5 - 1.0  # below it phi goes on along its tangent
        inside = r.clamp(min=edge)
        phi = inside / (1 + inside) + MAX_WEIGHT * (r - inside)
    return -phi.sum() / BETA[loss]


def units(case: Case, batch: Batch) -> int:
    """What a mean divides by: counted tokens, or pairs."""
    return batch.y.shape[0] // 2 if case.loss == "dpo" else batch.counted


def log_probs(batch: Batch, dtype: torch.dtype | None = None) -> Tensor:
    """Per-token log-probs (S, T) with all logits in memory; 0 where the label is ignored."""
    logits = batch.x if batch.w is None else F.linear(batch.x, batch.w)
    logp = logits.to(dtype or logits.dtype).log_softmax(-1)
    label = batch.y.clamp(min=0)[..., None]
    return logp.gather(-1, label).squeeze(-1).masked_fill(batch.y == IGNORED, 0.0)


def flat(batch: Batch) -> tuple[Tensor, Tensor]:
    return batch.x.flatten(0, 1), batch.y.flatten()


def need_gpu(batch: Batch) -> None:
    if batch.x.device.type != "cuda":
        raise UnavailableError("needs a GPU")


def from_token_losses(case: Case, batch: Batch, token_losses: Run) -> Run:
    """Compose a peer's per-token negative log-probs with the case's loss."""
    count = units(case, batch)
    return lambda: (
        summed_loss(case.loss, -token_losses().view(batch.y.shape), batch.ref, batch.y) / count
    )
