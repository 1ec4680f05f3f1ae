"""What a token loss is: phi and its derivative, on a device and in torch (objectives, eqs. 4-7).

The engine turns any member of the family into loss and gradients with one number per token, the
weight w(r) = phi'(r). So a member is two small elementwise functions and the point where its
continuation begins; kernels, chunking, reductions and autograd are written once, elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_losses_kernels.language import refuse_numbers

PhiAndWeight = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class TokenLoss:
    """A member of the family, ``loss = (value - phi(r)) / beta``.

    ``r = beta * (logp - ref_logp) + value`` (5)-(7). ``phi`` is concave with ``phi(0) = 0`` and
    ``phi'(0) = 1``, so that the gradient at policy = reference, and the limit beta -> 0, are those
    of MLE. A reweighted likelihood (dft) has a weight that is no derivative: ``torch_fn`` then cuts
    it from the graph, so that autograd sees the weight and nothing else.

    Args:
        name: Appears in error messages, in ``explain`` and in kernel names.
        device_fn: A ``@triton.jit`` function ``r -> (phi(r), phi'(r))`` on a block of fp32 or fp64
            values; its module must import ``triton.language``. A number that it reads from outside,
            a module's or an enclosing function's, has to be a constant to the compiler:
            ``scale = tl.constexpr(0.5)``. None: no Triton backend.
        torch_fn: The same in torch, ``Tensor -> (Tensor, Tensor)``, with a differentiable ``phi``.
        r0: Maps ``max_weight`` G > 1 to the point where ``phi'(r0) = G``. Below it phi goes on
            along its tangent (slope G), which keeps loss and weight finite. ``r0(math.inf)`` is the
            left end of phi's domain. None: phi needs no continuation.
        uses_reference: False where the reference log-probs and ``value`` cancel (mle), or there are
            none (dft): then r = logp, and what is given of them is not read.

    Raises:
        TypeError: ``device_fn`` reads a Python number from outside that is no ``tl.constexpr``.
    """

    name: str
    device_fn: Any
    torch_fn: PhiAndWeight
    r0: Callable[[float], float] | None = None
    uses_reference: bool = True

    def __post_init__(self) -> None:
        refuse_numbers(self.device_fn, f"loss {self.name!r}")

    def left_end(self, max_weight: float) -> float:
        """Return where the continuation begins, -inf if there is none."""
        return -math.inf if self.r0 is None else self.r0(max_weight)

    def phi_and_weight(self, r: Tensor, max_weight: float) -> tuple[Tensor, Tensor]:
        """Evaluate phi and phi', continuation included, in torch.

        Args:
            r: Implicit rewards (5), any shape, fp32 or fp64.
            max_weight: Cap G of the weight.

        Returns:
            ``(phi, weight)``, both of r's shape and dtype.
        """
        r0 = self.left_end(max_weight)
        if r0 == -math.inf:
            return self.torch_fn(r)
        # A tensor: torch.compile would begin anew for each number.
        end = r.new_ones(()) * r0
        # Clamp the argument first: a where around a pole would give NaN gradients under autograd.
        phi, weight = self.torch_fn(torch.where(r < end, end, r))
        return phi + weight * torch.where(r < end, r - end, 0.0), weight
