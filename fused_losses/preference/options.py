"""Options of pair losses: what each may be, and which loss takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from fused_losses.arguments import check_choice, check_number
from fused_losses.preference.losses import PAIR_LOSSES, LossType
from fused_losses.preference.pairs import PairLoss, PairOptions


@dataclass(frozen=True)
class _Further:
    """An option that belongs to few losses."""

    default: float
    zero_allowed: bool


_FURTHER = {"simpo_gamma": _Further(0.5, True), "discopop_tau": _Further(0.05, False)}


def parse_pair_options(
    loss_type: Any, beta: Any, label_smoothing: Any, simpo_gamma: Any, discopop_tau: Any
) -> PairOptions:
    """Check the options of a pair loss and fill in what was left to the loss.

    Raises:
        TypeError: An option that must be a number is none.
        ValueError: An unknown loss, an option out of range or of another loss.
    """
    loss = pair_loss(loss_type)
    beta = check_number("beta", beta, low=0.0)
    label_smoothing = _smoothing(loss_type, label_smoothing, loss)
    further = {"simpo_gamma": simpo_gamma, "discopop_tau": discopop_tau}
    filled = {name: _further(name, given, loss_type, loss) for name, given in further.items()}
    return PairOptions(loss_type, beta, label_smoothing, **filled)


def pair_loss(loss_type: Any) -> PairLoss:
    """Return the pair loss of a name, or the weighted sum of several.

    Raises:
        TypeError: A weight is no number.
        ValueError: An unknown loss; losses with a reference beside losses that know none.
    """
    if not isinstance(loss_type, Mapping):
        check_choice("loss_type", loss_type, get_args(LossType))
        return PAIR_LOSSES[loss_type]
    if not loss_type:
        raise ValueError("loss_type names no loss; give at least one, {'sigmoid': 1.0}")
    for name, weight in loss_type.items():
        check_choice("loss_type", name, get_args(LossType))
        check_number(f"loss_type[{name!r}]", weight, low=0.0, closed=True)
    losses = [PAIR_LOSSES[name] for name in loss_type]
    if len({loss.reference_free for loss in losses}) > 1:
        raise ValueError(
            f"loss_type={dict(loss_type)}: losses that compare with a reference cannot be added "
            "to losses that know none; choose of one kind"
        )
    below = [loss.smoothing_below for loss in losses if loss.smoothing_below]
    weighted = list(zip(losses, loss_type.values(), strict=True))
    return PairLoss(
        lambda pairs: sum(weight * loss.fn(pairs) for loss, weight in weighted),
        smoothing_below=min(below) if below else 0.0,
        needs_smoothing=any(loss.needs_smoothing for loss in losses),
        needs_lengths=any(loss.needs_lengths for loss in losses),
        reference_free=losses[0].reference_free,
        whole_batch=any(loss.whole_batch for loss in losses),
        mean_rewards=all(loss.mean_rewards for loss in losses),
        takes=tuple(name for loss in losses for name in loss.takes),
    )


def refuse_reference(loss_type: Any, name: str, reference: object) -> None:
    """Raise if a loss that knows no reference was given one.

    Raises:
        ValueError: A reference for a loss without one.
    """
    if pair_loss(loss_type).reference_free and reference is not None:
        raise ValueError(
            f"loss_type={loss_type!r} has no reference: {name} must be None, or choose a loss "
            "that compares with it, such as 'sigmoid'"
        )


def _smoothing(loss_type: Any, given: Any, loss: PairLoss) -> float:
    label_smoothing = check_number("label_smoothing", given)
    below = loss.smoothing_below
    # Names alone: torch.compile writes no weights.
    of = loss_type if isinstance(loss_type, str) else list(loss_type)
    if below == 0.0:
        allowed = label_smoothing == 0.0
        expected = f"0 for loss_type={of!r}, which takes none"
    else:
        allowed = 0.0 <= label_smoothing < below
        if loss.needs_smoothing:
            allowed &= label_smoothing > 0.0
        bracket = "(" if loss.needs_smoothing else "["
        expected = f"in {bracket}0, {below:g}) for loss_type={of!r}"
    if not allowed:
        raise ValueError(f"label_smoothing must be {expected}, got {label_smoothing}")
    return label_smoothing


def _further(name: str, given: Any, loss_type: Any, loss: PairLoss) -> float:
    option = _FURTHER[name]
    if given is None:
        return option.default
    if name not in loss.takes:
        owners = " and ".join(
            repr(key) for key, other in PAIR_LOSSES.items() if name in other.takes
        )
        raise ValueError(
            f"{name} belongs to loss_type={owners}; leave it None for {loss_type!r}, got {given}"
        )
    return float(check_number(name, given, low=0.0, closed=option.zero_allowed))
