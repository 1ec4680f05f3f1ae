"""The loop of the linear path: for each chunk of tokens, logits, row pass, gradient products.

Ignored tokens are dropped before the first product, so cost follows the supervised ones. Nothing of
size tokens x vocabulary is made: a chunk's logits live in one workspace that the next one reuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_losses.backends import RowMaths, lines, load_backend
from fused_losses.engine.head import Head, HeadGradient
from fused_losses.engine.rows import Coefficients, new_rows
from fused_losses.plan import Plan


def counted_positions(y: Tensor, ignore_index: int) -> Tensor | None:
    """Return the flat positions of the labels that count; None: take every row as it comes.

    On a GPU this is the one host synchronisation of a call. While a CUDA graph is captured nothing
    may depend on data: all rows stay, and ignored ones are zeroed.
    """
    if _capturing(y):
        return None
    positions = (y != ignore_index).nonzero()[:, 0]
    return None if positions.numel() == y.numel() else positions


def _capturing(t: Tensor) -> bool:
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


class Chunk:
    """Some counted tokens of a call: their hidden states, labels, logits and row results.

    Attributes:
        at: Where its tokens are among the rows of the call.
        x: (R, D) hidden states, in the compute dtype.
        y: (R,) labels.
        z: (R, V) logits.
        dz: (R, V) gradient of the logits, once ``differentiate`` was called; maybe z's memory.
        scale: (R,) factor on dz's rows that is still to be applied, or None.
        rows: (LINES, R) row results.
    """

    def __init__(self, call: ChunkedHead, at: slice | Tensor, z: Tensor, dz: Tensor) -> None:
        self._call = call
        self.at = at
        self.y = call.y[at]
        self.x = call.x[at].to(call.head.compute_dtype)
        if call.masked:
            # Kept rows of ignored tokens: NaN there must not reach dW as 0 * NaN.
            self.x = self.x.masked_fill((self.y == call.ignore_index)[:, None], 0.0)
        self.z, self.dz = z, dz
        self.scale: Tensor | None = None
        self._exponentials = False
        self.rows = new_rows(self.y, z.dtype)
        call.head.logits(self.x, z)

    def row_pass(self, *, exponentials: bool = False, **options: Any) -> None:
        """Fill ``rows`` and, if asked, ``dz`` with exponentials; see ``Backend.row_pass``."""
        call = self._call
        for name in ("ref", "value"):
            if options.get(name) is not None:
                options[name] = options[name][self.at]
        call.backend.row_pass(
            self.z,
            self.y,
            self.rows,
            maths=call.maths,
            ignore_index=call.ignore_index,
            exponentials=self.dz if exponentials else None,
            **options,
        )
        self._exponentials = exponentials
        # Rows of dropped tokens are zeros from the start.
        call.rows[:, self.at] = self.rows

    def differentiate(self, c: Coefficients) -> None:
        """Make ``scale * dz`` the gradient of the logits, from the coefficients of the rows (R,).

        Exponentials are there already up to a factor per row; else one more row pass writes it all.
        """
        call = self._call
        if self._exponentials:
            self.scale = self._scale_exponentials(c)
            return
        call.backend.row_gradient(
            self.z,
            self.y,
            self.rows,
            maths=call.maths,
            ignore_index=call.ignore_index,
            dlogp=c.dlogp,
            dlse=c.dlse,
            dmean=c.dmean,
            dentropy=c.dentropy,
            dz=self.dz,
        )

    def _scale_exponentials(self, c: Coefficients) -> Tensor:
        maths = self._call.maths
        alpha, s = -c.dlogp, self.rows[lines.SUM]
        if c.dlse is not None:
            alpha = alpha + c.dlse
            # The target's entry also carries dlse, divided by alpha; keep away from 0 / 0.
            least = 2.0**-20 * c.dlse.abs()
            alpha = torch.where(alpha.abs() < least, least, alpha)
            extra = torch.where(c.dlse == 0.0, 0.0, c.dlse / alpha * s)
            if maths.cap is not None:
                tanh_y = (self.rows[lines.LOGP] + self.rows[lines.LSE]) / maths.cap
                extra = extra * (1.0 - tanh_y * tanh_y)
            good = (self.y >= 0) & (self.y < self.dz.shape[1])
            at_y = torch.where(good, self.y, 0).to(torch.int64)[:, None]
            entry = self.dz.gather(1, at_y) + extra[:, None].to(self.dz.dtype)
            self.dz.scatter_(1, at_y, entry)
        factor = maths.pre * (1.0 if maths.cap is None else maths.cap)
        scale = alpha * factor / s
        return scale.masked_fill(self.y == self._call.ignore_index, 0.0)


class ChunkedHead:
    """A head over the counted tokens of one call; iterating yields its chunks one after another.

    Args:
        x: Hidden states (N, D).
        y: Labels (N,).
        positions: The counted ones, in the order in which chunks take them; None: all rows.
        plan: Its ``chunks`` say how many tokens each chunk takes.
        head: The GEMMs.
        maths: Transform of the logits.
        ignore_index: Label of ignored rows.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        positions: Tensor | None,
        plan: Plan,
        head: Head,
        maths: RowMaths,
        ignore_index: int,
    ) -> None:
        self.x, self.y, self.positions = x, y, positions
        self.plan, self.head, self.maths = plan, head, maths
        self.ignore_index = ignore_index
        self.backend = load_backend(plan.backend)
        self.masked = positions is None and _capturing(y)
        self.rows = new_rows(y, head.logits_dtype, zero=positions is not None)

    def __iter__(self) -> Iterator[Chunk]:
        """Make the logits of one chunk after another in the same workspace."""
        sizes = self.plan.chunks
        if not sizes:
            return
        z, dz = self._workspace(max(sizes))
        start = 0
        for size in sizes:
            stop = start + size
            at = slice(start, stop) if self.positions is None else self.positions[start:stop]
            yield Chunk(self, at, z[:size], dz[:size])
            start = stop

    def _workspace(self, rows: int) -> tuple[Tensor, Tensor]:
        """Memory for a chunk's logits and their gradient, the same where the dtype is.

        Raises:
            RuntimeError: Out of memory, of torch's own type, naming the budget to lower.
        """
        separate = self.head.logits_dtype != self.head.compute_dtype and self.plan.has_gradient
        try:
            z = self.head.new_logits(rows)
            dz = torch.empty_like(z, dtype=self.head.compute_dtype) if separate else z
        except RuntimeError as error:  # torch.OutOfMemoryError is one; a CPU raises it bare
            if "memory" not in str(error):
                raise
            raise type(error)(
                f"no memory for a workspace of {self.plan.workspace_bytes} bytes; lower "
                "workspace_bytes or FUSED_LOSSES_WORKSPACE_BYTES, now "
                f"{self.plan.budget_bytes}: {error}"
            ) from error
        return z, dz


class GradientSums:
    """Gradients of hidden states, weight and bias, filled chunk by chunk.

    They wait for backward in the dtype of what they belong to, except that fp16 waits in fp32 until
    the factor 1 / count and the upstream gradient have been applied.
    """

    def __init__(self, call: ChunkedHead, needs: Sequence[bool], accum_dtype: torch.dtype) -> None:
        need_dx, need_dw, need_db = needs
        head = call.head
        self._head = head
        self._half = head.compute_dtype == torch.float16
        self.dx = None
        if need_dx:
            # Ignored tokens' gradients are exactly zero.
            make = torch.empty_like if call.positions is None else torch.zeros_like
            self.dx = make(
                call.x,
                dtype=torch.float32 if self._half else call.x.dtype,
                memory_format=torch.contiguous_format,
            )
        self._sums = HeadGradient(head, need_dw, need_db, accum_dtype, len(call.plan.chunks))

    def add(self, chunk: Chunk) -> None:
        """Add what ``chunk.dz`` contributes."""
        if self.dx is not None:
            if isinstance(chunk.at, slice) and self.dx.dtype == self._head.compute_dtype:
                dx = self.dx[chunk.at]
                self._head.dx(chunk.dz, dx)
                if chunk.scale is not None:
                    dx.mul_(chunk.scale[:, None])
            else:
                dtype = torch.float32 if self._half else self._head.compute_dtype
                dx = chunk.x.new_empty(chunk.x.shape, dtype=dtype)
                self._head.dx(chunk.dz, dx)
                if chunk.scale is not None:
                    dx = dx * chunk.scale[:, None]
                self.dx[chunk.at] = dx.to(self.dx.dtype)
        self._sums.add(chunk.dz, chunk.x, chunk.scale)

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
