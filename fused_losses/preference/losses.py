"""The pair losses, one function each, and the table that names them."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses.preference.pairs import PairLoss, Pairs

LossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "sppo_hard",
    "aot",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
    "simpo",
    "cpo",
    "orpo",
]


def _smoothed(m: Tensor, epsilon: float) -> Tensor:
    # -(1 - epsilon) log sigma(m) - epsilon log sigma(-m), as log sigma(-m) = log sigma(m) - m.
    surprise = -F.logsigmoid(m)
    return surprise if epsilon == 0.0 else epsilon * m + surprise


def _sigmoid(pairs: Pairs) -> Tensor:
    """DPO with label smoothing (10)."""
    return _smoothed(pairs.margin, pairs.options.label_smoothing)


def _hinge(pairs: Pairs) -> Tensor:
    """Pairs with a margin above 1 are left alone."""
    return torch.relu(1.0 - pairs.margin)


def _ipo(pairs: Pairs) -> Tensor:
    """The difference of the mean log-ratios is drawn to 1 / (2 beta)."""
    chosen, rejected = pairs.means
    return (chosen - rejected - 0.5 / pairs.options.beta) ** 2


def _robust(pairs: Pairs) -> Tensor:
    """Unbiased DPO when a share epsilon of the pairs is flipped; may be negative."""
    m, epsilon = pairs.margin, pairs.options.label_smoothing
    kept, flipped = F.logsigmoid(m), F.logsigmoid(-m)
    return ((epsilon - 1.0) * kept + epsilon * flipped) / (1.0 - 2.0 * epsilon)


def _exo_pair(pairs: Pairs) -> Tensor:
    """KL from the policy's softmax over the pair to (1 - epsilon, epsilon)."""
    m = pairs.margin
    # A tensor: math.log would have torch.compile begin anew for each epsilon.
    epsilon = m.new_ones((), dtype=torch.float64) * pairs.options.label_smoothing
    chosen = torch.sigmoid(m) * (F.logsigmoid(m) - torch.log1p(-epsilon))
    return chosen + torch.sigmoid(-m) * (F.logsigmoid(-m) - torch.log(epsilon))


def _nca_pair(pairs: Pairs) -> Tensor:
    """Noise contrast: each reward by itself, so that the chosen one's does not sink as well."""
    chosen, rejected = pairs.rewards
    noise = F.logsigmoid(-chosen) + F.logsigmoid(-rejected)
    return -F.logsigmoid(chosen) - 0.5 * noise


def _sppo_hard(pairs: Pairs) -> Tensor:
    """Self-play with the winner's win rate taken as 1 and the loser's as 0."""
    half = 0.5 / pairs.options.beta
    return (pairs.chosen - half) ** 2 + (pairs.rejected + half) ** 2


def _aot(pairs: Pairs) -> Tensor:
    """The policy's margins dominate the reference's: quantile against quantile.

    The pair of rank k among the policy's margins meets the k-th smallest margin of the reference,
    not its own. What it has more than its own is added to the difference that was summed token by
    token: where both orders agree no digit is lost.
    """
    ratio, own = pairs.chosen - pairs.rejected, pairs.reference_margin
    if own is not None:
        own = own.to(ratio.dtype)
        policy, quantiles = ratio.detach() + own, own
        if pairs.present is not None:  # pairs that are not there come last in both orders
            policy = torch.where(pairs.present, policy, torch.inf)
            quantiles = torch.where(pairs.present, own, torch.inf)
        order = torch.argsort(policy, stable=True)
        rank = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=order.device)
        )
        met = torch.sort(quantiles).values[rank]
        difference = own - met
        if pairs.present is not None:
            difference = torch.where(pairs.present, difference, 0.0)
        ratio = ratio + difference
    return _smoothed(pairs.options.beta * ratio, pairs.options.label_smoothing)


def _apo_zero(pairs: Pairs) -> Tensor:
    """For chosen responses better than the model's own: theirs up, the rejected ones' down."""
    chosen, rejected = pairs.rewards
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def _apo_down(pairs: Pairs) -> Tensor:
    """For chosen responses worse than the model's own: both down, the rejected one more."""
    chosen, _ = pairs.rewards
    return torch.sigmoid(chosen) + torch.sigmoid(-pairs.margin)


def _discopop(pairs: Pairs) -> Tensor:
    """Logistic below margin 0, exponential above it, blended over a width tau."""
    m = pairs.margin
    blend = m / pairs.options.discopop_tau
    logistic = -F.logsigmoid(m) * torch.sigmoid(-blend)
    # exp(-m) sigma(m / tau) in one exponential: apart, their product is inf * 0 for lost pairs.
    return logistic + torch.exp(F.logsigmoid(blend) - m)


def _sigmoid_norm(pairs: Pairs) -> Tensor:
    """DPO on log-ratios per token."""
    chosen, rejected = pairs.means
    return -F.logsigmoid(pairs.options.beta * (chosen - rejected))


def _simpo(pairs: Pairs) -> Tensor:
    """The log-prob per token is the reward, and gamma the margin it must win by."""
    chosen, rejected = pairs.means
    return -F.logsigmoid(pairs.options.beta * (chosen - rejected) - pairs.options.simpo_gamma)


def _cpo(pairs: Pairs) -> Tensor:
    """DPO against a uniform reference."""
    return -F.logsigmoid(pairs.margin)


def _orpo(pairs: Pairs) -> Tensor:
    """The odds of the chosen response, of its mean log-prob, over those of the rejected one."""
    chosen, rejected = pairs.means
    return -pairs.options.beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)); p is kept one rounding step below 1, where its odds would be infinite."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - torch.log(-torch.expm1(logp))


PAIR_LOSSES: dict[str, PairLoss] = {
    "sigmoid": PairLoss(_sigmoid, smoothing_below=1.0),
    "hinge": PairLoss(_hinge),
    "ipo": PairLoss(_ipo, needs_lengths=True),
    "robust": PairLoss(_robust, smoothing_below=0.5),
    "exo_pair": PairLoss(_exo_pair, smoothing_below=1.0, needs_smoothing=True),
    "nca_pair": PairLoss(_nca_pair),
    "sppo_hard": PairLoss(_sppo_hard),
    "aot": PairLoss(_aot, smoothing_below=1.0, whole_batch=True),
    "apo_zero": PairLoss(_apo_zero),
    "apo_down": PairLoss(_apo_down),
    "discopop": PairLoss(_discopop, takes=("discopop_tau",)),
    "sigmoid_norm": PairLoss(_sigmoid_norm, needs_lengths=True),
    "simpo": PairLoss(
        _simpo,
        needs_lengths=True,
        reference_free=True,
        mean_rewards=True,
        takes=("simpo_gamma",),
    ),
    "cpo": PairLoss(_cpo, reference_free=True),
    "orpo": PairLoss(_orpo, needs_lengths=True, reference_free=True, mean_rewards=True),
}
