"""Functions of log-probs and of the KL to a reference, token by token, from hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fused_losses.cost import LinearShape
from fused_losses.engine.call import Call, Needs
from fused_losses.engine.logits_each import logits_each
from fused_losses.engine.rows import stats_of
from fused_losses.engine.teacher import step_beside_a_divergence, step_of_both
from fused_losses.engine.unit_sum import Step, unit_sum
from fused_losses.engine.units import UnitChunk, UnitLayout
from fused_losses.functional.anchor import Anchor
from fused_losses.functional.linear_source import LinearSource
from fused_losses.functional.observe import report_plan
from fused_losses.functional.row_losses import plan_each
from fused_losses.functional.tokens import Tokens
from fused_losses.plan import check_budget, plan_units
from fused_losses.stats import TokenStats


def tied_sum(
    source: LinearSource,
    tokens: Tokens,
    layout: UnitLayout,
    call: Call,
    anchor: Anchor,
    loss_fn: Callable[[TokenStats, UnitChunk | None, Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum over all units, differentiable, row results, and the KL of each token (N,).

    2 + 2 + 4 N D V for a reference as wide as the policy; a unit that does not fit the budget makes
    the logits of both again in backward, at 12.

    Args:
        source: Hidden states and head.
        tokens: The labels.
        layout: The units.
        call: What the row passes are asked for.
        anchor: The reference.
        loss_fn: Of some units or, with None, of all; linear in the KL.

    Raises:
        ValueError: The budget holds no row of both sides.
    """
    shape = _shape_of(source, call, anchor)(None)
    check_budget(["unit"], shape, source.head.budget)
    plan = plan_units(layout.ends, shape, source.head.budget)
    if plan is None:
        stats, rows, kl = tied_rows(source, tokens, call, anchor)
        return loss_fn(stats, None, kl), rows, kl.detach()
    report_plan(lambda: plan)
    of_row = torch.promote_types(source.head.logits_dtype, torch.float32)
    kl = source.input.new_zeros(tokens.y.shape, dtype=of_row)

    def seen(at: Tensor, found: Tensor) -> None:
        kl[at] = found

    step = step_beside_a_divergence(
        anchor.teacher,
        loss_fn,
        call,
        anchor.call(source, None),
        gradient=shape.need_gradient,
        seen=seen,
    )
    operands = (source.x, source.weight, source.bias, tokens.y)
    return *unit_sum(*operands, layout, call, plan, step), kl


def tied_rows(
    source: LinearSource, tokens: Tokens, call: Call, anchor: Anchor
) -> tuple[TokenStats, Tensor, Tensor]:
    """Return statistics of all tokens, row results, and the KL of each token (N,).

    Log-probs, entropies and the KL are differentiable, at 4 N D V and, in backward, 8.

    Raises:
        ValueError: The budget holds no row of both sides.
    """
    layout = UnitLayout.of_tokens(tokens.y, tokens.ignore_index)
    plans = plan_each(source, layout, _shape_of(source, call, anchor))
    asked = anchor.call(source, None)

    def make_step(weight: Tensor, each: Tensor, gradient: bool) -> Step:
        return step_of_both(anchor.teacher, weight, each, call, asked, gradient=gradient)

    operands = (source.x, source.weight, source.bias, tokens.y)
    each, rows = logits_each(*operands, layout, call, plans, make_step, numbers=3)
    logps, entropy, kl = each
    stats = stats_of(rows, entropy=call.entropy)._replace(logps=logps)
    return stats._replace(entropy=entropy) if call.entropy else stats, rows, kl


def _shape_of(
    source: LinearSource, call: Call, anchor: Anchor
) -> Callable[[Needs | None], LinearShape]:
    def shape(needs: Needs | None) -> LinearShape:
        plain = call.shape(source.input, source.weight, needs)
        return replace(plain, whole_logits=True, **anchor.teacher.shape)

    return shape
