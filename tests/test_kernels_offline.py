"""The kernels as a GPU gets them: compiled for four architectures on a machine without any.

Each architecture is compiled in a process of its own, without the interpreter, through the very
launchers that the library calls: a driver that only names its target stands in for the GPU, tensors
on the meta device for memory. That process is this file, run as a script.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has no wheel for this platform")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
_SHARED_BYTES = 48 * 1024  # what every GPU grants without being asked

# Rows start 16 bytes apart and V is a multiple of 16: here loads must be as wide as they get.
ALIGNED = {
    "bfloat16 hellinger, everything": dict(
        dtype="bfloat16",
        V=32768,
        loss="hellinger",
        ref=True,
        value=True,
        exponentials=True,
        z_loss=0.1,
    ),
    "float32 mle, smoothed and capped": dict(
        dtype="float32", V=50304, loss="mle", label_smoothing=0.1, cap=30.0, entropy=True
    ),
    "bfloat16 statistics, short row": dict(dtype="bfloat16", V=1024, entropy=True),
    "float64 neyman": dict(dtype="float64", V=32768, loss="neyman", ref=True, exponentials=True),
}
RAGGED = {
    "float32 pearson, odd V": dict(dtype="float32", V=50257, loss="pearson", ref=True),
    "float16 jensen_shannon, every other column, int32 labels": dict(
        dtype="float16", V=4096, loss="jensen_shannon", ref=True, step=2, labels="int32"
    ),
    # Triton makes constants of arguments that are 1.
    "bfloat16 kl, one row, one column, ignore_index 1": dict(
        dtype="bfloat16",
        V=1,
        N=1,
        loss="kl",
        ref=True,
        exponentials=True,
        ignore_index=1,
        entropy=True,
    ),
}


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


def _compile_only(kernel: Any, compiled: list[Any]) -> None:
    """Make launches of the kernel end where the GPU would begin."""
    run = kernel.run

    def warm_up(*args: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(run(*args, warmup=True, **kwargs))

    kernel.run = warm_up


def _launch(
    *,
    dtype: str,
    V: int,
    N: int = 64,
    loss: str | None = None,
    ref: bool = False,
    value: bool = False,
    exponentials: bool = False,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    cap: float | None = None,
    entropy: bool = False,
    step: int = 1,
    labels: str = "int64",
    ignore_index: int = -100,
) -> None:
    from fused_losses.token_losses import TOKEN_LOSSES
    from fused_losses_kernels import lines
    from fused_losses_kernels.row_gradient import row_gradient
    from fused_losses_kernels.row_pass import row_pass

    logits = getattr(torch, dtype)
    acc = torch.float64 if logits == torch.float64 else torch.float32

    def new(*shape: int, dtype: torch.dtype = acc) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    z = new(2, N, V * step, dtype=logits)[..., ::step] if step > 1 else new(N, V, dtype=logits)
    M = z.numel() // V
    y, rows, per_row = new(M, dtype=getattr(torch, labels)), new(lines.LINES, M), new(M)
    member = None if loss is None else TOKEN_LOSSES[loss]
    shared = dict(ignore_index=ignore_index, pre=1.0, cap=cap)
    row_pass(
        z,
        y,
        rows,
        ref=per_row if ref else None,
        value=per_row if value else None,
        exponentials=z if exponentials else None,
        phi=None if member is None else member.device_fn,
        beta=1.0,
        r0=float("-inf") if member is None else member.left_end(4.0),
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        entropy=entropy,
        top1=entropy,
        **shared,
    )
    row_gradient(
        z,
        y,
        rows,
        dlogp=per_row,
        dlse=per_row if z_loss or label_smoothing or entropy else None,
        dmean=per_row if label_smoothing else None,
        dentropy=per_row if entropy else None,
        dz=torch.empty_like(z, memory_format=torch.contiguous_format),
        **shared,
    )


def _launch_segment_sum(dtype: torch.dtype) -> None:
    from fused_losses_kernels.segment_sum import segment_sum

    x = torch.empty(64, dtype=dtype, device="meta")
    segment_sum(x, torch.empty(9, dtype=torch.int64, device="meta"), x.new_empty(8))


@triton.jit
def _careless_kernel(x_ptr, stride):
    row = tl.program_id(0) * stride  # what the check below must find
    tl.store(x_ptr + row + tl.arange(0, 16), 0.0)


_DEFINITION = re.compile(r"^\s*(%[\w#:]+) = (.*)$")
_NAME = re.compile(r"%[\w]+")


def narrow_products(ttir: str) -> list[str]:
    """Return the 32-bit products whose value reaches the offset of a pointer."""
    definitions: dict[str, str] = {}
    offsets: list[str] = []
    for line in ttir.splitlines():
        for argument, initial in re.findall(r"(%\w+) = (%\w+)(?=[,)])", line):
            definitions.setdefault(argument, f"carried {initial}")  # iter_args of a loop
        match = _DEFINITION.match(line)
        if match:
            definitions[match[1].split(":")[0].split("#")[0]] = match[2]
            if match[2].startswith("tt.addptr"):
                offsets.append(_NAME.findall(match[2])[1])
    found, seen = [], set()
    while offsets:
        name = offsets.pop()
        body = definitions.get(name, "")
        if name in seen or body.startswith("tt.load"):  # what was loaded is data
            continue
        seen.add(name)
        if body.startswith("arith.muli") and re.search(r": (tensor<\w+xi32>|i32)", body):
            found.append(f"{name} = {body}")
        offsets += _NAME.findall(body)
    return found


def _stack_bytes(kernel: Any, arch: str) -> int:
    """Bytes of stack per thread: where registers spill to."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        # Scalar registers spill to lanes of vector registers, not to memory: they do not count.
        spills = re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)
        private = re.findall(r"\.private_segment_fixed_size:\s*(\d+)", text)
        assert spills, text[-2000:]
        assert private, text[-2000:]
        return sum(map(int, spills + private))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def _report(kernel: Any, arch: str) -> dict[str, Any]:
    ptx = kernel.asm.get("ptx", "")
    return {
        "kernel": kernel.metadata.name,
        "stack": _stack_bytes(kernel, arch),
        "shared": kernel.metadata.shared,
        "narrow": narrow_products(kernel.asm["ttir"]),
        "wide_loads": len(re.findall(r"ld\.global\S*\.v(?:4\.b32|2\.b64)", ptx)),
        "wide_stores": len(re.findall(r"st\.global\S*\.v(?:4\.b32|2\.b64)", ptx)),
    }


def _compile_everything(arch: str) -> Iterator[tuple[str, Any]]:
    from fused_losses_kernels import row_gradient, row_pass, segment_sum

    driver.set_active(_Target(GPUTarget(*TARGETS[arch])))
    compiled: list[Any] = []
    for kernel in (
        row_pass._row_pass_kernel,
        row_gradient._row_gradient_kernel,
        segment_sum._segment_sum_kernel,
    ):
        _compile_only(kernel, compiled)
    _compile_only(_careless_kernel, careless := [])
    launches = {name: lambda o=o: _launch(**o) for name, o in (ALIGNED | RAGGED).items()}
    for dtype in (torch.float32, torch.float64):
        launches[f"segment_sum {dtype}"] = lambda dtype=dtype: _launch_segment_sum(dtype)
    for name, launch in launches.items():
        compiled.clear()
        try:
            launch()
        except Exception as error:
            yield name, f"{type(error).__name__}: {error}"
        else:
            yield name, [_report(kernel, arch) for kernel in compiled]
    _careless_kernel[(2,)](torch.empty(64, device="meta"), 48)
    yield "careless", narrow_products(careless[0].asm["ttir"])


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one architecture's compiler said: (architecture, reports by launch)."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, __file__, request.param],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return request.param, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.xdist_group("offline")
def test_every_kernel_compiles_without_spills_and_without_narrow_pointer_products(
    compiled: tuple[str, dict[str, Any]],
) -> None:
    _, reports = compiled
    # The check itself: it finds the product that a careless kernel adds to a pointer.
    assert reports.pop("careless"), "an int32 product went unnoticed"
    errors = {name: report for name, report in reports.items() if isinstance(report, str)}
    assert not errors
    for name, kernels in reports.items():
        assert len(kernels) == (1 if name.startswith("segment_sum") else 2), name
        for kernel in kernels:
            # A predicate or two of rows whose columns lie apart, which no model's head produces.
            allowed = 16 if RAGGED.get(name, {}).get("step", 1) > 1 else 0
            assert kernel["stack"] <= allowed, (name, kernel)
            assert kernel["shared"] <= _SHARED_BYTES, (name, kernel)
            assert kernel["narrow"] == [], (name, kernel)


@pytest.mark.xdist_group("offline")
def test_rows_that_allow_it_are_read_and_written_16_bytes_at_a_time(
    compiled: tuple[str, dict[str, Any]],
) -> None:
    arch, reports = compiled
    if arch == "gfx942":
        pytest.skip("read from PTX, which only NVIDIA targets have")
    for name in ALIGNED:
        for kernel in reports[name]:
            assert kernel["wide_loads"] > 0, (name, kernel)
            writes = kernel["kernel"] == "_row_gradient_kernel" or ALIGNED[name].get("exponentials")
            assert (kernel["wide_stores"] > 0) == bool(writes), (name, kernel)
    # Every other column cannot be read so: the pattern does not match whatever comes.
    assert all(kernel["wide_loads"] == 0 for kernel in reports[list(RAGGED)[1]])


if __name__ == "__main__":
    print(json.dumps(dict(_compile_everything(sys.argv[1]))))
