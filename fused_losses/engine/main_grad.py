"""Weights whose gradient goes to a ``main_grad``, as Megatron and its kin accumulate it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.engine.once import once_differentiable


def through_main_grad(weight: Tensor) -> Tensor:
    """Return a view of the weight whose gradient is added to ``weight.main_grad``.

    The weight itself where it has no such tensor or wants no gradient. What is promised:

    * Every backward that wants the weight's gradient, and no other, adds it to ``main_grad``, in
      that tensor's dtype; the gradient has been rounded to the weight's dtype, once, as autograd
      does it. So it is with checkpointing, with hooks on saved tensors and for a kept graph.
      ``torch.autograd.grad`` with the weight among its inputs is such a backward: what is
      returned there are zeros, or torch's error that nothing was.
    * A weight with ``grad_added_to_main_grad`` is told by True, and gets zeros for a ``grad``, so
      that the hooks of a data-parallel wrapper run; ``zero_out_wgrad`` asks for no more. Another
      weight's ``grad`` is left alone.
    * Gradients that reach the weight by another way, a tied embedding's say, are autograd's:
      ``main_grad + grad`` is the whole.
    * The attribute is read from the tensor that was given: a copy that has lost it, as reentrant
      checkpointing makes of its arguments, has a ``grad`` as usual.

    ``grad_dtype`` (an fp32 ``grad`` of a 16-bit weight) is autograd's own and needs none of this.

    Raises:
        ValueError: A ``main_grad`` of another shape.
        RuntimeError: Under ``torch.compile``.
    """
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None or not (weight.requires_grad and torch.is_grad_enabled()):
        return weight
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "linear_weight.main_grad is filled eagerly only; call the loss outside torch.compile "
            "(torch.compiler.disable), or delete main_grad and use linear_weight.grad"
        )
    if main_grad.shape != weight.shape:
        raise ValueError(
            f"linear_weight.main_grad must have the weight's shape {tuple(weight.shape)}, "
            f"got {tuple(main_grad.shape)}"
        )
    return _IntoMainGrad.apply(weight)


class _IntoMainGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        # A saved tensor comes back without its attributes where hooks have copied it.
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, dweight: Tensor | None) -> Tensor | None:
        weight = ctx.weight
        main_grad = getattr(weight, "main_grad", None)
        if dweight is None or main_grad is None:
            return dweight
        with torch.no_grad():
            main_grad.add_(dweight)
        if not hasattr(weight, "grad_added_to_main_grad"):
            return None
        weight.grad_added_to_main_grad = True
        return once_differentiable([torch.zeros_like(dweight)], [dweight])[0]
