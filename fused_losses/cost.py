"""What a plan of the linear path costs: FLOPs of its products, and bytes that it moves.

With N tokens in b chunks and a vocabulary of V in k ranges, c, l and a the bytes of an operand, of
a logit and of an accumulator, x = NDc and w = VDc the bytes of hidden states and head, and the
logits made in t strips, which are parts of chunks (t = b where a chunk is one):

    logits        2NDV FLOPs    read k x and t w, write NVl; the teacher's alike, of its own D
    divergence                  read both sides' logits; with the gradient write NVc (kernels read
                                twice for a gradient, but for forward KL: not counted)
    row pass                    read NVl; with exponentials or the gradient write NVc
    row gradient                read NVl, write NVc
    dX            2NDV          read NVc and b w; write and read again (2k - 1) NDa
    dW            2NDV          read NVc and k x; write and read again (2b - 1) VDa; with b > 1 one
                                rounding more if c < a

Recomputation makes the logits twice. A byte counts as many FLOPs as the machine does in the time
of moving it: the route and the sizes of chunks and ranges are those of the smallest sum.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import torch

Route = Literal["logits", "forward", "token", "unit", "frozen", "recompute"]

# FLOPs of a product in the time of one byte of memory traffic, by the operands' bytes. 16 bits: 790
# TFLOP/s and 4.3 TB/s of an H200. Else: about 200 GFLOP/s and 17 GB/s of two CPU cores, and of the
# same order on GPUs without TF32.
_FLOPS_PER_BYTE = {2: 180.0, 4: 12.0, 8: 6.0}


class Step(Enum):
    """What runs for a chunk of tokens and a range of columns; the values are the words for it."""

    LOGITS = "z = X W'"
    TEACHER_LOGITS = "teacher's z = X W'"
    TEACHER_ROW_PASS = "teacher's row pass"
    ROW_PASS = "row pass"
    ROW_PASS_WITH_EXPONENTIALS = "row pass with exponentials"
    ROW_PASS_WITH_GRADIENT = "row pass with gradient"
    LOSS_FUNCTION = "loss function"
    DIVERGENCE = "divergence"
    DIVERGENCE_WITH_GRADIENT = "divergence with gradient"
    ROW_GRADIENT = "row gradient"
    DX_OF_EXPONENTIALS = "dX += E W"
    DX = "dX += dz W"
    DW = "dW += dz' X"

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product over the head."""
        products = (Step.LOGITS, Step.TEACHER_LOGITS, Step.DX_OF_EXPONENTIALS, Step.DX, Step.DW)
        return self in products

    @property
    def writes(self) -> bool:
        """Whether it writes as many numbers as there are logits, beside them or over them."""
        return self in (
            Step.ROW_PASS_WITH_EXPONENTIALS,
            Step.ROW_PASS_WITH_GRADIENT,
            Step.ROW_GRADIENT,
            Step.DIVERGENCE_WITH_GRADIENT,
        )


@dataclass(frozen=True)
class LinearShape:
    """What the linear planner needs to know of a call, beyond the number of its tokens."""

    hidden: int
    vocabulary: int
    compute_dtype: torch.dtype
    logits_dtype: torch.dtype
    backend: str
    need_dx: bool
    need_dw: bool
    need_db: bool = False
    softcap: bool = False
    smoothing: bool = False
    entropy: bool = False
    entropy_gradient: bool = False
    input_dtype: torch.dtype | None = None  # None: as compute_dtype
    weight_dtype: torch.dtype | None = None  # None: as compute_dtype
    accum_dtype: torch.dtype = torch.float32  # of sums over chunks
    all_rows: bool = False  # no label is ignored, so hidden states are read where they lie
    whole_logits: bool = False  # the loss is a function of whole rows of logits, not of log-probs
    words: int = 0  # if not 0, it is a function of the logits of so many words of each row
    teacher_hidden: int = 0  # hidden size of a teacher whose logits stand beside them; 0: none
    teacher_dtype: torch.dtype = torch.float32  # in which its head computes
    divergence_in_kernel: bool = True  # if the backend has kernels; else torch makes it
    sharded: bool = False  # other ranks hold the rest of the vocabulary

    @property
    def need_gradient(self) -> bool:
        """Whether anything at all needs a gradient."""
        return self.need_dx or self.need_dw or self.need_db

    @property
    def exponentials(self) -> bool:
        """Whether the exponentials that a row pass leaves behind serve as the logits' gradient.

        They do up to a factor per row, which the products take: not for label smoothing, entropies
        and functions of all logits, whose gradients are no multiples. 16-bit operands would be
        rounded once more by that factor: measured in bf16, gradient errors of 2.8e-3 instead of
        2.1e-3 where a bound of 2.5e-3 is promised. And not for a shard of the vocabulary, whose
        exponentials are not relative to what the ranks agree on.
        """
        wide = self.compute_dtype.itemsize >= 4
        more = self.smoothing or self.entropy_gradient or self.whole_logits or self.sharded
        return wide and not more

    @property
    def head_is_frozen(self) -> bool:
        """Whether d logp / d x, with the target's and the mean row of the head, is all it takes.

        Entropies and functions of all logits need more, and smoothing with a softcap needs the mean
        of their products.
        """
        only_dx = self.need_dx and not (self.need_dw or self.need_db)
        more = self.entropy_gradient or self.whole_logits or (self.smoothing and self.softcap)
        return only_dx and not more

    def takes_whole_rows(self, route: Route) -> bool:
        """Whether a route needs the whole row before its gradient, not ranges of the vocabulary.

        Without products of 16-bit operands into fp32, as on a CPU, summing over ranges would take
        products of upcast operands, several times as slow; rounding each product instead was
        measured to double the error that summing adds (3.1e-3 in bf16, beyond what is promised).
        """
        if route in ("token", "unit"):
            return True
        rounds = self.backend == "torch" and self.compute_dtype.itemsize == 2
        return rounds and route != "forward"

    def takes_strips(self, route: Route) -> bool:
        """Whether logits and their gradient are apart, so that a chunk's logits come in strips.

        A chunk is then as many tokens as its gradient, of narrower numbers, leaves room for.
        """
        apart = self.logits_dtype.itemsize > self.compute_dtype.itemsize
        return route in ("token", "unit") and apart and self.need_gradient

    @property
    def teacher_logits_bytes(self) -> int:
        """Bytes of one of the teacher's logits, which are fp32 at least."""
        return max(self.teacher_dtype.itemsize, 4)

    @property
    def sums_wider(self) -> bool:
        """Whether a sum of the head's gradient over chunks is wider than that of a single one."""
        of_one, of_several = (sum_dtype(self.compute_dtype, self.accum_dtype, n) for n in (1, 2))
        return of_one != of_several

    @property
    def accumulator_bytes(self) -> int:
        """Bytes of a number that is summed over chunks or ranges."""
        return max(self.compute_dtype.itemsize, 4)


def sum_dtype(compute: torch.dtype, accum: torch.dtype, chunks: int) -> torch.dtype:
    """Return the dtype in which a head's gradient is summed over chunks; one is no sum."""
    # fp16 has no room for a gradient that still lacks the factor 1 / count.
    if compute == torch.float16:
        return torch.float32
    return compute if chunks == 1 else torch.promote_types(compute, accum)


def peak_bytes(shape: LinearShape, chunks: int, workspace: int, gone: int = 0) -> int:
    """Bytes that a call holds at its highest: workspace and what belongs to the head.

    That is its copy in the operands' dtype where it is stored in another, and its gradient, summed
    in ``sum_dtype`` and rounded when the workspace is gone. ``gone``: so much of the workspace is,
    the logits of a single chunk's strips, before there is a gradient of the head.
    """
    head, compute = shape.vocabulary * shape.hidden, shape.compute_dtype
    own = shape.weight_dtype or compute
    cast = head * compute.itemsize if own != compute else 0
    if not shape.need_dw:
        return workspace + cast
    summed = sum_dtype(compute, shape.accum_dtype, chunks)
    rounded = head * own.itemsize if summed != own else 0
    dw = head * summed.itemsize
    return cast + max(workspace, dw + workspace - gone, dw + rounded)


@functools.lru_cache(maxsize=512)
def steps_of(route: Route, shape: LinearShape) -> tuple[Step, ...]:
    """Return what runs for each chunk and range, in order."""
    if route == "forward":
        return (Step.LOGITS, Step.ROW_PASS)
    if route == "frozen":
        return (Step.LOGITS, Step.ROW_PASS_WITH_EXPONENTIALS, Step.DX_OF_EXPONENTIALS)
    passes, gradient = [Step.ROW_PASS], [Step.ROW_GRADIENT] * shape.need_gradient
    if route == "recompute":
        gradient = [Step.LOGITS, Step.ROW_GRADIENT]
    elif shape.exponentials:
        passes, gradient = [Step.ROW_PASS_WITH_EXPONENTIALS], []
    elif route == "token" and shape.backend == "torch" and not shape.sharded:
        passes, gradient = [Step.ROW_PASS_WITH_GRADIENT], []
    between = [Step.LOSS_FUNCTION] * (route == "unit")
    if shape.teacher_hidden:
        passes += [Step.TEACHER_LOGITS, Step.TEACHER_ROW_PASS]
        step = Step.DIVERGENCE_WITH_GRADIENT if shape.need_gradient else Step.DIVERGENCE
        between, gradient = [step], []
    products = [Step.DX] * shape.need_dx + [Step.DW] * shape.need_dw
    return (Step.LOGITS, *passes, *between, *gradient, *products)


def flops(route: Route, tokens: int, shape: LinearShape) -> int:
    """FLOPs of all products of a call, forward and backward."""
    products = [step for step in steps_of(route, shape) if step.is_product]
    hidden = sum(
        shape.teacher_hidden if step is Step.TEACHER_LOGITS else shape.hidden for step in products
    )
    return 2 * tokens * hidden * shape.vocabulary


def bytes_moved(
    route: Route, tokens: int, shape: LinearShape, chunks: int, ranges: int, strips: int = 0
) -> int:
    """Bytes that products and row passes read and write, by the table of the module.

    ``strips``: in how many the logits are made; 0: as many as chunks.
    """
    cut = chunks, ranges, strips or chunks
    return sum(step_bytes(step, tokens, shape, *cut) for step in steps_of(route, shape))


def step_bytes(
    step: Step, tokens: int, shape: LinearShape, chunks: int, ranges: int, strips: int
) -> int:
    """Bytes that one of the steps reads and writes, over all chunks, strips and ranges."""
    c, a = shape.compute_dtype.itemsize, shape.accumulator_bytes
    x, w = tokens * shape.hidden, shape.vocabulary * shape.hidden
    z = tokens * shape.vocabulary
    logits, gradient = z * shape.logits_dtype.itemsize, z * c
    if step is Step.TEACHER_LOGITS:
        operands = (ranges * tokens + strips * shape.vocabulary) * shape.teacher_hidden
        return operands * shape.teacher_dtype.itemsize + z * shape.teacher_logits_bytes
    if step in (Step.DIVERGENCE, Step.DIVERGENCE_WITH_GRADIENT):
        both = logits + z * shape.teacher_logits_bytes
        return both + (gradient if step.writes else 0)
    if step is Step.LOGITS:
        return ranges * x * c + strips * w * c + logits
    if step in (Step.DX, Step.DX_OF_EXPONENTIALS):
        return gradient + chunks * w * c + (2 * ranges - 1) * x * (a if ranges > 1 else c)
    if step is Step.DW:
        summed = (2 * chunks - 1) * w * (a if chunks > 1 else c)
        rounded = w * (a + c) if chunks > 1 and a > c else 0
        return gradient + ranges * x * c + summed + rounded
    if step is Step.LOSS_FUNCTION:
        return 0
    return logits + (gradient if step.writes else 0)


def cost(route: Route, tokens: int, shape: LinearShape, chunks: int, ranges: int) -> float:
    """Everything in FLOPs."""
    moved = bytes_moved(route, tokens, shape, chunks, ranges)
    return in_flops(flops(route, tokens, shape), moved, shape)


def in_flops(work: int, moved: int, shape: LinearShape) -> float:
    """FLOPs and bytes, in FLOPs."""
    return work + moved * _FLOPS_PER_BYTE[shape.compute_dtype.itemsize]
