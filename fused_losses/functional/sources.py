"""Where log-probs come from, as every loss sees it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from fused_losses.backends import Objective
from fused_losses.functional.tokens import Tokens


class Source(Protocol):
    """Log-probs of tokens, by the pass that makes them."""

    @property
    def backend(self) -> str:
        """Resolved name of the backend."""

    def tokens(self, target: Any) -> Tokens:
        """Check labels against this source."""

    def token_loss(
        self, tokens: Tokens, o: Objective, ref: Tensor | None, value: Tensor | None, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        """Return per-token losses (N,), differentiable, and rows (LINES, N)."""

    def token_loss_sum(
        self,
        tokens: Tokens,
        o: Objective,
        ref: Tensor | None,
        value: Tensor | None,
        token_weight: Tensor | None,
        factor: Tensor,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return ``factor * sum(token_weight * loss)`` and rows (LINES, N)."""

    def statistics(self, tokens: Tokens, *, entropy: bool) -> Tensor:
        """Return rows (LINES, N), differentiable in logp, lse and entropy."""


def wants_gradient(t: Tensor | None) -> bool:
    """Whether autograd would follow this tensor now."""
    return t is not None and t.requires_grad and torch.is_grad_enabled()


def refuse_sharded(name: str, t: Tensor) -> None:
    """Raise for a DTensor: what this process holds of it is not the tensor."""
    if hasattr(t, "device_mesh"):
        raise ValueError(
            f"{name} is a DTensor, of which this process holds a shard; call the loss inside the "
            "forward of the module that FSDP has wrapped, where the weight is whole "
            "(full_tensor() outside it gives the right loss and wrong gradients)"
        )
