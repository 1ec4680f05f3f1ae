"""What a policy loss may look at, and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

PerItem = Literal["sequence", "token", "max_length"]


@dataclass(frozen=True)
class PolicyOptions:
    """Checked options of a policy loss; ``parse_policy_options`` makes them."""

    loss_type: str
    ratio_level: str
    epsilon: float
    epsilon_high: float
    beta: float
    entropy_weight: float
    sampler_cap: float
    max_length: float | None


@dataclass(frozen=True)
class Rollouts:
    """Tokens of sampled sequences; what is per token has one shape, (..., T) or flat.

    Attributes:
        logps: Log-probs under the policy; 0 where nothing counts, as all that is per token.
        old_logps: Those under the policy that made the advantages; None: it is this one.
        advantages: Per token.
        lengths: (S,) counted tokens of each sequence.
        sums: Sums what is per token over each sequence: (S,).
        spread: Gives what is per sequence, (S,), to its tokens.
        options: The clip range and the like.
        counted: bool, which tokens count; None: all.
        ref_logps: Log-probs under the reference model, or None.
        kl: KL divergence to the reference, if that is known instead, or None.
        sampler_logps: Log-probs as the sampler had them, or None.
        entropy: Entropy of each prediction, or None.
    """

    logps: Tensor
    old_logps: Tensor | None
    advantages: Tensor
    lengths: Tensor
    sums: Callable[[Tensor], Tensor]
    spread: Callable[[Tensor], Tensor]
    options: PolicyOptions
    counted: Tensor | None = None
    ref_logps: Tensor | None = None
    kl: Tensor | None = None
    sampler_logps: Tensor | None = None
    entropy: Tensor | None = None

    @property
    def old(self) -> Tensor:
        """Log-probs under the old policy."""
        return self.logps.detach() if self.old_logps is None else self.old_logps

    def mean(self, x: Tensor) -> Tensor:
        """Average what is per token over each sequence, (S,); 0 for one without tokens."""
        return self.sums(x) / self.lengths.clamp(min=1)


@dataclass(frozen=True)
class Terms:
    """What there is to tell of each token; 0 and False where nothing counts.

    Attributes:
        ratios: The ratio to the old policy, of the level that was asked for.
        low: bool, clipped from below, where the advantage is negative.
        high: bool, clipped from above, where the advantage is positive.
        kl: The KL to the reference, or its estimate, or None.
    """

    ratios: Tensor
    low: Tensor
    high: Tensor
    kl: Tensor | None


@dataclass(frozen=True)
class Surrogate:
    """A policy loss.

    Args:
        fn: ``(ratios, rollouts) -> losses``, per token.
        clips: ``(ratios, rollouts) -> (low, high)``, see :class:`Terms`.
        per: What its mean counts: ``token``; ``sequence``, each the mean of its tokens;
            ``max_length``, each the sum of its tokens over a constant.
        ratio_levels: Those that it takes, its own first.
        epsilon_high: The upper bound where none is given; None: that of the lower one.
    """

    fn: Callable[[Tensor, Rollouts], Tensor]
    clips: Callable[[Tensor, Rollouts], tuple[Tensor, Tensor]]
    per: PerItem
    ratio_levels: tuple[str, ...] = ("token", "sequence", "sequence_token")
    epsilon_high: float | None = None
