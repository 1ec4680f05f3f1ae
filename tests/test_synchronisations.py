"""How often a call makes the CPU wait for the GPU: counted on a pretended one, and on a real one.

The bounds are what is counted today; nobody may add to them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_losses
from fused_losses import TokenStats

B, T, D, V = 4, 3, 8, 13
BUDGET = 40 * V * 4  # a few rows, for several chunks, and a pair

# (forward, backward) of each call. Linear calls learn how many labels count, or how many each
# sequence has: once, whatever the route, and backward knows.
BOUNDS = {
    "logits mle_loss": (0, 0),
    "logits hellinger_loss": (0, 0),
    "logits sequence": (0, 0),
    "logits dpo_loss": (0, 0),
    "logits kto_loss": (0, 0),
    "logits token_stats": (0, 0),
    "logits divergence_loss": (0, 0),
    "linear mle_loss": (1, 0),
    "linear hellinger_loss": (1, 0),
    "linear none": (1, 0),
    "linear sequence, none": (1, 0),
    "linear sequence, segments": (1, 0),
    "linear dpo_loss, none": (1, 0),
    "linear dpo_loss, frozen": (1, 0),
    "linear dpo_loss, too large a pair": (1, 0),
    "linear dpo_loss, aot": (1, 0),
    "linear sequence": (1, 0),
    "linear dpo_loss": (1, 0),
    "linear kto_loss": (1, 0),
    "linear policy_loss": (1, 0),
    "linear units": (1, 0),
    "linear function of logits": (1, 0),
    "linear divergence_loss": (1, 0),
    "linear divergence_loss, none": (1, 0),
    "linear sparse_divergence_loss": (1, 0),
    "linear frozen": (1, 0),
    "linear token_stats": (1, 0),
}


def _sums(stats: TokenStats, rows: Tensor) -> Tensor:
    return (stats.logps**2).sum()


def _sums_of_logits(stats: TokenStats, rows: Tensor, logits: Tensor) -> Tensor:
    return (logits**2).sum() + stats.lse.sum()


def calls() -> dict[str, Callable[[], Tensor]]:
    """Every kind of public call, on the default device."""
    z = torch.randn(B, T, V, requires_grad=True)
    x, w = torch.randn(B, T, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    y, ref = torch.randint(V, (B, T)), torch.full((B, T), -2.0)
    y[:, 0].fill_(-100)
    weight, desirable, advantages = torch.rand(B, T), torch.rand(B) < 0.5, torch.randn(B)
    logits = {
        "mle_loss": partial(fused_losses.mle_loss, z, y, token_weight=weight),
        "hellinger_loss": partial(fused_losses.hellinger_loss, z, y, ref, z_loss=0.1),
        "sequence": partial(fused_losses.pearson_loss, z, y, ref, level="sequence"),
        "dpo_loss": partial(fused_losses.dpo_loss, z, y, ref),
        "kto_loss": partial(fused_losses.kto_loss, z, y, ref, desirable, kl=ref),
        "token_stats": lambda **o: fused_losses.token_stats(z, y, entropy=True, **o).logps.sum(),
        "divergence_loss": partial(fused_losses.divergence_loss, z, z.detach() * 2.0, y),
    }
    head, two = (x, w, y), (x, w, 2.0 * x.detach(), w.detach(), y)
    ids = torch.zeros(B, T, 1, dtype=torch.long)
    linear = {
        "mle_loss": partial(fused_losses.linear_mle_loss, *head, token_weight=weight),
        "hellinger_loss": partial(fused_losses.linear_hellinger_loss, *head, ref),
        "none": partial(fused_losses.linear_hellinger_loss, *head, ref, reduction="none"),
        "sequence": partial(fused_losses.linear_pearson_loss, *head, ref, level="sequence"),
        "sequence, none": partial(
            fused_losses.linear_pearson_loss, *head, ref, level="sequence", reduction="none"
        ),
        "sequence, segments": partial(
            fused_losses.linear_pearson_loss, *head, ref, level="sequence", segment_ids=y % 2
        ),
        "dpo_loss": partial(fused_losses.linear_dpo_loss, *head, ref),
        "dpo_loss, none": partial(fused_losses.linear_dpo_loss, *head, ref, reduction="none"),
        "dpo_loss, frozen": partial(fused_losses.linear_dpo_loss, x, w.detach(), y, ref),
        "dpo_loss, too large a pair": partial(fused_losses.linear_dpo_loss, *head, ref),
        "dpo_loss, aot": partial(fused_losses.linear_dpo_loss, *head, ref, loss_type="aot"),
        "kto_loss": partial(fused_losses.linear_kto_loss, *head, ref, desirable, kl=ref),
        "policy_loss": partial(
            fused_losses.linear_policy_loss, *head, ref, advantages, ref, entropy_weight=0.1
        ),
        "units": partial(fused_losses.linear_loss, *head, _sums),
        "function of logits": partial(
            fused_losses.linear_loss, *head, _sums_of_logits, logits=True
        ),
        "divergence_loss": partial(fused_losses.linear_divergence_loss, *two, mle_weight=0.1),
        "divergence_loss, none": partial(
            fused_losses.linear_divergence_loss, *two, reduction="none", divergence="hellinger"
        ),
        "sparse_divergence_loss": partial(
            fused_losses.linear_sparse_divergence_loss, x, w, ids, ref[..., None], y, rest="bucket"
        ),
        "frozen": partial(fused_losses.linear_mle_loss, x, w.detach(), y),
        "token_stats": lambda **o: fused_losses.linear_token_stats(*head, **o).logps.sum(),
    }
    shared = {"backend": "triton"}
    found = {f"logits {name}": partial(fn, **shared) for name, fn in logits.items()}
    return found | {
        f"linear {name}": partial(
            fn, workspace_bytes=BUDGET // 6 if "too large" in name else BUDGET, **shared
        )
        for name, fn in linear.items()
    }


def pretended() -> dict[str, tuple[list[str], list[str]]]:
    """What each call waits for, forward and backward, on a device that is not there."""
    import pretend_gpu

    found = {}
    with torch.device(pretend_gpu.setup()):
        for name, call in calls().items():
            call()
            pretend_gpu.waits.clear()
            loss = call().sum()
            forward = pretend_gpu.waits.copy()
            pretend_gpu.waits.clear()
            loss.backward()
            found[name] = (forward, pretend_gpu.waits.copy())
    return found


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    """In a process of its own: the device, once known, stays so."""
    pytest.importorskip("triton")
    root = Path(__file__).resolve().parent.parent
    path = os.pathsep.join(map(str, (root, root / "kernels", root / "tests")))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there they are counted on the real one")
@pytest.mark.parametrize("name", BOUNDS)
def test_a_call_waits_for_a_gpu_no_more_often_than_it_did(
    name: str, counted: dict[str, Any]
) -> None:
    assert counted.keys() == BOUNDS.keys()
    for found, bound in zip(counted[name], BOUNDS[name], strict=True):
        assert len(found) <= bound, found


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", BOUNDS)
def test_a_call_waits_for_this_gpu_no_more_often_than_counted(name: str) -> None:
    call = calls()[name]
    call().sum().backward()  # compiles
    torch.cuda.synchronize()
    for run, bound in zip(_halves(call), BOUNDS[name], strict=True):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waited = [w for w in caught if "synchroniz" in str(w.message)]
        assert len(waited) <= bound, [f"{w.filename}:{w.lineno}" for w in waited]


def _halves(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Callable[[], None]]:
    losses: list[Tensor] = []
    return lambda: losses.append(call().sum()), lambda: losses[0].backward()


if __name__ == "__main__":
    print(json.dumps(pretended()), flush=True)
    # Autograd's thread of a device that is not there may abort an orderly exit.
    os._exit(0)
