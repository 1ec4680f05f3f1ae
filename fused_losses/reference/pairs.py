"""Preference losses on logits: reduce to one log-ratio per response, then ``preference_loss``."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from fused_losses.preference import LossType, preference_loss
from fused_losses.reference.rows import reduce, reference_logps, segment_sum
from fused_losses.reference.stats import Transform, counted_stats

if TYPE_CHECKING:
    from typing import Unpack


def dpo_loss(
    logits: Tensor,
    target: Tensor,
    ref_logps: Tensor | None,
    *,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    num_items: float | Tensor | None = None,
    token_weight: None = None,
    z_loss: float = 0.0,
    **transform: Unpack[Transform],
) -> Tensor:
    """DPO and its kin on pairs (9)-(10): per-token differences first, then sums per response.

    Args:
        logits: (2B, T, V), chosen rows first, then the rejected ones in the same order.
        target: (2B, T), int64 or int32; its ignored labels cut out the prompt.
        ref_logps: Per token (2B, T), per response (2B,), or None for no reference; float32 or
            float64, not read where nothing counts, no gradient.
        beta: Strength of the tie to the reference, > 0.
        loss_type: See ``preference_loss``.
        label_smoothing: epsilon of (10), the share of pairs taken to be flipped.
        reduction: ``mean`` over the pairs with a counted token, ``sum``, or ``none``.
        num_items: Replaces the number of pairs in the mean.
        token_weight: Refused: a pair's loss is not a sum over tokens.
        z_loss: Refused, as token_weight.
        **transform: See ``token_loss``.

    Returns:
        A 0-d tensor, or (B,) for ``none``, where a pair without counted tokens has 0.
    """
    if target.dim() < 2 or target.shape[0] % 2:
        raise ValueError(
            "target must be (2B, T): chosen rows, then as many rejected rows; "
            f"got shape {tuple(target.shape)}"
        )
    if token_weight is not None or z_loss:
        raise ValueError("dpo_loss takes no token_weight or z_loss: its losses belong to pairs")
    n_rows = target.shape[0]
    rows, stats = counted_stats(logits, target, **transform)
    ratio, response = stats.logps, rows // max(target.numel() // max(n_rows, 1), 1)
    lengths = response.bincount(minlength=n_rows)
    if ref_logps is not None and ref_logps.dim() > 1:
        ref = reference_logps(ref_logps, target.shape, ratio.dtype)
        ratios = segment_sum(ratio - ref.reshape(-1)[rows], response, n_rows)
    else:
        ratios = segment_sum(ratio, response, n_rows)
    if ref_logps is not None and ref_logps.dim() == 1:
        ref = reference_logps(ref_logps, target.shape[:1], ratio.dtype)
        ratios = ratios - ref.masked_fill(lengths == 0, 0.0)

    if (lengths == 0).any():
        warnings.warn("a response has no counted token; its log-ratio is 0", stacklevel=2)
    n_w, n_l = lengths.chunk(2)
    pairs = (n_w + n_l).nonzero().squeeze(-1)
    l_w, l_l = ratios.chunk(2)
    losses, _, _ = preference_loss(
        l_w[pairs],
        l_l[pairs],
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        chosen_lengths=n_w[pairs],
        rejected_lengths=n_l[pairs],
    )
    return reduce(losses, pairs, n_w.shape, reduction, num_items)
