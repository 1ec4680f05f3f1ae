"""Scoring sampled sequences: the public function of log-probs, and what the fused loss calls."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fused_losses.arguments import (
    check_choice,
    check_num_items,
    plain,
    refuse_gradient,
    warn_of_empty,
)
from fused_losses.policy.losses import POLICY_LOSSES, RATIO_LEVELS, PolicyType, RatioLevel
from fused_losses.policy.options import Count, parse_policy_options, policy_factors
from fused_losses.policy.rollouts import Rollouts, Terms

ADVANTAGE_CURE = "it is a constant of the loss: pass advantages.detach()"
EMPTY = "they add nothing, and no mean counts them: to count them, give num_items"


def policy_terms(rollouts: Rollouts) -> Terms:
    """What there is to tell of all tokens; 0 and False where nothing counts."""
    o, counted, ref = rollouts.options, rollouts.counted, rollouts.ref_logps
    ratios, kl = _ratios(rollouts), None if ref is None else _kl(ref - rollouts.logps)
    low, high = POLICY_LOSSES[o.loss_type].clips(ratios, rollouts)
    if counted is not None:
        ratios, low, high = torch.where(counted, ratios, 0.0), low & counted, high & counted
    return Terms(ratios, low, high, kl)


def _ratios(rollouts: Rollouts) -> Tensor:
    level = RATIO_LEVELS[rollouts.options.ratio_level]
    return level(rollouts.logps - rollouts.old, rollouts).exp()


def _kl(d: Tensor) -> Tensor:
    """The estimate of KL(policy || reference), from log(reference / policy)."""
    return torch.expm1(d) - d


def _surrogates(rollouts: Rollouts) -> Tensor:
    """Losses of all tokens, without the entropy's term; 0 where nothing counts."""
    o = rollouts.options
    losses = POLICY_LOSSES[o.loss_type].fn(_ratios(rollouts), rollouts)
    if rollouts.sampler_logps is not None:
        losses = losses * (rollouts.old - rollouts.sampler_logps).exp().clamp(max=o.sampler_cap)
    if o.beta and rollouts.ref_logps is not None:
        losses = losses + o.beta * _kl(rollouts.ref_logps - rollouts.logps)
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
      logp_t: truncated importance sampling [3] and the K3 estimate of KL(policy || reference)

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
            ratios are 1 and have a gradient. As all that follows but ``entropy``, never
            differentiated; never read where ``mask`` is False.
        advantages: (...), one per sequence, or (..., T), one per token.
        mask: (..., T) bool or integer: which tokens count.
        ref_logps: (..., T) under the reference model, for ``beta``.
        loss_type: One of the names above.
        ratio_level: ``token``, ``sequence`` or ``sequence_token``; None: ``sequence`` for ``gspo``,
            which does not take ``token``, and ``token`` for the others.
        epsilon: How far below 1 a ratio goes unclipped, in (0, 1); not for ``cispo``.
        epsilon_high: The same above 1, > 0; None: as ``epsilon``.
        beta: Weight of the KL estimate, >= 0; above 0 it needs ``ref_logps``.
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
            range, of another loss, or without their operand; advantages that require a gradient.

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
    check_operands(o.beta, ref_logps, o.entropy_weight, entropy)
    check_logps("logps", logps, logps, "logps")
    counted = _counted(mask, logps)
    check_place("advantages", advantages, "logps", logps)

    def per_token(name: str, t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        check_logps(name, t, logps, "logps")
        t = t if name == "entropy" else t.detach()
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
        sampler_logps=per_token("sampler_logps", sampler_logps),
        entropy=per_token("entropy", entropy),
    )
    warn_of_empty("mask", lengths, EMPTY, stacklevel=3)
    if reduction == "none":
        return token_losses(rollouts)
    counts = lengths.sum().double(), (lengths > 0).sum().double()
    return policy_total(rollouts, policy_factors(o, *counts, reduction, num_items))


def check_operands(
    beta: float, ref_logps: object, entropy_weight: float, entropy: object = True
) -> None:
    """Raise if a term has a weight and nothing to weigh.

    Raises:
        ValueError: As above.
    """
    if beta and ref_logps is None:
        raise ValueError(
            f"ref_logps is required by beta={beta}: log-probs of the tokens under the reference "
            "model, or leave beta at 0.0"
        )
    if entropy_weight and entropy is None:
        raise ValueError(
            f"entropy is required by entropy_weight={entropy_weight}: "
            "token_stats(..., entropy=True).entropy, or leave entropy_weight at 0.0"
        )


def check_logps(name: str, t: Any, beside: Tensor, beside_name: str) -> None:
    """Raise unless t is per token, and of a dtype that can carry a ratio.

    Raises:
        TypeError: Not a tensor of floats.
        ValueError: Another shape, a dtype below float32, another device.
    """
    if not isinstance(t, Tensor) or not t.is_floating_point():
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name} must be a float32 or float64 tensor, got {got}")
    if t.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} must be float32 or float64, got {t.dtype}: its rounding would shift every "
            "ratio; keep the dtype that token_stats or linear_token_stats returns"
        )
    if t.dim() < 2:
        raise ValueError(
            f"{name} must be (..., T), sequences of tokens, got shape {tuple(t.shape)}; give one "
            "sequence as (1, T)"
        )
    if t.shape != beside.shape:
        raise ValueError(
            f"{name} must have {beside_name}'s shape {tuple(beside.shape)}, one entry per token, "
            f"got {tuple(t.shape)}; what token_stats or linear_token_stats returns for the same "
            "target and shift has it"
        )
    check_place(name, t, beside_name, beside)


def check_place(name: str, t: Any, beside_name: str, beside: Tensor) -> None:
    """Raise if t is a tensor on another device.

    Raises:
        ValueError: As above.
    """
    if isinstance(t, Tensor) and t.device != beside.device:
        raise ValueError(
            f"{name} must be on {beside_name}'s device {str(beside.device)!r}, "
            f"got {str(t.device)!r}"
        )


def expand_advantages(advantages: Any, shape: torch.Size, shape_name: str) -> Tensor:
    """Check advantages per sequence, or per token, and give each token its own.

    Raises:
        TypeError: Not a tensor of floats.
        ValueError: Another shape; they require a gradient.
    """
    if not isinstance(advantages, Tensor) or not advantages.is_floating_point():
        got = advantages.dtype if isinstance(advantages, Tensor) else type(advantages).__name__
        raise TypeError(f"advantages must be a tensor of floats, got {got}")
    refuse_gradient("advantages", advantages, ADVANTAGE_CURE)
    if advantages.shape == shape[:-1]:
        advantages = advantages[..., None].expand(shape)
    if advantages.shape != shape:
        raise ValueError(
            f"advantages must be one per sequence, {tuple(shape[:-1])}, or one per token, "
            f"{shape_name}'s shape {tuple(shape)}, got {tuple(advantages.shape)}"
        )
    return advantages.detach()


def _counted(mask: Any, logps: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"mask must be a bool or integer tensor, got {got}; it says which tokens count and "
            "weighs none: pass mask.bool()"
        )
    if mask.shape != logps.shape:
        raise ValueError(
            f"mask must have logps's shape {tuple(logps.shape)}, got {tuple(mask.shape)}"
        )
    check_place("mask", mask, "logps", logps)
    return mask != 0
