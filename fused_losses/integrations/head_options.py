"""What a model does to the head's output before it calls it logits: read, then verified.

Models multiply the head's output (``logit_scale`` of Cohere), divide it (``logits_scaling`` of
Granite) or cap it (``final_logit_softcapping`` of Gemma). The config says how much, under a handful
of names; the model's own code says whether, by what it does to a stand-in for the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypedDict

import torch
from torch import Tensor


class HeadOptions(TypedDict, total=False):
    """Options of the linear functions that a head asks for; only what differs from the default."""

    linear_bias: Tensor
    softcap: float
    logit_scale: float


_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_SCALES: dict[str, Callable[[float], float]] = {
    "logit_scale": float,
    "output_multiplier": float,
    "lm_head_multiplier": float,
    "logits_scaling": lambda x: 1.0 / x,
}
# One name, three meanings: the first multiplies by it, the second has divided the hidden states.
_LOGITS_SCALING: dict[str, Callable[[float], float]] = {
    "hyperclovax": float,
    "minicpm3": lambda x: 1.0,
}


def options_of_config(config: Any) -> HeadOptions:
    """Read from a (text) config what happens to the head's output."""
    options = HeadOptions()
    for name in _SOFTCAPS:
        cap = _number(config, name)
        if cap is not None:
            options["softcap"] = cap
    scale = 1.0
    for name, meaning in _SCALES.items():
        given = _number(config, name)
        if given is not None:
            if name == "logits_scaling":
                meaning = _LOGITS_SCALING.get(config.model_type, meaning)
            scale *= meaning(given)
    if scale != 1.0:
        options["logit_scale"] = scale
    return options


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if value != 0 and math.isfinite(value) else None


def probe_logits(V: int, device: torch.device) -> Tensor:
    """Stand in for the logits of one position: (1, 1, V) values that show a scale and a cap."""
    return torch.linspace(-90.0, 110.0, V, device=device)[None, None]


@torch.compiler.disable
def verify(seen: Any, probe: Tensor, options: HeadOptions, model: str) -> None:
    """Raise unless the model did to the probe what the options say.

    Args:
        seen: What the model made of the probe and returned as logits.
        probe: What stood in for the head's output.
        options: What was read from the config, or given.
        model: Name of the model's class, for the message.

    Raises:
        NotImplementedError: It did something else, so that a loss with these options is wrong.
    """
    expected = probe.double() * options.get("logit_scale", 1.0)
    cap = options.get("softcap")
    if cap is not None:
        expected = cap * torch.tanh(expected / cap)
    same = isinstance(seen, Tensor) and seen.shape == probe.shape
    if same and torch.allclose(seen.double(), expected, rtol=1e-4, atol=1e-4):
        return
    read = {name: options.get(name) for name in ("logit_scale", "softcap")}
    if same:
        at = int((seen.double() - expected).abs().argmax())
        z, got, wanted = (float(t.reshape(-1)[at]) for t in (probe, seen, expected))
        what = f"a head output of {z:.4g} becomes a logit of {got:.6g}, not {wanted:.6g}"
    else:
        what = f"its logits became {getattr(seen, 'shape', type(seen).__name__)}"
    raise NotImplementedError(
        f"{model} does something else between head and logits than {read}, read from its config: "
        f"{what}. If it is softcap * tanh(logit_scale * z / softcap), say so: "
        "fuse_lm_head(model, logit_scale=..., softcap=...); if not, this head cannot be fused"
    )
