"""Who takes part: this library and its peers, each a small function of one signature.

``prepare(case, batch, budget)`` returns a function of nothing that computes the case's mean loss
from ``batch``; it raises :class:`UnavailableError`, or ``ImportError``, where the peer cannot run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import gpu_peers
import torch
import torch.nn.functional as F
from cases import Case
from contest import (
    BETA,
    EPSILON,
    MIB,
    OF_ROWS,
    Prepare,
    Run,
    UnavailableError,
    advantages,
    brier,
    desirable,
    flat,
    plain_sum,
    summed_loss,
    units,
)
from inputs import IGNORED, Batch
from torch import Tensor

import fused_losses


def ours(case: Case, batch: Batch, budget: int | None) -> Run:
    """Call the library as a user would."""
    if case.path == "logits":
        return lambda: fused_losses.mle_loss(batch.x, batch.y)
    bytes_ = None if budget is None else budget * MIB
    args = (batch.x, batch.w, batch.y)
    if case.loss == "mle":
        return lambda: fused_losses.linear_mle_loss(*args, workspace_bytes=bytes_)
    if case.loss in OURS_BY_LOSS:
        return OURS_BY_LOSS[case.loss](case, batch, bytes_)
    fn = getattr(fused_losses, f"linear_{case.loss}_loss")
    return lambda: fn(*args, batch.ref, beta=BETA[case.loss], workspace_bytes=bytes_)


def _ours_grpo(case: Case, batch: Batch, bytes_: int | None) -> Run:
    args = (batch.x, batch.w, batch.y, batch.ref, advantages(batch.y))
    return lambda: fused_losses.linear_policy_loss(*args, epsilon=EPSILON, workspace_bytes=bytes_)


def _ours_kto(case: Case, batch: Batch, bytes_: int | None) -> Run:
    args = (batch.x, batch.w, batch.y, batch.ref, desirable(batch.y))
    return lambda: fused_losses.linear_kto_loss(*args, beta=BETA["kto"], workspace_bytes=bytes_)


def _ours_distillation(case: Case, batch: Batch, bytes_: int | None) -> Run:
    args = (batch.x, batch.w, batch.ref_x, batch.w.detach(), batch.y)
    return lambda: fused_losses.linear_divergence_loss(*args, workspace_bytes=bytes_)


def _ours_sparse(case: Case, batch: Batch, bytes_: int | None) -> Run:
    args = (batch.x, batch.w, batch.words, batch.word_logps, batch.y)
    return lambda: fused_losses.linear_sparse_divergence_loss(*args, workspace_bytes=bytes_)


def _ours_brier(case: Case, batch: Batch, bytes_: int | None) -> Run:
    y, count = batch.y.flatten(), units(case, batch)

    def score(stats: fused_losses.TokenStats, rows: Tensor, logits: Tensor) -> Tensor:
        return brier((logits - stats.lse[:, None]).exp(), y[rows][:, None]) / count

    args = (batch.x, batch.w, batch.y, score)
    return lambda: fused_losses.linear_loss(*args, logits=True, workspace_bytes=bytes_)


OURS_BY_LOSS = {
    "grpo": _ours_grpo,
    "kto": _ours_kto,
    "distillation": _ours_distillation,
    "sparse teacher": _ours_sparse,
    "brier": _ours_brier,
}


def ours_in_place(case: Case, batch: Batch, budget: int | None) -> Run:
    """Overwrite the logits with their gradient; a view, for a leaf may not be overwritten."""
    return lambda: fused_losses.mle_loss(batch.x.view_as(batch.x), batch.y, inplace=True)


def ours_mle(case: Case, batch: Batch, budget: int | None) -> Run:
    return ours(replace(case, loss="mle"), batch, budget)


def ours_unmasked(case: Case, batch: Batch, budget: int | None) -> Run:
    return ours(case, replace(batch, y=batch.labels), budget)


def eager(case: Case, batch: Batch, budget: int | None) -> Run:
    """Keep the logits: what people write first."""
    if case.loss == "mle":
        x, y = flat(batch)
        if batch.w is None:
            return lambda: F.cross_entropy(batch.x.flatten(0, 1), y)
        return lambda: F.cross_entropy(F.linear(x, batch.w), y)
    count = units(case, batch)

    # fp32 for a ratio to a reference, or a second distribution, as the library does.
    return lambda: plain_sum(case.loss, batch, torch.float32) / count


def compiled(case: Case, batch: Batch, budget: int | None) -> Run:
    loss, count = case.loss, units(case, batch)

    def whole(x: Tensor, w: Tensor | None, y: Tensor, ref: Tensor | None) -> Tensor:
        if loss == "mle":
            logits = x if w is None else F.linear(x, w)
            return F.cross_entropy(logits.flatten(0, 1), y.flatten())
        inside = replace(batch, x=x, w=w, y=y, ref=ref)
        return plain_sum(loss, inside, torch.float32) / count

    fn = torch.compile(whole, dynamic=False)
    return lambda: fn(batch.x, batch.w, batch.y, batch.ref)


def torch_chunked(case: Case, batch: Batch, budget: int | None) -> Run:
    """Torch's own chunked head: its own choice of chunk, or as many rows as fit the budget."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise UnavailableError(
            f"torch {torch.__version__} has no F.linear_cross_entropy with chunks"
        )
    rows = None if budget is None else max(1, budget * MIB // (case.V * batch.x.element_size()))
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    x, y = flat(batch)
    return lambda: F.linear_cross_entropy(x, batch.w, y, ignore_index=IGNORED, options=options)


class _HeadOnly(torch.nn.Module):
    """The least model that TRL can give its fused head: a backbone that is already done."""

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        text = SimpleNamespace(model_type="none")
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.head = SimpleNamespace(weight=batch.w, bias=None)
        self.hidden = batch.x

    def base_model(self, **_: object) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.hidden)

    def get_output_embeddings(self) -> SimpleNamespace:
        return self.head

    def forward(self) -> None:
        """Never called: the fused head takes its place."""


def trl(case: Case, batch: Batch, budget: int | None) -> Run:
    """``add_fused_lm_head`` as TRL's trainers call it, with its leanest outputs."""
    from trl.trainer.utils import add_fused_lm_head

    model = _HeadOnly(batch)
    add_fused_lm_head(model)
    count = units(case, batch)

    def run() -> Tensor:
        out = model(shift_labels=batch.y, fused_lm_head=True)
        if case.loss == "mle":
            return out.loss
        return summed_loss(case.loss, out.log_probs, batch.ref, batch.y) / count

    return run


def trl_distillation(case: Case, batch: Batch, budget: int | None) -> Run:
    """The loss of TRL's DistillationTrainer, from hidden states."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    args = (batch.x, batch.ref_x, batch.w, batch.w.detach(), batch.y != IGNORED)
    return lambda: _chunked_divergence_loss(*args, beta=0.0)[0]


def _linear(case: Case) -> bool:
    return case.path == "linear"


def _of_log_probs(case: Case) -> bool:
    return case.path == "linear" and case.loss not in OF_ROWS


def _only(loss: str) -> Callable[[Case], bool]:
    return lambda case: case.path == "linear" and case.loss == loss


def _linear_mle(case: Case) -> bool:
    return case.path == "linear" and case.loss == "mle"


def _linear_ratio(case: Case) -> bool:
    return _of_log_probs(case) and case.loss != "mle"


@dataclass(frozen=True)
class Peer:
    """One row of the table of those who take part.

    Attributes:
        name: In tables; the first word names the project.
        prepare: See the module.
        knows: Whether it can compute a case's loss at all; if not, it is not listed.
        budgeted: Runs once more for the case's budget.
        slow: Compiles or tunes for long; ``--quick`` leaves it out and says so.
    """

    name: str
    prepare: Prepare
    knows: Callable[[Case], bool]
    budgeted: bool = False
    slow: bool = False


PEERS: tuple[Peer, ...] = (
    Peer("eager", eager, lambda case: True),
    Peer("torch.compile", compiled, lambda case: True, slow=True),
    Peer("torch chunked", torch_chunked, _linear_mle, budgeted=True),
    Peer("TRL", trl, _of_log_probs),
    Peer("TRL distillation", trl_distillation, _only("distillation")),
    Peer("Liger", gpu_peers.liger, lambda case: case.loss == "mle"),
    Peer("Liger, fp32 dW", gpu_peers.liger_fp32, _linear_mle),
    Peer(
        "Liger, reduction none",
        gpu_peers.liger_none,
        _linear_ratio,
    ),
    Peer("Liger per token", gpu_peers.liger_per_token, _of_log_probs, slow=True),
    Peer("Liger DPO", gpu_peers.liger_dpo, _only("dpo"), slow=True),
    Peer("Liger GRPO", gpu_peers.liger_grpo, _only("grpo"), slow=True),
    Peer("Liger KTO", gpu_peers.liger_kto, _only("kto"), slow=True),
    Peer("Liger JSD", gpu_peers.liger_jsd, _only("distillation")),
    Peer("cut-cross-entropy", gpu_peers.cut_cross_entropy("high"), _of_log_probs, slow=True),
    Peer("cut-cross-entropy, exact", gpu_peers.cut_cross_entropy(None), _of_log_probs, slow=True),
    Peer("quack", gpu_peers.quack, _linear_mle, slow=True),
)
OURS = Peer("fused-losses", ours, lambda case: True)
BESIDE = {
    "mle": Peer("fused-losses mle", ours_mle, _linear),
    "unmasked": Peer("fused-losses, nothing ignored", ours_unmasked, _linear),
    "in place": Peer("fused-losses, in place", ours_in_place, lambda case: case.path == "logits"),
}


@dataclass(frozen=True)
class Contender:
    """A peer with a budget in MiB: one line of a case's table."""

    peer: Peer
    budget: int | None
    kind: str  # "ours", "beside" or "peer"

    @property
    def name(self) -> str:
        return self.peer.name if self.budget is None else f"{self.peer.name} {self.budget} MiB"


def contenders(case: Case) -> list[Contender]:
    """Everyone who takes part in a case, the call that ratios refer to first."""
    linear = case.path == "linear"
    found = [Contender(OURS, case.budget if linear else None, "ours")]
    found += [Contender(OURS, budget, "beside") for budget in case.budgets]
    beside = case.beside if linear else ("in place",) * (case.trained != "nothing")
    found += [Contender(BESIDE[name], case.budget if linear else None, "beside") for name in beside]
    for peer in PEERS:
        if peer.knows(case) and (not case.only or peer.name in case.only):
            found.append(Contender(peer, None, "peer"))
            if peer.budgeted:
                found.append(Contender(peer, case.budget, "peer"))
    return found
