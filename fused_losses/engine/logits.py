"""The logits path: per-token losses and statistics from logits that exist, as custom operators.

Forward reads the logits once and keeps a few numbers per row; backward reads them once more and
writes the gradient once, into new memory or, on request, over the logits. The gradient operator has
no autograd formula of its own, so a second derivative through it is an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.backends import RowMaths, load_backend
from fused_losses.engine.once import once_differentiable, refuse_second_derivative
from fused_losses.engine.registry import loss_of, unpack
from fused_losses.engine.rows import (
    Coefficients,
    coefficients,
    lines,
    new_rows,
)


@torch.library.custom_op("fused_losses::logits_rows", mutates_args=())
def logits_rows(
    z: Tensor,
    y: Tensor,
    ref: Tensor | None,
    value: Tensor | None,
    changing: Tensor | None,
    loss: str,
    options: list[float],
    ignore_index: int,
    entropy: bool,
    inplace: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the per-token loss (N,) and the row statistics (LINES, N); see ``engine.rows``.

    ``z`` is (N, V) or (B, T, V) of any strides, ``y`` (N,). Differentiable in z (through the loss,
    logp, lse and entropy) and in value (through the loss). ``inplace`` is read by backward.
    """
    maths, objective = unpack(loss, options, changing)
    rows = new_rows(y, z.dtype)
    load_backend(backend).row_pass(
        z,
        y,
        rows,
        maths=maths,
        objective=objective,
        ref=ref,
        value=value,
        ignore_index=ignore_index,
        entropy=entropy,
        top1=entropy or objective is None,
    )
    return rows[lines.LOSS].clone(), rows


@logits_rows.register_fake
def _(z, y, ref, value, changing, loss, options, ignore_index, entropy, inplace, backend):
    rows = new_rows(y, z.dtype)
    return rows.new_empty(rows.shape[1]), rows


@torch.library.custom_op("fused_losses::logits_gradient", mutates_args=())
def logits_gradient(
    z: Tensor,
    y: Tensor,
    rows: Tensor,
    value: Tensor | None,
    changing: Tensor | None,
    dloss: Tensor | None,
    drows: Tensor | None,
    loss: str,
    options: list[float],
    ignore_index: int,
    entropy: bool,
    backend: str,
    need_dz: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of z (empty if not needed) and value (empty if there is none)."""
    maths, objective = unpack(loss, options, changing)
    c, dvalue = coefficients(y, rows, dloss, drows, objective, ignore_index, entropy)
    dz = z.new_empty(z.shape if need_dz else (0,))
    if need_dz:
        _write(z, y, rows, c, maths, ignore_index, backend, dz)
    return dz, rows.new_empty(0) if value is None else dvalue.to(value.dtype)


@logits_gradient.register_fake
def _(z, y, rows, value, changing, dloss, drows, loss, options, ignore_index, entropy, backend,
      need_dz):  # fmt: skip
    dz = z.new_empty(z.shape if need_dz else (0,))
    return dz, rows.new_empty(0) if value is None else value.new_empty(y.shape)


def _write(
    z: Tensor,
    y: Tensor,
    rows: Tensor,
    c: Coefficients,
    maths: RowMaths,
    ignore_index: int,
    backend: str,
    dz: Tensor,
) -> None:
    load_backend(backend).row_gradient(
        z,
        y,
        rows,
        c,
        maths=maths,
        ignore_index=ignore_index,
        dz=dz,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, y, _ref, value, changing, *ctx.static = inputs
    ctx.save_for_backward(z, y, output[1], value, changing)
    ctx.kept_alive = loss_of(ctx.static[0])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dloss: Tensor | None, drows: Tensor | None) -> tuple[Any, ...]:
    z, y, rows, value, changing = ctx.saved_tensors
    loss, options, ignore_index, entropy, inplace, backend = ctx.static
    need_dz, need_dvalue = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    static = (loss, options, ignore_index, entropy)
    # Tensors that a compiler traces with are not plain: to them, overwriting is a copy more.
    inplace = inplace and need_dz and type(z) is Tensor
    dz, dvalue = logits_gradient(
        z, y, rows, value, changing, dloss, drows, *static, backend, need_dz and not inplace
    )
    if inplace:
        with torch.no_grad():
            overwritten = z.detach()
            maths, objective = unpack(loss, options, changing)
            c, _ = coefficients(y, rows, dloss, drows, objective, ignore_index, entropy)
            _write(overwritten, y, rows, c, maths, ignore_index, backend, overwritten)
            # A second backward must find out that the logits are gone.
            torch.autograd.graph.increment_version(z)
        dz = once_differentiable([overwritten], [z, dloss, drows])[0]
    nothing = (None,) * 7
    return (dz if need_dz else None, None, None, dvalue if need_dvalue else None, *nothing)


logits_rows.register_autograd(_backward, setup_context=_setup_context)
logits_gradient.register_autograd(refuse_second_derivative)
