"""What a row pass gathers from a row: sums and maxima, kept per lane and reduced once.

A lane is a few columns side by side, all in one thread, and of each block it takes one such piece.
No lane looks at another before the row has ended, so the loop has neither barriers nor branches: a
lane that meets a logit above the row's limit stops, writes and sums nothing more, and the caller
takes the rest of the row again, from a shift that fits (``again``). The piece that holds the target
is left out of the sums, for its columns are counted one by one (``piece``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_losses_kernels.elementary import exp
from fused_losses_kernels.row_common import read, read_tail, transform, write_tail

# exp(d) is 0 long before, in fp64 too, and 0 times this is 0 where d is -inf.
LEAST = tl.constexpr(-1e4)


@triton.jit
def _take(
    x,  # (R, W)
    there,  # (R, W), or None: all
    y_lane,  # the lane that meets the target, or outside
    shift,
    limit,
    s,  # (R,) each, all that follow
    s_log,
    total,
    largest,
    ahead,
    SMOOTHED: tl.constexpr,
    ENTROPY_WANTED: tl.constexpr,
    TOP1_WANTED: tl.constexpr,
):
    """Take in a block; returns its exponentials and what lanes go on, before the sums."""
    most = tl.max(x, axis=1)
    largest = tl.maximum(largest, most)
    lane = tl.arange(0, s.shape[0])
    if TOP1_WANTED:
        ahead = tl.maximum(ahead, tl.where(lane < y_lane, most, float("-inf")))
    d = x - shift
    e = exp(d)
    goes_on = (largest > limit) == 0  # NaN does not stop a lane: it reaches the result in its sum
    counts = goes_on & (lane != y_lane)
    s += tl.where(counts, tl.sum(e, axis=1), 0.0)
    if ENTROPY_WANTED:
        s_log += tl.where(counts, tl.sum(e * tl.maximum(d, LEAST), axis=1), 0.0)
    if SMOOTHED:
        if there is not None:
            d = tl.where(there, d, 0.0)
        total += tl.sum(d, axis=1)
    return e, goes_on, s, s_log, total, largest, ahead


@triton.jit
def gather(
    z_ptr,
    e_ptr,
    C,
    stride_zv,
    pre,
    cap,
    y_lane,  # the target's piece
    shift,
    limit,
    ACC: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTHED: tl.constexpr,
    ENTROPY_WANTED: tl.constexpr,
    TOP1_WANTED: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """Read a row once, and write its exponentials.

    Returns (R,) each: the sums of E and of E log E, both without the target's piece and the columns
    after a lane stopped; how many blocks it took until then; and of all columns the sum of z less
    the shift, the largest z, and the largest before the target's piece.
    """
    s = tl.zeros((R,), ACC)
    s_log = tl.zeros((R,), ACC)
    total = tl.zeros((R,), ACC)
    largest = tl.full((R,), float("-inf"), ACC)
    ahead = tl.full((R,), float("-inf"), ACC)
    taken = tl.zeros((R,), tl.int32)
    cols = tl.arange(0, R).to(tl.int64)[:, None] * W + tl.arange(0, W)[None, :]
    offsets = cols * stride_zv
    z_block, e_block = z_ptr, e_ptr
    for _ in range(C // (R * W)):
        x, slope = transform(read(z_block + offsets, ACC), pre, cap, SOFTCAP)
        e, goes_on, s, s_log, total, largest, ahead = _take(
            x, None, y_lane, shift, limit, s, s_log, total, largest, ahead,
            SMOOTHED, ENTROPY_WANTED, TOP1_WANTED,
        )  # fmt: skip
        if e_ptr is not None:
            write_tail(e_block + cols, e * slope if SOFTCAP else e, goes_on[:, None])
            e_block += R * W
        taken += goes_on.to(tl.int32)
        z_block += tl.full((), R * W, tl.int64) * stride_zv
        y_lane -= R
    stop = tl.full((), C // (R * W), tl.int64) * (R * W)
    if stop < C:
        cols += stop
        there = cols < C
        x, slope = transform(read_tail(z_ptr + cols * stride_zv, there, ACC), pre, cap, SOFTCAP)
        x = tl.where(there, x, float("-inf"))
        e, goes_on, s, s_log, total, largest, ahead = _take(
            x, there, y_lane, shift, limit, s, s_log, total, largest, ahead,
            SMOOTHED, ENTROPY_WANTED, TOP1_WANTED,
        )  # fmt: skip
        if e_ptr is not None:
            write_tail(e_ptr + cols, e * slope if SOFTCAP else e, there & goes_on[:, None])
        taken += goes_on.to(tl.int32)
    return s, s_log, taken, total, largest, ahead


@triton.jit
def first_block(
    z_ptr, C, stride_zv, pre, cap, ACC: tl.constexpr, SOFTCAP: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Return the largest z of the first block."""
    cols = tl.arange(0, R).to(tl.int64)[:, None] * W + tl.arange(0, W)[None, :]
    x, _ = transform(read_tail(z_ptr + cols * stride_zv, cols < C, ACC), pre, cap, SOFTCAP)
    return tl.max(tl.max(tl.where(cols < C, x, float("-inf")), axis=1), axis=0)


@triton.jit
def again(
    z_ptr,
    e_ptr,
    C,
    stride_zv,
    pre,
    cap,
    y_at,
    shift,  # a new one
    factor,  # what brings exponentials of the old one to it
    s,  # (R,) brought to it, as s_log
    s_log,
    taken,
    ACC: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY_WANTED: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """Take what lanes left of a row; scale down what they have written, over their logits maybe."""
    lane = tl.arange(0, R)
    cols = lane.to(tl.int64)[:, None] * W + tl.arange(0, W)[None, :]
    for block in range(0, tl.cdiv(C, R * W)):
        there = cols < C
        left = block >= taken
        x, slope = transform(read_tail(z_ptr + cols * stride_zv, there, ACC), pre, cap, SOFTCAP)
        d = tl.where(there, x, float("-inf")) - shift
        e = exp(d)
        counts = left & (block * R + lane != y_at)
        s += tl.where(counts, tl.sum(e, axis=1), 0.0)
        if ENTROPY_WANTED:
            s_log += tl.where(counts, tl.sum(e * tl.maximum(d, LEAST), axis=1), 0.0)
        if e_ptr is not None:
            written = read_tail(e_ptr + cols, there, ACC) * factor
            e = tl.where(left[:, None], e * slope if SOFTCAP else e, written)
            write_tail(e_ptr + cols, e, there)
        cols += R * W
    return s, s_log
