"""Losses of whole units (tokens, sequences, pairs, groups) from hidden states, without logits.

A strip, a chunk or a part of one, holds whole units. While its logits exist the loss function is
called on its log-probs and differentiated by torch, so every token's weight is known before dW is
formed: the cost of a token loss, for any loss. Eager only: autograd cannot run inside an operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_losses.engine.call import Call
from fused_losses.engine.captured import refuse_captured, refuse_detached
from fused_losses.engine.gradients import GradientSums
from fused_losses.engine.handover import scale_saved
from fused_losses.engine.once import once_differentiable
from fused_losses.engine.planned import PlannedCall
from fused_losses.engine.rows import Coefficients, lines, stats_of
from fused_losses.engine.units import UnitChunk, UnitLayout
from fused_losses.engine.whole_rows import Strip, strips_of
from fused_losses.plan import Plan
from fused_losses.stats import TokenStats

# Gets all rows, those that do not count among them, and None where nothing is laid out in units.
UnitLoss = Callable[[TokenStats, UnitChunk | None], Tensor]
# Gets a strip of whole units whose rows are known; returns its loss, 0-d, and puts the gradient of
# the logits into ``strip.dz`` if the plan has one.
Step = Callable[[Strip, UnitChunk], Tensor]

_LOSS_FUNCTION = "the loss function (loss_fn, or a TokenLoss's torch_fn)"


def unit_sum(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    layout: UnitLayout,
    call: Call,
    plan: Plan,
    step: Step,
    ref: Tensor | None = None,
    value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sum of a step's losses over all units, differentiable, and rows (LINES, N).

    ``ref`` and ``value``, (N,), are for the call's objective, and not differentiated.
    """
    if plan.has_gradient:
        return _UnitSum.apply(x, w, bias, y, layout, call, plan, step, ref, value)
    planned = _planned(x, w, bias, y, layout, call, plan)
    return run_steps(planned, layout, step, None, ref, value), planned.results


def _planned(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    layout: UnitLayout,
    call: Call,
    plan: Plan,
) -> PlannedCall:
    planned = PlannedCall(x, w, bias, y, layout.positions, call, plan)
    planned.keep_rows = call.entropy  # else nobody asked for statistics
    return planned


def run_steps(
    planned: PlannedCall,
    layout: UnitLayout,
    step: Step,
    sums: GradientSums | None,
    ref: Tensor | None = None,
    value: Tensor | None = None,
) -> Tensor:
    """Run a step on one strip after another, and add up its losses and their gradients."""
    total: Tensor | None = None
    with torch.autocast(planned.x.device.type, enabled=False):
        every = layout.chunks(planned.plan.strips)
        for strip, units in zip(strips_of(planned, sums), every, strict=True):
            strip.row_pass(ref=ref, value=value, top1=True)
            loss = step(strip, units)
            total = loss if total is None else total + loss
    return planned.x.new_zeros((), dtype=planned.rows_dtype) if total is None else total


def step_of_log_probs(loss_fn: UnitLoss, call: Call, device_type: str, *, own: bool) -> Step:
    """Make a step of a function that torch differentiates, under the autocast of now.

    ``own``: see :func:`call_loss`.
    """
    user_autocast = autocast_of(device_type)

    def step(strip: Strip, units: UnitChunk) -> Tensor:
        with user_autocast:
            loss, c, _ = call_loss(loss_fn, strip.rows, units, call, gradient=True, own=own)
        strip.differentiate(c)
        return loss

    return step


class _UnitSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        y: Tensor,
        layout: UnitLayout,
        call: Call,
        plan: Plan,
        step: Step,
        ref: Tensor | None,
        value: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        planned = _planned(x, w, bias, y, layout, call, plan)
        sums = GradientSums(planned)
        total = run_steps(planned, layout, step, sums, ref, value)
        sums.complete()
        ctx.save_for_backward(x, w, bias, sums.dx, *sums.head_gradients(w, bias))
        rows = planned.results
        ctx.mark_non_differentiable(rows)
        ctx.set_materialize_grads(False)
        return total.to(rows.dtype), rows

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        x, w, bias, *gradients = ctx.saved_tensors
        if dtotal is None:
            return (None,) * 10
        scaled = scale_saved(gradients, [x, w, bias], dtotal)
        return (*once_differentiable(scaled, [dtotal, x, w, bias]), *(None,) * 7)


def autocast_of(device_type: str) -> torch.autocast:
    """The autocast state of the caller: a loss function sees it, whatever calls it."""
    return torch.autocast(
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=torch.is_autocast_cache_enabled(),
    )


def call_loss(
    loss_fn: Callable[..., Tensor],
    rows: Tensor,
    units: UnitChunk,
    call: Call,
    *,
    gradient: bool,
    own: bool = True,
    also: Tensor | None = None,
) -> tuple[Tensor, Coefficients, Tensor | None]:
    """Call the loss function on rows (LINES, R), which no graph holds, and differentiate it.

    ``own``: it is a user's, who may look at anything and overwrite it. Ours take log-probs, and
    entropies if those may be differentiated. ``also``: something of the rows that is no result of
    theirs, for it to take too: their logits.

    Returns:
        The loss, 0-d; its gradients with respect to logp, lse and entropy, (R,) each; and to
        ``also``, if it was given and the loss depends on it.

    Raises:
        ValueError: It returned something else than a 0-d tensor, one without a graph, or one that
            depends on a tensor beside the rows that wants a gradient.
    """
    taken = {"logps": lines.LOGP, "lse": lines.LSE, "entropy": lines.ENTROPY}
    if not call.linear.entropy_gradient:
        del taken["entropy"]
    if not own:
        del taken["lse"]
    found = {name: rows[line].clone() if own else rows[line] for name, line in taken.items()}
    named = {name: t.detach().requires_grad_(gradient) for name, t in found.items()}
    # Whether the target is the largest is nothing that ours ask.
    entropy = rows[lines.ENTROPY] if call.entropy else None
    stats = TokenStats(rows[lines.LOGP], rows[lines.LSE], entropy, rows[lines.TOP1])
    stats = (stats_of(rows, entropy=call.entropy) if own else stats)._replace(**named)
    leaves = list(named.values())
    given = [] if also is None else [also.detach().requires_grad_(gradient)]
    # Frozen rows or not, what the function has captured may want a gradient.
    with torch.set_grad_enabled(gradient or torch.is_grad_enabled()):
        loss = loss_fn(stats, units, *given)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return a 0-d tensor, the sum over its units, got {got}")
    leaves += given
    if own:
        refuse_captured(_LOSS_FUNCTION, loss_fn, [loss], leaves)
        if gradient:
            refuse_detached(_LOSS_FUNCTION, loss)
    slopes: list[Tensor | None] = [None] * len(leaves)
    if loss.requires_grad and gradient:
        with torch.autocast(loss.device.type, enabled=False):
            slopes = list(torch.autograd.grad(loss, leaves, allow_unused=True))
    dalso = slopes.pop() if given else None
    of = dict(zip(named, slopes, strict=True))
    dlogp = torch.zeros_like(leaves[0]) if of["logps"] is None else of["logps"]
    return loss.detach(), Coefficients(dlogp, of.get("lse"), None, of.get("entropy")), dalso


class _KnownGradient(torch.autograd.Function):
    """A number whose gradient with respect to the rows has been computed already."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, loss: Tensor, drows: Tensor) -> Tensor:
        ctx.save_for_backward(drows)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None]:
        (drows,) = ctx.saved_tensors
        return dloss * drows, None, None


def loss_of_rows(
    rows: Tensor, layout: UnitLayout, call: Call, loss_fn: UnitLoss, *, own: bool
) -> Tensor:
    """Call the loss function once on all units, from rows (LINES, N) that autograd tracks."""
    taken = rows.detach()[:, layout.positions]
    gradient = rows.requires_grad
    loss, c, _ = call_loss(loss_fn, taken, layout.whole, call, gradient=gradient, own=own)
    if not gradient:
        return loss
    drows = torch.zeros_like(rows)
    for line, d in ((lines.LOGP, c.dlogp), (lines.LSE, c.dlse), (lines.ENTROPY, c.dentropy)):
        if d is not None:
            drows[line, layout.positions] = d
    return _KnownGradient.apply(rows, loss.to(rows.dtype), drows)
