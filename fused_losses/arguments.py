"""Checks of arguments, the same for the fused functions, the pair losses and the specification."""

from __future__ import annotations

import math
import numbers
import sys
import warnings
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

_LARGEST = sys.float_info.max
_PARTS = (
    "give token losses the parts, with labels that were shifted before they were cut, shift=False "
    "and num_items of all processes; of whole sequences or pairs first sum linear_token_stats of "
    "the parts over the processes (docs/distributed.md)"
)
COUNT_CURE = "it is a count: pass it detached"
WEIGHT_CURE = (
    "use reduction='none', where it gets one, and reduce the losses yourself, or pass "
    "token_weight.detach()"
)


def plain(value: Any) -> Any:
    """Turn scalars of other libraries (numpy's, fractions) into Python's; leave all else alone."""
    if value is None or isinstance(value, (bool, int, float, str, Tensor)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def number(name: str, value: Any) -> float:
    """Return the number as Python's own.

    Raises:
        TypeError: Not a number; tensors are none, as no gradient would reach them.
    """
    value = plain(value)
    if isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a number, got a Tensor; it is a constant of the call, which no "
            f"gradient reaches: pass {name}.item()"
        )
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return value


def check_number(
    name: str,
    value: Any,
    *,
    low: float = -_LARGEST,
    high: float = _LARGEST,
    closed: bool = False,
) -> float:
    """Return the number; low < value < high, or <= if ``closed``; always finite.

    Raises:
        TypeError: Not a number.
        ValueError: Out of range, or not finite.
    """
    value = number(name, value)
    # Neither isfinite nor inf tells anything of a number that changes under torch.compile; NaN is
    # nowhere inside.
    if not (low <= value <= high if closed else low < value < high):
        lower = "" if low == -_LARGEST else f" {'>=' if closed else '>'} {low:g}"
        upper = "" if high == _LARGEST else f" and {'<=' if closed else '<'} {high:g}"
        raise ValueError(f"{name} must be a finite number{lower}{upper}, got {value}")
    return value


def check_max_weight(max_weight: Any) -> float:
    """Return a number > 1; inf is phi without a continuation."""
    if isinstance(max_weight, float) and max_weight == math.inf:
        return max_weight
    return check_number("max_weight", max_weight, low=1.0)


def check_flag(name: str, value: Any) -> None:
    """Raise unless the value is a bool: 2 or "no" would count as True, and mean something else.

    Raises:
        TypeError: Anything else, 0, 1 and numpy's bools among it.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__})")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise, naming the choices, unless the value is one of them."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_ids(name: str, t: Any) -> None:
    """Raise unless t is a tensor of integers."""
    integers = isinstance(t, Tensor) and not (t.is_floating_point() or t.is_complex())
    if not integers or t.dtype == torch.bool:
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name} must be an integer tensor of target's shape, got {got}")


def expand_units(units: Any, shape: torch.Size) -> Tensor:
    """Return the unit of each token, from that of each token or of each sequence (..., T).

    Raises:
        TypeError: Not a tensor of integers.
        ValueError: Another shape.
    """
    check_ids("units", units)
    if len(shape) > 1 and units.shape == shape[:-1]:
        return units[..., None].expand(shape)
    if units.shape != shape:
        per_sequence = f", or {tuple(shape[:-1])} for the unit of each sequence" * (len(shape) > 1)
        raise ValueError(
            f"units must have target's shape {tuple(shape)} for the unit of each token"
            f"{per_sequence}, got {tuple(units.shape)}; expand it, e.g. units.expand(target.shape)"
        )
    return units


def refuse_gradient(name: str, value: Any, cure: str) -> None:
    """Raise if autograd would expect a gradient of an argument that gets none.

    Raises:
        ValueError: A tensor that requires a gradient, while gradients are recorded.
    """
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient and would get none; {cure}")


def has_data(t: Tensor) -> bool:
    """Whether there are numbers to look at: not on the meta device, nor in a fake tensor."""
    return not (t.is_meta or isinstance(t, FakeTensor))


def refuse_unserved(name: str, t: Any, *, batched: bool = False) -> None:
    """Raise for tensors that would give wrong numbers: shards, and those of torch.func.

    ``batched`` says that this argument may be one that ``torch.func.vmap`` runs over.

    Raises:
        RuntimeError: A tensor that a transform of ``torch.func`` or forward mode follows.
        ValueError: A DTensor.
    """
    if torch.compiler.is_compiling() or not isinstance(t, Tensor):
        return
    if forward_ad.unpack_dual(t).tangent is not None:
        raise RuntimeError(
            f"{name} carries a forward-mode tangent, which the fused kernels do not propagate; "
            "use reverse mode, or fused_losses.reference"
        )
    if functorch.is_gradtrackingtensor(t):
        raise RuntimeError(
            f"{name} is followed by a transform of torch.func (grad, vjp, jacrev ...), which the "
            "fused kernels do not take part in; use torch.autograd.grad, or fused_losses.reference"
        )
    if functorch.is_batchedtensor(t) and not batched:
        raise RuntimeError(
            f"{name} is batched by torch.func.vmap, under which it would get no gradient; give the "
            "batch as leading dimensions, or use fused_losses.reference"
        )
    if is_dtensor(t):
        placements: Any = getattr(t, "placements", "")
        if placements and all(p.is_replicate() for p in placements):
            raise ValueError(
                f"{name} is a DTensor that every rank holds whole; pass {name}.to_local()"
            )
        raise ValueError(
            f"{name} is a DTensor {placements}, of which this process holds a part. If it is "
            "FSDP's, call the loss inside the forward of the module that FSDP has wrapped, where "
            "the weight is whole (full_tensor() outside it gives the right loss and wrong "
            "gradients). Tensor parallel, a head may be Shard(0), and logits Shard(-1), on a 1-D "
            f"mesh; all else must be whole: {name}.redistribute(placements=[Replicate()]). Of "
            f"positions that were cut, {_PARTS}"
        )


def refuse_cut_sequences(name: str) -> None:
    """Raise inside torch's ``context_parallel``, where a process holds a part of each sequence.

    There the parts are plain tensors; that attention is another function gives it away.

    Args:
        name: What reads neighbouring positions, or whole sequences.

    Raises:
        ValueError: With the cure.
    """
    if torch.compiler.is_compiling():
        return
    attention: Any = torch.nn.functional.scaled_dot_product_attention
    if "context_parallel" in (getattr(attention, "__module__", None) or ""):
        raise ValueError(
            f"{name} inside torch's context_parallel, where a process holds a part of each "
            f"sequence and not its neighbours': {_PARTS}"
        )


def is_dtensor(t: Any) -> bool:
    """Whether it is a DTensor, told without an import of what makes them."""
    return isinstance(t, Tensor) and hasattr(t, "device_mesh")


def check_num_items(name: str, num_items: Any, reduction: str) -> None:
    """Raise unless it is None, or a divisor for ``reduction="mean"``."""
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f"{name} replaces the divisor of reduction='mean', got {reduction!r}")
    if isinstance(num_items, Tensor):
        if num_items.dim() != 0:
            raise ValueError(
                f"{name} must be a number or a 0-d tensor, got shape {tuple(num_items.shape)}"
            )
        refuse_gradient(name, num_items, COUNT_CURE)
        if torch.compiler.is_compiling() or num_items.device.type != "cpu":
            return  # looking at it would synchronise
        if not has_data(num_items):
            return
        num_items = num_items.item()
    check_number(name, num_items, low=0.0, closed=True)


def warn_of_empty(name: str, lengths: Tensor, meaning: str, stacklevel: int = 4) -> None:
    """Warn of rows of an argument without a counted token, where looking synchronises nothing.

    Args:
        name: The argument.
        lengths: Counted tokens of each row.
        meaning: What becomes of such rows.
        stacklevel: Frames up to the user's call, this function's being the first.
    """
    if lengths.device.type != "cpu" or torch.compiler.is_compiling() or not has_data(lengths):
        return
    if not lengths.all():
        rows = (lengths.reshape(-1) == 0).nonzero()[:, 0].tolist()
        message = f"{name} rows {rows[:8]} have no counted token: {meaning}"
        warnings.warn(message, stacklevel=stacklevel)
