"""How a call will run: route, chunks, FLOPs and bytes, decided before anything is computed.

Pure functions of shapes, dtypes, who needs a gradient and the byte budget. One product over the
head is 2 N D V FLOPs, N the labels that are not ignored. The routes of the linear path:

- forward, 2 N D V: no gradient is wanted.
- frozen, 4 N D V: the head is, whatever the loss. Ranges of the vocabulary; d logp / d x is summed
  beside the row statistics, as attention sums its values, and scaled by the loss's weights.
- token, 6 N D V: a reduced token loss; gradients are formed while the chunk's logits exist.
- unit, 6 N D V: a function of the log-probs of whole units, called once per chunk of them.
- recompute, 8 N D V: any use of log-probs or per-token losses; ranges of the vocabulary are made
  again once the weights are known, and dW is rounded once. (6 where only hidden states want it.)

"token" and "unit" take whole rows, chunks of tokens, of which logits that are wider than operands
exist a strip at a time (:mod:`fused_losses.strips`); the others tiles, of chunks and ranges. Where
several would do, ``cost`` decides, written down in :mod:`fused_losses.cost`: on a tight budget
making the logits twice is cheaper than many chunks, each of which reads the head and adds to dW.

The budget bounds the workspace. Several chunks of 16-bit operands hold an fp32 sum of dW beside it;
one needs none, and is taken, whatever the budget, where in all it holds no more.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

from fused_losses.backends.base import BLOCK_BYTES
from fused_losses.chunk_bytes import least_bytes, least_columns, most_columns, tile_bytes
from fused_losses.cost import (
    LinearShape,
    Route,
    Step,
    bytes_moved,
    flops,
    in_flops,
    steps_of,
)
from fused_losses.strips import Cut, cut_in_one, cuts, evenly, memory_of

__all__ = [
    "LinearShape",
    "Plan",
    "Route",
    "check_budget",
    "forced_route",
    "plan_linear",
    "plan_logits",
    "plan_units",
    "routes_for",
]

_NO_MORE = 1.05  # what one chunk may hold of what several hold in all


@dataclass(frozen=True)
class Plan:
    """What a call does. ``explain`` returns one; the engine runs one.

    Attributes:
        route: See the module's table; "logits" for functions of logits.
        backend: "triton" or "torch".
        tokens: N, labels that are not ignored.
        hidden: D, 0 on the logits path.
        vocabulary: V.
        chunks: Tokens per chunk, in order: what the gradient's products take at a time.
        strips: Tokens per strip, in order: whose logits exist at a time. As ``chunks``, or, where
            logits are wider than operands, parts of them.
        columns: Columns of the vocabulary per product, in order; (V,) for whole rows.
        flops: GEMM FLOPs of forward and backward together.
        bytes_moved: Bytes that products and row passes read and write, as the cost model has them.
        cost: All of it in FLOPs; what decides between plans.
        workspace_bytes: Bytes that a chunk holds: logits, their gradient, row-pass scratch, and its
            rows' copies of hidden states and results.
        peak_bytes: Bytes at the highest of workspace, the head's gradient and its wider sum.
        budget_bytes: What chunks were fitted to; one chunk may take more, see the module.
        steps: What runs per chunk and range of columns, in order.
    """

    route: Route
    backend: str
    tokens: int
    hidden: int
    vocabulary: int
    chunks: tuple[int, ...]
    strips: tuple[int, ...]
    columns: tuple[int, ...]
    flops: int
    bytes_moved: int
    cost: float
    workspace_bytes: int
    peak_bytes: int
    budget_bytes: int
    steps: tuple[Step, ...]

    @property
    def has_gradient(self) -> bool:
        """Whether the row passes of this plan write gradients."""
        return any(step.writes for step in self.steps)

    @property
    def exponentials(self) -> bool:
        """Whether what they write is exponentials, gradients up to a factor per row."""
        return Step.ROW_PASS_WITH_EXPONENTIALS in self.steps

    @property
    def kernels(self) -> tuple[str, ...]:
        """The steps in words."""
        return tuple(step.value for step in self.steps)

    def __str__(self) -> str:
        """One line for people."""
        ndv = self.tokens * self.hidden * self.vocabulary
        gemms = f", {self.flops / ndv:.1f} NDV = {self.flops / 1e9:.2f} GFLOP" if ndv else ""
        sizes = f"{len(self.chunks)} chunk(s) of up to {max(self.chunks, default=0)} tokens"
        if len(self.strips) > len(self.chunks):
            sizes += f", {len(self.strips)} strips of up to {max(self.strips)}"
        if len(self.columns) > 1:
            sizes += f", {len(self.columns)} ranges of up to {max(self.columns)} words"
        return (
            f"{self.route} route on {self.backend}: {self.tokens} tokens x {self.vocabulary}, "
            f"{sizes}{gemms}, workspace {self.workspace_bytes / 2**20:.1f} MiB, "
            f"with dW at most {self.peak_bytes / 2**20:.1f} MiB; " + " > ".join(self.kernels)
        )


def routes_for(shape: LinearShape, *, known: bool) -> tuple[Route, ...]:
    """Return the routes that could serve a call.

    ``known``: the loss is reduced, so a row's weight is known as soon as the row is.
    """
    if not shape.need_gradient:
        return ("forward",)
    if shape.head_is_frozen:
        return ("frozen",)
    return ("token", "recompute") if known else ("recompute",)


_forced: ContextVar[Route | None] = ContextVar("fused_losses_route", default=None)


@contextmanager
def forced_route(route: Route) -> Iterator[None]:
    """Make calls take one of their routes whatever it costs; for tests and measurements."""
    token = _forced.set(route)
    try:
        yield
    finally:
        _forced.reset(token)


def plan_linear(routes: Sequence[Route], tokens: int, shape: LinearShape, budget: int) -> Plan:
    """Take the cheapest of some routes, cut into the cheapest tiles that fit the budget.

    Raises:
        ValueError: As :func:`check_budget`.
    """
    if len(routes) > 1 and _forced.get() in routes:
        routes = [route for route in routes if route == _forced.get()]
    check_budget(routes, shape, budget)
    plans = [_cheapest(route, tokens, shape, budget) for route in routes]
    cheapest = min([plan for plan in plans if plan is not None], key=_cost)
    return _in_one(cheapest, shape)


def check_budget(routes: Sequence[Route], shape: LinearShape, budget: int) -> None:
    """Raise unless one of some routes can run within the budget.

    Raises:
        ValueError: None can; the message names the least budget that works.
    """
    # Whatever labels a batch has: what works for one works for the next.
    shape = replace(shape, all_rows=False)
    least = min([least_bytes(route, shape) for route in routes])
    if budget < least:
        raise ValueError(
            f"workspace_bytes={budget} is too small for a head of {shape.vocabulary} words; "
            f"the least that works is {least}"
        )


def plan_units(ends: Sequence[int], shape: LinearShape, budget: int) -> Plan | None:
    """Fill chunks with whole units, in order, from the tokens up to the end of each.

    None if a unit does not fit the budget, or if recomputation, where it would do, is cheaper.
    """
    tokens = ends[-1] if ends else 0
    plan, other = _whole_rows("unit", tokens, shape, budget, ends), None
    if plan is None:
        return None
    if not shape.whole_logits and _forced.get() != "unit":
        other = _cheapest("recompute", tokens, shape, budget)
    if other is not None and other.cost < plan.cost:
        return None
    return _in_one(plan, shape, ends)


def plan_logits(tokens: int, vocabulary: int, backend: str, *, need_gradient: bool) -> Plan:
    """Describe a call on logits: one read forward, one read and one write backward."""
    steps = (Step.ROW_PASS, Step.ROW_GRADIENT) if need_gradient else (Step.ROW_PASS,)
    scratch = BLOCK_BYTES if backend == "torch" else 0
    return Plan(
        route="logits",
        backend=backend,
        tokens=tokens,
        hidden=0,
        vocabulary=vocabulary,
        chunks=(tokens,),
        strips=(tokens,),
        columns=(vocabulary,),
        flops=0,
        bytes_moved=0,
        cost=0.0,
        workspace_bytes=scratch,
        peak_bytes=scratch,
        budget_bytes=scratch,
        steps=steps,
    )


@functools.lru_cache(maxsize=512)
def _cheapest(route: Route, tokens: int, shape: LinearShape, budget: int) -> Plan | None:
    """The cheapest way to cut a route's logits into tiles that fit; None if none does."""
    V = shape.vocabulary
    if least_bytes(route, shape) > budget:
        return None
    if shape.takes_whole_rows(route) or tile_bytes(tokens, V, route, shape) <= budget:
        return _whole_rows(route, tokens, shape, budget)
    plans = []
    parts = 1
    while parts < 2 * tokens:
        rows = -(-tokens // min(parts, tokens))
        most = most_columns(rows, route, shape, budget)
        if most >= least_columns(route, shape):
            chunks, columns = evenly(tokens, rows), evenly(V, most)
            plans.append(_plan(route, tokens, shape, budget, chunks, chunks, columns))
        parts *= 2
    return min(plans, key=_cost)


def _whole_rows(
    route: Route, tokens: int, shape: LinearShape, budget: int, ends: Sequence[int] | None = None
) -> Plan | None:
    """The cheapest way to cut whole rows; None if a unit does not fit."""
    columns, found = (shape.vocabulary,), cuts(tokens, route, shape, budget, ends)
    plans = [_plan(route, tokens, shape, budget, *cut, columns) for cut in found]
    return min(plans, key=_cost, default=None)


def _in_one(plan: Plan, shape: LinearShape, ends: Sequence[int] | None = None) -> Plan:
    """Take one chunk of few strips, whatever the budget, if in all it holds no more.

    Several hold a wider sum of dW; the logits of one's strips are gone before there is a dW.
    """
    route, tokens = plan.route, plan.tokens
    sums = route in ("token", "unit") and shape.need_dw and shape.sums_wider
    if not sums or len(plan.strips) < 2:
        return plan
    one = cut_in_one(tokens, route, shape, int(_NO_MORE * plan.peak_bytes), ends)
    if one is None:
        return plan
    return min(plan, _plan(route, tokens, shape, plan.budget_bytes, *one, plan.columns), key=_cost)


def _cost(plan: Plan) -> float:
    return plan.cost


def _plan(
    route: Route,
    tokens: int,
    shape: LinearShape,
    budget: int,
    chunks: tuple[int, ...],
    strips: tuple[int, ...],
    columns: tuple[int, ...],
) -> Plan:
    workspace, peak = memory_of(Cut(chunks, strips), max(columns), route, shape)
    work = flops(route, tokens, shape)
    moved = bytes_moved(route, tokens, shape, len(chunks), len(columns), len(strips))
    return Plan(
        route=route,
        backend=shape.backend,
        tokens=tokens,
        hidden=shape.hidden,
        vocabulary=shape.vocabulary,
        chunks=chunks,
        strips=strips,
        columns=columns,
        flops=work,
        bytes_moved=moved,
        cost=in_flops(work, moved, shape),
        workspace_bytes=workspace,
        peak_bytes=peak,
        budget_bytes=budget,
        steps=steps_of(route, shape),
    )
