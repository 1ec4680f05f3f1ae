"""Preference losses: plain torch on the log-probs of whole responses, one pair per entry.

Each loss is one small function of a ``Pairs`` and one entry of ``PAIR_LOSSES``, which also says
what it asks for. Fused DPO and the reference call the same functions, so the maths of a pair exist
once.
"""

from fused_losses.preference.loss import preference_loss, rewards, score
from fused_losses.preference.losses import PAIR_LOSSES, LossType
from fused_losses.preference.options import pair_loss, parse_pair_options, refuse_reference
from fused_losses.preference.pairs import PairLoss, PairOptions, Pairs

__all__ = [
    "PAIR_LOSSES",
    "LossType",
    "PairLoss",
    "PairOptions",
    "Pairs",
    "pair_loss",
    "parse_pair_options",
    "preference_loss",
    "refuse_reference",
    "rewards",
    "score",
]
