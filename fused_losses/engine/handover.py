"""The last step of backward: gradients that forward made are scaled."""

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
    nothing_to_do = in_place and scale.is_cpu and float(scale) == 1.0
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
