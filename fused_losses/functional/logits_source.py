"""Log-probs from logits that exist."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_losses.arguments import check_flag, refuse_unserved
from fused_losses.backends import Objective, resolve_backend
from fused_losses.engine.call import Call
from fused_losses.engine.logits_rows import logits_rows
from fused_losses.engine.rows import stats_of
from fused_losses.engine.sharded_rows import IGNORED, VocabularyShard
from fused_losses.engine.unit_sum import UnitLoss
from fused_losses.engine.units import UnitLayout
from fused_losses.functional.observe import report_plan
from fused_losses.functional.options import Options
from fused_losses.functional.sharded import open_logits, shared_plan, shared_tokens, unwrap
from fused_losses.functional.sources import wants_gradient
from fused_losses.functional.tokens import Tokens, check_float, mean_factor
from fused_losses.plan import Plan, plan_logits


@dataclass(frozen=True)
class LogitsSource:
    """Logits (..., V) that exist."""

    logits: Tensor
    options: Options
    inplace: bool
    backend: str
    shard: VocabularyShard | None = None

    @staticmethod
    def of(logits: Any, options: Options, inplace: bool = False) -> LogitsSource:
        """Check the logits.

        Raises:
            TypeError: Not a floating-point tensor.
            ValueError: No vocabulary; ``inplace`` on logits whose elements share memory.
        """
        logits, shard = open_logits(logits)
        check_float("logits", logits)
        refuse_unserved("logits", logits, batched=True)
        if logits.dim() < 1 or logits.shape[-1] == 0:
            raise ValueError(f"logits must be (..., V) with V > 0, got {tuple(logits.shape)}")
        check_flag("inplace", inplace)
        if inplace:
            if logits.stride(-1) != 1 and logits.shape[-1] > 1:
                raise ValueError("inplace needs logits with contiguous rows; pass inplace=False")
            if any(s == 0 for s, n in zip(logits.stride(), logits.shape, strict=True) if n > 1):
                raise ValueError(
                    "inplace needs logits whose elements do not share memory, got an expanded "
                    "tensor; pass inplace=False"
                )
        return LogitsSource(
            logits, options, inplace, resolve_backend(options.backend, logits.device), shard
        )

    def tokens(self, target: Any) -> Tokens:
        """See :class:`Source`."""
        target, V = unwrap(target), self.logits.shape[-1]
        if self.shard is None:
            return Tokens.of(target, self.logits, V, "logits", self.options)
        given = (V, self.backend, self.inplace, self.logits.dtype, wants_gradient(self.logits))
        return shared_tokens(self.shard, target, self.logits, "logits", self.options, *given)

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
        return self._rows(tokens, o, ref, value, entropy)

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
        loss, rows = self._rows(tokens, o, ref, value, entropy)
        if token_weight is not None:
            loss = loss * token_weight.to(loss.dtype)
        factor = mean_factor(tokens.counted.sum(dtype=torch.float64), self.options)
        return loss.sum() * factor.to(loss.dtype), rows

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
        """See :class:`Source`; the loss is autograd's own function of all rows."""
        rows = self.statistics(tokens, entropy=entropy)
        return loss_fn(stats_of(rows, entropy=entropy), None), rows

    def statistics(self, tokens: Tokens, *, entropy: bool, entropy_gradient: bool = True) -> Tensor:
        """See :class:`Source`."""
        return self._rows(tokens, None, None, None, entropy)[1]

    def _rows(
        self,
        tokens: Tokens,
        o: Objective | None,
        ref: Tensor | None,
        value: Tensor | None,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        options, V = self.options, self.logits.shape[-1]
        ignore_index = options.ignore_index if self.shard is None else IGNORED
        call = Call(options.maths, o, ignore_index, entropy, self.backend, self.inplace)
        call = replace(call, shard=self.shard)
        gradient = wants_gradient(self.logits) or wants_gradient(value)
        top1 = entropy or o is None

        def plan() -> Plan:
            found = plan_logits(tokens.count(), V, self.backend, need_gradient=gradient)
            return shared_plan(found, call, 0, top1=top1, reduces=False)

        report_plan(plan)
        encoded, changing = call.encode()
        # (B, T, V): the kernels take any strides of three dimensions, so slices are not copied.
        z = self.logits
        z = z.flatten(0, -3) if z.dim() > 3 else z if z.dim() > 1 else z[None]
        return logits_rows(z, tokens.y, ref, value, changing, encoded)
