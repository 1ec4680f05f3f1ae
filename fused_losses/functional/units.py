"""Losses of whole units on the linear path: the route without logits and without recomputation."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.arguments import has_data
from fused_losses.engine.units import UnitCall, UnitLayout, UnitLoss, loss_of_rows, run_units
from fused_losses.functional.linear_source import LinearSource
from fused_losses.functional.observe import report_plan
from fused_losses.functional.tokens import Tokens
from fused_losses.plan import Plan, plan_units


def runs_whole_units(tokens: Tokens) -> bool:
    """Whether units can be laid out now: their sizes are data, which tracing does not have.

    Raises:
        ValueError: The call is only being explained: without data its plan would be another one.
    """
    if torch.compiler.is_compiling():
        return False
    if not has_data(tokens.y):
        report_plan(_refuse_plan)
        return False
    return True


def _refuse_plan() -> Plan:
    raise ValueError(
        "explain needs a target with data for a loss of whole units: it plans by their sizes, "
        "which a meta or fake tensor does not tell"
    )


def sum_over_units(
    source: LinearSource,
    tokens: Tokens,
    unit_of: Tensor | None,
    loss_fn: UnitLoss,
    *,
    entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the sum of ``loss_fn`` over all units with a counted token, and rows (LINES, N).

    ``unit_of`` is (N,), in the order of the rows. With a frozen head, and where recomputing the
    rows in backward is cheaper or the only way, the loss function is called once on all of them.
    """
    layout = UnitLayout.of(tokens.y, unit_of, tokens.ignore_index)
    shape = source.shape(entropy=entropy, entropy_gradient=entropy)
    # With a frozen head, or without gradients, whole units need not be in one chunk.
    trained = shape.need_gradient and not shape.head_is_frozen
    plan = plan_units(layout.sizes, shape, source.budget) if trained else None
    if plan is not None:
        report_plan(lambda: plan)
        call = UnitCall(
            tokens.y,
            layout,
            plan,
            source.options.maths,
            (source.compute_dtype, source.logits_dtype, source.accum_dtype),
            tokens.ignore_index,
            entropy,
            loss_fn,
        )
        return run_units(source.x, source.weight, source.bias, call, source.needs)
    rows = source.statistics(tokens, entropy=entropy)
    return loss_of_rows(rows, layout, loss_fn, entropy=entropy), rows
