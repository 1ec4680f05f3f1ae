"""Memory for a chunk's logits and their gradient, kept from call to call where that pays.

On a GPU torch's allocator keeps freed memory at hand. On a CPU it goes back to the system, and
every call pays for touching its pages anew: on virtual machines as much as a quarter of a step. So
one workspace, of at most the default budget, stays for the next call.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fused_losses.chunk_bytes import DEFAULT_CPU_BYTES, row_stride

_ALIGNMENT = 256  # bytes, between the two tensors of a workspace
_lock = threading.Lock()
_kept: list[Tensor] = []  # none or one


class Tiles:
    """Logits and their gradient in the memory of a workspace, rows contiguous and aligned.

    Args:
        logits: Memory for the logits.
        gradient: Memory for their gradient, or None: it takes the logits' place.
        dtype: Of the logits.
        gradient_dtype: Of the gradient.
        backend: Decides the distance of rows.
    """

    def __init__(
        self,
        logits: Tensor,
        gradient: Tensor | None,
        dtype: torch.dtype,
        gradient_dtype: torch.dtype,
        backend: str,
    ) -> None:
        self._logits, self._gradient = logits, gradient
        self._dtype, self._gradient_dtype = dtype, gradient_dtype
        self._backend = backend

    def __call__(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Return logits and gradient of that size; maybe the same memory."""
        return self.logits(rows, columns), self.gradient(rows, columns)

    def logits(self, rows: int, columns: int) -> Tensor:
        """Return logits of that size."""
        return self._view(self._logits, self._dtype, rows, columns)

    def gradient(self, rows: int, columns: int) -> Tensor:
        """Return a gradient of that size."""
        if self._gradient is None:
            return self.logits(rows, columns)
        return self._view(self._gradient, self._gradient_dtype, rows, columns)

    def drop_logits(self) -> None:
        """Let go of the logits' memory, for good."""
        self._logits = self._logits.new_empty(0)

    def _view(self, memory: Tensor, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
        stride = row_stride(columns, self._backend)
        of_rows = memory[: rows * stride * dtype.itemsize].view(dtype)
        return of_rows.view(rows, stride)[:, :columns]


@contextmanager
def workspace(
    rows: int,
    columns: int,
    backend: str,
    spare_bytes: int,
    device: torch.device,
    dtype: torch.dtype,
    gradient_dtype: torch.dtype | None,
    *,
    strip: int | None = None,
    apart: bool = False,
) -> Iterator[Tiles]:
    """Give memory for tiles of up to ``rows`` x ``columns`` logits, and for their gradient.

    Memory from a call before may be larger than needed, by up to ``spare_bytes``.

    Args:
        rows: Of the gradient.
        columns: Of both.
        backend: Decides the distance of rows.
        spare_bytes: What is too much.
        device: Where.
        dtype: Of the logits.
        gradient_dtype: Of the gradient; the logits' own or None: it takes their place.
        strip: Rows of the logits, if they are fewer.
        apart: Whether the logits' memory is to be dropped before the gradient's.
    """
    stride = row_stride(columns, backend)
    first = (rows if strip is None else strip) * stride * dtype.itemsize
    if gradient_dtype is None or gradient_dtype == dtype:
        memory = _take(first, first + spare_bytes, device)
        tile = Tiles(memory, None, dtype, dtype, backend)
    else:
        first = -(-first // _ALIGNMENT) * _ALIGNMENT
        second = rows * stride * gradient_dtype.itemsize
        start = 0 if apart else first
        memory = _take(start + second, start + second + spare_bytes, device)
        logits = memory
        if apart:
            logits = torch.empty(first, dtype=torch.uint8, device=device)
        tile = Tiles(logits, memory[start:], dtype, gradient_dtype, backend)
        del logits
    try:
        yield tile
    finally:
        _give_back(memory)


def release() -> None:
    """Let go of the memory that is kept."""
    with _lock:
        _kept.clear()


def out_of_memory(error: RuntimeError) -> bool:
    """Whether it says that memory ran out; a CPU has no type of its own for that."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def largest_free(too_much: int, least: int, device: torch.device) -> int | None:
    """Return a half, a quarter, ... of what there is no memory for; None below ``least``.

    Tried out: nothing else tells what an allocator can give.
    """
    size = too_much // 2
    while size >= least:
        try:
            torch.empty(size, dtype=torch.uint8, device=device)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            size //= 2
        else:
            return size
    return None


def _take(size: int, most: int, device: torch.device) -> Tensor:
    if device.type == "cpu":
        with _lock:
            if _kept and size <= _kept[0].numel() <= most:
                return _kept.pop()
            _kept.clear()  # before more is asked for
    return torch.empty(size, dtype=torch.uint8, device=device)


def _give_back(memory: Tensor) -> None:
    # Inference tensors can't be written to in ordinary mode; fake ones hold nothing.
    plain = type(memory) is Tensor and not memory.is_inference()
    if plain and memory.device.type == "cpu":
        with _lock:
            if not _kept and memory.numel() <= DEFAULT_CPU_BYTES:
                _kept.append(memory)
