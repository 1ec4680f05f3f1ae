"""What a pair loss may look at, and what it may ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PairOptions:
    """Checked options of a pair loss; ``parse_pair_options`` makes them."""

    loss_type: str | Mapping[str, float]
    beta: float
    label_smoothing: float
    simpo_gamma: float
    discopop_tau: float


@dataclass(frozen=True)
class Pairs:
    """Pairs of responses; all tensors are (B,).

    Attributes:
        chosen: l_w, the log-ratio policy / reference of the chosen response, summed over its
            tokens, nats; the log-prob itself where there is no reference.
        rejected: l_l, the same of the rejected response.
        options: beta and the like.
        chosen_lengths: Counted tokens; 0 counts as 1. None where the loss does not need them.
        rejected_lengths: The same of the rejected response.
        reference_margin: Log-prob of the chosen minus that of the rejected response under the
            reference, a constant; None where there is no reference or nobody looks at it.
        present: bool, which pairs have a counted token; None: all.
    """

    chosen: Tensor
    rejected: Tensor
    options: PairOptions
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None
    reference_margin: Tensor | None = None
    present: Tensor | None = None

    @property
    def rewards(self) -> tuple[Tensor, Tensor]:
        """Beta l_w and beta l_l (12)."""
        return self.options.beta * self.chosen, self.options.beta * self.rejected

    @property
    def margin(self) -> Tensor:
        """M = beta Delta, the difference of the two rewards."""
        return self.options.beta * (self.chosen - self.rejected)

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """l_w / n_w and l_l / n_l: per token of each response."""
        return _mean(self.chosen, self.chosen_lengths), _mean(self.rejected, self.rejected_lengths)


@dataclass(frozen=True)
class PairLoss:
    """A pair loss and what it asks for.

    Args:
        fn: ``Pairs -> (B,)`` losses, entry i of pair i.
        smoothing_below: label_smoothing must lie in [0, smoothing_below). 0.0: it takes none.
        needs_smoothing: label_smoothing must not be 0 either.
        needs_lengths: The lengths of both responses must be given.
        reference_free: A reference is refused.
        whole_batch: A pair's loss depends on the other pairs of the batch, and on
            ``reference_margin``.
        mean_rewards: Its rewards are beta times the log-prob per token, not per response.
        takes: Names of the further options of :class:`PairOptions` that it reads.
    """

    fn: Callable[[Pairs], Tensor]
    smoothing_below: float = 0.0
    needs_smoothing: bool = False
    needs_lengths: bool = False
    reference_free: bool = False
    whole_batch: bool = False
    mean_rewards: bool = False
    takes: tuple[str, ...] = ()


def _mean(total: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        raise ValueError("this pair loss divides by the lengths of the responses; give both")
    return total / lengths.detach().clamp(min=1)
