"""What a chunk holds at a time: logits, and what its rows have of their own.

Of usual shapes logits are nearly all. Where the vocabulary is smaller than the hidden size, copies
of hidden states are: gathered or cast, summed, scaled. The engine frees them as counted here;
``tests/test_small_vocabularies.py`` holds it to that.
"""

from __future__ import annotations

import functools
import os
from bisect import bisect_right

import torch

from fused_losses.backends import lines
from fused_losses.backends.base import BLOCK_BYTES, DIVERGENCE_BLOCK_BYTES
from fused_losses.cost import LinearShape, Route

# Numbers per row that are alive at a time, in units of a row's results: those of two chunks, and
# what makes them.
_RESULTS = 5
# Tensors of the logits' size, in fp32 or wider, that a function of a chunk's logits may hold at a
# time beside the logits: a log-softmax, its exponential, the loss of each word, what autograd makes
# of them.
FUNCTION_TENSORS = 4
# The same of a divergence, of a block of rows: both sides' log-probs, a word's part, its slope, and
# what these are made of.
_DIVERGENCE_TENSORS = 9

# Long rows of a tile begin a multiple of so many elements apart, whatever the vocabulary: matrix
# units and kernels then access whole words. Counted for sm_90 at V = 50257 in bf16: 10 instructions
# per element of a row pass, else 34. Of shorter rows it would be a waste of memory.
_ALIGNED = 16
_LONG_ROW = 4096
# Narrower ranges of the vocabulary are not worth a launch.
_LEAST_COLUMNS = 256
# No call has as many tokens.
_MANY = 2**31

ENVIRONMENT_VARIABLE = "FUSED_LOSSES_WORKSPACE_BYTES"
DEFAULT_CPU_BYTES = 256 * 2**20
_DEFAULT_BYTES_GPU = 2**30


def row_stride(columns: int, backend: str) -> int:
    """Elements from one row of a tile to the next."""
    if backend == "torch" or columns < _LONG_ROW:
        return columns
    return -(-columns // _ALIGNED) * _ALIGNED


def tile_bytes(
    rows: int, columns: int, route: Route, shape: LinearShape, strip: int | None = None
) -> int:
    """Bytes that a chunk holds for one range of columns: what the budget bounds.

    Its logits, or those of ``strip`` rows at a time, their gradient where it is not in place, the
    row pass's scratch, and what its rows have of their own, which is most of it where the
    vocabulary is small.
    """
    strip = rows if strip is None else strip
    tile, gradient, scratch = _element_bytes(route, shape)
    # The torch backend passes over blocks of rows; a single row may be larger than a block.
    block = max(columns, BLOCK_BYTES // max(shape.logits_dtype.itemsize, 4))
    logits = (strip * tile + rows * gradient) * row_stride(columns, shape.backend)
    logits += min(strip * columns, block) * scratch
    if shape.teacher_hidden and (shape.backend == "torch" or not shape.divergence_in_kernel):
        wide = max(shape.logits_dtype.itemsize, 4)
        block = max(columns, DIVERGENCE_BLOCK_BYTES // wide)
        logits += min(strip * columns, block) * wide * _DIVERGENCE_TENSORS
    several = columns < shape.vocabulary
    upcast = _upcast(rows, strip, columns, route, shape)
    return logits + rows * _row_bytes(route, shape, several) + upcast


def logits_bytes(strip: int, shape: LinearShape) -> int:
    """Bytes of the logits of so many whole rows."""
    return strip * row_stride(shape.vocabulary, shape.backend) * shape.logits_dtype.itemsize


def _row_bytes(route: Route, shape: LinearShape, several: bool) -> int:
    """Bytes of a row beside its logits: copies of its hidden state, and its results.

    ``several``: the vocabulary is taken in ranges, so their sums are as wide as an accumulator.
    """
    c, a, D = shape.compute_dtype.itemsize, shape.accumulator_bytes, shape.hidden
    cast = shape.input_dtype not in (None, shape.compute_dtype)
    x = 0 if shape.all_rows and not cast else c
    dx = 0
    if shape.need_dx:
        wide = several or shape.compute_dtype == torch.float16
        dx = a if wide else c
        if not x and (dx == c or not several):
            dx = 0  # written where it belongs
    whole_rows = route in ("token", "unit")
    factored = c if whole_rows and shape.need_dw and shape.exponentials else 0
    # The chunk's hidden states, and with them those of the chunk before, which live until then, or
    # what the products take later: dx, or the operand of dW times a factor.
    hidden = x + max(x, dx, factored)
    if route == "forward":
        hidden = 2 * x
    if route == "frozen":
        hidden = a + x + c  # sums of exponentials times rows of the head; the targets' rows
    if cast and shape.input_dtype is not None:
        hidden += shape.input_dtype.itemsize  # gathered before the cast, or cast back
    # The teacher's hidden states, gathered, and cast.
    teacher = shape.teacher_hidden * (shape.teacher_logits_bytes + shape.teacher_dtype.itemsize)
    words = shape.words * (2 * torch.int64.itemsize + _function_bytes(shape))
    results = _RESULTS * lines.LINES * max(shape.logits_dtype.itemsize, 4)
    return hidden * D + teacher + words + results


def _function_bytes(shape: LinearShape) -> int:
    """Bytes per logit of what a function of logits gets, its gradient, and what it makes of it."""
    taken = 1 + shape.need_gradient + FUNCTION_TENSORS
    return taken * max(shape.logits_dtype.itemsize, 4)


def _upcast(rows: int, strip: int, columns: int, route: Route, shape: LinearShape) -> int:
    """Bytes of 16-bit operands made fp32 where no product takes them as they are, on a CPU."""
    if shape.backend != "torch" or shape.compute_dtype.itemsize > 2:
        return 0
    D, fp16 = shape.hidden, shape.compute_dtype == torch.float16
    # The operand with the shorter side goes as a whole, the other one piece after piece; both in
    # pieces if the sum is the longest.
    elements = 0
    if shape.logits_dtype != shape.compute_dtype:
        elements = min(strip, columns) * D
    if route == "frozen" or (fp16 and shape.need_dx and route != "forward"):
        elements = max(elements, min(rows, D) * min(columns, max(rows, D)))
    if route == "frozen" or (shape.need_dw and route != "forward"):
        elements = max(elements, min(columns, D) * rows)
    if shape.teacher_hidden and shape.teacher_dtype.itemsize <= 2:
        elements = max(elements, min(strip, columns) * shape.teacher_hidden)
    return 4 * elements


def _element_bytes(route: Route, shape: LinearShape) -> tuple[int, int, int]:
    """Bytes per logit of a tile, of its gradient if it is apart, and of the row pass's scratch."""
    separate_gradient = route != "forward" and shape.logits_dtype != shape.compute_dtype
    gradient = separate_gradient * shape.compute_dtype.itemsize
    tile = shape.logits_dtype.itemsize
    if shape.teacher_hidden:
        tile += shape.teacher_logits_bytes
    elif shape.whole_logits and not shape.words:
        tile += _function_bytes(shape)
    if shape.backend != "torch":
        return tile, gradient, 0
    # A pass that must leave the logits as they are, or whose maths are wider, works on a copy.
    whole = route == "unit" or (route == "token" and shape.sharded)
    keeps_logits = whole and not shape.exponentials
    narrow = shape.compute_dtype if route == "recompute" else shape.logits_dtype
    copies = int(keeps_logits or narrow.itemsize < 4)
    copies += (shape.softcap and route != "forward") + shape.entropy
    return tile, gradient, max(shape.logits_dtype.itemsize, 4) * copies


def least_columns(route: Route, shape: LinearShape) -> int:
    """Fewest columns of a range."""
    V = shape.vocabulary
    return V if shape.takes_whole_rows(route) else min(V, _LEAST_COLUMNS)


def least_bytes(route: Route, shape: LinearShape) -> int:
    """Bytes of the smallest tile of a route."""
    return tile_bytes(1, least_columns(route, shape), route, shape)


@functools.lru_cache(maxsize=512)
def most_rows(route: Route, shape: LinearShape, budget: int, strips: int = 1) -> int:
    """Most whole rows whose logits, made in so many strips, fit the budget."""

    def size(rows: int) -> int:
        return tile_bytes(rows, shape.vocabulary, route, shape, -(-rows // strips))

    return bisect_right(range(1, _MANY), budget, key=size)


def most_columns(rows: int, route: Route, shape: LinearShape, budget: int) -> int:
    """Most columns of so many rows that fit the budget, up to all."""
    V = shape.vocabulary
    # All at once may take less than all but one: ranges are summed in a wider dtype.
    if tile_bytes(rows, V, route, shape) <= budget:
        return V
    sizes = range(1, V)
    return bisect_right(sizes, budget, key=lambda columns: tile_bytes(rows, columns, route, shape))


def workspace_budget(workspace_bytes: int | None, device: torch.device) -> int:
    """Return the byte budget: the argument, else the environment's, else the device's default.

    Raises:
        ValueError: The budget is not a positive integer.
    """
    source = "workspace_bytes"
    if workspace_bytes is None:
        text = os.environ.get(ENVIRONMENT_VARIABLE)
        if text is None:
            return DEFAULT_CPU_BYTES if device.type == "cpu" else _DEFAULT_BYTES_GPU
        source = ENVIRONMENT_VARIABLE
        if not text.strip().isdecimal():
            raise ValueError(f"{source} must be a positive integer (bytes), got {text!r}")
        workspace_bytes = int(text)
    if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int):
        raise TypeError(f"{source} must be an int (bytes), got {type(workspace_bytes).__name__}")
    if workspace_bytes <= 0:
        raise ValueError(f"{source} must be a positive integer (bytes), got {workspace_bytes}")
    return workspace_bytes
