"""Options of pair losses: what each may be, and which loss takes it."""

from __future__ import annotations

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
    check_choice("loss_type", loss_type, get_args(LossType))
    loss = PAIR_LOSSES[loss_type]
    beta = check_number("beta", beta, low=0.0)
    label_smoothing = _smoothing(loss_type, label_smoothing, loss)
    further = {"simpo_gamma": simpo_gamma, "discopop_tau": discopop_tau}
    filled = {name: _further(name, given, loss_type, loss) for name, given in further.items()}
    return PairOptions(loss_type, beta, label_smoothing, **filled)


def refuse_reference(loss_type: str, name: str, reference: object) -> None:
    """Raise if a loss that knows no reference was given one.

    Raises:
        ValueError: A reference for a loss without one.
    """
    if PAIR_LOSSES[loss_type].reference_free and reference is not None:
        raise ValueError(
            f"loss_type={loss_type!r} has no reference: {name} must be None, or choose a loss "
            "that compares with it, such as 'sigmoid'"
        )


def _smoothing(loss_type: str, given: Any, loss: PairLoss) -> float:
    label_smoothing = check_number("label_smoothing", given)
    below = loss.smoothing_below
    if below == 0.0:
        allowed = label_smoothing == 0.0
        expected = f"0 for loss_type={loss_type!r}, which takes none"
    else:
        allowed = 0.0 <= label_smoothing < below
        if loss.needs_smoothing:
            allowed &= label_smoothing > 0.0
        bracket = "(" if loss.needs_smoothing else "["
        expected = f"in {bracket}0, {below:g}) for loss_type={loss_type!r}"
    if not allowed:
        raise ValueError(f"label_smoothing must be {expected}, got {label_smoothing}")
    return label_smoothing


def _further(name: str, given: Any, loss_type: str, loss: PairLoss) -> float:
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
