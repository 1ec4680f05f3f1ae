"""Which of TRL's GRPO options are policy losses of this library, and which are refused."""

from __future__ import annotations

from typing import Any

import torch

import fused_losses
from fused_losses.integrations.trl.checks import check_adapters, refuse_liger

# TRL's names; luspo sums a sequence's tokens, which is dr_grpo with a constant of 1.
_ONE_PASS = {name: name for name in ("grpo", "bnpo", "dapo", "dr_grpo", "cispo")}
_ONE_PASS["luspo"] = "dr_grpo"
_TRLS_OWN = ("sapo", "vespo")


def check_grpo(given: dict[str, Any], anchor: str | None = None) -> None:
    """Raise where the policy losses cannot be what these arguments of ``GRPOTrainer`` train on.

    Raises:
        ValueError: An unknown loss or level, where TRL raises at the first step; an option out of
            its range; ``use_liger_kernel``; an ``anchor`` that nothing would read.
        NotImplementedError: An ``anchor`` beside adapters that change the base weights.
    """
    args = given.get("args")
    if anchor is not None:
        _check_anchor(given, args, anchor)
    if args is None:
        return
    refuse_liger(args)
    for name, choices in (
        ("loss_type", (*_ONE_PASS, *_TRLS_OWN)),
        ("importance_sampling_level", ("token", "sequence")),
    ):
        if getattr(args, name) not in choices:
            named = ", ".join(map(repr, choices))
            raise ValueError(f"{name} must be one of {named}, got {getattr(args, name)!r}")
    if one_policy_loss(args) is not None:
        token, one = torch.zeros(1, 1), torch.ones(1)
        high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        options = policy_loss_options(args, args.beta, args.epsilon, high)
        fused_losses.policy_loss(token, None, one, one[None].bool(), token, **options)


def _check_anchor(given: dict[str, Any], args: Any, anchor: str) -> None:
    directions = ("forward_kl", "reverse_kl")
    if anchor not in directions:
        named = ", ".join(map(repr, directions))
        raise ValueError(f"anchor must be one of {named} or None, got {anchor!r}")
    if args is None or args.beta == 0.0:
        raise ValueError(
            f"anchor={anchor!r} would not be read: beta, its weight, is 0.0 in GRPOConfig; set it, "
            "or leave anchor out"
        )
    own = _trls_own(args)
    if own is not None:
        raise ValueError(
            f"anchor={anchor!r} is not taken beside {own}, whose formula is TRL's own and weighs "
            "an estimate: change it, or leave anchor out"
        )
    check_adapters(given)


def refuse_sharded(anchor: str | None, *, sharded: bool) -> None:
    """Raise where the reference would run beside a model in pieces.

    Raises:
        ValueError: As above.
    """
    if anchor is not None and sharded:
        raise ValueError(
            f"anchor={anchor!r} runs the reference's body beside the model that FSDP or DeepSpeed "
            "shards, which is not served: leave anchor out, and beta weighs TRL's estimate"
        )


def one_policy_loss(args: Any) -> str | None:
    """Return the loss of this library that TRL's options name, or None."""
    return None if _trls_own(args) else _ONE_PASS.get(args.loss_type)


def _trls_own(args: Any) -> str | None:
    """Name an option whose formula is TRL's own, if there is one."""
    entropy = (args.entropy_coef, *((args.entropy_coef_min,) * args.use_adaptive_entropy))
    asked = {
        "loss_type": args.loss_type in _TRLS_OWN,
        "delta": args.delta is not None,
        "top_entropy_quantile": args.top_entropy_quantile < 1.0,
        "off_policy_mask_threshold": args.off_policy_mask_threshold is not None,
        "use_bias_correction_kl": args.use_bias_correction_kl and args.beta != 0.0,
        "epsilon": not 0.0 < args.epsilon < 1.0,
        "entropy_coef": min(entropy) < 0.0,
    }
    return next((f"{name}={getattr(args, name)!r}" for name, own in asked.items() if own), None)


def policy_loss_options(
    args: Any, beta: float, epsilon: float, epsilon_high: float
) -> dict[str, Any]:
    """Return those of TRL's options that a policy loss of this library reads."""
    kind = args.loss_type
    options: dict[str, Any] = {
        "loss_type": _ONE_PASS[kind],
        "ratio_level": args.importance_sampling_level,
        "beta": beta,
        "epsilon_high": epsilon_high,
    }
    if kind != "cispo":
        options["epsilon"] = epsilon
    if kind in ("dr_grpo", "luspo"):
        options["max_length"] = 1.0 if kind == "luspo" else float(args.max_completion_length)
    return options
