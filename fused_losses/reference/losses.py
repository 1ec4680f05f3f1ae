"""The losses on logits, as the equations state them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fused_losses.arguments import (
    WEIGHT_CURE,
    check_ids,
    check_max_weight,
    check_number,
    refuse_gradient,
)
from fused_losses.reference.rows import reduce, reference_logps, segment_sum, select
from fused_losses.reference.stats import Transform, counted
from fused_losses.token_losses import TOKEN_LOSSES, TokenLoss

if TYPE_CHECKING:
    from typing import Unpack


class Common(Transform, total=False):
    """The options shared by the token losses."""

    reduction: Literal["mean", "sum", "none"]
    num_items: float | Tensor | None
    token_weight: Tensor | None
    label_smoothing: float
    z_loss: float
    level: Literal["token", "sequence"]
    segment_ids: Tensor | None


def mle_loss(logits: Tensor, target: Tensor, **common: Unpack[Common]) -> Tensor:
    """Maximum likelihood, ``loss_t = -logp_t`` (6): ``F.cross_entropy`` with more options.

    Args:
        logits: (..., V), any float dtype.
        target: (...), int64 or int32.
        **common: See ``token_loss``.

    Returns:
        A 0-d tensor, nats; 0.0 if all labels are ignored. Of target's shape for ``none``.
    """
    return token_loss(logits, target, loss="mle", **common)


def pearson_loss(
    logits: Tensor,
    target: Tensor,
    ref_logps: Tensor | None,
    *,
    beta: float = 1.0,
    value: float | Tensor = 0.0,
    **common: Unpack[Common],
) -> Tensor:
    """Pearson chi-squared: (6) with ``phi(r) = r - r^2 / 4``; see ``token_loss``."""
    return token_loss(logits, target, ref_logps, loss="pearson", beta=beta, value=value, **common)


def hellinger_loss(
    logits: Tensor,
    target: Tensor,
    ref_logps: Tensor | None,
    *,
    beta: float = 1.0,
    value: float | Tensor = 0.0,
    max_weight: float = 4.0,
    **common: Unpack[Common],
) -> Tensor:
    """Squared Hellinger: (6) with ``phi(r) = r / (1 + r)``; see ``token_loss``."""
    return token_loss(
        logits,
        target,
        ref_logps,
        loss="hellinger",
        beta=beta,
        value=value,
        max_weight=max_weight,
        **common,
    )


def token_loss(
    logits: Tensor,
    target: Tensor,
    ref_logps: Tensor | None = None,
    *,
    loss: str | TokenLoss = "mle",
    beta: float = 1.0,
    value: float | Tensor = 0.0,
    level: Literal["token", "sequence"] = "token",
    segment_ids: Tensor | None = None,
    max_weight: float = 4.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    num_items: float | Tensor | None = None,
    token_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    **transform: Unpack[Transform],
) -> Tensor:
    """Any member of the family, ``loss_t = (value_t - phi(r_t)) / beta`` (5)-(6), by autograd.

    ``r_t = beta * (logp_t - ref_logp_t) + value_t``; at sequence level the log-ratios of a sequence
    are summed first. ``mle`` is ``-logp_t``, where reference and value cancel.

    Args:
        logits: (..., V), any float dtype; computed in float32 (float64 for float64).
        target: (...), int64 or int32.
        ref_logps: target's shape, float32 or float64; not read at ignored positions, no gradient.
        loss: A name in ``TOKEN_LOSSES``, or a ``TokenLoss``.
        beta: Strength of the tie to the reference, > 0.
        value: Offset of the reward, a number or a tensor that broadcasts to target (to the
            sequences at sequence level, with segment_ids ordered by row, then id). Differentiable.
        level: ``token``, or ``sequence``: the rows of target, or its segments, are one item each.
        segment_ids: target's shape, integer, local to a row; for packed rows at sequence level.
        max_weight: Cap G of the weight, where the member has a continuation.
        reduction: ``mean`` over counted labels (sequences), ``sum`` or ``none``.
        num_items: Replaces the mean's divisor; 0 gives 0.
        token_weight: target's shape; multiplies the losses. Differentiable with
            ``reduction="none"``; elsewhere one that requires a gradient is refused.
        label_smoothing: Share of the uniform target, ``mle`` only, as in ``F.cross_entropy``.
        z_loss: Adds ``z_loss * lse_t ** 2``.
        **transform: ``ignore_index=-100``, ``softcap=None``, ``logit_scale=1.0``,
            ``temperature=1.0``, ``shift=False``; see ``Transform`` for the options without effect.

    Returns:
        A 0-d tensor in nats, float32 or float64; 0.0 attached to the graph if nothing counts. For
        ``none`` target's shape (one entry per row at sequence level), 0 for what does not count.

    Raises:
        ValueError: Unknown names, shapes that do not fit, a missing reference, options that do not
            combine.
        IndexError: A counted label outside [0, V).
    """
    member = _member(loss)
    beta = check_number("beta", beta, low=0.0)
    max_weight = check_max_weight(max_weight)
    label_smoothing = check_number(
        "label_smoothing", label_smoothing, low=0.0, high=1.0, closed=True
    )
    z_loss = check_number("z_loss", z_loss, low=0.0, closed=True)
    if member.uses_reference and ref_logps is None:
        raise ValueError(f"loss={member.name!r} needs ref_logps, got None")
    if label_smoothing and member.name != "mle":
        raise ValueError(f"label_smoothing belongs to 'mle', got loss={member.name!r}")
    if level not in ("token", "sequence"):
        raise ValueError(f"level must be 'token' or 'sequence', got {level!r}")
    if segment_ids is not None and level == "token":
        raise ValueError("segment_ids needs level='sequence'")
    if reduction != "none":
        refuse_gradient("token_weight", token_weight, WEIGHT_CURE)

    rows, z, y = counted(logits, target, **transform)
    logp_v = z.log_softmax(-1)  # (n, V)
    ratio = logp_v.gather(-1, y[:, None]).squeeze(-1)
    if member.uses_reference and ref_logps is not None:
        ratio = ratio - reference_logps(ref_logps, target.shape, z.dtype).reshape(-1)[rows]

    if level == "sequence":
        if token_weight is not None or z_loss or label_smoothing:
            raise ValueError("level='sequence' takes no token_weight, z_loss or label_smoothing")
        segment, shape = _sequences(target, segment_ids, reduction)
        items, inverse = segment[rows].unique(return_inverse=True)
        ratio = segment_sum(ratio, inverse, len(items))
        value_s = select("value", value, shape, items, z.dtype)
        losses = _losses(member, ratio, value_s, beta, max_weight)
        return reduce(losses, items, shape, reduction, num_items)

    value_t = select("value", value, target.shape, rows, z.dtype)
    losses = _losses(member, ratio, value_t, beta, max_weight)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * logp_v.mean(-1)
    if z_loss:
        losses = losses + z_loss * z.logsumexp(-1) ** 2
    if token_weight is not None:
        if token_weight.shape != target.shape:
            raise ValueError(
                f"token_weight must have target's shape {tuple(target.shape)}, "
                f"got {tuple(token_weight.shape)}"
            )
        losses = losses * token_weight.reshape(-1)[rows].to(z.dtype)
    return reduce(losses, rows, target.shape, reduction, num_items)


def _losses(
    member: TokenLoss, ratio: Tensor, value: Tensor, beta: float, max_weight: float
) -> Tensor:
    """(5) and (6)."""
    if not member.uses_reference:
        return -member.phi_and_weight(ratio, max_weight)[0]
    phi, _ = member.phi_and_weight(beta * ratio + value, max_weight)
    return (value - phi) / beta


def _sequences(
    target: Tensor, segment_ids: Tensor | None, reduction: str
) -> tuple[Tensor, torch.Size]:
    """Number the sequences; return each position's number, flat, and the shape of all sequences."""
    T = max(target.shape[-1], 1) if target.dim() else 1
    row = torch.arange(target.numel(), device=target.device) // T
    if segment_ids is None:
        if target.dim() < 2:
            raise ValueError(
                "level='sequence' takes the rows of a (B, T) target as sequences; "
                f"a target of shape {tuple(target.shape)} needs segment_ids"
            )
        return row, target.shape[:-1]
    if reduction == "none":
        raise ValueError(
            "reduction='none' has no shape to return with segment_ids; use 'sum' or 'mean'"
        )
    if segment_ids.shape != target.shape:
        raise ValueError(
            f"segment_ids must have target's shape {tuple(target.shape)}, "
            f"got {tuple(segment_ids.shape)}"
        )
    check_ids("segment_ids", segment_ids)
    keys = torch.stack([row, segment_ids.reshape(-1).long()], dim=-1)
    segments, number = keys.unique(dim=0, return_inverse=True)
    return number, segments.shape[:1]


def _member(loss: str | TokenLoss) -> TokenLoss:
    if isinstance(loss, TokenLoss):
        return loss
    if loss not in TOKEN_LOSSES:
        raise ValueError(
            f"loss must be a TokenLoss or one of {', '.join(TOKEN_LOSSES)}, got {loss!r}"
        )
    return TOKEN_LOSSES[loss]
