"""The other side of a divergence, from hidden states and a head: checked against the student's."""

from __future__ import annotations

from typing import Any

import torch

from fused_losses.arguments import refuse_gradient
from fused_losses.divergences import check_teacher
from fused_losses.engine.head import Head
from fused_losses.engine.teacher import Teacher
from fused_losses.functional.head import check_head, compute_dtype
from fused_losses.functional.linear_source import LinearSource
from fused_losses.functional.sharded import refuse_shared
from fused_losses.functional.tokens import check_device

TEACHER_CURE = (
    "it is a constant: run its model under torch.no_grad(), and pass what it holds detached"
)


def open_teacher(
    source: LinearSource, input: Any, weight: Any, bias: Any, names: tuple[str, str, str]
) -> Teacher:
    """Check hidden states (..., D'), head (V, D') and bias, by the names that they have.

    Raises:
        TypeError: Dtypes that nothing computes with.
        ValueError: Shapes or devices that do not fit, other positions or words than the student's,
            a tensor that requires a gradient.
        NotImplementedError: Ranks share the student's vocabulary.
    """
    refuse_shared(source.shard, f"a divergence ({names[0]})")
    check_head(input, weight, bias, names)
    check_device(names[0], input, "input", source.input)
    for name, t in zip(names, (input, weight, bias), strict=True):
        refuse_gradient(name, t, TEACHER_CURE)
    V, leading = source.weight.shape[0], source.input.shape[:-1]
    check_teacher(V, weight.shape[0], leading, input, names[0])
    compute = compute_dtype(input, weight)
    x, bias = input.detach(), None if bias is None else bias.detach()
    head = Head(weight.detach(), bias, compute, torch.promote_types(compute, torch.float32))
    return Teacher(x.reshape(-1, x.shape[-1]), head)
