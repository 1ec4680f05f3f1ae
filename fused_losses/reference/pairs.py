"""Preference losses on logits: reduce to one log-ratio per response, then score the pairs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fused_losses.arguments import check_number
from fused_losses.preference import (
    LossType,
    Pairs,
    parse_pair_options,
    refuse_reference,
    score,
)
from fused_losses.reference.rows import check_count, reduce, reference_logps, segment_sum
from fused_losses.reference.stats import Transform, counted_stats

if TYPE_CHECKING:
    from typing import Unpack


def dpo_loss(
    logits: Tensor,
    target: Tensor,
    ref_logps: Tensor | None,
    *,
    beta: float = 0.1,
    loss_type: LossType | Mapping[str, float] = "sigmoid",
    label_smoothing: float = 0.0,
    simpo_gamma: float | None = None,
    discopop_tau: float | None = None,
    sft_weight: float = 0.0,
    sft_num_items: float | Tensor | None = None,
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
        simpo_gamma: See ``preference_loss``.
        discopop_tau: See ``preference_loss``.
        sft_weight: Adds its multiple of the mean negative log-likelihood of the chosen responses'
            counted tokens (of the sum for ``reduction="sum"``; refused for ``none``).
        sft_num_items: Replaces the number of those tokens; None: where ``num_items`` is given, the
            mean is weighted by the batch's share of the ``num_items`` pairs.
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
    sft_weight = check_number("sft_weight", sft_weight, low=0.0, closed=True)
    sft_num_items = check_count("sft_num_items", sft_num_items)
    if sft_weight and reduction == "none":
        raise ValueError("sft_weight is not taken with reduction='none'")
    options = parse_pair_options(loss_type, beta, label_smoothing, simpo_gamma, discopop_tau)
    refuse_reference(loss_type, "ref_logps", ref_logps)
    n_rows = target.shape[0]
    rows, stats = counted_stats(logits, target, **transform)
    logps, response = stats.logps, rows // max(target.numel() // max(n_rows, 1), 1)
    lengths = response.bincount(minlength=n_rows)
    if (lengths == 0).any():
        warnings.warn("a response has no counted token; its log-ratio is 0", stacklevel=2)
    refs = logps.new_zeros(n_rows)
    ratio = logps
    if ref_logps is not None and ref_logps.dim() > 1:
        ref = reference_logps(ref_logps, target.shape, logps.dtype).reshape(-1)[rows]
        ratio, refs = ratio - ref, segment_sum(ref, response, n_rows)
    ratios = segment_sum(ratio, response, n_rows)
    if ref_logps is not None and ref_logps.dim() == 1:
        ref = reference_logps(ref_logps, target.shape[:1], logps.dtype)
        refs = ref.masked_fill(lengths == 0, 0.0)
        ratios = ratios - refs

    n_w, n_l = lengths.chunk(2)
    at = (n_w + n_l).nonzero().squeeze(-1)
    l_w, l_l = ratios.chunk(2)
    ref_w, ref_l = refs.chunk(2)
    margin = None if ref_logps is None else (ref_w - ref_l)[at]
    losses = score(Pairs(l_w[at], l_l[at], options, n_w[at], n_l[at], margin))
    loss = reduce(losses, at, n_w.shape, reduction, num_items)
    if not sft_weight:
        return loss
    nll = -logps[response < n_rows // 2]
    chosen = torch.arange(len(nll), device=nll.device)
    sft = reduce(nll, chosen, nll.shape, reduction, sft_num_items)
    if num_items is not None and sft_num_items is None:
        sft = sft * (len(at) / float(num_items) if float(num_items) else 0.0)
    return loss + sft_weight * sft
