"""Token losses and options as custom operators can take them: strings and numbers, not objects."""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fused_losses.backends import Objective, RowMaths
from fused_losses.engine.captured import refuse_captured_by_token_loss
from fused_losses.token_losses import TOKEN_LOSSES, TokenLoss

_users: WeakValueDictionary[str, TokenLoss] = WeakValueDictionary()


def loss_key(loss: TokenLoss) -> str:
    """Return the key of a loss; a user's own loss stays known for as long as it lives.

    Raises:
        ValueError: A user's own loss under ``torch.compile``, or one with tensors to be trained.
    """
    if TOKEN_LOSSES.get(loss.name) is loss:
        return loss.name
    if torch.compiler.is_compiling():
        raise ValueError(
            f"loss={loss.name!r} is a TokenLoss of your own and runs eagerly only; call it outside "
            "torch.compile (torch.compiler.disable), or use one of "
            f"{', '.join(map(repr, TOKEN_LOSSES))}"
        )
    refuse_captured_by_token_loss(loss.name, loss.torch_fn)
    key = f"{loss.name}@{id(loss):x}"
    _users[key] = loss
    return key


def loss_of(key: str) -> TokenLoss | None:
    """Return the loss of a key, None of the empty one.

    A graph whose backward will need a loss holds it by this: the caller may have let go of it.
    """
    return TOKEN_LOSSES.get(key) or _users[key] if key else None


def pack(maths: RowMaths, objective: Objective | None) -> tuple[str, list[float], Tensor | None]:
    """Flatten the options into what an operator's schema can hold; see ``unpack``.

    Returns the key of the loss, and its constants: as numbers or, where they change from call to
    call of a compiled function, as a tensor (7,) on the CPU. A graph with numbers in it would be
    compiled anew for each value.
    """
    o = objective
    key = "" if o is None else loss_key(o.loss)
    constants = [0.0] * 4 if o is None else [o.beta, o.max_weight, o.label_smoothing, o.z_loss]
    constants = [maths.scale, maths.softcap or 0.0, maths.temperature, *constants]
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value

        if not all([has_static_value(c) for c in constants]):
            one = torch.ones((), dtype=torch.float64)
            return key, [], torch.stack([one * c for c in constants])
    return key, constants, None


def unpack(
    key: str, options: list[float], changing: Tensor | None
) -> tuple[RowMaths, Objective | None]:
    """Undo ``pack``."""
    scale, softcap, temperature, *constants = options if changing is None else changing.tolist()
    maths = RowMaths(scale, softcap or None, temperature)
    loss = loss_of(key)
    return maths, None if loss is None else Objective(loss, *constants)
