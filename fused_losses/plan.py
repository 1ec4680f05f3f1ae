"""How a call will run: route, chunks, FLOPs and bytes, decided before anything is computed.

Pure functions of shapes, dtypes, who needs a gradient and the byte budget. One GEMM over the head
is 2 N D V FLOPs, N the labels that are not ignored. The routes of the linear path, with their FLOPs
in units of N D V for a frozen and for a trained head:

- forward (2): no gradient is wanted.
- token (4, 6): a reduced token loss; gradients are formed while the chunk's logits exist.
- unit (4, 6): a function of the log-probs of whole units, called once per chunk of them.
- frozen (4): arbitrary use of log-probs or of per-token losses, head frozen; their gradients with
  respect to the hidden states are kept, (N, D), and scaled in backward.
- recompute (8): the same with a trained head (6: frozen, with entropy gradients); backward makes
  each chunk's logits again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fused_losses.backends.base import BLOCK_BYTES

Route = Literal["logits", "forward", "token", "unit", "frozen", "recompute"]
ENVIRONMENT_VARIABLE = "FUSED_LOSSES_WORKSPACE_BYTES"

_DEFAULT_BYTES = {"cpu": 256 * 2**20}
_DEFAULT_BYTES_GPU = 2**30
_ROW_MULTIPLE = 128


@dataclass(frozen=True)
class Plan:
    """What a call does. ``explain`` returns one; the engine runs one.

    Attributes:
        route: See the module's table; "logits" for functions of logits.
        backend: "triton" or "torch".
        tokens: N, labels that are not ignored.
        hidden: D, 0 on the logits path.
        vocabulary: V.
        chunks: Tokens per chunk, in order.
        flops: GEMM FLOPs of forward and backward together.
        workspace_bytes: Bytes of a chunk's logits, their gradient and row-pass scratch.
        budget_bytes: The budget that the chunks were fitted to.
        kernels: What runs per chunk, in order.
    """

    route: Route
    backend: str
    tokens: int
    hidden: int
    vocabulary: int
    chunks: tuple[int, ...]
    flops: int
    workspace_bytes: int
    budget_bytes: int
    kernels: tuple[str, ...]

    @property
    def has_gradient(self) -> bool:
        """Whether the row passes of this plan write gradients."""
        return any("gradient" in k or "exponentials" in k for k in self.kernels)

    def __str__(self) -> str:
        """One line for people."""
        ndv = self.tokens * self.hidden * self.vocabulary
        gemms = f", {self.flops / ndv:.1f} NDV = {self.flops / 1e9:.2f} GFLOP" if ndv else ""
        sizes = f"{len(self.chunks)} chunk(s) of up to {max(self.chunks, default=0)} tokens"
        return (
            f"{self.route} route on {self.backend}: {self.tokens} tokens x {self.vocabulary}, "
            f"{sizes}{gemms}, workspace {self.workspace_bytes / 2**20:.1f} MiB; "
            + " > ".join(self.kernels)
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
    entropy: bool = False
    exponentials: bool = True

    @property
    def need_gradient(self) -> bool:
        """Whether anything at all needs a gradient."""
        return self.need_dx or self.need_dw or self.need_db


def workspace_budget(workspace_bytes: int | None, device: torch.device) -> int:
    """Return the byte budget: the argument, else the environment's, else the device's default.

    Raises:
        ValueError: The budget is not a positive integer.
    """
    source = "workspace_bytes"
    if workspace_bytes is None:
        text = os.environ.get(ENVIRONMENT_VARIABLE)
        if text is None:
            return _DEFAULT_BYTES.get(device.type, _DEFAULT_BYTES_GPU)
        source = ENVIRONMENT_VARIABLE
        if not text.strip().isdecimal():
            raise ValueError(f"{source} must be a positive integer (bytes), got {text!r}")
        workspace_bytes = int(text)
    if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int):
        raise TypeError(f"{source} must be an int (bytes), got {type(workspace_bytes).__name__}")
    if workspace_bytes <= 0:
        raise ValueError(f"{source} must be a positive integer (bytes), got {workspace_bytes}")
    return workspace_bytes


def choose_route(shape: LinearShape, *, reduced: bool, entropy_gradient: bool = False) -> Route:
    """Pick the route of a token loss (``reduced``) or of per-token results (not ``reduced``)."""
    if not shape.need_gradient:
        return "forward"
    if reduced:
        return "token"
    if shape.need_dw or shape.need_db or entropy_gradient:
        return "recompute"
    return "frozen"


def plan_linear(route: Route, tokens: int, shape: LinearShape, budget: int) -> Plan:
    """Split ``tokens`` evenly into chunks that fit the budget.

    Raises:
        ValueError: Not even one row fits; the message names the least budget that works.
    """
    most = _most_rows(route, shape, budget)
    count = -(-tokens // most) if tokens else 0
    rows = -(-tokens // count) if count else 0
    rounded = -(-rows // _ROW_MULTIPLE) * _ROW_MULTIPLE
    if rounded <= most:
        rows = rounded
    chunks = tuple(min(rows, tokens - start) for start in range(0, tokens, rows)) if rows else ()
    return _plan(route, tokens, shape, budget, chunks)


def plan_units(sizes: Sequence[int], shape: LinearShape, budget: int) -> Plan | None:
    """Fill chunks with whole units, in order; None if a unit does not fit the budget."""
    route: Route = "unit" if shape.need_gradient else "forward"
    most = _most_rows(route, shape, budget)
    chunks: list[int] = []
    for size in sizes:
        if size > most:
            return None
        if chunks and chunks[-1] + size <= most:
            chunks[-1] += size
        else:
            chunks.append(size)
    return _plan(route, sum(sizes), shape, budget, tuple(chunks))


def plan_logits(tokens: int, vocabulary: int, backend: str, *, need_gradient: bool) -> Plan:
    """Describe a call on logits: one read forward, one read and one write backward."""
    kernels = ("row pass", "row gradient") if need_gradient else ("row pass",)
    scratch = BLOCK_BYTES if backend == "torch" else 0
    return Plan("logits", backend, tokens, 0, vocabulary, (tokens,), 0, scratch, scratch, kernels)


def _plan(
    route: Route, tokens: int, shape: LinearShape, budget: int, chunks: tuple[int, ...]
) -> Plan:
    product, passes, gradients = "z = X W'", "row pass", ["row gradient"]
    if route != "recompute" and shape.exponentials:
        # The pass leaves exponentials behind, which are the gradient up to a factor per row.
        passes, gradients = "row pass with exponentials", []
    between = {"unit": ["loss function"], "recompute": [product]}.get(route, [])
    kernels = [product, "row pass"]
    if route != "forward":
        kernels = [product, passes, *between, *gradients]
        kernels += ["dX = dz W"] * shape.need_dx + ["dW += dz' X"] * shape.need_dw
    gemms = sum(" = X W'" in k or k.startswith(("dX", "dW")) for k in kernels)
    return Plan(
        route=route,
        backend=shape.backend,
        tokens=tokens,
        hidden=shape.hidden,
        vocabulary=shape.vocabulary,
        chunks=chunks,
        flops=2 * gemms * tokens * shape.hidden * shape.vocabulary,
        workspace_bytes=_chunk_bytes(max(chunks, default=0), route, shape),
        budget_bytes=budget,
        kernels=tuple(kernels),
    )


def _row_bytes(route: Route, shape: LinearShape) -> tuple[int, int]:
    """Bytes per row of a chunk, and per row of the row pass's scratch."""
    V = shape.vocabulary
    accumulate = max(shape.logits_dtype.itemsize, 4)
    separate_gradient = route != "forward" and shape.logits_dtype != shape.compute_dtype
    chunk = V * (shape.logits_dtype.itemsize + separate_gradient * shape.compute_dtype.itemsize)
    if shape.backend != "torch":
        return chunk, 0
    # A pass that must leave the logits as they are, or whose maths are wider, works on a copy.
    keeps_logits = route in ("token", "unit", "frozen") and not shape.exponentials
    copies = int(keeps_logits or shape.logits_dtype.itemsize < 4)
    copies += (shape.softcap and route != "forward") + shape.entropy
    # The entropy's gradient masks what 0 * log 0 leaves, one byte per element.
    mask = int(shape.entropy and route in ("unit", "recompute"))
    return chunk, V * (accumulate * copies + mask)


def _chunk_bytes(rows: int, route: Route, shape: LinearShape) -> int:
    chunk, scratch = _row_bytes(route, shape)
    return rows * chunk + min(rows, _scratch_rows(shape)) * scratch


def _scratch_rows(shape: LinearShape) -> int:
    return max(1, BLOCK_BYTES // (shape.vocabulary * max(shape.logits_dtype.itemsize, 4)))


def _most_rows(route: Route, shape: LinearShape, budget: int) -> int:
    """Most rows of a chunk that fit the budget; at least one."""
    chunk, scratch = _row_bytes(route, shape)
    least = chunk + scratch
    if budget < least:
        raise ValueError(
            f"workspace_bytes={budget} is too small for one row of {shape.vocabulary} logits; "
            f"the least that works is {least}"
        )
    rows = budget // least
    if rows > _scratch_rows(shape):
        rows = (budget - _scratch_rows(shape) * scratch) // chunk
    return rows
