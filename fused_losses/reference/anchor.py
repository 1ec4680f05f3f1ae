"""Token losses of a linear head tied to a reference model: the loss, plus the weighted KL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from fused_losses.arguments import check_choice, check_number
from fused_losses.reference.divergences import divergence_loss
from fused_losses.reference.rows import linear_logits

_SHARED = (
    *("ignore_index", "shift", "softcap", "logit_scale", "temperature"),
    *("reduction", "num_items", "token_weight"),
)


def anchored(
    function: Callable[..., Tensor], logits: Tensor, target: Tensor, *args: Any, **options: Any
) -> Tensor:
    """Return ``function(logits, target, *args, **options)``, and what an anchor adds to it."""
    anchor = {name: options.pop(name) for name in list(options) if name.startswith("anchor")}
    loss = function(logits, target, *args, **options)
    weight = check_number("anchor_weight", anchor.pop("anchor_weight", 0.0), low=0.0, closed=True)
    if not weight:
        for name, given in anchor.items():
            if given is not None:
                raise ValueError(f"{name} was given and anchor_weight is 0.0")
        return loss
    if options.get("level", "token") != "token":
        raise ValueError("anchor_weight is not taken at level='sequence'")
    shared = {name: options[name] for name in _SHARED if name in options}
    return loss + weight * kl_to_reference(logits, target, **anchor, **shared)


def kl_to_reference(
    logits: Tensor,
    target: Tensor,
    *,
    anchor: Literal["forward_kl", "reverse_kl"] = "forward_kl",
    anchor_input: Tensor | None = None,
    anchor_weight_matrix: Tensor | None = None,
    anchor_bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """KL divergence to the distribution of a reference's head, whose logits transform alike.

    Args:
        logits: (..., V), the policy's.
        target: (...), int64 or int32: which positions count.
        anchor: ``forward_kl`` KL(reference || policy), or ``reverse_kl`` KL(policy || reference).
        anchor_input: (..., D') hidden states of the reference; a constant.
        anchor_weight_matrix: (V, D'), its head; a constant.
        anchor_bias: (V,), of that head.
        **options: Of the transform and the reduction, as in ``mle_loss``.

    Returns:
        As ``mle_loss``.
    """
    check_choice("anchor", anchor, ("forward_kl", "reverse_kl"))
    if anchor_input is None or anchor_weight_matrix is None:
        raise ValueError("an anchor needs anchor_input and anchor_weight_matrix")
    theirs = linear_logits(
        anchor_input.detach(),
        anchor_weight_matrix.detach(),
        target,
        None if anchor_bias is None else anchor_bias.detach(),
        options.get("ignore_index", -100),
        options.get("shift", False),
    )
    return divergence_loss(
        logits,
        theirs,
        target,
        divergence=anchor,
        teacher_softcap=options.get("softcap"),
        teacher_logit_scale=options.get("logit_scale", 1.0),
        **options,
    )
