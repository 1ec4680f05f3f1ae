"""Token losses by key: custom operators take strings, not functions."""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch

from fused_losses.backends import Objective, RowMaths
from fused_losses.token_losses import TOKEN_LOSSES, TokenLoss

_users: WeakValueDictionary[str, TokenLoss] = WeakValueDictionary()


def loss_key(loss: TokenLoss) -> str:
    """Return the key of a loss; a user's own loss stays known for as long as it lives.

    Raises:
        ValueError: A user's own loss under ``torch.compile``.
    """
    if TOKEN_LOSSES.get(loss.name) is loss:
        return loss.name
    if torch.compiler.is_compiling():
        raise ValueError(
            f"loss={loss.name!r} is a TokenLoss of your own and runs eagerly only; call it outside "
            "torch.compile (torch.compiler.disable), or use one of "
            f"{', '.join(map(repr, TOKEN_LOSSES))}"
        )
    key = f"{loss.name}@{id(loss):x}"
    _users[key] = loss
    return key


def pack(maths: RowMaths, objective: Objective | None) -> tuple[str, list[float]]:
    """Flatten the options into what an operator's schema can hold; see ``unpack``."""
    o = objective
    key = "" if o is None else loss_key(o.loss)
    constants = [0.0] * 4 if o is None else [o.beta, o.max_weight, o.label_smoothing, o.z_loss]
    return key, [maths.scale, maths.softcap or 0.0, maths.temperature, *constants]


def unpack(key: str, options: list[float]) -> tuple[RowMaths, Objective | None]:
    """Undo ``pack``."""
    scale, softcap, temperature, *constants = options
    maths = RowMaths(scale, softcap or None, temperature)
    if not key:
        return maths, None
    loss = TOKEN_LOSSES.get(key) or _users[key]
    return maths, Objective(loss, *constants)
