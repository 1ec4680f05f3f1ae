"""First derivatives only: what makes a second derivative an error instead of a wrong number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SECOND_DERIVATIVE = (
    "fused_losses: second derivatives are not implemented by the fused kernels; "
    "differentiate twice through fused_losses.reference"
)


def refuse_second_derivative(ctx: Any, *_: Any) -> Any:
    """Autograd formula of the operators that compute gradients."""
    raise RuntimeError(SECOND_DERIVATIVE)


class _OnceDifferentiable(torch.autograd.Function):
    """Identity on gradients that are tied to what they depend on, by an error."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(SECOND_DERIVATIVE)


def once_differentiable(
    gradients: Sequence[Tensor | None], anchors: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Return the gradients, tied to what they depend on.

    Under ``create_graph`` their derivative with respect to anything behind ``anchors`` raises.
    torch's own ``once_differentiable`` would not do: a gradient that forward has saved depends, as
    far as autograd can see, on nothing.
    """
    if not torch.is_grad_enabled():
        return tuple(gradients)
    return _OnceDifferentiable.apply(len(gradients), *gradients, *anchors)


def graph_is_kept() -> bool:
    """Whether the running backward was called with ``retain_graph=True``, as far as torch tells.

    What a kept graph has saved may be read again and must not be overwritten.
    """
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else ask()
