"""The last step of backward: gradients that forward made are scaled and handed over."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_losses.engine.once import graph_is_kept


def scale_saved(
    gradients: Sequence[Tensor | None], owners: Sequence[Tensor | None], scale: Tensor
) -> list[Tensor | None]:
    """Multiply saved gradients by the upstream one, 0-d, and give them their owners' dtypes."""
    plain = all(t is None or type(t) is Tensor for t in gradients)
    # In place where nobody can ask again: the gradient of a head is too large to hold twice.
    in_place = plain and not graph_is_kept()
    # Looking at it costs a GPU a synchronisation.
    nothing_to_do = in_place and scale.is_cpu and bool(scale == 1.0)
    scaled: list[Tensor | None] = []
    with torch.no_grad():
        for gradient, owner in zip(gradients, owners, strict=True):
            if gradient is None or owner is None:
                scaled.append(None)
            elif gradient.dtype != owner.dtype or not in_place:
                scaled.append((gradient * scale).to(owner.dtype))
            else:
                scaled.append(gradient if nothing_to_do else gradient.mul_(scale))
    return scaled


def hand_over(weight: Tensor, gradient: Tensor | None) -> Tensor | None:
    """Add a weight's gradient to its ``main_grad``, if it has one; else return it for autograd.

    ``main_grad`` is what Megatron and its kin accumulate micro-batches in, usually fp32. A weight
    that also has ``grad_added_to_main_grad`` is told, and autograd gets a tensor of its shape that
    nobody reads, so that the hooks of a data-parallel wrapper run.
    """
    main_grad = getattr(weight, "main_grad", None)
    if gradient is None or not isinstance(main_grad, Tensor):
        return gradient
    if main_grad.shape != gradient.shape:
        raise ValueError(
            f"linear_weight.main_grad must have the weight's shape {tuple(gradient.shape)}, "
            f"got {tuple(main_grad.shape)}"
        )
    with torch.no_grad():
        main_grad.add_(gradient)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)
