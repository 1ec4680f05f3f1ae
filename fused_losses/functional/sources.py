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

    def statistics(self, tokens: Tokens, *, entropy: bool, entropy_gradient: bool = True) -> Tensor:
        """Return rows (LINES, N), differentiable in logp, lse and entropy.

        ``entropy_gradient=False`` says that nobody will differentiate the entropy.
        """


def wants_gradient(t: Tensor | None) -> bool:
    """Whether autograd would follow this tensor now."""
    return t is not None and t.requires_grad and torch.is_grad_enabled()
