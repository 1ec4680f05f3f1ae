"""No tensor of tokens x vocabulary, forward or backward; and how much memory there is besides.

Seen from two sides: the profiler's memory events (what ATen's kernels take inside counts too) and
the storages that reach a ``TorchDispatchMode``, which looks inside the library's operators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_oracle import (
    HeadBatch,
    NewTensors,
    head_batch,
    memory_events,
    near_reference,
    peak,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_losses
from fused_losses.backends import RowMaths
from fused_losses.engine import head as head_products
from fused_losses.engine import planned as planned_calls
from fused_losses.engine import workspace
from fused_losses.engine.call import Call, HeadOptions, Needs
from fused_losses.engine.gradients import GradientSums
from fused_losses.engine.planned import PlannedCall
from fused_losses.engine.ranges import recompute, seen_chunks
from fused_losses.engine.rows import Coefficients
from fused_losses.engine.whole_rows import strips_of
from fused_losses.plan import LinearShape, plan_linear

B, T, D, V = 12, 25, 96, 5003
BUDGET = 2**20
N = 200
SEQUENCES = torch.arange(B)[:, None].expand(B, T)
# What O(N) vectors, row statistics and Python's bookkeeping take; far below a chunk.
SLACK = 2**16
# Upcast vocabulary at a time, where a CPU makes fp32 of 16-bit operands: outside the workspace.
UPCAST = 2**20


@pytest.fixture(autouse=True)
def _nothing_is_kept_from_before() -> None:
    workspace.release()


def _squares(stats: fused_losses.TokenStats, rows: Tensor) -> Tensor:
    return (stats.logps**2).sum()


def _first(batch: HeadBatch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.x, batch.w, batch.y


CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "mle": (fused_losses.linear_mle_loss, {}, ""),
    "mle, capped and smoothed": (
        fused_losses.linear_mle_loss,
        {"softcap": 20.0, "label_smoothing": 0.1, "z_loss": 1e-3},
        "",
    ),
    "hellinger": (fused_losses.linear_hellinger_loss, {}, "ref"),
    "hellinger, none": (fused_losses.linear_hellinger_loss, {"reduction": "none"}, "ref"),
    "statistics": (fused_losses.linear_token_stats, {}, ""),
    "statistics with entropy, capped": (
        fused_losses.linear_token_stats,
        {"entropy": True, "softcap": 20.0},
        "",
    ),
    "linear_loss": (fused_losses.linear_loss, {"units": SEQUENCES}, "fn"),
    "linear_loss with entropy, capped": (
        fused_losses.linear_loss,
        {"entropy": True, "softcap": 20.0},
        "fn",
    ),
    "linear_loss, too large a unit": (
        fused_losses.linear_loss,
        {"units": torch.zeros_like(SEQUENCES)},
        "fn",
    ),
    "dpo": (fused_losses.linear_dpo_loss, {}, "ref"),
    "sequences": (fused_losses.linear_pearson_loss, {"level": "sequence"}, "ref"),
}
each_call = pytest.mark.parametrize("name", CALLS)


def _arguments(
    name: str, batch: HeadBatch, ref: Tensor, **more: Any
) -> tuple[Callable[..., Any], list[Any], dict[str, Any]]:
    fn, options, extra = CALLS[name]
    args: list[Any] = [*_first(batch)]
    args += [ref] if extra == "ref" else [_squares] if extra == "fn" else []
    return fn, args, {"workspace_bytes": BUDGET, **options, **more}


def _run(name: str, batch: HeadBatch, ref: Tensor, **more: Any) -> list[Tensor]:
    fn, args, options = _arguments(name, batch, ref, **more)
    out = fn(*args, **options)
    if isinstance(out, fused_losses.TokenStats):
        out = sum(t.sum() for t in out[:3] if t is not None)
    leaves = [t for t in batch.tensors if t.requires_grad]
    return list(torch.autograd.grad(out.sum(), leaves)) if leaves else []


def test_the_instruments_see_eager_torch_make_the_logits() -> None:
    batch = head_batch((B, T), D, V).leaves()

    def eager() -> Tensor:
        loss = F.cross_entropy(F.linear(batch.x, batch.w).view(-1, V), batch.y.view(-1))
        return torch.autograd.grad(loss, batch.x)[0]

    assert max(memory_events(eager)) >= B * T * V * 4
    with NewTensors(*batch.tensors) as seen:
        eager()
    assert seen.largest >= B * T * V * 4


@each_call
@pytest.mark.parametrize("trained", ["nothing", "input", "input and weight"])
@pytest.mark.parametrize(
    ("dtype", "logits_dtype"),
    [(torch.float32, None), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=["fp32", "bf16", "bf16 with fp32 logits"],
)
def test_nothing_of_tokens_times_vocabulary_is_made(
    name: str, trained: str, dtype: torch.dtype, logits_dtype: torch.dtype | None
) -> None:
    batch = head_batch((B, T), D, V, dtype=dtype)
    assert batch.counted == N
    ref = near_reference(batch)
    if trained != "nothing":
        batch = batch.leaves(w="weight" in trained)
    with NewTensors(*batch.tensors) as seen:
        _run(name, batch, ref, logits_dtype=logits_dtype)
    # Nor anything near it: the workspace, or the weight's gradient.
    accumulator = V * D * 4
    assert seen.largest <= max(BUDGET, accumulator)
    assert seen.largest < N * V * dtype.itemsize


@each_call
@pytest.mark.parametrize("trained", ["nothing", "input", "input and weight"])
def test_memory_is_the_gradients_and_one_chunk(name: str, trained: str) -> None:
    batch = head_batch((B, T), D, V)
    ref = near_reference(batch)
    if trained != "nothing":
        batch = batch.leaves(w="weight" in trained)
    fn, args, options = _arguments(name, batch, ref)
    plan = fused_losses.explain(fn, *args, **options)
    assert len(plan.chunks) * len(plan.columns) > 3
    events = memory_events(lambda: _run(name, batch, ref))
    assert max(events) < N * V * 4
    gradients = sum(t.numel() * t.itemsize for t in batch.tensors if t.requires_grad)
    # A frozen head keeps -d logp / d x from forward.
    kept = batch.x.numel() * 4 if plan.route == "frozen" else 0
    # A chunk's hidden states; and what they give to dx, or their targets' rows of the head.
    chunk_rows = 2 * max(plan.chunks) * D * 4
    assert peak(events) <= gradients + kept + plan.workspace_bytes + chunk_rows + SLACK


def test_ties_for_top1_take_no_memory() -> None:
    batch = head_batch((B, T), D, V)
    batch.w.zero_()
    fn, args, options = _arguments("statistics", batch, near_reference(batch))
    plan = fused_losses.explain(fn, *args, **options)
    events = memory_events(lambda: fn(*args, **options))
    assert peak(events) <= plan.workspace_bytes + 2 * max(plan.chunks) * D * 4 + SLACK


@pytest.mark.parametrize("name", ["mle", "hellinger", "dpo", "statistics"])
def test_a_16_bit_weight_gradient_takes_one_fp32_accumulator(name: str) -> None:
    batch = head_batch((B, T), D, V, dtype=torch.bfloat16)
    ref = near_reference(batch)
    batch = batch.leaves()
    fn, args, options = _arguments(name, batch, ref)
    plan = fused_losses.explain(fn, *args, **options)
    events = memory_events(lambda: _run(name, batch, ref))
    gradients = sum(t.numel() * t.itemsize for t in batch.tensors)
    accumulator = V * D * 4
    limit = gradients + accumulator + plan.workspace_bytes + UPCAST + SLACK
    assert peak(events) <= limit + 4 * max(plan.chunks) * D * 4
    assert max(events) < N * V * 4


def _taken_by_products(plan: fused_losses.Plan, hidden: int) -> int:
    """What one of a chunk's bare products in bf16 takes by itself.

    oneDNN makes the result in fp32 first where a CPU knows no bf16.
    """
    R, C = max(plan.chunks), max(plan.columns)
    x, w, dz = (
        torch.zeros(shape, dtype=torch.bfloat16) for shape in ((R, hidden), (C, hidden), (R, C))
    )
    products = ((x, w.t(), torch.empty_like(dz)), (dz, w, x.clone()), (dz.t(), x, w.clone()))
    return max(
        peak(memory_events(functools.partial(torch.mm, a, b, out=out))) for a, b, out in products
    )


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("mle", 16),
        ("mle", 600),
        ("hellinger", 16),
        ("hellinger", 150),
        ("hellinger", 600),
        ("dpo", 16),
    ],
)
def test_the_peak_that_is_explained_is_that_of_the_allocator(name: str, hidden: int) -> None:
    batch = head_batch((B, T), hidden, V, dtype=torch.bfloat16)
    ref = near_reference(batch)
    batch = batch.leaves()
    budget = {"workspace_bytes": 2 * BUDGET if name == "dpo" else BUDGET}  # a pair must fit
    fn, args, options = _arguments(name, batch, ref, **budget)
    plan = fused_losses.explain(fn, *args, **options)
    # Fewer tokens than hidden units, or many more.
    assert (len(plan.chunks) == 1) == (hidden > 16)
    assert (plan.workspace_bytes > plan.budget_bytes) == (hidden > 16)
    # Of 150 the head's gradient is smaller than all logits, and takes the place of some.
    assert (len(plan.chunks) == 1 < len(plan.strips)) == (hidden == 150)
    dx = batch.x.numel() * 2
    found = peak(memory_events(lambda: _run(name, batch, ref, **budget))) - dx
    most = plan.peak_bytes + _taken_by_products(plan, hidden) + UPCAST + SLACK
    assert 0.8 * plan.peak_bytes <= found <= most


@each_call
def test_explained_bytes_fit_the_budget_and_are_what_is_taken(name: str) -> None:
    batch = head_batch((B, T), D, V)
    ref = near_reference(batch)
    for leaves in (batch, batch.leaves(w=False), batch.leaves()):
        for budget in (BUDGET // 3, BUDGET, 4 * BUDGET):
            fn, args, options = _arguments(name, leaves, ref, workspace_bytes=budget)
            plan = fused_losses.explain(fn, *args, **options)
            assert plan.budget_bytes == budget
            assert plan.workspace_bytes <= budget
            # The chunk's logits alone: the plan may not promise less than they take.
            assert plan.workspace_bytes >= max(plan.chunks) * max(plan.columns) * 4


@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float32])
@each_call
def test_the_workspace_holds_all_that_a_chunk_allocates(
    name: str, logits_dtype: torch.dtype
) -> None:
    """Without gradients nothing else is large, so the peak is the workspace itself."""
    batch = head_batch((B, T), D, V, dtype=torch.bfloat16)
    ref = near_reference(batch)
    fn, args, options = _arguments(name, batch, ref, logits_dtype=logits_dtype)
    plan = fused_losses.explain(fn, *args, **options)
    upcast = UPCAST if logits_dtype == torch.float32 else 0
    events = memory_events(lambda: _run(name, batch, ref, logits_dtype=logits_dtype))
    assert peak(events) <= plan.workspace_bytes + upcast + SLACK + 4 * max(plan.chunks) * D * 4


@pytest.mark.usefixtures("device")
def test_the_triton_backend_takes_no_memory_beside_the_chunk() -> None:
    batch = head_batch((4, 8), 8, 300, ignored=0.0)
    with NewTensors(*batch.tensors) as seen:
        for leaves in (batch.leaves(), batch.leaves(w=False)):
            loss = fused_losses.linear_mle_loss(
                *_first(leaves), backend="triton", workspace_bytes=5 * 300 * 4
            )
            loss.backward()
    dw = batch.w.numel() * 4
    assert dw <= seen.largest <= max(5 * 300 * 4, dw) < 4 * batch.ndv / batch.w.shape[1]


class _NoRows:
    """Row passes that compute nothing: they take no memory, as the kernels take none."""

    @staticmethod
    def row_pass(z: Tensor, *args: Any, **options: Any) -> None:
        assert z.dim() == 2

    row_gradient = row_pass


def _whole_rows(planned: PlannedCall) -> GradientSums:
    sums = GradientSums(planned)
    for strip in strips_of(planned, sums):
        strip.row_pass(top1=False)
    return sums


def _in_ranges(planned: PlannedCall) -> GradientSums:
    for _ in seen_chunks(planned, ref=None, value=None, top1=False):
        pass
    return recompute(planned, planned.rows, Coefficients(planned.rows[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("route", "run"), [("token", _whole_rows), ("recompute", _in_ranges)])
def test_the_engine_stays_below_it_at_32k_tokens_and_262k_words(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    route: Any,
    run: Callable[[PlannedCall], GradientSums],
) -> None:
    """Below the custom operator, with every row counted, on tensors that hold no memory."""
    tokens, vocabulary, hidden, budget = 32768, 262144, 4096, 2**30
    monkeypatch.setattr(planned_calls, "passes_of", lambda name, shard: _NoRows)
    # Fewer and larger blocks of upcast vocabulary, for time: still far below the limit.
    monkeypatch.setattr(head_products, "_BLOCK_BYTES", 2**27)
    shape = LinearShape(hidden, vocabulary, dtype, dtype, "triton", True, True)
    head = HeadOptions(dtype, dtype, torch.float32, budget, Needs(True, True, False))
    call = Call(RowMaths(), None, -100, False, "triton", head=head)
    plan = plan_linear([route], tokens, shape, budget)
    assert sum(plan.chunks) == tokens
    with FakeTensorMode():
        x = torch.empty(tokens, hidden, dtype=dtype)
        w = torch.empty(vocabulary, hidden, dtype=dtype)
        y = torch.empty(tokens, dtype=torch.int64)
        with NewTensors(x, w, y) as seen:
            sums = run(PlannedCall(x, w, None, y, None, call, plan))
            dw, _ = sums.head_gradients(w, None)
        assert sums.dx is not None
        assert sums.dx.shape == x.shape
        assert dw is not None
        assert (dw.shape, dw.dtype) == (w.shape, dtype)
    # dW, or its fp32 accumulator, is the largest; the logits of all tokens would be far more.
    assert seen.largest <= vocabulary * hidden * 4
    assert seen.largest * 4 <= tokens * vocabulary * dtype.itemsize
    assert plan.workspace_bytes <= budget


def test_a_cpu_keeps_one_workspace_of_at_most_the_default_budget() -> None:
    batch = head_batch((B, T), D, V).leaves()

    def taken() -> int:
        call = lambda: fused_losses.linear_mle_loss(*_first(batch)).backward()  # noqa: E731
        return max(memory_events(call))

    logits = N * V * 4
    assert taken() >= logits
    # Gradients alone: the logits are in the memory of the call before.
    assert taken() == V * D * 4 < logits
    workspace.release()
    assert taken() >= logits
    with torch.inference_mode():
        workspace.release()
        fused_losses.linear_mle_loss(*_first(batch))
    fused_losses.linear_mle_loss(*_first(batch)).backward()  # on memory of its own


def test_a_smaller_budget_keeps_less_and_nothing_above_the_default_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = head_batch((B, T), D, V).leaves()

    def kept(budget: int) -> list[int]:
        fused_losses.linear_mle_loss(*_first(batch), workspace_bytes=budget)
        return [memory.numel() for memory in workspace._kept]

    workspace.release()
    (large,), (small,) = kept(4 * BUDGET), kept(BUDGET // 4)
    assert small <= BUDGET // 4 < large <= 4 * BUDGET
    monkeypatch.setattr(workspace, "DEFAULT_CPU_BYTES", BUDGET)
    assert kept(4 * BUDGET) == []


def test_calls_inside_a_call_have_workspaces_of_their_own() -> None:
    batch = head_batch((B, T), D, V)
    inner = fused_losses.linear_mle_loss(*_first(batch))
    seen: list[Tensor] = []

    def loss_fn(stats: fused_losses.TokenStats, rows: Tensor) -> Tensor:
        seen.append(fused_losses.linear_mle_loss(*_first(batch)))
        return -stats.logps.sum() / N

    leaves = batch.leaves()
    loss = fused_losses.linear_loss(*_first(leaves), loss_fn)
    assert torch.equal(seen[0], inner)
    torch.testing.assert_close(loss, inner)
    (dx,) = torch.autograd.grad(loss, leaves.x)
    again = batch.leaves()
    (expected,) = torch.autograd.grad(fused_losses.linear_mle_loss(*_first(again)), again.x)
    torch.testing.assert_close(dx, expected)
