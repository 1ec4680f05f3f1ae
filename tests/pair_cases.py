"""Every pair loss with the options it needs, for the tests that go through all of them."""

from __future__ import annotations

from typing import Any

from fused_losses.preference import PAIR_LOSSES

# One case per loss at least; the smoothed losses twice.
CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "sigmoid, smoothed": {"label_smoothing": 0.2},
    "hinge": {},
    "ipo": {},
    "robust": {},
    "robust, smoothed": {"label_smoothing": 0.3},
    "exo_pair": {"label_smoothing": 0.1},
    "nca_pair": {},
    "sppo_hard": {},
    "aot": {},
    "aot, smoothed": {"label_smoothing": 0.2},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "discopop, wide": {"discopop_tau": 0.7},
    "sigmoid_norm": {},
    "simpo": {},
    "simpo, wide": {"simpo_gamma": 1.3},
    "cpo": {},
    "orpo": {},
}
CASES = {name: {"loss_type": name.split(",")[0], **given} for name, given in CASES.items()}


def needed(loss_type: str) -> dict[str, Any]:
    """The loss and the options without which it does not run."""
    return CASES[loss_type]


def takes_reference(loss_type: str) -> bool:
    """Whether the loss compares with a reference."""
    return not PAIR_LOSSES[loss_type].reference_free
