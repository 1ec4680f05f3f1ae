"""Where the vocabulary is smaller than the hidden size, a chunk is its copies of hidden states."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from linear_oracle import head_batch, memory_events, near_reference, peak, relative_error
from torch import Tensor

import fused_losses
from fused_losses import reference
from fused_losses.engine import workspace
from fused_losses.plan import Plan, forced_route

D = 512
BUDGET = 2**19
# Numbers per row of the whole call: results, positions, weights, and autograd's gradients of them.
PER_ROW = 200
SLACK = 2**15
# Upcast operands at a time, where a CPU makes fp32 of 16-bit operands: outside the workspace.
UPCAST = 2**20


@pytest.fixture(autouse=True)
def _nothing_is_kept_from_before() -> None:
    workspace.release()


def _squares(stats: fused_losses.TokenStats, rows: Tensor) -> Tensor:
    return (stats.logps**2).sum()


# The function, the route it is made to take, and who wants gradients.
CALLS: dict[str, tuple[str, str | None, str, dict[str, Any]]] = {
    "token": ("mle_loss", "token", "both", {}),
    "token, smoothed and capped": (
        "mle_loss", "token", "both", {"label_smoothing": 0.1, "softcap": 9.0},
    ),
    "recompute": ("mle_loss", "recompute", "both", {}),
    "per token": ("mle_loss", None, "both", {"reduction": "none", "z_loss": 0.01}),
    "frozen": ("mle_loss", None, "input", {}),
    "frozen, per token": ("mle_loss", None, "input", {"reduction": "none", "z_loss": 0.01}),
    "forward": ("token_stats", None, "nothing", {}),
    "unit": ("loss", "unit", "both", {}),
    "only the head": ("mle_loss", "token", "head", {}),
}  # fmt: skip


def _measured(
    name: str, N: int, V: int, backend: str, dtype: torch.dtype, ignored: float, budget: int
) -> tuple[Plan, int]:
    """The plan of a call, and its peak of memory beside the gradients."""
    function, route, wanted, options = CALLS[name]
    batch = head_batch((N,), D, V, dtype=dtype, ignored=ignored)
    if wanted != "nothing":
        batch = batch.leaves(x=wanted != "head", w=wanted != "input")
    fn = getattr(fused_losses, f"linear_{function}")
    args: list[Any] = [batch.x, batch.w, batch.y, *([_squares] if function == "loss" else [])]
    options = {"workspace_bytes": budget, "backend": backend, **options}
    wants = [t for t in batch.tensors if t.requires_grad]

    def run() -> Any:
        out = fn(*args, **options)
        return torch.autograd.grad(out.sum(), wants) if wants else out

    with forced_route(route) if route else contextlib.nullcontext():  # type: ignore[arg-type]
        plan = fused_losses.explain(fn, *args, **options)
        if route is not None:
            assert plan.route == route
        run()  # what is made once in a process
        workspace.release()
        highest = peak(memory_events(run))
    kept = sum(t.numel() * t.itemsize for t in wants)
    if dtype != torch.float32 and batch.w.requires_grad:
        kept += batch.w.numel() * 4  # its sum
    if plan.route == "frozen" and options.get("reduction") == "none":
        kept += batch.x.numel() * 4  # d logp / d x waits for backward
    return plan, highest - kept


@pytest.mark.parametrize("V", [2, 10, 300])
@pytest.mark.parametrize("name", CALLS)
def test_the_budget_bounds_what_a_chunk_holds_whatever_the_vocabulary(name: str, V: int) -> None:
    N = 1200
    ignored = 0.0 if V == 10 else 1 / 3
    plan, highest = _measured(name, N, V, "torch", torch.float32, ignored, BUDGET)
    assert plan.workspace_bytes <= BUDGET
    assert highest <= plan.workspace_bytes + PER_ROW * N + SLACK
    # With all rows in one chunk the copies alone are beyond any of that.
    assert 800 * D * 4 > 2 * (BUDGET + PER_ROW * N + SLACK)


@pytest.mark.parametrize("V", [2, 300])
@pytest.mark.parametrize("name", CALLS)
def test_nor_of_16_bit_operands_does_a_chunk_hold_more(name: str, V: int) -> None:
    N = 3000
    plan, highest = _measured(name, N, V, "torch", torch.bfloat16, 1 / 3, BUDGET)
    assert plan.workspace_bytes <= BUDGET
    assert highest <= plan.workspace_bytes + UPCAST + PER_ROW * N + SLACK


@pytest.mark.parametrize("V", [2, 300])
@pytest.mark.parametrize("name", CALLS)
def test_the_kernels_hold_no_more(name: str, V: int, device: torch.device) -> None:
    pytest.importorskip("triton")
    if device.type != "cpu":
        pytest.skip("counted from the allocator of CPUs, under the interpreter")
    N, budget = 24, 2**15
    plan, highest = _measured(name, N, V, "triton", torch.float32, 1 / 3, budget)
    assert plan.workspace_bytes <= budget
    assert highest <= plan.workspace_bytes + PER_ROW * N + 2**12


def test_what_is_explained_is_most_of_what_is_taken() -> None:
    for V in (2, 300):
        plan, highest = _measured("token", 1200, V, "torch", torch.float32, 1 / 3, 2**20)
        assert len(plan.chunks) > 1
        assert highest >= 0.8 * plan.workspace_bytes


@pytest.mark.parametrize("V", [2, 300])
@pytest.mark.parametrize("name", [name for name in CALLS if name != "unit"])
def test_the_least_budget_that_is_named_works(name: str, V: int) -> None:
    with pytest.raises(ValueError, match="the least that works is") as caught:
        _measured(name, 3, V, "torch", torch.float32, 0.0, 1)
    least = int(str(caught.value).rsplit(" ", 1)[1])
    for ignored in (0.0, 1 / 3):
        plan, _ = _measured(name, 3, V, "torch", torch.float32, ignored, least)
        assert plan.workspace_bytes <= least
    with pytest.raises(ValueError, match=f"least that works is {least}"):
        _measured(name, 3, V, "torch", torch.float32, 0.0, least - 1)


def test_scaling_what_a_frozen_head_kept_in_pieces_changes_nothing() -> None:
    batch = head_batch((50,), 32, 9)
    ref = near_reference(batch)
    found = []
    for budget in (2**22, 2**12):
        leaves = batch.leaves(w=False)
        loss = fused_losses.linear_hellinger_loss(
            leaves.x, leaves.w, leaves.y, ref, reduction="none", z_loss=0.1, workspace_bytes=budget
        )
        found.append(torch.autograd.grad(loss.square().sum(), leaves.x)[0])
    exact = batch.to(torch.float64).leaves(w=False)
    truth = reference.linear_hellinger_loss(
        exact.x, exact.w, exact.y, ref.double(), reduction="none", z_loss=0.1
    )
    (want,) = torch.autograd.grad(truth.square().sum(), exact.x)
    for got in found:
        assert relative_error(got, want) <= 2e-6
