"""Gradients of hidden states, weight and bias, filled piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_losses.engine.head import EVERYTHING, HeadGradient
from fused_losses.engine.planned import Place, PlannedCall


def fake_gradients(
    owners: Sequence[Tensor | None],
    needs: Sequence[bool],
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Return what operators promise for the gradients of owners that need them: contiguous."""
    form = torch.contiguous_format
    return tuple(
        torch.empty_like(t, dtype=dtype, memory_format=form)
        for t, need in zip(owners, needs, strict=True)
        if need and t is not None
    )


class GradientSums:
    """Where the gradients of a call wait for backward.

    They wait in the dtype of what they belong to, except that fp16 waits in fp32 until the factor 1
    / count and the upstream gradient have been applied.

    Attributes:
        head: The head of the call.
        dx: (N, D) gradient of the hidden states, or None.
    """

    def __init__(self, planned: PlannedCall) -> None:
        options = planned.call.linear
        need_dx, need_dw, need_db = options.needs
        self.head = planned.head
        compute, self._owner_dtype = options.compute_dtype, planned.x.dtype
        self._half = compute == torch.float16
        self._shard = planned.call.shard
        self._owner = planned.x.dtype
        # Sums over ranges of the vocabulary are as wide as those over tokens.
        ranges = len(planned.plan.columns) > 1 or self._shard is not None
        self._dx_dtype = torch.promote_types(compute, torch.float32) if ranges else compute
        if self._half:
            self._dx_dtype = torch.float32
        self.dx = None
        if need_dx:
            # Ignored tokens' gradients are exactly zero.
            make = torch.empty_like if planned.positions is None else torch.zeros_like
            wide = self._dx_dtype if self._shard is not None else planned.x.dtype
            self.dx = make(
                planned.x,
                dtype=torch.float32 if self._half else wide,
                memory_format=torch.contiguous_format,
            )
        chunks = len(planned.plan.chunks)
        self._sums = HeadGradient(self.head, need_dw, need_db, options.accum_dtype, chunks)

    def dx_of(self, at: Place, x: Tensor, *, overwrite: bool = False) -> Tensor | None:
        """Return memory for the gradient of some hidden states (R, D), its own place if it can.

        ``overwrite``: else that of ``x``, nobody's any more, where it is a copy of theirs.
        """
        if self.dx is None:
            return None
        if self._in_place(at, self.dx):
            return self.dx[at]
        # A slice of what computes as it lies is no copy.
        copied = not isinstance(at, slice) or self._owner_dtype != x.dtype
        if overwrite and copied and x.dtype == self._dx_dtype and x.is_contiguous():
            return x
        return x.new_empty(x.shape, dtype=self._dx_dtype)

    def put_dx(self, at: Place, dx: Tensor) -> None:
        """Put what ``dx_of`` gave, now filled, where it belongs."""
        if self.dx is not None and not self._in_place(at, self.dx):
            self.dx[at] = dx.to(self.dx.dtype)

    def complete(self) -> None:
        """Sum the hidden states' gradient over the ranks that share the head, before rounding."""
        if self.dx is not None and self._shard is not None:
            dx = self._shard.sum(self.dx)
            self.dx = dx if self._half else dx.to(self._owner)

    def _in_place(self, at: Place, dx: Tensor) -> bool:
        return isinstance(at, slice) and dx.dtype == self._dx_dtype

    def add_head(
        self,
        dz: Tensor,
        x: Tensor,
        scale: Tensor | None = None,
        columns: slice = EVERYTHING,
    ) -> None:
        """Add what ``scale * dz`` of some tokens and columns gives to weight and bias."""
        self._sums.add(dz, x, scale, columns)

    def head_gradients(
        self, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of weight and bias, in their dtypes (fp16: still fp32)."""
        dw, db = self._sums.dw, self._sums.db
        if dw is not None and not self._half:
            dw = dw.to(weight.dtype)
        if db is not None and bias is not None and not self._half:
            db = db.to(bias.dtype)
        return dw, db
