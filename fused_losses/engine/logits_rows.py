"""The logits path: per-token losses and statistics from logits that exist, as custom operators.

Forward reads the logits once and keeps a few numbers per row; backward reads them once more and
writes the gradient once, into new memory or, on request, over the logits. The gradient operator has
no autograd formula of its own, so a second derivative through it is an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.engine.call import Call, decode
from fused_losses.engine.once import once_differentiable, refuse_second_derivative
from fused_losses.engine.rows import Coefficients, coefficients, lines, new_rows
from fused_losses.engine.sharded_rows import passes_of


@torch.library.custom_op("fused_losses::logits_rows", mutates_args=())
def logits_rows(
    z: Tensor,
    y: Tensor,
    ref: Tensor | None,
    value: Tensor | None,
    changing: Tensor | None,
    encoded: str,
) -> tuple[Tensor, Tensor]:
    """Return the per-token loss (N,) and the row statistics (LINES, N); see ``engine.rows``.

    ``z`` is (N, V) or (B, T, V) of any strides, ``y`` (N,). Differentiable in z (through the loss,
    logp, lse and entropy) and in value (through the loss).
    """
    call = decode(encoded, changing)
    rows = new_rows(y, z.dtype)
    passes_of(call.backend, call.shard).row_pass(
        z,
        y,
        rows,
        maths=call.maths,
        objective=call.objective,
        ref=ref,
        value=value,
        ignore_index=call.ignore_index,
        entropy=call.entropy,
        top1=call.entropy or call.objective is None,
    )
    return rows[lines.LOSS].clone(), rows


@logits_rows.register_fake
def _(z, y, ref, value, changing, encoded):
    rows = new_rows(y, z.dtype)
    return rows.new_empty(rows.shape[1]), rows


@torch.library.custom_op("fused_losses::logits_gradient", mutates_args=())
def logits_gradient(
    z: Tensor,
    y: Tensor,
    rows: Tensor,
    dloss: Tensor | None,
    drows: Tensor | None,
    changing: Tensor | None,
    encoded: str,
    need_dz: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of z (empty if not needed) and of value (N,)."""
    call = decode(encoded, changing)
    c, dvalue = coefficients(y, rows, dloss, drows, call)
    dz = z.new_empty(z.shape if need_dz else (0,))
    if need_dz:
        _write(z, y, rows, c, call, dz)
    return dz, torch.zeros_like(rows[0]) if dvalue is None else dvalue


@logits_gradient.register_fake
def _(z, y, rows, dloss, drows, changing, encoded, need_dz):
    return z.new_empty(z.shape if need_dz else (0,)), torch.empty_like(rows[0])


def _write(z: Tensor, y: Tensor, rows: Tensor, c: Coefficients, call: Call, dz: Tensor) -> None:
    passes_of(call.backend, call.shard).row_gradient(
        z, y, rows, c, maths=call.maths, ignore_index=call.ignore_index, dz=dz
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, y, _ref, value, changing, ctx.encoded = inputs
    ctx.call = decode(ctx.encoded, None)  # holds a user's own loss
    ctx.value_dtype = None if value is None else value.dtype
    ctx.save_for_backward(z, y, output[1], changing)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dloss: Tensor | None, drows: Tensor | None) -> tuple[Any, ...]:
    z, y, rows, changing = ctx.saved_tensors
    need_dz, need_dvalue = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    # Tensors that a compiler traces with are not plain: to them, overwriting is a copy more.
    inplace = ctx.call.inplace and need_dz and type(z) is Tensor
    write = need_dz and not inplace
    dz, dvalue = logits_gradient(z, y, rows, dloss, drows, changing, ctx.encoded, write)
    if inplace:
        with torch.no_grad():
            overwritten = z.detach()
            call = decode(ctx.encoded, changing)
            c, _ = coefficients(y, rows, dloss, drows, call)
            _write(overwritten, y, rows, c, call, overwritten)
            # A second backward must find out that the logits are gone.
            torch.autograd.graph.increment_version(z)
        dz = once_differentiable([overwritten], [z, dloss, drows])[0]
    dvalue = dvalue.to(ctx.value_dtype) if need_dvalue else None
    return dz if need_dz else None, None, None, dvalue, None, None


logits_rows.register_autograd(_backward, setup_context=_setup_context)
logits_gradient.register_autograd(refuse_second_derivative)
