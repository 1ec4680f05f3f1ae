"""What all who take part share: losses in plain torch, divisors, and how a peer says it cannot."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from cases import Case
from inputs import IGNORED, Batch
from torch import Tensor

BETA = {"pearson": 0.2, "hellinger": 0.2, "dpo": 0.1, "kto": 0.1}
# Losses of whole rows of logits; all others are of log-probs.
OF_ROWS = ("distillation", "sparse teacher", "brier")
MAX_WEIGHT = 4.0
EPSILON = 0.2
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
    if loss == "kto":
        margin = BETA[loss] * ratio.sum(1) * (2 * desirable(y) - 1.0)
        return torch.sigmoid(-margin).sum()
    if loss == "grpo":
        w, gain = ratio.exp(), advantages(y).to(ratio)[:, None]
        surrogate = torch.minimum(w * gain, w.clamp(1 - EPSILON, 1 + EPSILON) * gain)
        return -(surrogate.masked_fill(~mask, 0.0).sum(1) / mask.sum(1)).sum()
    r = BETA[loss] * ratio
    if loss == "pearson":
        phi = r - r * r / 4
    else:
        edge = MAX_WEIGHT**-0.5 - 1.0  # below it phi goes on along its tangent
        inside = r.clamp(min=edge)
        phi = inside / (1 + inside) + MAX_WEIGHT * (r - inside)
    return -phi.sum() / BETA[loss]


def desirable(y: Tensor) -> Tensor:
    """Which responses are, for KTO: the first half."""
    return torch.arange(y.shape[0], device=y.device) < y.shape[0] // 2


def advantages(y: Tensor) -> Tensor:
    """Per sequence, for GRPO: the first half did better."""
    return desirable(y).float() * 2.0 - 1.0


def summed_rows(loss: str, batch: Batch, dtype: torch.dtype | None = None) -> Tensor:
    """Sum of a loss of rows of logits over the tokens, in plain torch, all logits in memory."""
    mask = batch.y != IGNORED
    y = batch.y[mask][:, None]
    logits = F.linear(batch.x[mask], batch.w)
    logp = logits.to(dtype or logits.dtype).log_softmax(-1)
    if loss == "brier":
        return brier(logp.exp(), y)
    if loss == "sparse teacher":
        theirs = batch.word_logps[mask].to(logp)
        return (theirs.exp() * (theirs - logp.gather(-1, batch.words[mask]))).sum()
    taught = F.linear(batch.ref_x[mask].to(batch.x.dtype), batch.w.detach())
    return F.kl_div(logp, taught.to(logp).log_softmax(-1), reduction="sum", log_target=True)


def brier(p: Tensor, y: Tensor) -> Tensor:
    """Sum of the squared distances of probabilities (R, V) from labels (R, 1)."""
    return (p.square().sum(-1) - 2.0 * p.gather(-1, y).squeeze(-1) + 1.0).sum()


def plain_sum(loss: str, batch: Batch, dtype: torch.dtype | None = None) -> Tensor:
    """Sum of any loss in plain torch, all logits in memory."""
    if loss in OF_ROWS:
        return summed_rows(loss, batch, dtype)
    return summed_loss(loss, log_probs(batch, dtype), batch.ref, batch.y)


def units(case: Case, batch: Batch) -> int:
    """What a mean divides by: counted tokens, pairs, or sequences."""
    sequences = batch.y.shape[0]
    return {"dpo": sequences // 2, "grpo": sequences, "kto": sequences}.get(
        case.loss, batch.counted
    )


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
