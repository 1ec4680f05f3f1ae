"""Preference losses: plain torch on the log-probs of whole responses, one pair per entry.

Each loss is one small function of a ``Pairs`` and one entry of ``PAIR_LOSSES``, which also says
whether it takes label smoothing and needs response lengths. Fused DPO calls the same functions, so
the maths of a pair exist once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

LossType = Literal["sigmoid", "hinge", "ipo", "robust"]


@dataclass(frozen=True)
class Pairs:
    """What a pair loss may look at; all tensors are (B,)."""

    chosen: Tensor  # l_w: log-ratio policy / reference of the chosen response, summed, nats
    rejected: Tensor  # l_l: the same of the rejected response
    chosen_lengths: Tensor  # counted tokens, at least 1 (1 where the loss does not need them)
    rejected_lengths: Tensor
    beta: float
    label_smoothing: float

    @property
    def margin(self) -> Tensor:
        """The difference of the two implicit rewards, beta * Delta (9)."""
        return self.beta * (self.chosen - self.rejected)

    @property
    def mean_ratios(self) -> tuple[Tensor, Tensor]:
        """Log-ratio per token of the chosen and of the rejected response."""
        return self.chosen / self.chosen_lengths, self.rejected / self.rejected_lengths


@dataclass(frozen=True)
class PairLoss:
    """A pair loss and what it asks for.

    Args:
        fn: ``Pairs -> (B,)`` losses.
        smoothing_below: label_smoothing must lie in [0, smoothing_below). 0.0: it takes none.
        needs_lengths: The lengths of both responses must be given.
    """

    fn: Callable[[Pairs], Tensor]
    smoothing_below: float = 0.0
    needs_lengths: bool = False


def _sigmoid(pairs: Pairs) -> Tensor:
    """DPO with label smoothing (10)."""
    m, eps = pairs.margin, pairs.label_smoothing
    return -(1.0 - eps) * F.logsigmoid(m) - eps * F.logsigmoid(-m)


def _hinge(pairs: Pairs) -> Tensor:
    """max(0, 1 - beta Delta): pairs with a margin above 1 are left alone."""
    return torch.relu(1.0 - pairs.margin)


def _ipo(pairs: Pairs) -> Tensor:
    """(Delta' - 1 / (2 beta))^2, where Delta' is the difference of per-token mean log-ratios."""
    chosen, rejected = pairs.mean_ratios
    return (chosen - rejected - 0.5 / pairs.beta) ** 2


def _robust(pairs: Pairs) -> Tensor:
    """Unbiased DPO when a share epsilon of the pairs is flipped; may be negative."""
    m, eps = pairs.margin, pairs.label_smoothing
    return ((eps - 1.0) * F.logsigmoid(m) + eps * F.logsigmoid(-m)) / (1.0 - 2.0 * eps)


PAIR_LOSSES: dict[str, PairLoss] = {
    "sigmoid": PairLoss(_sigmoid, smoothing_below=1.0),
    "hinge": PairLoss(_hinge),
    "ipo": PairLoss(_ipo, needs_lengths=True),
    "robust": PairLoss(_robust, smoothing_below=0.5),
}


def preference_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None = None,
    reference_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score pairs of responses by the log-probs of the whole responses.

    With l_w and l_l the log-ratios policy / reference of the chosen and of the rejected response,
    Delta = l_w - l_l (9), m = beta Delta and epsilon = ``label_smoothing``:

    * ``sigmoid``: -(1 - epsilon) log sigma(m) - epsilon log sigma(-m) (10)
    * ``hinge``: max(0, 1 - m)
    * ``ipo``: (l_w / n_w - l_l / n_l - 1 / (2 beta))^2, n the lengths (0 counts as 1)
    * ``robust``: [-(1 - epsilon) log sigma(m) + epsilon log sigma(-m)] / (1 - 2 epsilon)

    The formulas are TRL 1.16's, except that ``sigmoid`` honours label smoothing and losses that
    do not take it refuse it. Without references the log-ratios are the log-probs themselves. Where
    log-probs are available per token, subtract the reference per token, sum the differences and
    pass the sums as policy log-probs: subtracting two large sums loses digits that DPO needs.
    Plain torch: differentiable any number of times, deterministic, no host sync.

    Args:
        policy_chosen_logps: (B,) float32 or float64, summed log-probs of the chosen responses.
        policy_rejected_logps: (B,), the same of the rejected responses.
        reference_chosen_logps: (B,), under the reference model; never differentiated. None,
            together with ``reference_rejected_logps``: no reference.
        reference_rejected_logps: (B,), as above.
        beta: Strength of the tie to the reference, > 0.
        loss_type: ``"sigmoid"``, ``"hinge"``, ``"ipo"`` or ``"robust"``.
        label_smoothing: epsilon, the share of pairs taken to be flipped: in [0, 1) for ``sigmoid``,
            in [0, 1/2) for ``robust``, 0 for the others.
        chosen_lengths: (B,), counted tokens of the chosen responses; ``ipo`` needs them.
        rejected_lengths: (B,), the same of the rejected responses.

    Returns:
        ``(losses, chosen_rewards, rejected_rewards)``, each (B,), fp32 (fp64 for fp64 input). The
        losses carry gradients; the implicit rewards ``beta * l`` (12), in nats, are detached.

    Raises:
        TypeError: Log-probs are not floating point.
        ValueError: An unknown ``loss_type``, a precision below float32, shapes that differ, one
            reference without the other, missing lengths, ``beta`` or ``label_smoothing`` out of
            range.

    References:
        Rafailov et al., Direct Preference Optimization, arXiv 2305.18290, eq. 7. Mitchell, A note
        on DPO with noisy preferences (label smoothing). Zhao et al., SLiC-HF, arXiv 2305.10425
        (hinge). Azar et al., arXiv 2310.12036, eq. 17 (ipo). Chowdhury et al., arXiv 2403.00409
        (robust).
    """
    loss = _find(loss_type)
    _check_number("beta", beta, 0.0 < beta < math.inf, "a finite number > 0")
    _check_smoothing(loss_type, label_smoothing, loss.smoothing_below)
    shape = policy_chosen_logps.shape
    if len(shape) != 1:
        raise ValueError(
            "policy_chosen_logps must be (B,), one summed log-prob per pair, "
            f"got shape {tuple(shape)}; sum over the tokens first"
        )
    for name, logps in (
        ("policy_chosen_logps", policy_chosen_logps),
        ("policy_rejected_logps", policy_rejected_logps),
        ("reference_chosen_logps", reference_chosen_logps),
        ("reference_rejected_logps", reference_rejected_logps),
    ):
        if logps is not None:
            _check_logps(name, logps, shape)
    if (reference_chosen_logps is None) != (reference_rejected_logps is None):
        raise ValueError(
            "reference_chosen_logps and reference_rejected_logps go together: "
            "give both, or neither for no reference"
        )
    pairs = Pairs(
        _log_ratio(policy_chosen_logps, reference_chosen_logps),
        _log_ratio(policy_rejected_logps, reference_rejected_logps),
        _lengths("chosen_lengths", chosen_lengths, policy_chosen_logps, loss_type, loss),
        _lengths("rejected_lengths", rejected_lengths, policy_rejected_logps, loss_type, loss),
        beta,
        label_smoothing,
    )
    return loss.fn(pairs), beta * pairs.chosen.detach(), beta * pairs.rejected.detach()


def _find(loss_type: str) -> PairLoss:
    if loss_type not in PAIR_LOSSES:
        choices = ", ".join(repr(name) for name in get_args(LossType))
        raise ValueError(f"loss_type must be one of {choices}, got {loss_type!r}")
    return PAIR_LOSSES[loss_type]


def _log_ratio(policy: Tensor, reference: Tensor | None) -> Tensor:
    return policy if reference is None else policy - reference.detach()


def _lengths(
    name: str, lengths: Tensor | None, logps: Tensor, loss_type: str, loss: PairLoss
) -> Tensor:
    if lengths is None:
        if loss.needs_lengths:
            raise ValueError(
                f"loss_type={loss_type!r} divides by the response lengths: "
                f"{name} must be a (B,) tensor of counted tokens, got None"
            )
        return torch.ones_like(logps, requires_grad=False)
    if lengths.shape != logps.shape:
        raise ValueError(
            f"{name} must have the log-probs' shape {tuple(logps.shape)}, "
            f"got {tuple(lengths.shape)}"
        )
    return lengths.detach().clamp(min=1)


def _check_logps(name: str, logps: Tensor, shape: torch.Size) -> None:
    if not logps.is_floating_point():
        raise TypeError(f"{name} must be float32 or float64, got {logps.dtype}")
    if logps.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} must be float32 or float64, got {logps.dtype}: the difference of two summed "
            "log-probs drowns in its rounding; sum the log-probs in float32"
        )
    if logps.shape != shape:
        raise ValueError(
            f"{name} must have the shape of policy_chosen_logps, {tuple(shape)}, "
            f"got {tuple(logps.shape)}"
        )


def _check_smoothing(loss_type: str, label_smoothing: float, below: float) -> None:
    if below == 0.0:
        allowed, expected = (
            label_smoothing == 0.0,
            f"0 for loss_type={loss_type!r}, which takes none",
        )
    else:
        allowed = 0.0 <= label_smoothing < below
        expected = f"in [0, {below:g}) for loss_type={loss_type!r}"
    _check_number("label_smoothing", label_smoothing, allowed, expected)


def _check_number(name: str, number: float, allowed: bool, expected: str) -> None:
    if not allowed:
        raise ValueError(f"{name} must be {expected}, got {number}")
