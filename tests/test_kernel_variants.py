"""One kernel serves every number of rows: counted by compiling offline, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import kernel_report  # noqa: E402

pytestmark = pytest.mark.xdist_group("offline")


def test_any_number_of_rows_and_any_mixture_run_the_same_kernels() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    words = [sys.executable, __file__]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    first, *others = json.loads(done.stdout)
    assert len(first) == 4
    assert all(other == first for other in others)


if __name__ == "__main__":
    from fused_losses_kernels import divergence_gradient, row_divergence, row_gradient, row_pass

    compiled = kernel_report.compile_only(
        "sm_90",
        row_pass._row_pass_kernel,
        row_gradient._row_gradient_kernel,
        row_divergence._divergence_sums_kernel,
        divergence_gradient.divergence_gradient_kernel,
    )
    found = []
    for rows in (1, 127, 128, 4096):
        compiled.clear()
        kernel_report._launch_rows(logits="bfloat16", V=1024, N=rows, loss="mle")
        kernel_report._launch_divergence(
            logits="float32",
            V=1024,
            N=rows,
            divergence="jensen_shannon",
            mixture=rows / 8192,
            gradient="bfloat16",
        )
        found.append(sorted({kernel.hash for kernel in compiled}))
    print(json.dumps(found))
