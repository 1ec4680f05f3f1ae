"""Outputs that keep what was computed, where a wrapper casts the floats that a module returns.

FSDP2 casts them to ``output_dtype`` of its mixed precision, which accelerate sets to bfloat16: a
loss of 4.8827 becomes 4.875. Losses and log-probs are float32 whatever the model computes in.
"""

from __future__ import annotations

import functools
from dataclasses import InitVar, field, make_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.utils import ModelOutput


def uncast(seen: Any, computed: Any) -> Any:
    """Return what is seen, but what was computed where that is the same in a lower precision.

    Tuples, lists, dicts and what else torch looks into are looked into.
    """
    leaves, spec = tree_flatten(seen)
    before, same = tree_flatten(computed)
    if spec != same:
        return seen
    return tree_unflatten([_uncast(*pair) for pair in zip(leaves, before, strict=True)], spec)


def _uncast(seen: Any, computed: Any) -> Any:
    if not (isinstance(seen, Tensor) and isinstance(computed, Tensor)):
        return seen
    floats = seen.is_floating_point() and computed.is_floating_point()
    lower = floats and seen.dtype.itemsize < computed.dtype.itemsize
    return computed if lower and seen.shape == computed.shape else seen


@torch.compiler.disable
def with_result(output: ModelOutput, result: Any) -> ModelOutput:
    """Return the output with the result as ``fused``, and as ``loss`` if it is a 0-d tensor."""
    loss = {"loss": result} if isinstance(result, Tensor) and result.dim() == 0 else {}
    return without_logits(output, fused=result, **loss)


def without_logits(output: ModelOutput, **given: Any) -> ModelOutput:
    """Return the output without logits and with what is given, which no cast of it lowers."""
    fields = {name: value for name, value in output.items() if name != "logits"}
    cls: Any = type(output)
    return _fused_output_of(cls)(**{**fields, **given})


@functools.cache
def _fused_output_of(cls: Any) -> type:
    def keep(self: Any, computed: tuple[Any, Any] = (None, None)) -> None:
        cls.__post_init__(self)
        # Who casts an output makes another one, of its fields and of this.
        loss, result = computed
        self.loss, self.fused = uncast(self.loss, loss), uncast(self.fused, result)
        vars(self)["computed"] = (self.loss, self.fused)

    return make_dataclass(
        f"Fused{cls.__name__}",
        [
            ("fused", Any, field(default=None)),
            ("computed", InitVar[Any], field(default=(None, None))),
        ],
        bases=(cls,),
        namespace={
            "__doc__": f"{cls.__name__} with what the function returned, as ``fused``.",
            "__post_init__": keep,
        },
    )
