"""Per-token results from hidden states, for any use of them by autograd, as operators.

The upstream gradient is known only in backward, which scales the gradients of the log-probs that
forward kept (head frozen) or makes the logits again (head trained).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.engine.linear_call import deferred, linear_shape, open_call, or_empty
from fused_losses.engine.once import refuse_second_derivative
from fused_losses.engine.registry import loss_of, unpack
from fused_losses.engine.rows import coefficients, lines, new_rows
from fused_losses.engine.tiles import blocks_of, hidden_gradient, recompute
from fused_losses.plan import Route


@torch.library.custom_op("fused_losses::linear_rows", mutates_args=())
def linear_rows(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    ref: Tensor | None,
    value: Tensor | None,
    changing: Tensor | None,
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
    keep_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the per-token loss (N,), rows (LINES, N) and, if kept, -d logp / d x (N, D).

    With ``loss=""`` the rows (logp, lse, entropy) are differentiable and the loss is 0; else the
    loss is. ``keep_dx`` says that the head is frozen and backward will scale what is kept.
    """
    dtypes = (compute_dtype, logits_dtype, accum_dtype)
    maths, objective = unpack(loss, options, changing)
    shape = linear_shape(w, maths, dtypes, backend, [keep_dx, False, False], entropy=entropy)
    route: Route = "frozen" if keep_dx else "forward"
    call = open_call(x, w, bias, y, maths, ignore_index, dtypes, budget, shape, [route])
    kept = call.rows.new_empty(0)
    if keep_dx:
        # Dropped rows are multiplied by 0: they must not be NaN.
        make = torch.empty if call.positions is None else torch.zeros
        kept = make(x.shape, dtype=call.rows.dtype, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        row_options = dict(objective=objective, ref=ref, value=value, entropy=entropy)
        for block in blocks_of(call, keep=keep_dx, top1=entropy or not loss, **row_options):
            if block.kept is not None:
                kept[block.at] = block.kept
    return call.rows[lines.LOSS].clone(), call.rows, kept


@linear_rows.register_fake
def _(x, w, bias, y, ref, value, changing, loss, options, ignore_index, entropy, compute_dtype,
      logits_dtype, accum_dtype, budget, backend, needs, keep_dx):  # fmt: skip
    rows = new_rows(y, logits_dtype)
    return rows.new_empty(y.shape), rows, rows.new_empty(x.shape if keep_dx else (0,))


@torch.library.custom_op("fused_losses::linear_rows_gradient", mutates_args=())
def linear_rows_gradient(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    rows: Tensor,
    kept_dx: Tensor,
    value: Tensor | None,
    changing: Tensor | None,
    dloss: Tensor | None,
    drows: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dw, db and dvalue, each empty if it is not needed."""
    dtypes = (compute_dtype, logits_dtype, accum_dtype)
    maths, objective = unpack(loss, options, changing)
    c, per_row = coefficients(y, rows, dloss, drows, objective, ignore_index, entropy)
    dvalue = None if value is None else per_row.to(value.dtype)
    dx = dw = db = None
    with torch.autocast(x.device.type, enabled=False):
        if needs[0] and kept_dx.numel():
            counted = c.map(lambda t: torch.where(y == ignore_index, 0.0, t))
            # A kept graph may ask again.
            dx = hidden_gradient(kept_dx.clone(), y, rows, counted, w, maths).to(x.dtype)
        elif any(needs):
            shape = linear_shape(
                w, maths, dtypes, backend, needs, entropy=entropy, entropy_gradient=entropy
            )
            call = open_call(
                x, w, bias, y, maths, ignore_index, dtypes, budget, shape, ["recompute"]
            )
            # Upstream gradients hold 1 / count: bring them near 1 while dz is fp16.
            size = c.largest() if deferred(compute_dtype) else None
            near_one = c if size is None else c.map(lambda t: t / size)
            sums = recompute(call, rows, near_one, needs, accum_dtype)
            found = (sums.dx, *sums.head_gradients(w, bias))
            dx, dw, db = (
                t if t is None or size is None else (t * size).to(own.dtype)
                for t, own in zip(found, (x, w, x if bias is None else bias), strict=True)
            )
    dx, dw, db, dvalue = (or_empty(t, rows) for t in (dx, dw, db, dvalue))
    return dx, dw, db, dvalue


@linear_rows_gradient.register_fake
def _(x, w, bias, y, rows, kept_dx, value, changing, dloss, drows, loss, options, ignore_index,
      entropy, compute_dtype, logits_dtype, accum_dtype, budget, backend, needs):  # fmt: skip
    gradients = (
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else None
        for t, need in zip((x, w, bias), needs, strict=True)
    )
    dvalue = None if value is None else value.new_empty(y.shape)
    return tuple(or_empty(t, rows) for t in (*gradients, dvalue))


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w, bias, y, _ref, value, changing, *ctx.static, ctx.needs, _keep_dx = inputs
    loss, rows, kept_dx = output
    ctx.save_for_backward(x, w, bias, y, rows, kept_dx, value, changing)
    ctx.kept_alive = loss_of(ctx.static[0])
    ctx.mark_non_differentiable(*((rows, kept_dx) if ctx.static[0] else (loss, kept_dx)))
    ctx.set_materialize_grads(False)


def _backward_rows(
    ctx: Any, dloss: Tensor | None, drows: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    none = (None,) * 18
    if dloss is None and drows is None:
        return none
    saved = ctx.saved_tensors  # once: checkpointing objects to more
    found = linear_rows_gradient(*saved, dloss, drows, *ctx.static, ctx.needs)
    wanted = [*ctx.needs, ctx.needs_input_grad[5]]
    dx, dw, db, dvalue = (t if want else None for t, want in zip(found, wanted, strict=True))
    return (dx, dw, db, None, None, dvalue, *none[6:])


linear_rows.register_autograd(_backward_rows, setup_context=_setup_rows)
linear_rows_gradient.register_autograd(refuse_second_derivative)
