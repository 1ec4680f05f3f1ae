"""How whole rows are cut: into chunks, and where that pays these into strips.

Products of the logits' gradient take a chunk, and each of them reads the head or adds to its
gradient. A strip is what logits exist of at a time. Where their gradient takes their place a chunk
is one strip. But fp32 logits of 16-bit operands are twice as wide as their gradient, and nobody
reads them again: small strips of them can fill the gradient of a chunk several times as large.

That trades one kind of traffic for another. Of V x D numbers a strip reads the head's, 2 bytes
each; a chunk reads them for dX and takes the sum of dW in and out, 10 bytes. So with r bytes for
each of V columns, S rows in a strip and R in a chunk, N (2 / S + 10 / R) is smallest at
4 S + 2 R = r where R is about 3 S: three quarters of what it is at R = S. One chunk has no sum of
dW to take in, and is worth many strips. ``cost`` decides, as between routes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fused_losses.chunk_bytes import logits_bytes, most_rows, tile_bytes
from fused_losses.cost import LinearShape, Route, peak_bytes

# Rows and columns of tiles: what matrix units and 16-byte accesses like.
_MULTIPLE = 128
# Strips of a chunk that are tried.
_STRIPS = (1, 2, 3, 4, 6, 8, 12, 16)


class Cut(NamedTuple):
    """Tokens per chunk and, chunk after chunk, tokens per strip."""

    chunks: tuple[int, ...]
    strips: tuple[int, ...]


def evenly(total: int, most: int) -> tuple[int, ...]:
    """Split into the fewest parts of at most ``most``, alike and rounded where there is room."""
    size = -(-total // -(-total // most))
    rounded = -(-size // _MULTIPLE) * _MULTIPLE
    if rounded <= most:
        size = rounded
    return tuple(min(size, total - start) for start in range(0, total, size))


def cuts(
    tokens: int, route: Route, shape: LinearShape, budget: int, ends: Sequence[int] | None = None
) -> Iterator[Cut]:
    """Yield ways to cut some tokens within the budget, of more and more strips per chunk.

    ``ends``: strips hold whole units, which end there; none is yielded if a unit does not fit.
    """
    for strips in _STRIPS if shape.takes_strips(route) else _STRIPS[:1]:
        most = most_rows(route, shape, budget, strips)
        # More strips have fewer rows, so a unit that does not fit now never does.
        found = _cut(tokens, most, -(-most // strips), ends) if most else None
        if found is None:
            return
        yield found
        if len(found.chunks) < 2:
            return


def cut_in_one(
    tokens: int, route: Route, shape: LinearShape, limit: int, ends: Sequence[int] | None = None
) -> Cut | None:
    """Cut tokens into one chunk whose peak is within a limit, of the largest strips; else None."""

    def peak(strip: int) -> int:
        return memory_of(Cut((tokens,), (strip,)), shape.vocabulary, route, shape)[1]

    if not shape.takes_strips(route):
        return Cut((tokens,), (tokens,)) if peak(tokens) <= limit else None
    most = bisect_right(range(1, tokens + 1), limit, key=peak)
    found = _cut(tokens, tokens, most, ends) if most else None
    if found is None or ends is None:
        return found
    # As many may do with less memory.
    count = len(found.strips)
    alike = _cut(tokens, tokens, -(-tokens // count), ends)
    return found if alike is None or len(alike.strips) > count else alike


def memory_of(cut: Cut, columns: int, route: Route, shape: LinearShape) -> tuple[int, int]:
    """Return the bytes of the workspace, and those of the peak."""
    chunks, strips = cut
    chunk, strip = max(chunks, default=0), max(strips, default=0)
    workspace = tile_bytes(chunk, columns, route, shape, strip)
    gone = logits_bytes(strip, shape) if len(chunks) == 1 and strip < chunk else 0
    return workspace, peak_bytes(shape, len(chunks), workspace, gone)


def _cut(tokens: int, chunk: int, strip: int, ends: Sequence[int] | None) -> Cut | None:
    """Cut tokens into chunks and strips of at most so many; None if a unit is larger."""
    if ends is not None:
        return _of_units(tokens, chunk, strip, ends)
    chunks = evenly(tokens, chunk) if tokens else ()
    return Cut(chunks, tuple(size for rows in chunks for size in evenly(rows, strip)))


def _of_units(tokens: int, chunk: int, strip: int, ends: Sequence[int]) -> Cut | None:
    chunks: list[int] = []
    strips: list[int] = []
    start = 0
    while start < tokens:
        first = start
        # Of strips as large as a chunk one is all that it holds.
        while start == first or strip < chunk:
            units = bisect_right(ends, min(start + strip, first + chunk))
            end = ends[units - 1] if units else 0
            if end <= start:
                break
            strips.append(end - start)
            start = end
        if start == first:
            return None
        chunks.append(start - first)
    return Cut(tuple(chunks), tuple(strips))
