"""Scoring sampled sequences: the public function of log-probs, and what the fused loss calls."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fused_losses.arguments import check_choice, check_num_items, plain, warn_of_empty
from fused_losses.policy.checks import (
    check_logps,
    check_mask,
    check_operands,
    check_place,
    expand_advantages,
)
from fused_losses.policy.losses import POLICY_LOSSES, RATIO_LEVELS, PolicyType, RatioLevel
from fused_losses.policy.options import Count, parse_policy_options, policy_factors
from fused_losses.policy.rollouts import Rollouts, Terms

EMPTY = "they add nothing, and no mean counts them: to count them, give num_items"


def policy_terms(rollouts: Rollouts) -> Terms:
    """What there is to tell of all tokens; 0 and False where nothing counts."""
    o, counted = rollouts.options, rollouts.counted
    ratios, kl = _ratios(rollouts), _kl(rollouts)
    low, high = POLICY_LOSSES[o.loss_type].clips(ratios, rollouts)
    if counted is not None:
        ratios, low, high = torch.where(counted, ratios, 0.0), low & counted, high & counted
    return Terms(ratios, low, high, kl)


def _ratios(rollouts: Rollouts) -> Tensor:
    level = RATIO_LEVELS[rollouts.options.ratio_level]
    return level(rollouts.logps - rollouts.old, rollouts).exp()


def _kl(rollouts: Rollouts) -> Tensor | None:
    """The KL to the reference: what was given, or the estimate of KL(policy || reference)."""
    if rollouts.ref_logps is None:
        return rollouts.kl
    d = rollouts.ref_logps - rollouts.logps
    return torch.expm1(d) - d


def _surrogates(rollouts: Rollouts) -> Tensor:
    """Losses of all tokens, without the entropy's term; 0 where nothing counts."""
    o = rollouts.options
    losses = POLICY_LOSSES[o.loss_type].fn(_ratios(rollouts), rollouts)
    if rollouts.sampler_logps is not None:
        losses = losses * (rollouts.old - rollouts.sampler_logps).exp().clamp(max=o.sampler_cap)
    kl = _kl(rollouts) if o.beta else None
    if kl is not None:
        losses = losses + o.beta * kl
    return losses if rollouts.counted is None else torch.where(rollouts.counted, losses, 0.0)


def token_losses(rollouts: Rollouts) -> Tensor:
    """Losses of all tokens, the entropy's term among them; 0 where nothing counts."""
    losses = _surrogates(rollouts)
    if rollouts.options.entropy_weight and rollouts.entropy is not None:
        losses = losses - rollouts.options.entropy_weight * rollouts.entropy
    return losses


def policy_total(rollouts: Rollouts, factors: tuple[Count, Count]) -> Tensor:
    """Reduce the losses of some whole sequences by ``policy_factors`` of the batch; additive."""
    o, losses = rollouts.options, _surrogates(rollouts)
    factor, entropy_factor = (f.to(losses.dtype) if isinstance(f, Tensor) else f for f in factors)
    if POLICY_LOSSES[o.loss_type].per == "sequence":
        losses = losses / rollouts.spread(rollouts.lengths.clamp(min=1))
    total = losses.sum() * factor
    if o.entropy_weight and rollouts.entropy is not None:
        total = total - o.entropy_weight * entropy_factor * rollouts.entropy.sum()
    return total


def policy_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    ref_logps: Tensor | None = None,
    *,
    loss_type: PolicyType = "grpo",
    ratio_level: RatioLevel | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    kl: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_weight: float = 0.0,
    sampler_logps: Tensor | None = None,
    sampler_cap: float = 3.0,
    max_length: float | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """Policy-gradient loss of sampled sequences by their log-probs: GRPO and its kin.

    Let w_t be the ratio of the policy to the old one, A_t the advantage, C = ``sampler_cap``:

    * ``grpo``, ``bnpo``, ``dapo``, ``dr_grpo``, ``gspo``: the surrogate is s_t = -min(w_t A_t,
      clip(w_t, 1 - ``epsilon``, 1 + ``epsilon_high``) A_t) [1]
    * ``cispo``: s_t = -sg(min(w_t, ``epsilon_high``)) A_t logp_t; the cap is ``epsilon_high``
      itself (None: 5), and there is no bound below [2]
    * loss_t = s_t min(exp(old_t - sampler_t), C) + ``beta`` (exp(d_t) - 1 - d_t), d_t = ref_t -
      logp_t: truncated importance sampling [3] and the K3 estimate of KL(policy || reference), in
      whose place ``kl`` is the KL itself

    with w_t = exp(logp_t - old_t) at ``ratio_level="token"``; at ``"sequence"`` (GSPO [4]) all
    tokens of a sequence have the exponential of the mean of its log-ratios, and at
    ``"sequence_token"`` its value with the token's own gradient. The mean is

    * over tokens for ``bnpo``, ``dapo`` [5] and ``cispo``
    * over sequences, each the mean of its tokens, for ``grpo`` and ``gspo``
    * over sequences, each the sum of its tokens over ``max_length``, for ``dr_grpo`` [6]

    and ``num_items`` puts another count of tokens, or of sequences, in the place of this batch's
    own: that of all the batches of a step, as ``dapo`` wants it. From it ``entropy_weight`` times
    the mean entropy of the tokens is taken. Formulas are TRL 1.16's; its mean over sequences counts
    those without a token too. Plain torch: differentiable any number of times, no host sync.

    Args:
        logps: (..., T) float32 or float64, log-probs of the sampled tokens; differentiated.
        old_logps: The same under the policy that the advantages belong to; None: this one, so that
            ratios are 1 and have a gradient. As all that follows but ``kl`` and ``entropy``, never
            differentiated; never read where ``mask`` is False.
        advantages: (...), one per sequence, or (..., T), one per token.
        mask: (..., T) bool or integer: which tokens count.
        ref_logps: (..., T) under the reference model, for ``beta``.
        loss_type: One of the names above.
        ratio_level: ``token``, ``sequence`` or ``sequence_token``; None: ``sequence`` for ``gspo``,
            which does not take ``token``, and ``token`` for the others.
        epsilon: How far below 1 a ratio goes unclipped, in (0, 1); not for ``cispo``.
        epsilon_high: The same above 1, > 0; None: as ``epsilon``.
        beta: Weight of the KL, >= 0; above 0 it needs ``ref_logps`` or ``kl``.
        kl: (..., T), in the place of ``ref_logps``: the KL between the predictions of policy and
            reference over the whole vocabulary, as :func:`divergence_loss` gives it with
            ``reduction="none"``; differentiated.
        entropy: (..., T), of the predictions; differentiated.
        entropy_weight: Weight of the mean entropy, >= 0; above 0 it needs ``entropy``.
        sampler_logps: (..., T), log-probs as the engine that sampled reported them.
        sampler_cap: Largest weight of a token by ``sampler_logps``, > 0.
        max_length: The constant of ``dr_grpo``, > 0; other losses refuse it.
        reduction: ``mean``; ``sum`` over what the mean is over; ``none``: (..., T), loss_t and the
            entropy's term, of any loss.
        num_items: Number, or 0-d tensor, that replaces the count of the mean.

    Returns:
        0-d tensor (``none``: (..., T)), fp32 or fp64; 0 attached to the graph if nothing counts. A
        sequence without a counted token warns.

    Raises:
        TypeError: Log-probs that are not floating point, a mask of floats, options of other types.
        ValueError: Unknown names, shapes that differ, a precision below float32, options out of
            range, of another loss, or without their operand; ``ref_logps`` beside ``kl``;
            advantages that require a gradient.

    References:
        [1] Shao et al., GRPO, arXiv 2402.03300, eq. 3. [2] MiniMax-M1, arXiv 2506.13585, eqs. 4
        and 5. [3] Yao et al., Your efficient RL framework secretly brings you off-policy RL
        training. [4] Zheng et al., GSPO, arXiv 2507.18071. [5] Yu et al., DAPO, arXiv 2503.14476.
        [6] Liu et al., Dr. GRPO, arXiv 2503.20783.
    """
    o = parse_policy_options(
        loss_type,
        ratio_level,
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        beta=beta,
        entropy_weight=entropy_weight,
        sampler_cap=sampler_cap,
        max_length=max_length,
    )
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    num_items = plain(num_items)
    check_num_items("num_items", num_items, reduction)
    check_operands(o.beta, ref_logps, kl, o.entropy_weight, entropy)
    check_logps("logps", logps, logps, "logps")
    counted = check_mask(mask, logps)
    check_place("advantages", advantages, "logps", logps)

    def per_token(name: str, t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        check_logps(name, t, logps, "logps")
        t = t if name in ("entropy", "kl") else t.detach()
        return torch.where(counted, t, 0.0).to(logps.dtype)

    lengths = counted.sum(-1)
    rollouts = Rollouts(
        torch.where(counted, logps, 0.0),
        per_token("old_logps", old_logps),
        torch.where(counted, expand_advantages(advantages, logps.shape, "logps"), 0.0).to(logps),
        lengths,
        lambda x: x.sum(-1),
        lambda s: s[..., None].expand(logps.shape),
        o,
        counted=counted,
        ref_logps=per_token("ref_logps", ref_logps),
        kl=per_token("kl", kl),
        sampler_logps=per_token("sampler_logps", sampler_logps),
        entropy=per_token("entropy", entropy),
    )
    warn_of_empty("mask", lengths, EMPTY, stacklevel=3)
    if reduction == "none":
        return token_losses(rollouts)
    counts = lengths.sum().double(), (lengths > 0).sum().double()
    return policy_total(rollouts, policy_factors(o, *counts, reduction, num_items))
