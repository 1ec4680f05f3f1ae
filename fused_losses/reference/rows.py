"""Which tokens count, and how numbers per token become a result: shared by every reference loss."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses.arguments import (
    COUNT_CURE,
    check_number,
    number,
    refuse_cut_sequences,
    refuse_gradient,
)


def counted_rows(target: Tensor, ignore_index: int, shift: bool) -> Tensor:
    """Return the flat int64 positions in target of the counted labels, ascending.

    With ``shift`` position t is scored by the logits of t - 1, so position 0 of each row has none.
    """
    counted = target != ignore_index
    if shift:
        refuse_cut_sequences("shift=True")
        if target.dim() == 0:
            raise ValueError(
                "shift=True needs a target with a sequence dimension, got a 0-d target"
            )
        counted = counted & (torch.arange(target.shape[-1], device=target.device) > 0)
    return counted.flatten().nonzero().squeeze(-1)


def counted_logits(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int,
    shift: bool,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Select the logits that count and transform them: z = softcap(scale * logits) / temperature.

    Selecting (never multiplying by a mask) is what keeps NaN of ignored rows out of loss and
    gradient.

    Args:
        logits: (..., V), any float dtype.
        target: (...), int64 or int32.
        ignore_index: Labels of this value do not count.
        shift: Score ``target[..., 1:]`` by positions ``[..., :-1]``.
        softcap: c of ``c * tanh(z / c)``, or None.
        logit_scale: Factor before the softcap.
        temperature: Divisor after it.

    Returns:
        ``(rows, z, y)``: flat positions in target (n,), logits (n, V) in float32 (float64 for
        float64), labels (n,).
    """
    if logits.dim() == 0 or logits.shape[:-1] != target.shape:
        raise ValueError(
            f"logits must be target's shape plus a vocabulary dimension: target is "
            f"{tuple(target.shape)}, logits are {tuple(logits.shape)}"
        )
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target must be int64 or int32, got {target.dtype}")
    V = logits.shape[-1]
    rows = counted_rows(target, ignore_index, shift)
    y = target.reshape(-1)[rows].long()
    _check_labels(y, rows, target, V)
    # Positions t and t - 1 of one sequence are neighbours in flat order too.
    z = logits.reshape(-1, V)[rows - int(shift)].to(compute_dtype(logits)) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return rows, z / temperature, y


def linear_logits(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    ignore_index: int,
    shift: bool,
) -> Tensor:
    """Compute ``input @ linear_weight.T + linear_bias`` for the counted positions, 0 elsewhere.

    Ignored positions stay out of the product, so NaN in their hidden states cannot reach the
    gradient of the weight as 0 * NaN.
    """
    if input.shape[:-1] != target.shape:
        raise ValueError(
            f"input must be target's shape plus a hidden dimension: target is "
            f"{tuple(target.shape)}, input is {tuple(input.shape)}"
        )
    if linear_weight.dim() != 2 or linear_weight.shape[1] != input.shape[-1]:
        raise ValueError(
            f"linear_weight must be (V, D) with D = {input.shape[-1]}, input's last dimension, "
            f"got {tuple(linear_weight.shape)}"
        )
    dtype = torch.promote_types(compute_dtype(input), compute_dtype(linear_weight))
    V, D = linear_weight.shape
    rows = counted_rows(target, ignore_index, shift) - int(shift)
    h = input.reshape(-1, D)[rows].to(dtype)
    bias = None if linear_bias is None else linear_bias.to(dtype)
    logits = F.linear(h, linear_weight.to(dtype), bias)
    return scatter(logits, rows, target.numel()).reshape(*target.shape, V)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything below."""
    if not tensor.is_floating_point():
        raise TypeError(f"expected a floating-point tensor, got {tensor.dtype}")
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def scatter(x: Tensor, positions: Tensor, size: int) -> Tensor:
    """Put the rows of x at ``positions`` of a tensor with ``size`` rows, 0 elsewhere."""
    return x.new_zeros(size, *x.shape[1:]).index_copy(0, positions, x)


def segment_sum(x: Tensor, segment: Tensor, size: int) -> Tensor:
    """Sum the entries of x that share a segment, ``out[s] = sum of x[segment == s]``."""
    return x.new_zeros(size).index_add(0, segment, x)


def select(
    name: str, argument: Tensor | float, shape: torch.Size, positions: Tensor, dtype: torch.dtype
) -> Tensor:
    """Read an argument that broadcasts to the items (tokens, sequences) where they count."""
    if not isinstance(argument, Tensor):
        argument = check_number(name, argument)
    x = torch.as_tensor(argument, dtype=dtype, device=positions.device)
    try:
        return x.expand(shape).reshape(-1)[positions]
    except RuntimeError:
        raise ValueError(
            f"{name} must broadcast to shape {tuple(shape)}, got {tuple(x.shape)}"
        ) from None


def reference_logps(ref_logps: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Check the reference log-probs and cut them from the graph; they are data."""
    if ref_logps.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"ref_logps must be float32 or float64, got {ref_logps.dtype}; compute them with "
            "token_stats, which returns float32"
        )
    if ref_logps.shape != shape:
        raise ValueError(f"ref_logps must have shape {tuple(shape)}, got {tuple(ref_logps.shape)}")
    return ref_logps.detach().to(dtype)


def check_count(name: str, count: float | Tensor | None) -> float | Tensor | None:
    """Return a divisor of a mean: a number, a tensor without gradient, or None."""
    refuse_gradient(name, count, COUNT_CURE)
    return count if count is None or isinstance(count, Tensor) else number(name, count)


def reduce(
    losses: Tensor,
    positions: Tensor,
    shape: torch.Size,
    reduction: str,
    num_items: float | Tensor | None,
) -> Tensor:
    """Reduce the losses of what counted (tokens, sequences or pairs).

    Args:
        losses: (n,), one per counted item.
        positions: (n,), where each stands among all items, flat.
        shape: The shape of all items.
        reduction: ``mean`` over the counted items, ``sum``, or ``none``: every item, 0 where it
            does not count.
        num_items: Replaces the number of counted items in the mean; 0 gives 0.

    Returns:
        A 0-d tensor, or for ``none`` a tensor of ``shape``.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    num_items = check_count("num_items", num_items)
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items needs reduction='mean', got reduction={reduction!r}")
    if reduction == "none":
        return scatter(losses, positions, math.prod(shape)).reshape(shape)
    if reduction == "sum":
        return losses.sum()
    divisor = len(losses) if num_items is None else float(num_items)
    if not divisor >= 0:
        raise ValueError(f"num_items must be a number >= 0, got {divisor}")
    # The empty sum is 0, attached to the graph, with zero gradients.
    return losses.sum() / divisor if divisor > 0 else losses[:0].sum()


def _check_labels(y: Tensor, rows: Tensor, target: Tensor, V: int) -> None:
    outside = ((y < 0) | (y >= V)).nonzero()
    if len(outside):
        first = outside[0, 0]
        position = tuple(int(i) for i in torch.unravel_index(rows[first], target.shape))
        raise IndexError(f"label {int(y[first])} at position {position} is outside [0, {V})")
