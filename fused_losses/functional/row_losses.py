"""Losses of tokens that take whole rows of logits, from hidden states: planned, run, reduced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_losses.backends import lines
from fused_losses.cost import LinearShape
from fused_losses.engine.call import Call, Needs
from fused_losses.engine.logits_each import MakeStep, logits_each
from fused_losses.engine.unit_sum import unit_sum
from fused_losses.engine.units import UnitLayout
from fused_losses.functional.linear_source import LinearSource
from fused_losses.functional.observe import Stats, report_plan, report_stats
from fused_losses.functional.options import Options
from fused_losses.functional.sources import lays_out_units
from fused_losses.functional.tokens import Tokens, mean_factor
from fused_losses.plan import Plan


def token_losses_of_rows(
    source: LinearSource,
    tokens: Tokens,
    options: Options,
    call: Call,
    make_step: MakeStep,
    *,
    ref: Tensor | None = None,
    value: Tensor | None = None,
    stats: Callable[[Tensor], Stats] | None = None,
    **shape: Any,
) -> Tensor:
    """Run a step on chunks of tokens and reduce their losses.

    Args:
        source: Hidden states and head.
        tokens: The labels.
        options: The common options.
        call: What the row passes are asked for.
        make_step: Makes the step.
        ref: (N,) for the call's objective.
        value: (N,) for it; not differentiated.
        stats: Makes of row results what there is to report; None: the tokens' statistics.
        **shape: What the planner is to know beside the call: see ``LinearShape``.
    """

    def tokens_only(rows: Tensor) -> Stats:
        return tokens.stats(rows, entropy=call.entropy)

    weight = tokens.weight(options.token_weight)
    if not lays_out_units(tokens):
        each = source.statistics(tokens, entropy=False)[lines.LOGP]
        return reduced(each, weight, tokens, options)
    data = (ref, value)
    each, rows = _run(source, tokens, weight, options, call, make_step, data, shape)
    report_stats(lambda: (stats or tokens_only)(rows))
    if options.reduction == "none":
        return reduced(each, weight, tokens, options)
    return each * mean_factor(tokens.counted.sum(dtype=torch.float64), options).to(each.dtype)


def _run(
    source: LinearSource,
    tokens: Tokens,
    weight: Tensor | None,
    options: Options,
    call: Call,
    make_step: MakeStep,
    data: tuple[Tensor | None, Tensor | None],
    more: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the losses or, unreduced, each (N,); and row results."""
    layout = UnitLayout.of_tokens(tokens.y, tokens.ignore_index)
    operands = (source.x, source.weight, source.bias, tokens.y, layout, call)

    def shape(needs: Needs | None) -> LinearShape:
        plain = call.shape(source.input, source.weight, needs)
        return replace(plain, whole_logits=True, **more)

    trained = shape(None)
    if options.reduction == "none" and trained.need_gradient:
        plans = plan_each(source, layout, shape)
        return logits_each(*operands, plans, make_step, *data)
    plan = source.plan_whole_rows(layout, trained)
    report_plan(lambda: plan)
    of_row = torch.promote_types(call.linear.logits_dtype, torch.float32)
    each = torch.zeros(tokens.y.shape, dtype=of_row, device=tokens.y.device)
    own = torch.ones_like(each)
    if weight is not None and options.reduction != "none":  # which weighs its results
        own = weight.detach()
    step = make_step(own, each, trained.need_gradient)
    total, rows = unit_sum(*operands, plan, step, *data)
    return (each if options.reduction == "none" else total), rows


def plan_each(
    source: LinearSource, layout: UnitLayout, shape: Callable[[Needs | None], LinearShape]
) -> tuple[Plan, Plan]:
    """Plan what makes the logits again in backward: its forward, and its backward.

    Raises:
        ValueError: As ``plan_whole_rows``.
    """
    plan = source.plan_whole_rows(layout, shape(None))
    if not plan.has_gradient:
        report_plan(lambda: plan)
        return plan, plan
    forward = source.plan_whole_rows(layout, shape(Needs(False, False, False)))
    fields = ("flops", "bytes_moved", "cost")
    sums = {name: getattr(plan, name) + getattr(forward, name) for name in fields}
    report_plan(lambda: replace(plan, **sums))
    return forward, plan


def reduced(each: Tensor, weight: Tensor | None, tokens: Tokens, options: Options) -> Tensor:
    """Weigh and reduce losses of tokens (N,)."""
    if weight is not None:
        each = each * weight.to(each.dtype)
    if options.reduction == "none":
        return tokens.restore(each)
    return each.sum() * mean_factor(tokens.counted.sum(dtype=torch.float64), options).to(each.dtype)
