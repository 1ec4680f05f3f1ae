"""A planned call over the head: the tokens that count, in chunks, and the products to make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from fused_losses.chunk_bytes import least_bytes
from fused_losses.engine.call import Call, Needs
from fused_losses.engine.head import Head
from fused_losses.engine.rows import accumulation_dtype, lines, new_rows
from fused_losses.engine.sharded_rows import passes_of
from fused_losses.engine.workspace import Tiles, largest_free, out_of_memory, workspace
from fused_losses.plan import Plan, Route, plan_linear

Place = slice | Tensor  # where tokens are among the rows of a call


def counted_positions(y: Tensor, ignore_index: int) -> tuple[Tensor | None, int]:
    """Return the flat positions of the labels that count, and how many rows to take.

    No positions: take every row as it comes.

    On a GPU this is the one host synchronisation of a call. While a CUDA graph is captured nothing
    may depend on data: all rows stay, and ignored ones are zeroed.
    """
    if _capturing(y):
        return None, y.numel()
    positions = (y != ignore_index).nonzero()[:, 0]
    counted = positions.numel()
    return None if counted == y.numel() else positions, counted


def _capturing(t: Tensor) -> bool:
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


class PlannedCall:
    """A head over the counted tokens of one call.

    Args:
        x: Hidden states (N, D).
        weight: (V, D).
        bias: (V,) or None.
        y: Labels (N,).
        positions: The counted ones, in the order in which chunks take them; None: all rows.
        call: What is asked for.
        plan: How many tokens and how many columns of the vocabulary are taken at a time.

    Attributes:
        head: The products.
        keep_rows: Whether row results are wanted.
        masked: Whether rows of ignored tokens are among those that chunks take.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        y: Tensor,
        positions: Tensor | None,
        call: Call,
        plan: Plan,
    ) -> None:
        self.x, self.y, self.positions = x, y, positions
        self.call, self.plan = call, plan
        self.head = Head(weight, bias, call.linear.compute_dtype, call.linear.logits_dtype)
        self.backend = passes_of(call.backend, call.shard)
        self.masked = positions is None and _capturing(y)
        self.keep_rows = True
        self.rows_dtype = accumulation_dtype(call.linear.logits_dtype)
        self._rows: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """(LINES, N) row results; those of dropped tokens are zeros from the start."""
        if self._rows is None:
            self._rows = new_rows(self.y, self.rows_dtype, zero=self.positions is not None)
        return self._rows

    def new_rows(self, y: Tensor) -> Tensor:
        """Return memory for the row results of a strip with labels ``y``."""
        # All of the call: they are where they belong.
        if self.keep_rows and self.positions is None and len(self.plan.strips) == 1:
            return self.rows
        return new_rows(y, self.rows_dtype)

    @property
    def results(self) -> Tensor:
        """Row results as they leave the engine: (LINES, 0) if they are not wanted."""
        if self.keep_rows:
            return self.rows
        return self.x.new_empty((lines.LINES, 0), dtype=self.rows_dtype)

    def put_rows(self, at: Place, rows: Tensor) -> None:
        """Put a strip's row results among those of the call."""
        if self.keep_rows and rows is not self.rows:
            self.rows[:, at] = rows

    @staticmethod
    def of(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        y: Tensor,
        call: Call,
        routes: Sequence[Route],
        needs: Needs | None = None,
        *,
        positions: Tensor | None = None,
        counted: int = -1,
    ) -> PlannedCall:
        """Plan a call over the labels that count, by the cheapest of some routes.

        ``positions`` and ``counted``: see :func:`counted_positions`; -1: they are to be found.
        """
        if counted < 0:
            positions, counted = counted_positions(y, call.ignore_index)
        shape = replace(call.shape(x, weight, needs), all_rows=positions is None)
        plan = plan_linear(routes, counted, shape, call.linear.budget)
        return PlannedCall(x, weight, bias, y, positions, call, plan)

    def places(self) -> Iterator[Place]:
        """Where the tokens of each chunk are, chunk after chunk."""
        start = 0
        for size in self.plan.chunks:
            at = slice(start, start + size)
            yield at if self.positions is None else self.positions[at]
            start += size

    def strips(self) -> Iterator[list[slice]]:
        """The parts of each chunk whose logits exist at a time, chunk after chunk."""
        sizes = iter(self.plan.strips)
        for chunk in self.plan.chunks:
            parts: list[slice] = []
            start = 0
            while start < chunk:
                stop = start + next(sizes)
                parts.append(slice(start, stop))
                start = stop
            yield parts

    def columns(self) -> Iterator[slice]:
        """The ranges of the vocabulary, in order; of a shard smaller than the largest, its own."""
        start, V = 0, self.head.vocabulary
        for size in self.plan.columns:
            if start < V:
                yield slice(start, min(start + size, V))
            start += size

    def labels_and_hidden(self, at: Place) -> tuple[Tensor, Tensor]:
        """Labels (R,) and hidden states (R, D), in the compute dtype, of some tokens."""
        y, x = self.y[at], self.x[at].to(self.head.compute_dtype)
        if self.masked:
            # Kept rows of ignored tokens: NaN there must not reach dW as 0 * NaN.
            x = x.masked_fill((y == self.call.ignore_index)[:, None], 0.0)
        return y, x

    @contextmanager
    def workspace(self) -> Iterator[Tiles]:
        """Memory for one strip's logits of one range of columns, and for a chunk's gradient.

        Raises:
            RuntimeError: Out of memory, of torch's own type, naming the budget to lower and a value
                that fits, or what makes a call keep to its budget.
        """
        plan, head = self.plan, self.head
        size, strips = (max(plan.chunks, default=0), max(plan.columns)), len(plan.strips)
        gradient = head.compute_dtype if plan.has_gradient else None
        spare = max(plan.budget_bytes - plan.workspace_bytes, 0)
        with ExitStack() as stack:
            try:
                tile = stack.enter_context(
                    workspace(
                        *size,
                        plan.backend,
                        spare,
                        self.x.device,
                        head.logits_dtype,
                        gradient,
                        strip=max(plan.strips, default=0),
                        apart=len(plan.chunks) == 1 < strips,
                    )
                )
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                raise type(error)(f"{self._too_large()}: {error}") from error
            yield tile

    def _too_large(self) -> str:
        plan, head = self.plan, self.head
        said = f"no memory for a workspace of {plan.workspace_bytes} bytes; "
        if plan.workspace_bytes > plan.budget_bytes:
            # One chunk, in place of several and a wider sum of dW, which take no less.
            cure = f"accum_dtype={head.compute_dtype} keeps to workspace_bytes, now "
            return f"{said}{cure}{plan.budget_bytes}"
        cure = "lower workspace_bytes or FUSED_LOSSES_WORKSPACE_BYTES, now"
        least = least_bytes(plan.route, self.call.shape(self.x, head.weight))
        fits = largest_free(plan.workspace_bytes, least, self.x.device)
        if fits is None:
            return (
                f"{said}{cure} {plan.budget_bytes}, though the least that works, {least}, "
                "does not fit either: free memory, or give the call fewer tokens or a smaller head"
            )
        return f"{said}{cure} {plan.budget_bytes}: {fits} fits"
