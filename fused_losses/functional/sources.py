"""Where log-probs come from, as every loss sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from fused_losses.arguments import has_data
from fused_losses.backends import Objective
from fused_losses.engine.unit_sum import UnitLoss
from fused_losses.engine.units import UnitLayout
from fused_losses.functional.observe import report_plan
from fused_losses.functional.tokens import Tokens
from fused_losses.plan import Plan
from fused_losses.stats import TokenStats

_F = TypeVar("_F", bound=Callable[..., Any])


def eager_only(reason: str) -> Callable[[_F], _F]:
    """Keep a function out of ``torch.compile``, which breaks the graph there and says why."""
    return cast("Callable[[_F], _F]", torch.compiler.disable(reason=reason))


class Source(Protocol):
    """Log-probs of tokens, by the pass that makes them.

    What is per token comes as (N,), in the order of ``tokens.y``; row results are (LINES, N).
    """

    @property
    def backend(self) -> str:
        """Resolved name of the backend."""

    def tokens(self, target: Any) -> Tokens:
        """Check labels against this source."""

    def losses(
        self,
        tokens: Tokens,
        o: Objective,
        ref: Tensor | None,
        value: Tensor | None,
        *,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return per-token losses (N,), differentiable, and row results."""

    def loss_sum(
        self,
        tokens: Tokens,
        o: Objective,
        ref: Tensor | None,
        value: Tensor | None,
        token_weight: Tensor | None,
        *,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return the reduced ``token_weight * loss``, differentiable, and row results.

        Row results may be missing, (LINES, 0), where nobody asked for the entropy.
        """

    def unit_sum(
        self,
        tokens: Tokens,
        lay_out: Callable[[], UnitLayout],
        loss_fn: UnitLoss,
        *,
        entropy: bool,
        entropy_gradient: bool = False,
        own: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of ``loss_fn`` over all units, differentiable, and row results.

        ``lay_out`` makes the units. ``loss_fn`` gets the tokens of some whole units, or all tokens
        and None where a source or a compiler takes them as they come. ``entropy_gradient`` says
        that it differentiates the entropy, which takes more; ``own`` that it is a user's.
        """

    def statistics(self, tokens: Tokens, *, entropy: bool, entropy_gradient: bool = True) -> Tensor:
        """Return row results, differentiable in logp, lse and (if wanted) entropy."""


def statistics_of(source: Source, target: Any, *, entropy: bool) -> TokenStats:
    """Log-probs, log-normaliser, entropy and top-1 of every token."""
    tokens = source.tokens(target)
    return tokens.stats(source.statistics(tokens, entropy=entropy), entropy=entropy)


def lays_out_units(tokens: Tokens) -> bool:
    """Whether units can be laid out now: their sizes are data, which tracing does not have.

    Raises:
        ValueError: The call is only being explained: without data its plan would be another one.
    """
    if torch.compiler.is_compiling():
        return False
    if not has_data(tokens.y):
        report_plan(_refuse_plan)
        return False
    return True


def _refuse_plan() -> Plan:
    raise ValueError(
        "explain needs a target with data for a loss of whole units: it plans by their sizes, "
        "which a meta or fake tensor does not tell"
    )


def wants_gradient(t: Tensor | None) -> bool:
    """Whether autograd would follow this tensor now."""
    return t is not None and t.requires_grad and torch.is_grad_enabled()
