"""The same losses from hidden states and the head's weight: make the logits, then as before."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_losses.arguments import check_flag, check_number, expand_units
from fused_losses.policy import policy_loss
from fused_losses.reference import kto, losses, pairs
from fused_losses.reference import stats as statistics
from fused_losses.reference.anchor import anchored, kl_to_reference
from fused_losses.reference.rows import counted_rows, linear_logits
from fused_losses.stats import TokenStats, call_on_stats


def linear_mle_loss(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    """``mle_loss`` of ``input @ linear_weight.T + linear_bias``.

    Args:
        input: (..., D) hidden states.
        linear_weight: (V, D), the head's weight.
        target: (...), int64 or int32.
        **options: ``linear_bias`` (V,), those of ``mle_loss``, and ``workspace_bytes``,
            ``accum_dtype``, ``logits_dtype``, which have no effect here; ``anchor_weight`` times
            the KL of ``anchor`` to a reference, ``anchor_input`` (..., D') and
            ``anchor_weight_matrix`` (V, D'), ``anchor_bias`` (V,).

    Returns:
        As ``mle_loss``; gradients reach input, weight and bias.
    """
    logits, options = _logits(input, linear_weight, target, **options)
    return anchored(losses.mle_loss, logits, target, **options)


def linear_pearson_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, ref_logps: Tensor | None, **options: Any
) -> Tensor:
    """``pearson_loss`` of a linear head; arguments as in ``linear_mle_loss``."""
    logits, options = _logits(input, linear_weight, target, **options)
    return anchored(losses.pearson_loss, logits, target, ref_logps, **options)


def linear_hellinger_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, ref_logps: Tensor | None, **options: Any
) -> Tensor:
    """``hellinger_loss`` of a linear head; arguments as in ``linear_mle_loss``."""
    logits, options = _logits(input, linear_weight, target, **options)
    return anchored(losses.hellinger_loss, logits, target, ref_logps, **options)


def linear_token_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    ref_logps: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """``token_loss`` of a linear head; arguments as in ``linear_mle_loss``."""
    logits, options = _logits(input, linear_weight, target, **options)
    return anchored(losses.token_loss, logits, target, ref_logps, **options)


def linear_dpo_loss(
    input: Tensor, linear_weight: Tensor, target: Tensor, ref_logps: Tensor | None, **options: Any
) -> Tensor:
    """``dpo_loss`` of a linear head; arguments as in ``linear_mle_loss``."""
    logits, options = _logits(input, linear_weight, target, **options)
    return pairs.dpo_loss(logits, target, ref_logps, **options)


def linear_kto_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    **options: Any,
) -> Tensor:
    """``kto_loss`` of a linear head; arguments as in ``linear_mle_loss``."""
    logits, options = _logits(input, linear_weight, target, **options)
    return kto.kto_loss(logits, target, ref_logps, desirable, **options)


def linear_policy_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    ref_logps: Tensor | None = None,
    *,
    entropy_weight: float = 0.0,
    **options: Any,
) -> Tensor:
    """``policy_loss`` of the statistics of a linear head; labels that count are its mask.

    Args:
        input: (..., T, D) hidden states.
        linear_weight: (V, D), the head's weight.
        target: (..., T), int64 or int32, the sampled tokens.
        old_logps: See ``policy_loss``.
        advantages: See ``policy_loss``.
        ref_logps: See ``policy_loss``.
        entropy_weight: See ``policy_loss``.
        **options: Those of ``policy_loss`` but ``entropy`` and ``kl``, those of
            ``linear_token_stats``, and those of the anchor of ``linear_mle_loss`` but its weight:
            then ``beta`` weighs the KL of ``anchor``, by default "reverse_kl", not an estimate.

    Returns:
        As ``policy_loss``.
    """
    for name, neutral in (("token_weight", None), ("z_loss", 0.0), ("label_smoothing", 0.0)):
        if options.pop(name, neutral) != neutral:
            raise ValueError(f"{name} is not taken by policy losses")
    names = inspect.signature(policy_loss).parameters
    policy = {name: options.pop(name) for name in list(options) if name in names}
    anchor = {name: options.pop(name) for name in list(options) if name.startswith("anchor")}
    entropy = bool(check_number("entropy_weight", entropy_weight))
    logits, options = _logits(input, linear_weight, target, **options)
    stats = statistics.token_stats(logits, target, entropy=entropy, **options)
    kl = None
    if anchor:
        shared = {name: t for name, t in options.items() if name != "validate"}
        anchor = {"anchor": "reverse_kl", **anchor}
        kl = kl_to_reference(logits, target, reduction="none", **anchor, **shared)
    ignore_index, shift = options.get("ignore_index", -100), options.get("shift", False)
    mask = torch.zeros(target.numel(), dtype=torch.bool, device=target.device)
    mask[counted_rows(target, ignore_index, shift)] = True
    return policy_loss(
        stats.logps,
        old_logps,
        advantages,
        mask.view(target.shape),
        ref_logps,
        kl=kl,
        entropy=stats.entropy,
        entropy_weight=entropy_weight,
        **policy,
    )


def linear_token_stats(
    input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any
) -> TokenStats:
    """``token_stats`` of a linear head; arguments as in ``linear_mle_loss``."""
    logits, options = _logits(input, linear_weight, target, **options)
    return statistics.token_stats(logits, target, **options)


def linear_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    loss_fn: Callable[..., Tensor],
    *,
    units: Tensor | None = None,
    logits: bool = False,
    **options: Any,
) -> Tensor:
    """Apply a loss of your own to the statistics of all counted tokens.

    ``loss_fn`` is called once, with everything; the fused form calls it on some whole units at a
    time, so the two agree if it is additive over units. Here autograd also reaches tensors that
    ``loss_fn`` captures, which the fused form takes as constants.

    Args:
        input: (..., D) hidden states.
        linear_weight: (V, D), the head's weight.
        target: (...), int64 or int32.
        loss_fn: ``(stats, rows) -> 0-d tensor``: 1-D ``TokenStats`` over the counted tokens,
            ordered by unit and then by position, and their flat int64 positions in target.
        units: Integer tensor of target's shape, each token's unit, or without its last dimension,
            each sequence's. None: every token its own.
        logits: Also give it the transformed logits (n, V) of those tokens.
        **options: ``entropy=False``, ``linear_bias``, and those of ``linear_token_stats``.

    Returns:
        What ``loss_fn`` returned; 0.0 attached to the graph, without calling it, if nothing counts.
    """
    check_flag("logits", logits)
    scores, options = _logits(input, linear_weight, target, **options)
    rows, stats = statistics.counted_stats(scores, target, **options)
    order = torch.arange(len(rows), device=rows.device)
    if units is not None:
        order = expand_units(units, target.shape).reshape(-1)[rows].argsort(stable=True)
        rows, stats = rows[order], statistics.apply(lambda x: x[order], stats)
    if not len(rows):
        return stats.logps.sum()
    given = []
    if logits:
        options.pop("entropy", None)
        given = [statistics.counted(scores, target, **options)[1][order]]
    loss = call_on_stats(loss_fn, stats, rows, *given)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return a 0-d tensor, got {got}")
    return loss


def _logits(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    workspace_bytes: int | None = None,
    accum_dtype: torch.dtype = torch.float32,
    logits_dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """Make the logits and drop the options that belong to the product."""
    if "inplace" in options:
        raise TypeError(
            "inplace belongs to the functions of logits; a linear head has none to overwrite"
        )
    ignore_index, shift = options.get("ignore_index", -100), options.get("shift", False)
    check_flag("shift", shift)
    return linear_logits(input, linear_weight, target, linear_bias, ignore_index, shift), options
