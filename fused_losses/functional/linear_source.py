"""Log-probs from hidden states and a head, whose logits are never stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from operator import sub
from typing import Any

import torch
from torch import Tensor

import fused_losses.engine.flop_formulas  # noqa: F401  (registers them)
from fused_losses.arguments import has_data, is_dtensor
from fused_losses.backends import Objective, lines, resolve_backend
from fused_losses.chunk_bytes import tile_bytes, workspace_budget
from fused_losses.engine.call import Call, HeadOptions, Needs
from fused_losses.engine.linear_rows import linear_rows
from fused_losses.engine.linear_sum import linear_loss_sum
from fused_losses.engine.logits_step import LogitsLoss, step_of_logits
from fused_losses.engine.main_grad import through_main_grad
from fused_losses.engine.planned import counted_positions
from fused_losses.engine.rows import stats_of
from fused_losses.engine.sharded_rows import IGNORED, VocabularyShard
from fused_losses.engine.unit_sum import UnitLoss, loss_of_rows, step_of_log_probs, unit_sum
from fused_losses.engine.units import UnitLayout
from fused_losses.functional.head import check_head, chosen_dtypes, compute_dtype
from fused_losses.functional.observe import report_plan
from fused_losses.functional.options import Options, parse_options, split_linear
from fused_losses.functional.sharded import (
    open_head,
    refuse_shared,
    shared_plan,
    shared_tokens,
    unwrap,
)
from fused_losses.functional.sources import lays_out_units, wants_gradient
from fused_losses.functional.tokens import Tokens, known_divisor, mean_factor
from fused_losses.plan import (
    LinearShape,
    Plan,
    check_budget,
    plan_linear,
    plan_units,
    routes_for,
)


@dataclass(frozen=True)
class LinearSource:
    """Hidden states (..., D) and the head that would make logits of them."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    options: Options
    backend: str
    head: HeadOptions
    shard: VocabularyShard | None = None

    @staticmethod
    def of(
        input: Any,
        linear_weight: Any,
        options: Options,
        linear: Mapping[str, Any],
        *,
        precise: bool,
    ) -> LinearSource:
        """Check hidden states and head; ``precise`` asks for logits of at least fp32 by default.

        Raises:
            TypeError: Dtypes that nothing computes with.
            ValueError: Shapes or devices that do not fit, an empty head, a sharded weight.
        """
        if is_dtensor(linear_weight):  # whose part would have lost it
            linear_weight = through_main_grad(linear_weight)
        opened = open_head(input, linear_weight, linear.get("linear_bias"))
        input, weight, bias, shard = opened
        check_head(input, weight, bias, shared=shard is not None)
        weight = through_main_grad(weight)
        device = input.device
        compute = compute_dtype(input, weight)
        logits_dtype, accum_dtype = chosen_dtypes(linear, compute, precise=precise)
        bias = None if bias is None else bias.contiguous()
        head = HeadOptions(
            compute,
            logits_dtype,
            accum_dtype,
            workspace_budget(linear.get("workspace_bytes"), device),
            Needs(wants_gradient(input), wants_gradient(weight), wants_gradient(bias)),
        )
        backend = resolve_backend(options.backend, device)
        return LinearSource(input, weight, bias, options, backend, head, shard)

    def tokens(self, target: Any) -> Tokens:
        """See :class:`Source`."""
        target, V, options = unwrap(target), self.weight.shape[0], self.options
        if self.shard is None:
            return Tokens.of(target, self.input, V, "input", options)
        bias = None if self.bias is None else (self.bias.dtype, len(self.bias) == V)
        given = (V, self.head, self.backend, self.input.dtype, self.weight.dtype, bias)
        return shared_tokens(self.shard, target, self.input, "input", options, *given)

    @property
    def x(self) -> Tensor:
        """Hidden states, (N, D)."""
        return self.input.reshape(-1, self.input.shape[-1])

    def losses(
        self,
        tokens: Tokens,
        o: Objective,
        ref: Tensor | None,
        value: Tensor | None,
        *,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Source`."""
        return self._rows(tokens, self.call(o, entropy=entropy), ref, value)

    def loss_sum(
        self,
        tokens: Tokens,
        o: Objective,
        ref: Tensor | None,
        value: Tensor | None,
        token_weight: Tensor | None,
        *,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Source`."""
        call = self.call(o, entropy=entropy)
        self._explain(tokens, call, known=True)
        divisor, factor = known_divisor(self.options), None
        if divisor is None or self.head.deferred:
            divisor = 1.0
            factor = mean_factor(tokens.counted.sum(dtype=torch.float64), self.options)
        encoded, changing = call.encode()
        total, found = linear_loss_sum(
            self.x,
            self.weight,
            self.bias,
            tokens.y,
            ref,
            value,
            token_weight,
            factor,
            changing,
            encoded,
            divisor,
        )
        return total, found[-1] if entropy else total.new_empty((lines.LINES, 0))

    def unit_sum(
        self,
        tokens: Tokens,
        lay_out: Callable[[], UnitLayout],
        loss_fn: UnitLoss,
        *,
        entropy: bool,
        entropy_gradient: bool = False,
        own: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Source`.

        With a frozen head, without gradients, and where recomputing the rows in backward is cheaper
        or the only way, whole units need not be in one chunk: ``loss_fn`` is called once on all.
        """
        call = self.call(None, entropy=entropy, entropy_gradient=entropy_gradient)
        shape = call.shape(self.input, self.weight)
        if not lays_out_units(tokens):
            _, rows = self._rows(tokens, call, None, None)
            return loss_fn(stats_of(rows, entropy=entropy), None), rows
        layout = lay_out()
        trained = shape.need_gradient and not shape.head_is_frozen
        plan = plan_units(layout.ends, shape, self.head.budget) if trained else None
        if plan is not None:
            report_plan(lambda: self._with_exchange(plan, call, top1=True))
            operands = (self.x, self.weight, self.bias, tokens.y)
            step = step_of_log_probs(loss_fn, call, self.input.device.type, own=own)
            return unit_sum(*operands, layout, call, plan, step)
        _, rows = self._rows(tokens, call, None, None, layout.positions)
        return loss_of_rows(rows, layout, call, loss_fn, own=own), rows

    def logits_sum(
        self,
        tokens: Tokens,
        lay_out: Callable[[], UnitLayout],
        loss_fn: LogitsLoss,
        *,
        entropy: bool,
        entropy_gradient: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of a function of the logits over all units, and row results.

        Raises:
            ValueError: A unit does not fit the budget: rows of logits cannot be made again in
                ranges, as log-probs can.
        """
        call = self.call(None, entropy=entropy, entropy_gradient=entropy_gradient)
        shape = replace(call.shape(self.input, self.weight), whole_logits=True)
        layout = lay_out()
        plan = self.plan_whole_rows(layout, shape)
        report_plan(lambda: plan)
        step = step_of_logits(loss_fn, call, self.input.device.type, gradient=shape.need_gradient)
        operands = (self.x, self.weight, self.bias, tokens.y)
        return unit_sum(*operands, layout, call, plan, step)

    def plan_whole_rows(self, layout: UnitLayout, shape: LinearShape) -> Plan:
        """Plan chunks of whole units that hold whole rows of logits.

        Raises:
            ValueError: A unit, or even a row, does not fit the budget.
        """
        refuse_shared(self.shard, "linear_loss with logits=True")
        budget = self.head.budget
        check_budget(["unit"], shape, budget)
        plan = plan_units(layout.ends, shape, budget)
        if plan is None:
            largest = max(map(sub, layout.ends, [0, *layout.ends]))
            needed = tile_bytes(largest, shape.vocabulary, "unit", shape)
            raise ValueError(
                "with logits=True a chunk holds the logits of whole units, and a unit of "
                f"{largest} tokens takes {needed} bytes: workspace_bytes={budget} is too small; "
                "raise it, or give smaller units (none, if loss_fn is additive over tokens)"
            )
        return plan

    def statistics(self, tokens: Tokens, *, entropy: bool, entropy_gradient: bool = True) -> Tensor:
        """See :class:`Source`."""
        # Whether an entropy will be differentiated is not known before backward: assume it.
        call = self.call(None, entropy=entropy, entropy_gradient=entropy and entropy_gradient)
        return self._rows(tokens, call, None, None)[1]

    def call(self, o: Objective | None, *, entropy: bool, entropy_gradient: bool = False) -> Call:
        """Describe a call on these hidden states to the engine."""
        return Call(
            self.options.maths,
            o,
            self.options.ignore_index if self.shard is None else IGNORED,
            entropy,
            self.backend,
            head=replace(self.head, entropy_gradient=entropy_gradient),
            shard=self.shard,
        )

    def _rows(
        self,
        tokens: Tokens,
        call: Call,
        ref: Tensor | None,
        value: Tensor | None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return losses and row results; ``positions`` of counted rows, if they are known."""
        self._explain(tokens, call, known=False)
        shape = call.shape(self.input, self.weight)
        # Backward must not be the first to object.
        check_budget(routes_for(shape, known=False), shape, self.head.budget)
        encoded, changing = call.encode()
        operands = (self.x, self.weight, self.bias, tokens.y)
        counted = -1
        if positions is not None:
            counted = positions.numel()
            positions = None if counted == tokens.y.numel() else positions
        elif not torch.compiler.is_compiling() and has_data(tokens.y):
            # Here, not inside: backward need not wait for it again.
            positions, counted = counted_positions(tokens.y, tokens.ignore_index)
        loss, rows, _ = linear_rows(*operands, ref, value, changing, encoded, positions, counted)
        return loss, rows

    def _explain(self, tokens: Tokens, call: Call, *, known: bool) -> None:
        def plan() -> Plan:
            count = tokens.count()
            shape = call.shape(self.input, self.weight)
            shape = replace(shape, all_rows=count == tokens.y.numel())
            found = plan_linear(routes_for(shape, known=known), count, shape, self.head.budget)
            return self._with_exchange(found, call, top1=call.entropy or call.objective is None)

        report_plan(plan)

    def _with_exchange(self, plan: Plan, call: Call, *, top1: bool) -> Plan:
        return shared_plan(plan, call, len(self.x), top1=top1, reduces=call.linear.needs.input)


def open_source(
    function: Callable[..., Any],
    input: Any,
    linear_weight: Any,
    given: Mapping[str, Any],
    *,
    precise: bool,
) -> tuple[LinearSource, Options]:
    """Check the head and the shared options of a public function."""
    common, linear = split_linear(given)
    options = parse_options(function, common)
    return LinearSource.of(input, linear_weight, options, linear, precise=precise), options
