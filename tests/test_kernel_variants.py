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


def test_any_number_of_rows_runs_the_same_kernels() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    words = [sys.executable, __file__]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout) == {"row_pass": 1, "row_gradient": 1}


if __name__ == "__main__":
    from fused_losses_kernels import row_gradient, row_pass

    kernels = (row_pass._row_pass_kernel, row_gradient._row_gradient_kernel)
    compiled = kernel_report.compile_only("sm_90", *kernels)
    for rows in (1, 127, 128, 4096):
        kernel_report._launch_rows(logits="bfloat16", V=1024, N=rows, loss="mle")
    print(json.dumps({
        name: len({k.hash for k in compiled if name in k.metadata.name})
        for name in ("row_pass", "row_gradient")
    }))  # fmt: skip
