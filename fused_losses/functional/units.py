"""Losses of whole units on the linear path: the route without logits and without recomputation."""

from __future__ import annotations

from torch import Tensor

from fused_losses.engine.units import UnitCall, UnitLayout, UnitLoss, loss_of_rows, run_units
from fused_losses.functional.linear_source import LinearSource
from fused_losses.functional.observe import report_plan
from fused_losses.functional.tokens import Tokens
from fused_losses.plan import plan_units


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
