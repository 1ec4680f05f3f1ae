"""The GEMMs of the linear path: logits from hidden states, and the sums of their gradients.

Matrix products are torch's (cuBLAS, oneDNN). What is added here is precision where a product rounds
to 16 bits: fp32 logits from 16-bit operands, and weight gradients accumulated in fp32 across
chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.cost import sum_dtype

EVERYTHING = slice(None)

# Bytes of upcast vocabulary at a time, where a device has no mixed-precision product.
_BLOCK_BYTES = 2**20


class Head:
    """The output head in the dtype it computes in.

    Args:
        weight: (V, D).
        bias: (V,) or None.
        compute_dtype: Of the operands.
        logits_dtype: Of the logits; fp32 logits of 16-bit operands are never rounded to 16 bits.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        compute_dtype: torch.dtype,
        logits_dtype: torch.dtype,
    ) -> None:
        self.weight = weight.to(compute_dtype)
        self.bias = bias
        self.compute_dtype = compute_dtype
        self.logits_dtype = logits_dtype

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.weight.shape[0]

    def logits(self, x: Tensor, out: Tensor, columns: slice = EVERYTHING) -> None:
        """Write ``x @ weight.T + bias`` to out (R, C); x is (R, D) in the compute dtype."""
        if self.bias is not None:
            # Under the product, not on top of it: logits are rounded once.
            out.copy_(self.bias[columns])
        _product(x, self.weight[columns].t(), out, accumulate=self.bias is not None)

    def dx(
        self, dz: Tensor, out: Tensor, columns: slice = EVERYTHING, *, accumulate: bool = False
    ) -> None:
        """Write ``dz @ weight`` to out (R, D), or add it; dz is (R, C)."""
        _product(dz, self.weight[columns], out, accumulate=accumulate)


class HeadGradient:
    """Gradients of weight and bias, summed over the chunks of a call.

    A single chunk needs no buffer: its product is the gradient, rounded once. Several are
    accumulated in ``accum_dtype``: sums of 16-bit numbers would lose the rows of rare tokens.
    """

    def __init__(
        self, head: Head, need_dw: bool, need_db: bool, accum_dtype: torch.dtype, chunks: int
    ) -> None:
        compute = head.compute_dtype
        wide = torch.promote_types(compute, torch.float32)
        self._weight, self._need_dw = head.weight, need_dw
        self._dtype = sum_dtype(compute, accum_dtype, chunks)
        self._dw: Tensor | None = None
        self.db = head.weight.new_zeros(head.vocabulary, dtype=wide) if need_db else None
        self._begun: set[int] = set()

    @property
    def dw(self) -> Tensor | None:
        """(V, D), or None if nobody needs it; there is no memory for it before the first chunk."""
        if self._need_dw and self._dw is None:
            make = torch.empty_like if self._begun else torch.zeros_like
            # Contiguous, as the fakes of the operators promise, whatever the weight is.
            form = torch.contiguous_format
            self._dw = make(self._weight, dtype=self._dtype, memory_format=form)
        return self._dw

    def add(self, dz: Tensor, x: Tensor, scale: Tensor | None, columns: slice) -> None:
        """Add a chunk: ``dw += dz.T @ x``, ``db += dz.sum(0)``, dz's rows times ``scale``."""
        begun = columns.start in self._begun
        self._begun.add(columns.start)
        if self.dw is not None:
            # (R, D), not (R, C): the factor goes to the smaller operand.
            scaled = x if scale is None else (x * scale[:, None]).to(x.dtype)
            _product(dz.t(), scaled, self.dw[columns], accumulate=begun)
        if self.db is not None:
            if scale is None:
                self.db[columns] += dz.sum(0, dtype=self.db.dtype)
            else:
                self.db[columns] += torch.mv(dz.t().to(self.db.dtype), scale.to(self.db.dtype))


def _product(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
    """``out = a @ b`` or ``out += a @ b``, computed and rounded in out's dtype if it is wider."""
    if out.numel() == 1:
        # BLAS sums a row times a column term by term, as autograd knows: its own product of the
        # two is transposed, which sums in lanes. 3 times the error of 4000 terms otherwise.
        a, b, out = b.t(), a.t(), out.t()
    if a.dtype == out.dtype:
        if accumulate:
            torch.addmm(out, a, b, out=out)  # FlopCounterMode does not know addmm_
        else:
            torch.mm(a, b, out=out)
    elif a.is_cuda and out.dtype == torch.float32 and a.dtype.itemsize == 2:
        if accumulate:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        _product_in_blocks(a, b, out, accumulate)


def _product_in_blocks(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """The same where no mixed-precision product exists, upcasting the vocabulary in blocks."""
    summed, wide = a.shape[1], out.dtype
    if summed > max(out.shape):  # the vocabulary is what is summed over
        if not accumulate:
            out.zero_()
        size = max(1, _BLOCK_BYTES // (sum(out.shape) * wide.itemsize))
        for start in range(0, summed, size):
            block = slice(start, start + size)
            torch.addmm(out, a[:, block].to(wide), b[block].to(wide), out=out)
        return
    if out.shape[0] > out.shape[1]:  # the vocabulary runs along the rows
        a, b, out = b.t(), a.t(), out.t()
    a = a.to(wide)
    columns = max(1, _BLOCK_BYTES // (summed * wide.itemsize))
    for start in range(0, b.shape[1], columns):
        block = slice(start, start + columns)
        if accumulate:
            torch.addmm(out[:, block], a, b[:, block].to(wide), out=out[:, block])
        else:
            torch.mm(a, b[:, block].to(wide), out=out[:, block])
