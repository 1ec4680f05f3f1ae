"""FLOPs of the operators of the linear path, for ``torch.utils.flop_counter``.

A mode sees an operator as one call: without a formula it counts none of the products inside.
Counted are products over the head of the labels that count, 2 N D V each; of tensors without data,
all labels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fused_losses.arguments import has_data
from fused_losses.engine.call import Call, decode
from fused_losses.engine.linear_rows import (
    keeps_hidden_gradient,
    linear_rows,
    linear_rows_gradient,
)
from fused_losses.engine.linear_sum import linear_loss_sum
from fused_losses.plan import plan_linear, routes_for

_sum, _rows, _rows_gradient = (
    getattr(torch.ops.fused_losses, operator._name)
    for operator in (linear_loss_sum, linear_rows, linear_rows_gradient)
)


def _encoded(given: tuple[Any, ...]) -> str:
    return next(argument for argument in given if isinstance(argument, str))


def _counted(y: Tensor, call: Call) -> int:
    return int((y != call.ignore_index).sum()) if has_data(y) else y.numel()


@register_flop_formula(_sum, get_raw=True)
def _sum_flops(x: Tensor, w: Tensor, bias: Any, y: Tensor, *given: Any, out_val: Any = None) -> int:
    call = decode(_encoded(given), None)
    counted = _counted(y, call)
    shape = replace(call.shape(x, w), all_rows=counted == y.numel())
    routes = routes_for(shape, known=True)
    plan = plan_linear(routes, counted, shape, call.linear.budget)
    return plan.flops // plan.vocabulary * w.shape[0]  # which a shard of a head may be smaller than


@register_flop_formula(_rows, get_raw=True)
def _rows_flops(
    x: Tensor, w: Tensor, bias: Any, y: Tensor, *given: Any, out_val: Any = None
) -> int:
    call = decode(_encoded(given), None)
    return 2 * _counted(y, call) * w.numel() * (1 + keeps_hidden_gradient(call, x, w))


@register_flop_formula(_rows_gradient, get_raw=True)
def _rows_gradient_flops(
    x: Tensor, w: Tensor, bias: Any, y: Tensor, rows: Any, kept_dx: Tensor, *given: Any,
    out_val: Any = None,
) -> int:  # fmt: skip
    call = decode(_encoded(given), None)
    need_dx, need_dw, need_db = call.linear.needs
    if kept_dx.numel() or not (need_dx or need_dw or need_db):
        return 0
    return 2 * _counted(y, call) * w.numel() * (1 + need_dx + need_dw)
