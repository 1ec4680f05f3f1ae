"""Per-token results from hidden states, for any use of them by autograd, as operators.

The upstream gradient is known only in backward, which scales the gradients of the log-probs that
forward kept (head frozen) or makes the logits again (head trained).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.engine.call import Call, Needs, decode
from fused_losses.engine.gradients import fake_gradients
from fused_losses.engine.once import refuse_second_derivative
from fused_losses.engine.planned import PlannedCall
from fused_losses.engine.ranges import hidden_gradient, recompute, seen_chunks
from fused_losses.engine.rows import Coefficients, coefficients, lines, new_rows
from fused_losses.plan import Route, routes_for


@torch.library.custom_op("fused_losses::linear_rows", mutates_args=())
def linear_rows(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    ref: Tensor | None,
    value: Tensor | None,
    changing: Tensor | None,
    encoded: str,
    positions: Tensor | None,
    counted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the per-token loss (N,), rows (LINES, N) and, if kept, -d logp / d x (N, D).

    The loss is differentiable where the call has an objective; else it is 0, and the rows (logp,
    lse, entropy) are. With a frozen head backward scales what is kept. ``positions`` of the rows
    that count, and how many do: see ``counted_positions``; -1: to be found, here and in backward.
    """
    call = decode(encoded, changing)
    keep = keeps_hidden_gradient(call, x, w)
    needs = Needs(keep, False, False)
    routes: list[Route] = ["frozen" if keep else "forward"]
    planned = PlannedCall.of(
        x, w, bias, y, call, routes, needs, positions=positions, counted=counted
    )
    kept = planned.rows.new_empty(0)
    if keep:
        # Dropped rows are multiplied by 0: they must not be NaN.
        make = torch.empty if planned.positions is None else torch.zeros
        kept = make(x.shape, dtype=planned.rows.dtype, device=x.device)
    top1 = call.entropy or call.objective is None
    with torch.autocast(x.device.type, enabled=False):
        for chunk in seen_chunks(planned, keep=keep, ref=ref, value=value, top1=top1):
            if chunk.kept is not None:
                kept[chunk.at] = chunk.kept
    return planned.rows[lines.LOSS].clone(), planned.rows, kept


def keeps_hidden_gradient(call: Call, x: Tensor, w: Tensor) -> bool:
    """Whether the head is frozen, so that forward keeps d logp / d x for backward."""
    return routes_for(call.shape(x, w), known=False) == ("frozen",)


@linear_rows.register_fake
def _(x, w, bias, y, ref, value, changing, encoded, positions, counted):
    call = decode(encoded, None)
    rows = new_rows(y, call.linear.logits_dtype)
    kept = rows.new_empty(x.shape if keeps_hidden_gradient(call, x, w) else (0,))
    return rows.new_empty(y.shape), rows, kept


@torch.library.custom_op("fused_losses::linear_rows_gradient", mutates_args=())
def linear_rows_gradient(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    rows: Tensor,
    kept_dx: Tensor,
    dloss: Tensor | None,
    drows: Tensor | None,
    changing: Tensor | None,
    encoded: str,
    positions: Tensor | None,
    counted: int,
    need_dvalue: bool,
) -> list[Tensor]:
    """Return dx, dw, db and dvalue (N,), each if it is needed."""
    call = decode(encoded, changing)
    c, dvalue = coefficients(y, rows, dloss, drows, call, need_dvalue=need_dvalue)
    found: tuple[Tensor | None, ...] = ()
    with torch.autocast(x.device.type, enabled=False):
        if kept_dx.numel():
            found = (_scaled(kept_dx, x, y, rows, c, w, call),)
        elif any(call.linear.needs):
            planned = PlannedCall.of(
                x, w, bias, y, call, ["recompute"], positions=positions, counted=counted
            )
            found = _recomputed(planned, w, bias, rows, c)
    found = tuple(t for t, need in zip(found, call.linear.needs, strict=False) if need)
    return [t for t in (*found, dvalue) if t is not None]


def _scaled(
    kept_dx: Tensor, x: Tensor, y: Tensor, rows: Tensor, c: Coefficients, w: Tensor, call: Call
) -> Tensor:
    """Return dx from what forward kept, as many rows at a time as fit the budget."""
    counted = c.map(lambda t: torch.where(y == call.ignore_index, 0.0, t))
    # Of a shared head it is a part of the sum, which is rounded once.
    dtype = x.dtype if call.shard is None else kept_dx.dtype
    dx = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    # A copy, since a kept graph may ask again; the targets' rows of the head, maybe upcast.
    per_row = 3 * kept_dx.itemsize * x.shape[1]
    size = max(1, call.linear.budget // per_row)
    for start in range(0, len(y), size):
        at = slice(start, start + size)
        kept = kept_dx[at].clone()
        dx[at] = hidden_gradient(kept, y[at], rows[:, at], counted.at(at), w, call)
    return dx if call.shard is None else call.shard.sum(dx).to(x.dtype)


def _recomputed(
    planned: PlannedCall, w: Tensor, bias: Tensor | None, rows: Tensor, c: Coefficients
) -> tuple[Tensor | None, ...]:
    if not planned.call.linear.deferred:
        sums = recompute(planned, rows, c)
        sums.complete()
        return sums.dx, *sums.head_gradients(w, bias)
    # Upstream gradients hold 1 / count: bring them near 1 while dz is fp16.
    size = c.largest()
    sums = recompute(planned, rows, c.map(lambda t: t / size))
    sums.complete()
    found = (sums.dx, *sums.head_gradients(w, bias))
    return tuple(
        t if t is None or own is None else (t * size).to(own.dtype)
        for t, own in zip(found, (planned.x, w, bias), strict=True)
    )


@linear_rows_gradient.register_fake
def _(
    x, w, bias, y, rows, kept_dx, dloss, drows, changing, encoded,
    positions, counted, need_dvalue,
):  # fmt: skip
    needs = decode(encoded, None).linear.needs
    found = fake_gradients((x, w, bias), needs)
    return [*found, *([torch.empty_like(rows[0])] if need_dvalue else [])]


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w, bias, y, _ref, value, changing, ctx.encoded, positions, ctx.counted = inputs
    loss, rows, kept_dx = output
    ctx.call = decode(ctx.encoded, None)  # holds a user's own loss
    ctx.value_dtype = None if value is None else value.dtype
    ctx.save_for_backward(x, w, bias, y, rows, kept_dx, changing, positions)
    ctx.mark_non_differentiable(kept_dx, rows if ctx.call.objective is not None else loss)
    ctx.set_materialize_grads(False)


def _backward_rows(
    ctx: Any, dloss: Tensor | None, drows: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    if dloss is None and drows is None:
        return (None,) * 10
    *saved, changing, positions = ctx.saved_tensors  # once: checkpointing objects to more
    need_dvalue = ctx.needs_input_grad[5]
    found = linear_rows_gradient(
        *saved, dloss, drows, changing, ctx.encoded, positions, ctx.counted, need_dvalue
    )
    wanted = [*ctx.call.linear.needs, need_dvalue]
    dx, dw, db, dvalue = (found.pop(0) if want else None for want in wanted)
    dvalue = None if dvalue is None else dvalue.to(ctx.value_dtype)
    return dx, dw, db, None, None, dvalue, *(None,) * 4


linear_rows.register_autograd(_backward_rows, setup_context=_setup_rows)
linear_rows_gradient.register_autograd(refuse_second_derivative)
