"""What a GPU would get: every kernel and launch row, compiled offline for four architectures.

``make kernel-report`` writes tables of them to ``results/kernels/triton-<release>``, to be
committed; ``tests/test_kernels_offline.py`` compiles again and compares. Nothing is timed and
no GPU is needed: each architecture is compiled in a process of its own, without the interpreter,
through the very launchers that the library calls. A driver that only names its target stands in
for the GPU, tensors on the meta device for memory.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from kernel_assembly import Record, describe
from kernel_tables import lines_per_kernel, markdown
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

ROOT = Path(__file__).resolve().parent.parent
# A build's local tag (3.6.0+git1234) names the same code generator: no folder of its own.
COMMITTED = (
    ROOT / "benchmarks" / "results" / "kernels" / f"triton-{triton.__version__.partition('+')[0]}"
)
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# Every row of the launch table is met by one of these; equal kernels are reported once.
VOCABULARIES = tuple(2**n for n in range(10, 19))

# Rows start 16 bytes apart and V is a multiple of 16: what a model's head produces.
ALIGNED: dict[str, Record] = {
    "bf16 mle, exponentials in place": dict(logits="bfloat16", loss="mle", exponentials="bfloat16"),
    "bf16 hellinger, all options": dict(
        logits="bfloat16", loss="hellinger", ref=True, value=True, exponentials="bfloat16", z=0.1
    ),
    "bf16 kl with softcap": dict(
        logits="bfloat16", loss="kl", ref=True, exponentials="bfloat16", cap=30.0
    ),
    "bf16 statistics": dict(logits="bfloat16", entropy=True),
    "fp16 jensen_shannon": dict(
        logits="float16", loss="jensen_shannon", ref=True, exponentials="float16"
    ),
    "fp32 pearson, bf16 exponentials": dict(
        logits="float32", loss="pearson", ref=True, exponentials="bfloat16"
    ),
    "fp32 mle, smoothed and capped": dict(
        logits="float32", loss="mle", smoothing=0.1, cap=30.0, entropy=True
    ),
    "bf16 statistics, first range of columns": dict(logits="bfloat16", entropy=True, place="first"),
    "fp32 hellinger, bf16 exponentials, middle range": dict(
        logits="float32", loss="hellinger", ref=True, exponentials="bfloat16", place="middle"
    ),
    "fp32 hellinger, bf16 exponentials, last range": dict(
        logits="float32", loss="hellinger", ref=True, exponentials="bfloat16", place="last"
    ),
    "fp64 neyman": dict(logits="float64", loss="neyman", ref=True, exponentials="float64"),
}
RAGGED: dict[str, Record] = {
    "fp32 pearson, odd V": dict(V=50257, logits="float32", loss="pearson", ref=True),
    "fp16 jensen_shannon, every other column, int32 labels": dict(
        V=4096, logits="float16", loss="jensen_shannon", ref=True, step=2, labels="int32"
    ),
    # Triton makes constants of arguments that are 1.
    "bf16 kl, one row, one column, ignore_index 1": dict(
        V=1, N=1, logits="bfloat16", loss="kl", ref=True, exponentials="bfloat16",
        ignore_index=1, entropy=True,
    ),
}  # fmt: skip
# The same of divergences. Gradients of fp32 logits are written as the operands of products.
ALIGNED_DIVERGENCES: dict[str, Record] = {
    "fp32 forward_kl, bf16 gradient, anchor": dict(
        logits="float32", gradient="bfloat16", beside="some"
    ),
    "fp32 jensen_shannon, bf16 gradient": dict(
        logits="float32", divergence="jensen_shannon", gradient="bfloat16"
    ),
    "fp32 reverse_kl, capped, bf16 gradient": dict(
        logits="float32", divergence="reverse_kl", gradient="bfloat16", cap=30.0, beside="all"
    ),
    "fp16 hellinger": dict(logits="float16", divergence="hellinger", gradient="float16"),
    "bf16 total_variation": dict(
        logits="bfloat16", divergence="total_variation", gradient="bfloat16"
    ),
    "fp64 jensen_shannon": dict(
        logits="float64", divergence="jensen_shannon", gradient="float64", beside="all"
    ),
}
RAGGED_DIVERGENCES: dict[str, Record] = {
    "fp32 forward_kl, odd V": dict(V=50257, logits="float32", gradient="float32", beside="some"),
    "bf16 reverse_kl of fp64, one row, one column, ignore_index 1": dict(
        V=1, N=1, logits="bfloat16", teacher="float64", divergence="reverse_kl",
        gradient="bfloat16", beside="all", ignore_index=1,
    ),
}  # fmt: skip


class _Target:
    """All that compiling asks of a driver."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target)

    def get_current_stream(self, device: str) -> int:
        return 0


def compile_only(target: str, *kernels: Any) -> list[Any]:
    """Make launches of the kernels end where the GPU would begin; they append to the result."""
    driver.set_active(_Target(GPUTarget(*TARGETS[target])))
    compiled: list[Any] = []

    def warm_up(run: Callable, *args: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(run(*args, warmup=True, **kwargs))

    for kernel in kernels:
        kernel.run = functools.partial(warm_up, kernel.run)
    return compiled


def _launch_rows(
    *,
    logits: str,
    V: int,
    N: int = 64,
    place: str = "whole",
    loss: str | None = None,
    ref: bool = False,
    value: bool = False,
    exponentials: str | None = None,
    smoothing: float = 0.0,
    z: float = 0.0,
    cap: float | None = None,
    entropy: bool = False,
    step: int = 1,
    labels: str = "int64",
    ignore_index: int = -100,
) -> None:
    """A row pass and the gradient of the same rows."""
    from fused_losses.token_losses import TOKEN_LOSSES
    from fused_losses_kernels import lines, row_gradient, row_pass

    wide = torch.float64 if logits == "float64" else torch.float32

    def new(*shape: int, dtype: Any = wide) -> torch.Tensor:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return torch.empty(shape, dtype=dtype, device="meta")

    x = new(2, N, V * step, dtype=logits)[..., ::step] if step > 1 else new(N, V, dtype=logits)
    M = x.numel() // V
    y, rows, per_row = new(M, dtype=labels), new(lines.LINES, M), new(M)
    member = None if loss is None else TOKEN_LOSSES[loss]
    first_column, vocabulary = {
        "whole": (0, V), "first": (0, 3 * V), "middle": (V, 3 * V), "last": (2 * V, 3 * V)
    }[place]  # fmt: skip
    shared = dict(
        ignore_index=ignore_index, pre=1.0, cap=cap, first_column=first_column, V=vocabulary
    )
    row_pass.row_pass(
        x,
        y,
        rows,
        ref=per_row if ref else None,
        value=per_row if value else None,
        exponentials=None if exponentials is None else new(M, V, dtype=exponentials),
        phi=None if member is None else member.device_fn,
        beta=1.0,
        r0=float("-inf") if member is None else member.left_end(4.0),
        label_smoothing=smoothing,
        z_loss=z,
        entropy=entropy,
        top1=entropy,
        **shared,
    )
    row_gradient.row_gradient(
        x,
        y,
        rows,
        dlogp=per_row,
        dlse=per_row if z or smoothing or entropy else None,
        dmean=per_row if smoothing else None,
        dentropy=per_row if entropy else None,
        dz=new(*x.shape, dtype=exponentials or logits),
        **shared,
    )


def _launch_divergence(
    *,
    logits: str,
    V: int,
    N: int = 64,
    teacher: str | None = None,
    divergence: str = "forward_kl",
    mixture: float = 0.5,
    gradient: str,
    beside: str | None = None,
    cap: float | None = None,
    ignore_index: int = -100,
) -> None:
    """A divergence with its gradient; alone too, where the one does not take the other's kernel."""
    from fused_losses.divergences import check_divergence
    from fused_losses_kernels import lines
    from fused_losses_kernels.row_divergence import row_divergence

    def wide(name: str) -> str:
        return "float64" if name == "float64" else "float32"

    def new(*shape: int, dtype: str) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    theirs = teacher or logits
    per_row = new(N, dtype=wide(logits))
    member = check_divergence(divergence, mixture)
    for dz in (None, new(N, V, dtype=gradient))[member.slope_sum is None :]:
        row_divergence(
            new(N, V, dtype=logits),
            new(N, V, dtype=theirs),
            new(N, dtype="int64"),
            new(lines.LINES, N, dtype=wide(logits)),
            new(lines.LINES, N, dtype=wide(theirs)),
            term=member.device_fn,
            slope_sum=member.slope_sum,
            parameter=member.parameter,
            out=per_row,
            dz=dz,
            share=per_row if beside else None,
            weight=per_row,
            dlogp=per_row if beside else None,
            dlse=per_row if beside == "all" else None,
            dmean=per_row if beside == "all" else None,
            dentropy=per_row if beside == "all" else None,
            ignore_index=ignore_index,
            pre=1.0,
            cap=cap,
            teacher_pre=1.0,
            teacher_cap=cap,
        )


def _launch_segment_sum(dtype: torch.dtype) -> None:
    from fused_losses_kernels.segment_sum import segment_sum

    x = torch.empty(64, dtype=dtype, device="meta")
    segment_sum(x, torch.empty(9, dtype=torch.int64, device="meta"), x.new_empty(8))


def compile_target(target: str, *, quick: bool = False) -> Iterator[Record]:
    """Yield a record per distinct kernel; a launch that does not compile gives its error.

    ``quick``: every launch row with the first case, the other cases in the longest row only.
    """
    from fused_losses_kernels import divergence_gradient as of_divergence
    from fused_losses_kernels import row_divergence, row_gradient, row_pass, segment_sum

    compiled = compile_only(
        target,
        row_pass._row_pass_kernel,
        row_gradient._row_gradient_kernel,
        segment_sum._segment_sum_kernel,
        row_divergence._divergence_sums_kernel,
        of_divergence.divergence_gradient_kernel,
    )
    launches = []
    for launch, aligned, ragged in (
        (_launch_rows, ALIGNED, RAGGED),
        (_launch_divergence, ALIGNED_DIVERGENCES, RAGGED_DIVERGENCES),
    ):
        launches += [
            (case, functools.partial(launch, V=V, **options))
            for number, (case, options) in enumerate(aligned.items())
            for V in (VOCABULARIES if number == 0 or not quick else VOCABULARIES[-1:])
        ]
        launches += [(case, functools.partial(launch, **o)) for case, o in ragged.items()]
    for name, dtype in (("fp32", torch.float32), ("fp64", torch.float64)):
        launches.append((name, functools.partial(_launch_segment_sum, dtype)))
    seen = set()
    for case, launch in launches:
        compiled.clear()
        try:
            launch()
            fresh = [kernel for kernel in compiled if (case, kernel.hash) not in seen]
            for kernel in fresh:
                seen.add((case, kernel.hash))
                yield {"target": target, "case": case, **describe(kernel)}
        except Exception as error:
            yield {"target": target, "case": case, "error": f"{type(error).__name__}: {error}"}


def _run_target(target: str, *, quick: bool) -> list[Record]:
    """Compile one target in a process of its own, with a cache of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    words = [sys.executable, __file__, "--child", target, *(["--quick"] if quick else [])]
    records, begin, shown = [], time.monotonic(), 0.0
    with tempfile.TemporaryDirectory() as cache:
        environment["TRITON_CACHE_DIR"] = cache
        with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as child:
            for line in child.stdout or ():
                records.append(json.loads(line))
                if (seconds := time.monotonic() - begin) > shown + 5:
                    shown = seconds
                    print(f"{target}: {len(records)} kernels, {seconds:.0f} s", flush=True)
    if child.returncode:
        raise RuntimeError(f"compiling for {target} ended with status {child.returncode}")
    print(f"{target}: {len(records)} kernels, {time.monotonic() - begin:.0f} s, done", flush=True)
    return records


def _write(path: Path, text: str) -> None:
    """Replace ``path`` whole or leave it as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        partial.write_text(text, "utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def main() -> int:
    """Compile, report, write; 1 if a kernel did not compile."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--quick", action="store_true", help="half of the kernels; needs --out")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="folder of the tables")
    parser.add_argument("--child", choices=TARGETS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    whole = not options.quick and len(set(options.targets)) == len(TARGETS)
    if not (whole or options.out or options.child):
        parser.error("a part of the report does not replace the committed one: give --out FOLDER")
    if options.child:
        for record in compile_target(options.child, quick=options.quick):
            print(json.dumps(record), flush=True)
        return 0
    with ThreadPoolExecutor(options.jobs) as pool:
        run = functools.partial(_run_target, quick=options.quick)
        records = [record for found in pool.map(run, options.targets) for record in found]
    for record in (failed := [record for record in records if "error" in record]):
        print(f"{record['target']}, {record['case']}: {record['error']}", file=sys.stderr)
    if failed:
        return 1
    content = {"triton": triton.__version__, "kernels": records}
    out = options.out or COMMITTED
    _write(out / "report.json", lines_per_kernel(content))
    _write(out / "report.md", markdown(content))
    print(f"{len(records)} kernels: {out / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
