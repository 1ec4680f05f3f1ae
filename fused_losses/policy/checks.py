"""What is per token, or per sequence, in a policy loss: refused by name where it does not fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.arguments import refuse_gradient

ADVANTAGE_CURE = "it is a constant of the loss: pass advantages.detach()"


def check_operands(
    beta: float,
    ref_logps: object,
    kl: object,
    entropy_weight: float,
    entropy: object = True,
    *,
    kl_name: str = "kl",
) -> None:
    """Raise if a term has a weight and nothing to weigh, or two things.

    Raises:
        ValueError: As above.
    """
    if ref_logps is not None and kl is not None:
        raise ValueError(
            f"ref_logps and {kl_name} were both given, and beta weighs one KL to the reference: "
            f"ref_logps has it estimated from the sampled tokens, {kl_name} is of the whole "
            "vocabulary; leave one of them out"
        )
    if beta and ref_logps is None and kl is None:
        raise ValueError(
            f"ref_logps is required by beta={beta}: log-probs of the tokens under the reference "
            f"model; or {kl_name}, for the KL of the whole vocabulary; or leave beta at 0.0"
        )
    if entropy_weight and entropy is None:
        raise ValueError(
            f"entropy is required by entropy_weight={entropy_weight}: "
            "token_stats(..., entropy=True).entropy, or leave entropy_weight at 0.0"
        )


def check_logps(name: str, t: Any, beside: Tensor, beside_name: str) -> None:
    """Raise unless t is per token, and of a dtype that can carry a ratio.

    Raises:
        TypeError: Not a tensor of floats.
        ValueError: Another shape, a dtype below float32, another device.
    """
    if not isinstance(t, Tensor) or not t.is_floating_point():
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name} must be a float32 or float64 tensor, got {got}")
    if t.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} must be float32 or float64, got {t.dtype}: its rounding would shift every "
            "ratio; keep the dtype that token_stats or linear_token_stats returns"
        )
    if t.dim() < 2:
        raise ValueError(
            f"{name} must be (..., T), sequences of tokens, got shape {tuple(t.shape)}; give one "
            "sequence as (1, T)"
        )
    if t.shape != beside.shape:
        raise ValueError(
            f"{name} must have {beside_name}'s shape {tuple(beside.shape)}, one entry per token, "
            f"got {tuple(t.shape)}; what token_stats or linear_token_stats returns for the same "
            "target and shift has it"
        )
    check_place(name, t, beside_name, beside)


def check_place(name: str, t: Any, beside_name: str, beside: Tensor) -> None:
    """Raise if t is a tensor on another device.

    Raises:
        ValueError: As above.
    """
    if isinstance(t, Tensor) and t.device != beside.device:
        raise ValueError(
            f"{name} must be on {beside_name}'s device {str(beside.device)!r}, "
            f"got {str(t.device)!r}"
        )


def expand_advantages(advantages: Any, shape: torch.Size, shape_name: str) -> Tensor:
    """Check advantages per sequence, or per token, and give each token its own.

    Raises:
        TypeError: Not a tensor of floats.
        ValueError: Another shape; they require a gradient.
    """
    if not isinstance(advantages, Tensor) or not advantages.is_floating_point():
        got = advantages.dtype if isinstance(advantages, Tensor) else type(advantages).__name__
        raise TypeError(f"advantages must be a tensor of floats, got {got}")
    refuse_gradient("advantages", advantages, ADVANTAGE_CURE)
    if advantages.shape == shape[:-1]:
        advantages = advantages[..., None].expand(shape)
    if advantages.shape != shape:
        raise ValueError(
            f"advantages must be one per sequence, {tuple(shape[:-1])}, or one per token, "
            f"{shape_name}'s shape {tuple(shape)}, got {tuple(advantages.shape)}"
        )
    return advantages.detach()


def check_mask(mask: Any, logps: Tensor) -> Tensor:
    """Return which tokens count.

    Raises:
        TypeError: Not a tensor of bools or integers.
        ValueError: Another shape, another device.
    """
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"mask must be a bool or integer tensor, got {got}; it says which tokens count and "
            "weighs none: pass mask.bool()"
        )
    if mask.shape != logps.shape:
        raise ValueError(
            f"mask must have logps's shape {tuple(logps.shape)}, got {tuple(mask.shape)}"
        )
    check_place("mask", mask, "logps", logps)
    return mask != 0
