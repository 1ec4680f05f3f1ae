"""KTO on logits: reduce to one log-ratio per response, then score it by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fused_losses.arguments import warn_of_empty
from fused_losses.preference.kto import drift_of, kto_losses, parse_kto_options
from fused_losses.reference.rows import reduce, reference_logps, segment_sum
from fused_losses.reference.stats import Transform, counted_stats

if TYPE_CHECKING:
    from typing import Unpack


def kto_loss(
    logits: Tensor,
    target: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    kl: float | Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    num_items: float | Tensor | None = None,
    token_weight: None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    **transform: Unpack[Transform],
) -> Tensor:
    """KTO of responses judged one by one: per-token differences first, then sums per response.

    Args:
        logits: (..., T, V), one response a row.
        target: (..., T), int64 or int32; its ignored labels cut out the prompt.
        ref_logps: Per token, target's shape, or per response (...); float32 or float64, not read
            where nothing counts, no gradient.
        desirable: (...) bool, one per response.
        beta: Strength of the tie to the reference, > 0.
        desirable_weight: Weight of the desirable responses' losses, >= 0.
        undesirable_weight: Weight of the others' losses, >= 0.
        kl: The drift of the policy: a number, or a tensor, of which the mean is taken; at least 0.
        reduction: ``mean`` over the responses with a counted token, ``sum``, or ``none``.
        num_items: Replaces the number of responses in the mean.
        token_weight: Refused: a response's loss is not a sum over tokens.
        z_loss: Refused, as token_weight.
        label_smoothing: Refused, as token_weight.
        **transform: See ``token_loss``.

    Returns:
        A 0-d tensor, or (...) for ``none``, where a response without counted tokens has 0.
    """
    if token_weight is not None or z_loss or label_smoothing:
        raise ValueError(
            "kto_loss takes no token_weight, z_loss or label_smoothing: its losses belong to "
            "responses"
        )
    shape = target.shape[:-1]
    if target.dim() < 2:
        raise ValueError(f"target must be (..., T), one response a row, got {tuple(target.shape)}")
    _check_flags(desirable, shape)
    o, drift = parse_kto_options(beta, desirable_weight, undesirable_weight), drift_of(kl, target)
    rows, stats = counted_stats(logits, target, **transform)
    ratios, response = stats.logps, rows // max(target.shape[-1], 1)
    lengths = response.bincount(minlength=shape.numel())
    warn_of_empty("target", lengths, "they add nothing, and no mean counts them", stacklevel=3)
    if ref_logps is None:
        raise ValueError("ref_logps is required by KTO, got None")
    whole = ref_logps.shape == shape
    ref = reference_logps(ref_logps, shape if whole else target.shape, ratios.dtype).reshape(-1)
    if not whole:
        ratios = ratios - ref[rows]
    sums = segment_sum(ratios, response, shape.numel())
    at = lengths.nonzero().squeeze(-1)
    sums = sums[at] - ref[at] if whole else sums[at]
    kl = drift.to(sums) if isinstance(drift, Tensor) else drift
    losses = kto_losses(sums, desirable.reshape(-1)[at], kl, o)
    return reduce(losses, at, shape, reduction, num_items)


def _check_flags(desirable: Any, shape: torch.Size) -> None:
    if not isinstance(desirable, Tensor) or desirable.dtype != torch.bool:
        got = desirable.dtype if isinstance(desirable, Tensor) else type(desirable).__name__
        raise TypeError(f"desirable must be a bool tensor, one entry per response, got {got}")
    if desirable.shape != shape:
        raise ValueError(
            f"desirable must have one entry per response, {tuple(shape)}, "
            f"got {tuple(desirable.shape)}"
        )
