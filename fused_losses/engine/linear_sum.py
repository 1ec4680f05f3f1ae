"""A weighted sum of token losses from hidden states, its gradients included, as an operator.

A token's weight is known as soon as its row is, so each chunk's logits are made once, used for loss
and gradients, and forgotten.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.engine.chunks import Chunk
from fused_losses.engine.linear_call import (
    deferred,
    open_call,
    or_empty,
    run_row_pass,
    sum_gradients,
)
from fused_losses.engine.once import graph_is_kept, once_differentiable
from fused_losses.engine.registry import unpack
from fused_losses.engine.rows import lines, new_rows
from fused_losses.plan import Route


@torch.library.custom_op("fused_losses::linear_loss_sum", mutates_args=())
def linear_loss_sum(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    ref: Tensor | None,
    value: Tensor | None,
    token_weight: Tensor | None,
    factor: Tensor,
    loss: str,
    options: list[float],
    ignore_index: int,
    entropy: bool,
    compute_dtype: torch.dtype,
    logits_dtype: torch.dtype,
    accum_dtype: torch.dtype,
    budget: int,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ``factor * sum(token_weight * loss)``, rows (LINES, N), and dx, dw, db, dvalue.

    ``x`` (N, D), ``w`` (V, D), ``y`` (N,), ``factor`` 0-d; ``needs`` says which of dx, dw, db to
    make. Only the sum is differentiable.
    """
    dtypes = (compute_dtype, logits_dtype, accum_dtype)
    _, objective = unpack(loss, options)
    route: Route = "token" if any(needs) else "forward"
    call = open_call(
        x, w, bias, y, options, ignore_index, dtypes, budget, backend,
        route=route, needs=needs, entropy=entropy,
        label_smoothing=0.0 if objective is None else objective.label_smoothing,
    )  # fmt: skip
    dtype = call.rows.dtype
    weight = _row_weight(token_weight, factor, y, dtype)
    wait = deferred(compute_dtype)
    in_row = _row_weight(token_weight, torch.ones_like(factor), y, dtype) if wait else weight

    def row_pass(chunk: Chunk) -> None:
        run_row_pass(
            chunk,
            objective,
            in_row if any(needs) else None,
            ref=ref,
            value=value,
            entropy=entropy,
            top1=entropy,
        )

    with torch.autocast(x.device.type, enabled=False):
        if any(needs):
            sums = sum_gradients(call, needs, accum_dtype, row_pass)
            dx, (dw, db) = sums.dx, sums.head_gradients(w, bias)
        else:
            dx = dw = db = None
            for chunk in call:
                row_pass(chunk)
    rows = call.rows
    total = (weight * rows[lines.LOSS]).sum()
    dvalue = None
    if value is not None and objective is not None:
        dvalue = (1.0 + rows[lines.DLOGP]) / objective.beta
        dvalue = torch.where(y == ignore_index, 0.0, in_row * dvalue).to(value.dtype)
    dx, dw, db, dvalue = (or_empty(t, rows) for t in (dx, dw, db, dvalue))
    return total, rows, dx, dw, db, dvalue


def _row_weight(
    token_weight: Tensor | None, factor: Tensor, y: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the weight of each row's loss, (N,)."""
    factor = factor.to(dtype)
    return factor.expand(y.shape) if token_weight is None else token_weight.to(dtype) * factor


@linear_loss_sum.register_fake
def _(x, w, bias, y, ref, value, token_weight, factor, loss, options, ignore_index, entropy,
      compute_dtype, logits_dtype, accum_dtype, budget, backend, needs):  # fmt: skip
    rows = new_rows(y, logits_dtype)
    waiting = torch.float32 if deferred(compute_dtype) else None
    gradients = (
        torch.empty_like(t, dtype=waiting, memory_format=torch.contiguous_format) if need else None
        for t, need in zip((x, w, bias), needs, strict=True)
    )
    dvalue = None if value is None else torch.empty_like(value)
    return rows.new_empty(()), rows, *(or_empty(t, rows) for t in (*gradients, dvalue))


def _setup_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (
        x,
        w,
        bias,
        _y,
        _ref,
        value,
        _tw,
        factor,
        *_,
        compute_dtype,
        _logits,
        _accum,
        _budget,
        _backend,
        needs,
    ) = inputs
    ctx.save_for_backward(x, w, bias, value, factor, *output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.needs, ctx.deferred = needs, deferred(compute_dtype)


def _backward_sum(ctx: Any, dtotal: Tensor | None, *_: Any) -> tuple[Any, ...]:
    x, w, bias, value, factor, *gradients = ctx.saved_tensors
    none = (None,) * 18
    if dtotal is None:
        return none
    own = (x, w, bias, value)
    wanted = [*ctx.needs, ctx.needs_input_grad[5]]
    with torch.no_grad():
        scale = dtotal * factor if ctx.deferred else dtotal
        # In place where nobody can ask again: the gradient of a head is too large to hold twice.
        in_place = type(gradients[0]) is Tensor and not graph_is_kept()
        scaled: list[Tensor | None] = []
        for t, gradient, want in zip(own, gradients, wanted, strict=True):
            if not want or t is None:
                scaled.append(None)
            elif in_place and gradient.dtype == t.dtype:
                scaled.append(gradient.mul_(scale))
            else:
                scaled.append((gradient * scale).to(t.dtype))
    dx, dw, db, dvalue = once_differentiable(scaled, [dtotal, x, w, bias, value])
    return (dx, dw, db, None, None, dvalue, *none[6:])


linear_loss_sum.register_autograd(_backward_sum, setup_context=_setup_sum)
