"""Memory for a chunk's logits and their gradient, kept from call to call where that pays.

On a GPU torch's allocator keeps freed memory at hand. On a CPU it goes back to the system, and
every call pays for touching its pages anew: on virtual machines as much as a quarter of a step. So
one workspace, of at most the default budget, stays for the next call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fused_losses.chunk_bytes import DEFAULT_CPU_BYTES, row_stride

Tile = Callable[[int, int], tuple[Tensor, Tensor]]

_ALIGNMENT = 256  # bytes, between the two tensors of a workspace
_lock = threading.Lock()
_kept: list[Tensor] = []  # none or one


@contextmanager
def workspace(
    rows: int,
    columns: int,
    backend: str,
    spare_bytes: int,
    device: torch.device,
    dtype: torch.dtype,
    gradient_dtype: torch.dtype | None,
) -> Iterator[Tile]:
    """Give memory for tiles of up to ``rows`` x ``columns`` logits, and for their gradient.

    Memory from a call before may be larger than needed, by up to ``spare_bytes``.

    Yields:
        ``tile(rows, columns)``: logits and gradient of that size, rows contiguous and aligned, the
        same memory where ``gradient_dtype`` is the logits' own or None.
    """
    elements = rows * row_stride(columns, backend)
    shared = gradient_dtype in (None, dtype)
    first = -(-elements * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    second = 0 if gradient_dtype is None or shared else elements * gradient_dtype.itemsize
    memory = _take(first + second, first + second + spare_bytes, device)

    def tile(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        stride = row_stride(columns, backend)
        size = rows * stride
        z = memory[: size * dtype.itemsize].view(dtype).view(rows, stride)[:, :columns]
        if gradient_dtype is None or shared:
            return z, z
        dz = memory[first : first + size * gradient_dtype.itemsize].view(gradient_dtype)
        return z, dz.view(rows, stride)[:, :columns]

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
