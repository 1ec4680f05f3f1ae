"""Rows and columns more than 2**31 elements apart: in memory that is mapped, and hardly there.

Only pages that are touched exist. Of everything, results are those of the same numbers side by
side, bit for bit. The interpreter may compute offsets in other integers than a GPU, so what the
compiler makes of the sources is read too.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_losses
from fused_losses.divergences import check_divergence

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from fused_losses_kernels import launch, lines
from fused_losses_kernels.row_divergence import row_divergence
from fused_losses_kernels.row_gradient import row_gradient
from fused_losses_kernels.row_pass import row_pass
from fused_losses_kernels.segment_sum import segment_sum

ROOT = Path(__file__).resolve().parent.parent
_FAR = 2**31
_NO_RESERVE = 0x4000  # of Linux: no promise that all of it could exist
# Strides that each fit 32 bits, of which a few make an offset that does not: (B, T, V), or (N, V).
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "rows": ((3, 37), (2**30 + 64, 1)),
    "sequences": ((3, 1, 37), (2**30 + 64, 48, 1)),
    "tokens": ((1, 3, 37), (48, 2**30 + 64, 1)),
    "columns": ((2, 37), (1, 2**26 + 8)),
    "columns of several blocks": ((2, 600), (1, 2**22 + 8)),
}
ROWS = [name for name, (_, strides) in LAYOUTS.items() if strides[-1] == 1]
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_written = pytest.mark.parametrize("layout", ROWS)


@pytest.fixture(autouse=True)
def _blocks_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_INTERPRETED_BLOCK", 256)


def spread(near: Tensor, layout: str) -> Tensor:
    """The same numbers, far apart."""
    shape, strides = LAYOUTS[layout]
    reach = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    assert reach > _FAR > max(strides)
    far = mapped(reach, near.dtype, near.device).as_strided(shape, strides)
    return far.copy_(near.view(shape))


def mapped(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that no memory is taken for until they are written; on a GPU, memory."""
    size = elements * dtype.itemsize
    if device.type != "cpu":
        if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < size:
            pytest.skip("no GPU with room for the span")
        return torch.empty(elements, dtype=dtype, device=device)
    if not sys.platform.startswith("linux"):
        pytest.skip("asks Linux for memory that is not there")
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        memory = mmap.mmap(-1, size, flags=flags)
    except OSError as error:
        pytest.skip(f"no address space for {size} bytes: {error}")
    return torch.frombuffer(memory, dtype=dtype)


class Case:
    """Logits side by side, with labels, the first of which is ignored."""

    def __init__(self, layout: str) -> None:
        shape, _ = LAYOUTS[layout]
        self.layout, self.V = layout, shape[-1]
        self.N = math.prod(shape[:-1])
        self.z = (4.0 * torch.randn(shape)).bfloat16()
        self.y = torch.arange(self.N) * 7 % self.V
        self.y[0] = -100
        self.rows = torch.zeros(lines.LINES, self.N)
        self.one = torch.rand(self.N)


OPTIONS: dict[str, Any] = dict(ignore_index=-100, pre=1.0, cap=None, first_column=0)
PASS: dict[str, Any] = dict(
    ref=None, value=None, phi=None, beta=1.0, r0=float("-inf"), label_smoothing=0.0, z_loss=0.0,
    entropy=True, top1=True,
)  # fmt: skip


def same(layout: str, near: Tensor, run: Callable[[Tensor], list[Tensor]]) -> None:
    """Run with a tensor side by side and far apart."""
    far = spread(near, layout)
    for a, b in zip(run(near), run(far), strict=True):
        assert a.isfinite().all()
        if a.device.type == "cpu":
            assert torch.equal(a, b)
        else:  # where other alignments are read in other pieces
            torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("device")
@each_layout
def test_a_row_pass_reads_logits_far_apart(layout: str) -> None:
    case = Case(layout)

    def run(z: Tensor) -> list[Tensor]:
        rows, e = torch.full_like(case.rows, torch.nan), torch.empty(case.N, case.V)
        row_pass(z, case.y, rows, exponentials=e, V=case.V, **PASS, **OPTIONS)
        return [rows, e]

    same(layout, case.z, run)


@pytest.mark.usefixtures("device")
def test_a_row_pass_writes_exponentials_far_apart() -> None:
    case = Case("rows")
    case.z[:, -1] = 60.0  # so that rows are gone through again, and what was written is scaled

    def run(e: Tensor) -> list[Tensor]:
        rows = torch.full_like(case.rows, torch.nan)
        row_pass(case.z, case.y, rows, exponentials=e, V=case.V, **PASS, **OPTIONS)
        return [rows, e.clone()]

    same("rows", torch.zeros_like(case.z), run)


@pytest.mark.usefixtures("device")
@each_layout
def test_a_row_gradient_reads_logits_far_apart(layout: str) -> None:
    case = Case(layout)
    row_pass(case.z, case.y, case.rows, exponentials=None, V=case.V, **PASS, **OPTIONS)
    beside = {"dlogp": case.one, "dlse": case.one, "dmean": case.one, "dentropy": case.one}

    def run(z: Tensor) -> list[Tensor]:
        dz = torch.full_like(case.z, torch.nan)
        row_gradient(z, case.y, case.rows, **beside, dz=dz, V=case.V, **OPTIONS)
        return [dz]

    same(layout, case.z, run)


@pytest.mark.usefixtures("device")
@each_written
def test_a_row_gradient_writes_far_apart(layout: str) -> None:
    case = Case(layout)
    row_pass(case.z, case.y, case.rows, exponentials=None, V=case.V, **PASS, **OPTIONS)
    beside = {"dlogp": case.one, "dlse": None, "dmean": None, "dentropy": None}

    def run(dz: Tensor) -> list[Tensor]:
        row_gradient(case.z, case.y, case.rows, **beside, dz=dz, V=case.V, **OPTIONS)
        return [dz.clone()]

    same(layout, torch.zeros_like(case.z), run)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("which", ["student", "teacher", "gradient"])
@pytest.mark.parametrize("layout", ["rows", "columns of several blocks"])
def test_a_divergence_reads_and_writes_far_apart(layout: str, which: str) -> None:
    if which == "gradient" and layout not in ROWS:
        pytest.skip("gradients are written by contiguous rows")
    case = Case(layout)
    teacher = case.z.flip(-1)
    theirs = torch.zeros_like(case.rows)
    for z, rows in ((case.z, case.rows), (teacher, theirs)):
        row_pass(z, case.y, rows, exponentials=None, V=case.V, **PASS, **OPTIONS)
    given = {"student": case.z, "teacher": teacher, "gradient": torch.zeros_like(case.z)}
    member = check_divergence("reverse_kl", 0.5)  # one whose gradient needs the sum before it

    def run(t: Tensor) -> list[Tensor]:
        of = given | {which: t}
        out = torch.full((case.N,), torch.nan)
        row_divergence(
            of["student"], of["teacher"], case.y, case.rows, theirs, term=member.device_fn,
            slope_sum=member.slope_sum, parameter=member.parameter, out=out, dz=of["gradient"],
            share=None, weight=case.one, dlogp=case.one, dlse=None, dmean=None, dentropy=None,
            ignore_index=-100, pre=1.0, cap=None, teacher_pre=1.0, teacher_cap=None,
        )  # fmt: skip
        return [out, of["gradient"].clone()]

    same(layout, given[which], run)


@pytest.mark.usefixtures("device")
def test_a_sum_of_a_segment_reads_values_far_off() -> None:
    x = mapped(_FAR + 9, torch.float32, torch.get_default_device())
    x[_FAR:] = 0.0
    x[_FAR + 2 : _FAR + 5] = torch.tensor([1.0, 2.0, 4.0])
    out = torch.empty(2)
    segment_sum(x, torch.tensor([_FAR + 1, _FAR + 4, _FAR + 9]), out)
    assert out.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_losses_and_gradients_of_logits_far_apart(layout: str, backend: str) -> None:
    case = Case(layout)
    ref = torch.zeros(case.N)

    def run(z: Tensor) -> list[Tensor]:
        leaf = z.detach().requires_grad_()
        stats = fused_losses.token_stats(leaf, case.y, entropy=True, backend=backend)
        sums = [t.sum() for t in stats[:3]]
        slopes = torch.autograd.grad(sums, leaf)
        options = {"backend": backend, "reduction": "sum", "inplace": layout in ROWS}
        loss = fused_losses.pearson_loss(leaf, case.y, ref, z_loss=0.01, **options)
        return [*sums, *slopes, loss, *torch.autograd.grad(loss, leaf)]

    same(layout, case.z, run)


def test_no_offset_is_a_32_bit_product(tmp_path: Path) -> None:
    """Of every kernel, as its source says it: before a compiler makes anything of it."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    words = [sys.executable, __file__]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert {name: bad for name, bad in found.items() if bad} == {}
    assert [name.split()[0] for name in found] == [
        *(3 * ["_row_pass_kernel"]),
        "_row_gradient_kernel",
        "_divergence_sums_kernel",
        "divergence_gradient_kernel",
        "_segment_sum_kernel",
    ]


class _EnoughError(Exception):
    """The compiler has made what it makes of the source."""


def launches() -> list[Callable[[], None]]:
    """Every kernel with everything asked of it and no stride of 1, on tensors that do not exist."""
    from fused_losses.token_losses import TOKEN_LOSSES

    V, shape = 4096, (2, 3, 4096)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    z, teacher = (new(*shape[:-1], 2 * V, dtype=torch.bfloat16)[..., ::2] for _ in range(2))
    y, per_row, rows = new(6, dtype=torch.int64), new(6), new(lines.LINES, 6)
    dz, e, x = new(*shape), new(6, V), new(64)
    beside = {name: per_row for name in ("dlogp", "dlse", "dmean", "dentropy")}
    member, given = check_divergence("reverse_kl", 0.5), TOKEN_LOSSES["hellinger"]
    options = OPTIONS | {"cap": 30.0, "V": 3 * V}
    passed = PASS | {
        "phi": given.device_fn, "r0": given.left_end(4.0), "ref": per_row, "value": per_row,
        "label_smoothing": 0.1, "exponentials": e,
    }  # fmt: skip
    return [
        *(
            functools.partial(row_pass, z, y, rows, **(options | passed | {"first_column": first}))
            for first in (0, V, 2 * V)
        ),
        lambda: row_gradient(z, y, rows, **beside, dz=dz, **options),
        lambda: row_divergence(
            z, teacher, y, rows, rows, term=member.device_fn, slope_sum=None, parameter=None,
            out=per_row, dz=dz, share=per_row, weight=per_row, **beside, ignore_index=-100,
            pre=1.0, cap=30.0, teacher_pre=1.0, teacher_cap=30.0,
        ),
        lambda: segment_sum(x, new(9, dtype=torch.int64), new(8)),
    ]  # fmt: skip


def narrow_in_sources() -> dict[str, list[str]]:
    """The 32-bit products in pointers of every kernel, kernel by kernel."""
    from triton.backends.nvidia.compiler import CUDABackend

    from fused_losses_kernels import divergence_gradient, row_divergence, segment_sum
    from fused_losses_kernels import row_gradient as of_gradient
    from fused_losses_kernels import row_pass as of_pass

    sys.path.insert(0, str(ROOT / "benchmarks"))
    import kernel_assembly
    import kernel_report

    found: dict[str, list[str]] = {}

    def stop(module: Any, *_: Any) -> None:
        text = str(module)
        name = text.partition("tt.func public @")[2].partition("(")[0]
        found[f"{name} {len(found)}"] = kernel_assembly.narrow_products(text)
        raise _EnoughError

    CUDABackend.make_ttgir = staticmethod(stop)
    kernels = [
        of_pass._row_pass_kernel,
        of_gradient._row_gradient_kernel,
        row_divergence._divergence_sums_kernel,
        divergence_gradient.divergence_gradient_kernel,
        segment_sum._segment_sum_kernel,
    ]
    kernel_report.compile_only("sm_90", *kernels)
    for kernel in kernels:

        def compiled(*args: Any, run: Any = kernel.run, **kwargs: Any) -> None:
            with contextlib.suppress(_EnoughError):
                run(*args, **kwargs)

        kernel.run = compiled
    for launch_one in launches():
        launch_one()
    return found


if __name__ == "__main__":
    print(json.dumps(narrow_in_sources()))
