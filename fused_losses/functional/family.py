"""One entry for every member of the family of token losses, at either level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from fused_losses.arguments import check_choice, check_max_weight, check_number
from fused_losses.backends import Objective
from fused_losses.functional.options import Level, Options, check_token_loss
from fused_losses.functional.sequence_level import run_sequence_level
from fused_losses.functional.sources import Source
from fused_losses.functional.token_level import run_token_level
from fused_losses.token_losses import TokenLoss


@dataclass(frozen=True)
class Family:
    """A member of the family with everything that is its own."""

    loss: str | TokenLoss = "mle"
    beta: float = 1.0
    value: float | Tensor = 0.0
    level: Level = "token"
    max_weight: float = 4.0
    segment_ids: Tensor | None = None

    def objective(self, options: Options, ref_logps: Any) -> Objective:
        """Check what belongs to the loss.

        Raises:
            ValueError: An option out of range, a missing reference, smoothing of a ratio loss.
        """
        loss = check_token_loss(self.loss)
        beta = check_number("beta", self.beta, low=0.0)
        max_weight = check_max_weight(self.max_weight)
        check_choice("level", self.level, get_args(Level))
        if self.level == "token" and self.segment_ids is not None:
            raise ValueError("segment_ids belongs to level='sequence', got level='token'")
        if loss.uses_reference:
            if ref_logps is None:
                raise ValueError(
                    f"ref_logps is required by loss={loss.name!r}: log-probs of the target under "
                    "the reference model, e.g. linear_token_stats(...).logps under torch.no_grad()"
                )
            if options.label_smoothing:
                raise ValueError(
                    f"label_smoothing belongs to loss='mle', loss={loss.name!r} does not take it"
                )
            return Objective(loss, beta, max_weight, 0.0, options.z_loss)
        # The reference cancels, and beta with it (6).
        return Objective(loss, 1.0, max_weight, options.label_smoothing, options.z_loss)


def run_family(
    source: Source, options: Options, target: Any, ref_logps: Any, family: Family
) -> Tensor:
    """Run a member of the family at its level."""
    o = family.objective(options, ref_logps)
    if o.loss.device_fn is None and source.backend == "triton" and family.level == "token":
        raise ValueError(
            f"loss={o.loss.name!r} has no device_fn, which backend='triton' needs; "
            "give the TokenLoss one, or use backend='torch'"
        )
    if family.level == "sequence":
        return run_sequence_level(
            source, target, ref_logps, family.value, family.segment_ids, o, options
        )
    return run_token_level(source, target, ref_logps, family.value, o, options)
