"""What is read off a call from outside: time, GEMM FLOPs, peak memory, the truth in float64."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from cases import Case
from contest import Run, plain_sum, units
from inputs import IGNORED, Batch, softmax_error
from profiles import gemm_flops, memory_events, peak
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fused_losses.engine import workspace

_TRUTH_BYTES = {"cpu": 2**28, "cuda": 2**33}


@dataclass(frozen=True)
class Times:
    """Seconds of one forward and the backward that follows it."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


def call(case: Case, batch: Batch, run: Run) -> tuple[Tensor, list[Tensor]]:
    """Forward and backward, untimed: the loss, and the gradients of the leaves."""
    batch.restore()
    if case.trained == "nothing":
        with torch.no_grad():
            return run(), []
    loss = run()
    return loss.detach(), list(torch.autograd.grad(loss, batch.leaves))


def timed(case: Case, batch: Batch, run: Run) -> Times:
    """Time one forward and backward: CUDA events on a GPU, the wall clock on a CPU."""
    batch.restore()
    leaves = batch.leaves
    mark, seconds = _clock(batch.x.device.type)
    with torch.set_grad_enabled(case.trained != "nothing"):
        start = mark()
        loss = run()
        middle = mark()
        if loss.requires_grad:
            torch.autograd.grad(loss, leaves)
        end = mark()
    return Times(seconds(start, middle), seconds(middle, end))


def timed_alone(run: Callable[[], object], device: str) -> Times:
    """Time something without a backward."""
    mark, seconds = _clock(device)
    start = mark()
    run()
    return Times(seconds(start, mark()), 0.0)


def _clock(device: str) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    if device != "cuda":
        return time.perf_counter, lambda start, end: end - start
    torch.cuda.synchronize()

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return mark, seconds


@dataclass(frozen=True)
class Cost:
    """GEMM FLOPs that torch made (0 where a peer's own kernels hide them), and peak new bytes.

    ``seconds`` is what the run took, for planning the rounds; the profiler is in it.
    """

    flops: int
    peak_bytes: int
    seconds: float


def cost_of(case: Case, batch: Batch, run: Run) -> Cost:
    """Run once under the profiler.

    On a CPU the peak is read from the allocator's events, so what a BLAS library keeps for itself
    is not in it; on a GPU it is ``max_memory_allocated``.
    """
    gpu = batch.x.device.type == "cuda"
    before = 0
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    workspace.release()  # kept from a call before, it would not be counted
    with profile(
        activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=not gpu
    ) as profiler:
        start = time.perf_counter()
        kept = call(case, batch, run)
        if gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    flops = gemm_flops(profiler)
    if gpu:
        return Cost(flops, torch.cuda.max_memory_allocated() - before, seconds)
    events = memory_events(profiler)
    del kept
    return Cost(flops, peak(events), seconds)


def floor(case: Case, batch: Batch) -> tuple[str, Callable[[], None]]:
    """Name and run what cannot be avoided: the bare GEMMs, or on logits the bytes to be moved.

    The GEMMs multiply the very operands of the case, ignored rows left out, into buffers that are
    there already. The bytes are one read forward, one read and one write backward, as copies.
    """
    if batch.w is None:
        logits = batch.x.detach().flatten(0, 1)
        buffer = torch.empty_like(logits)
        half = logits[: len(logits) // 2]
        if case.trained == "nothing":
            return "copy, NV bytes moved", lambda: _run(lambda: buffer[: len(half)].copy_(half))

        def copies() -> None:
            buffer.copy_(logits)
            buffer[: len(half)].copy_(half)

        return "copy, 3 NV elements moved", copies
    x, dz = softmax_error(batch)
    w = batch.w.detach()
    z = torch.empty_like(dz)
    dx, dw = torch.empty_like(x), torch.empty_like(w)

    second = batch.ref_x[batch.y != IGNORED] if case.loss == "distillation" else None

    def products() -> None:
        torch.mm(x, w.T, out=z)
        if second is not None:
            torch.mm(second, w.T, out=z)
        if case.trained != "nothing":
            torch.mm(dz, w, out=dx)
        if case.trained == "head":
            torch.mm(dz.T, x, out=dw)

    return f"bare GEMMs, {2 * case.products} NDV", products


def _run(action: Callable[[], object]) -> None:
    action()


def truth(case: Case, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients in float64, on the same rounded inputs, a few pairs at a time."""
    half, T = batch.y.shape[0] // 2, batch.y.shape[1]
    step = max(1, _TRUTH_BYTES[batch.x.device.type] // (2 * T * case.V * 8))
    count = units(case, batch)
    total = torch.zeros((), dtype=torch.float64, device=batch.x.device)
    gradients = [torch.zeros_like(t, dtype=torch.float64) for t in batch.leaves]
    for start in range(0, half, step):
        stop = min(start + step, half)
        part = batch.pairs(start, stop, torch.float64)
        loss = plain_sum(case.loss, part) / count
        total += loss.detach()
        if not part.leaves:
            continue
        dx, *dw = torch.autograd.grad(loss, part.leaves)
        gradients[0][start:stop], gradients[0][half + start : half + stop] = dx.chunk(2)
        for found, more in zip(gradients[1:], dw, strict=True):
            found += more
    return total, gradients


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Relative Frobenius error."""
    size = exact.norm().item()
    difference = (found.double() - exact).norm().item()
    return difference / size if size else difference
