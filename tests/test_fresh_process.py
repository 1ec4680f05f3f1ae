"""What only a process of its own shows: two threads' first calls at once, and too little memory.

Both in one process, for most of its seconds go into importing torch.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
_LITTLE = 100 << 20


def first_calls(backend: str) -> list[list[float]]:
    """Losses and gradients of this library, which nobody may have imported yet."""
    import torch

    import fused_losses

    made = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 8, generator=made).requires_grad_() for n in (6, 37))
    y, ref = torch.arange(6), torch.zeros(6)
    losses = [
        fused_losses.linear_mle_loss(x, w, y, backend=backend),
        fused_losses.linear_pearson_loss(x[None], w, y[None], ref[None], level="sequence"),
        fused_losses.hellinger_loss(x @ w.t(), y, ref, backend=backend),
    ]
    found = [*losses, *torch.autograd.grad(sum(losses), [x, w])]
    return [t.detach().flatten().tolist() for t in found]


def cold() -> dict[str, Any]:
    """The first calls of two threads that begin together, and the same once more.

    Of the torch backend: Triton's interpreter itself is not for two threads at once.
    """
    together, found, failed = threading.Barrier(2), {}, []

    def work(which: int) -> None:
        try:
            together.wait(60)
            found[which] = first_calls("torch")
        except BaseException as error:
            failed.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"found": [*found.values()], "failed": failed, "later": first_calls("torch")}


def starved() -> dict[str, Any]:
    """A call with more than there is, and again with the budget that its error names."""
    import torch

    import fused_losses

    x, w, y = torch.randn(4096, 8), torch.randn(65536, 8), torch.arange(4096)
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + _LITTLE, has + _LITTLE))

    def call(budget: int) -> float:
        options = {"backend": "torch", "workspace_bytes": budget}
        return fused_losses.linear_mle_loss(x, w, y, **options).item()

    try:
        return {"said": f"nothing: {call(1 << 30)}"}
    except RuntimeError as error:
        said = str(error)
    fits = re.search(r"workspace_bytes or .*, now 1073741824: ([0-9]+) fits: ", said)
    return {"said": said} if fits is None else {"said": said, "loss": call(int(fits.group(1)))}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What a fresh process finds."""
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_two_threads_may_be_the_first_to_call_a_cold_library(found: dict[str, Any]) -> None:
    assert found["cold"]["failed"] == []
    assert found["cold"]["found"] == [found["cold"]["later"]] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory there is")
def test_an_error_for_lack_of_memory_names_a_budget_that_fits(found: dict[str, Any]) -> None:
    assert "no memory for a workspace of" in found["starved"]["said"]
    assert 5.0 < found["starved"]["loss"] < 50.0


if __name__ == "__main__":
    everything = {"cold": cold()}
    if sys.platform == "linux":
        everything["starved"] = starved()
    print(json.dumps(everything))
