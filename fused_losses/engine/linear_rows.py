"""Per-token results from hidden states, for any use of them by autograd, as operators.

The upstream gradient is known only in backward, which scales gradients that forward kept (head
frozen) or makes the chunks again (head trained).
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
from fused_losses.engine.once import refuse_second_derivative
from fused_losses.engine.registry import unpack
from fused_losses.engine.rows import coefficients, lines, new_rows

_MLE = "mle"


@torch.library.custom_op("fused_losses::linear_rows", mutates_args=())
def linear_rows(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    ref: Tensor | None,
    value: Tensor | None,
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
    """Return the per-token loss (N,), rows (LINES, N) and, if kept, d loss / d x (N, D).

    With ``loss=""`` the rows (logp, lse, entropy) are differentiable and the loss is 0; else the
    loss is. ``keep_dx`` keeps the gradient of the loss, of -logp without one, for a frozen head.
    """
    dtypes = (compute_dtype, logits_dtype, accum_dtype)
    key = loss or (_MLE if keep_dx else "")
    _, objective = unpack(key, options)
    call = open_call(
        x, w, bias, y, options, ignore_index, dtypes, budget, backend,
        route="frozen" if keep_dx else "forward",
        needs=[keep_dx, False, False],
        entropy=entropy,
        label_smoothing=0.0 if objective is None else objective.label_smoothing,
    )  # fmt: skip
    ones = torch.ones((), dtype=call.rows.dtype, device=y.device).expand(y.shape)

    def row_pass(chunk: Chunk) -> None:
        run_row_pass(
            chunk,
            objective,
            ones if keep_dx else None,
            ref=ref,
            value=value,
            entropy=entropy,
            top1=entropy or not loss,
        )

    dx = None
    with torch.autocast(x.device.type, enabled=False):
        if keep_dx:
            dx = sum_gradients(call, [True, False, False], accum_dtype, row_pass).dx
        else:
            for chunk in call:
                row_pass(chunk)
    return call.rows[lines.LOSS].clone(), call.rows, or_empty(dx, call.rows)


@linear_rows.register_fake
def _(x, w, bias, y, ref, value, loss, options, ignore_index, entropy, compute_dtype, logits_dtype,
accum_dtype,
      budget, backend, needs, keep_dx):  # fmt: skip
    rows = new_rows(y, logits_dtype)
    waiting = torch.float32 if deferred(compute_dtype) else None
    dx = torch.empty_like(x, dtype=waiting, memory_format=torch.contiguous_format)
    return rows.new_empty(y.shape), rows, dx if keep_dx else rows.new_empty(0)


@torch.library.custom_op("fused_losses::linear_rows_gradient", mutates_args=())
def linear_rows_gradient(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    rows: Tensor,
    kept_dx: Tensor,
    value: Tensor | None,
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
    c, per_row = coefficients(y, rows, dloss, drows, loss, options, ignore_index, entropy)
    dvalue = None if value is None else per_row.to(value.dtype)
    dx = dw = db = None
    with torch.autocast(x.device.type, enabled=False):
        if needs[0] and kept_dx.numel():
            dx = _scaled_dx(x, w, y, rows, kept_dx, dloss, drows, options, ignore_index)
        elif any(needs):
            call = open_call(
                x, w, bias, y, options, ignore_index, dtypes, budget, backend,
                route="recompute", needs=needs, entropy=entropy,
            )  # fmt: skip
            # Upstream gradients hold 1 / count: bring them near 1 while dz is fp16.
            size = c.largest() if deferred(compute_dtype) else None
            near_one = c if size is None else c.map(lambda t: t / size)

            def row_gradient(chunk: Chunk) -> None:
                chunk.rows = rows[:, chunk.at].contiguous()
                chunk.differentiate(near_one.map(lambda t: t[chunk.at]))

            sums = sum_gradients(call, needs, accum_dtype, row_gradient)
            found = (sums.dx, *sums.head_gradients(w, bias))
            dx, dw, db = (
                t if t is None or size is None else (t * size).to(own.dtype)
                for t, own in zip(found, (x, w, x if bias is None else bias), strict=True)
            )
    dx, dw, db, dvalue = (or_empty(t, rows) for t in (dx, dw, db, dvalue))
    return dx, dw, db, dvalue


def _scaled_dx(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    rows: Tensor,
    kept: Tensor,
    dloss: Tensor | None,
    drows: Tensor | None,
    options: list[float],
    ignore_index: int,
) -> Tensor:
    """Scale the kept rows: of d loss / d x, or of -d logp / d x and with it d lse / d x."""
    counted = y != ignore_index
    if dloss is not None:
        return (kept * torch.where(counted, dloss, 0.0)[:, None]).to(x.dtype)
    if drows is None:
        return torch.zeros_like(x)
    maths, _ = unpack("", options)
    dlogp, dlse = (torch.where(counted, drows[line], 0.0) for line in (lines.LOGP, lines.LSE))
    # logp = z_y - lse, so d lse / d x is the target's row of the head, transformed, minus d logp /
    # d x.
    slope = torch.full_like(dlse, maths.pre)
    if maths.cap is not None:
        tanh = (rows[lines.LOGP] + rows[lines.LSE]) / maths.cap
        slope = maths.pre * maths.cap * (1.0 - tanh * tanh)
    good = counted & (y >= 0) & (y < w.shape[0])
    w_y = w[torch.where(good, y, 0)]
    return (
        kept * (dlse - dlogp)[:, None] + w_y * torch.where(good, dlse * slope, 0.0)[:, None]
    ).to(x.dtype)


@linear_rows_gradient.register_fake
def _(x, w, bias, y, rows, kept_dx, value, dloss, drows, loss, options, ignore_index, entropy,
      compute_dtype, logits_dtype, accum_dtype, budget, backend, needs):  # fmt: skip
    gradients = (
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else None
        for t, need in zip((x, w, bias), needs, strict=True)
    )
    dvalue = None if value is None else torch.empty_like(value)
    return tuple(or_empty(t, rows) for t in (*gradients, dvalue))


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w, bias, y, _ref, value, *ctx.static, ctx.needs, _keep_dx = inputs
    loss, rows, kept_dx = output
    ctx.save_for_backward(x, w, bias, y, rows, kept_dx, value)
    ctx.mark_non_differentiable(*((rows, kept_dx) if ctx.static[0] else (loss, kept_dx)))
    ctx.set_materialize_grads(False)


def _backward_rows(
    ctx: Any, dloss: Tensor | None, drows: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    none = (None,) * 17
    if dloss is None and drows is None:
        return none
    found = linear_rows_gradient(*ctx.saved_tensors, dloss, drows, *ctx.static, ctx.needs)
    wanted = [*ctx.needs, ctx.needs_input_grad[5]]
    dx, dw, db, dvalue = (t if want else None for t, want in zip(found, wanted, strict=True))
    return (dx, dw, db, None, None, dvalue, *none[6:])


linear_rows.register_autograd(_backward_rows, setup_context=_setup_rows)
linear_rows_gradient.register_autograd(refuse_second_derivative)
