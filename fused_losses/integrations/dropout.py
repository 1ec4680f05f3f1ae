"""Dropout off, wherever a model keeps it."""

from __future__ import annotations

from typing import Any

from torch import nn


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to 0, in place: modules, and numbers that its code reads.

    Attentions take ``attention_dropout`` as a number, of theirs or of their config, and never hold
    an ``nn.Dropout``. Numbers in [0, 1] whose name holds "drop" are set to 0, in the modules and in
    their configs.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        _zero(module)
        config = getattr(module, "config", None)
        if hasattr(config, "to_diff_dict"):
            _zero(config)


def _zero(holder: Any) -> None:
    for name, value in vars(holder).items():
        if "drop" in name and isinstance(value, float) and 0.0 < value <= 1.0:
            setattr(holder, name, 0.0)
