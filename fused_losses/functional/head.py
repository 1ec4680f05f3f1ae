"""What hidden states and a head must be, a student's or a teacher's, and what computes on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fused_losses.arguments import has_data, refuse_unserved
from fused_losses.functional.tokens import check_device, check_float


def compute_dtype(input: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of a product over a head, autocast's where there is one."""
    device = input.device.type
    # The meta device has no autocast to ask for.
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        # Autocast never lowers fp64.
        if torch.float64 not in (input.dtype, weight.dtype):
            return _servable(dtype, device)
    return _servable(torch.promote_types(input.dtype, weight.dtype), device)


def _servable(dtype: torch.dtype, device: str) -> torch.dtype:
    # fp16 products on a CPU are emulated, 50x slower than fp32's.
    return torch.float32 if dtype == torch.float16 and device == "cpu" else dtype


# What FSDP1 and ZeRO-3 leave of a weight between calls: something flat, empty or freed.
_PART = (
    "if FSDP1 keeps the rest, call the loss inside the forward of the module that it has wrapped "
    "(fuse_lm_head), where the weight is whole; if DeepSpeed's ZeRO-3 does, use FSDP2 or ZeRO-2"
)
_HEAD = ("input", "linear_weight", "linear_bias")


def chosen_dtypes(
    linear: Mapping[str, Any], compute: torch.dtype, *, precise: bool
) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes of logits and of the head's summed gradient that a call asks for.

    Raises:
        ValueError: Others than the compute dtype and those that it is summed in.
    """
    logits_dtype = linear.get("logits_dtype")
    if logits_dtype is None:
        logits_dtype = torch.promote_types(compute, torch.float32) if precise else compute
    elif logits_dtype not in (compute, torch.promote_types(compute, torch.float32)):
        raise ValueError(
            f"logits_dtype must be the compute dtype {compute} or float32 for 16-bit operands, "
            f"got {logits_dtype}"
        )
    accum_dtype = linear.get("accum_dtype", torch.float32)
    if accum_dtype not in (torch.float32, torch.float64, compute):
        raise ValueError(
            f"accum_dtype must be torch.float32, torch.float64 or the compute dtype {compute}, "
            f"got {accum_dtype}"
        )
    return logits_dtype, accum_dtype


def check_head(
    input: Any,
    weight: Any,
    bias: Any,
    names: tuple[str, str, str] = _HEAD,
    *,
    shared: bool = False,
) -> None:
    """Raise, by the names of the three, unless they are hidden states and a head that fit.

    ``shared``: how many rows this rank holds is compared with the others, which all raise then.

    Raises:
        TypeError: Dtypes that nothing computes with.
        ValueError: Shapes or devices that do not fit, an empty head, a sharded weight.
    """
    x, w, b = names
    named = {x: input, w: weight} if bias is None else {x: input, w: weight, b: bias}
    for name, t in named.items():
        check_float(name, t)
        refuse_unserved(name, t)
        check_device(name, t, x, input)
    if weight.dim() != 2:
        raise ValueError(f"{w} must be (V, D), got {tuple(weight.shape)}; {_PART}")
    V, D = weight.shape
    if V == 0 and not shared:
        raise ValueError(f"{w} has 0 rows; gather it first (a sharded head?): {_PART}")
    if _is_freed(weight):
        raise ValueError(f"{w} has shape {tuple(weight.shape)} and no memory; {_PART}")
    if input.dim() < 1 or input.shape[-1] != D:
        raise ValueError(
            f"{x} must be (..., D) with {w}'s hidden size D = {D} ({w} is "
            f"(V, D) = {(V, D)}), got {x} of shape {tuple(input.shape)}"
        )
    if bias is not None and bias.shape != (V,) and not shared:
        raise ValueError(f"{b} must be (V,) = ({V},), got {tuple(bias.shape)}")


def _is_freed(weight: Tensor) -> bool:
    """Whether the memory of a weight was taken away, as FSDP1 does between forward passes."""
    if torch.compiler.is_compiling() or not has_data(weight) or weight.numel() == 0:
        return False
    return type(weight) in (Tensor, torch.nn.Parameter) and weight.untyped_storage().size() == 0
