"""What the machine gives at best, and how near to that the row kernels are.

A copy, the three products of the head in their layouts, the head's gradient summed over chunks in
16 and in 32 bits, and GB/s of every row kernel, all on the operands of one case. The JSON of
``--out`` is rewritten after every line.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import Case
from inputs import Batch, make_batch, softmax_error
from instruments import timed_alone
from results import describe_machine, write_json
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fused_losses

CHUNKS = 4  # of the head's gradient, where it is a sum


@dataclass(frozen=True)
class Line:
    """One thing to time.

    ``bytes`` or ``flops`` is the work of a run. ``kernel`` is a part of the names of the kernels
    whose time counts on a GPU; without it, and on a CPU, the whole run counts. ``prepare`` is run
    before, untimed; ``run`` gets what it returns.
    """

    name: str
    run: Callable[..., Any]
    bytes: int = 0
    flops: int = 0
    kernel: str = ""
    prepare: Callable[[], Any] | None = None


def products(batch: Batch) -> Iterator[Line]:
    """The copy and the matrix products: the ceilings."""
    x, dz = softmax_error(batch)
    w = batch.w.detach()
    z, dx, dw = torch.empty_like(dz), torch.empty_like(x), torch.empty_like(w)
    wide = torch.empty_like(w, dtype=torch.float32)
    work = 2 * dz.shape[0] * w.numel()
    halves = dz[: len(dz) // 2], dz[len(dz) // 2 : 2 * (len(dz) // 2)]

    def summed(out: Tensor, *, cast: bool) -> None:
        for i, (part, rows) in enumerate(zip(dz.chunk(CHUNKS), x.chunk(CHUNKS), strict=True)):
            _add_product(out, part.t(), rows, first=i == 0)
        if cast:
            dw.copy_(out)

    yield Line("copy", lambda: halves[0].copy_(halves[1]), bytes=2 * halves[0].nbytes)
    yield Line("z = x W'", lambda: torch.mm(x, w.t(), out=z), flops=work)
    yield Line("dx = dz W", lambda: torch.mm(dz, w, out=dx), flops=work)
    yield Line("dW = dz' x", lambda: torch.mm(dz.t(), x, out=dw), flops=work)
    name = f"dW in {CHUNKS} chunks, summed in"
    yield Line(f"{name} {dw.dtype}", lambda: summed(dw, cast=False), flops=work)
    yield Line(f"{name} float32, and cast", lambda: summed(wide, cast=True), flops=work)


def _add_product(out: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    mixed = {"out_dtype": out.dtype} if a.dtype != out.dtype else {}
    if mixed and not a.is_cuda:  # no such product on a CPU
        a, b, mixed = a.to(out.dtype), b.to(out.dtype), {}
    if first:
        torch.mm(a, b, out=out, **mixed)
    else:
        torch.addmm(out, a, b, out=out, **mixed)


def row_kernels(batch: Batch) -> Iterator[Line]:
    """Public calls, each with the row kernel that it is about and the bytes that this one moves."""
    y, ref = batch.y, batch.ref
    z = (batch.x @ batch.w.T).detach()
    for logits in (z, z[: len(z) // 2].float()):
        label, beside = y[: len(logits)], ref[: len(logits)]
        forward = {
            "mle": (fused_losses.mle_loss, (label,)),
            "hellinger": (fused_losses.hellinger_loss, (label, beside)),
            "statistics": (fused_losses.token_stats, (label,)),
            "statistics with entropy": (fused_losses.token_stats, (label,), {"entropy": True}),
        }
        for name, (fn, args, *options) in forward.items():
            call = partial(fn, logits, *args, **dict(*options))
            yield Line(f"pass, {name}, {logits.dtype}", call, logits.nbytes, kernel="row_pass")
        yield Line(
            f"gradient, mle, {logits.dtype}",
            lambda loss: loss.backward(),
            2 * logits.nbytes,
            kernel="row_gradient",
            prepare=partial(_loss_of_a_leaf, logits, label),
        )
    for name in ("mle", "hellinger"):  # bf16 logits, and fp32 ones with bf16 exponentials
        args = (batch.x, batch.w, y, *(() if name == "mle" else (ref,)))
        moved = 2 * z.nbytes if name == "mle" else z.nbytes + 4 * z.numel()
        run = partial(getattr(fused_losses, f"linear_{name}_loss"), *args)
        yield Line(f"pass that keeps exponentials, {name}", run, moved, kernel="row_pass")


def _loss_of_a_leaf(z: Tensor, y: Tensor) -> Tensor:
    return fused_losses.mle_loss(z.detach().requires_grad_(), y)


def measure(line: Line, device: str, seconds: float) -> dict[str, Any]:
    """Median time of a line, and what it comes to."""

    def once(timer: Callable[[Callable[[], Any]], float]) -> float:
        given = () if line.prepare is None else (line.prepare(),)
        return timer(lambda: line.run(*given))

    def alone(run: Callable[[], Any]) -> float:
        return timed_alone(run, device).both

    once(alone)  # compiles
    timer = _kernel_timer(line.kernel) if line.kernel and device == "cuda" else alone
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < 3 or (time.monotonic() < end and len(times) < 30):
        times.append(once(timer))
    median = statistics.median(times)
    return {
        "name": line.name,
        "kernel": line.kernel if timer is not alone else None,
        "time_s": {"median": median, "min": min(times)},
        "bytes": line.bytes or None,
        "gbytes_per_s": line.bytes / median / 1e9 if line.bytes else None,
        "tflops": line.flops / median / 1e12 if line.flops else None,
    }


def _kernel_timer(kernel: str) -> Callable[[Callable[[], Any]], float]:
    """Seconds of a run's kernels of that name alone, from the profiler."""

    def timer(run: Callable[[], Any]) -> float:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
        found = [e for e in profiler.key_averages() if kernel in e.key]
        spent = sum(e.self_device_time_total for e in found) / 1e6
        if not spent:
            raise RuntimeError(f"the profiler saw no kernel {kernel!r}")
        return spent

    return timer


def main() -> int:
    """Time every line; one that fails costs only itself. Returns how many did."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", type=int, nargs=3, default=(8192, 4096, 128256))
    parser.add_argument("--seconds", type=float, default=1.0, help="of a line")
    options = parser.parse_args()
    N, D, V = options.size
    dtype = "bfloat16" if options.device == "cuda" else "float32"
    case = Case("hellinger", N, D, V, dtype, length=N // 2)
    content = {"schema": 1, "machine": describe_machine(options.device), "size": [N, D, V]}
    lines: list[dict[str, Any]] = []
    for part in (products, row_kernels):
        for line in part(make_batch(case, options.device)):
            try:
                lines.append(measure(line, options.device, options.seconds))
            except Exception as error:
                lines.append({"name": line.name, "error": f"{type(error).__name__}: {error}"})
            if options.out is not None:
                write_json(options.out, {**content, "lines": lines})
            print(_shown(lines[-1]), flush=True)
    return sum("error" in line for line in lines)


def _shown(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"  = {found['name']}: {found['error'][:200]}"
    rate = (
        f"{found['gbytes_per_s']:8.1f} GB/s"
        if found["gbytes_per_s"]
        else f"{found['tflops']:8.1f} TFLOP/s"
    )
    return f"  = {found['time_s']['median'] * 1e3:9.3f} ms {rate}  {found['name']}"


if __name__ == "__main__":
    sys.exit(main())
