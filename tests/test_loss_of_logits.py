"""``linear_loss(..., logits=True)``: any function of whole rows of logits, in a chunk's memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_oracle import (
    HeadBatch,
    NewTensors,
    gemm_flops,
    gradients,
    head_batch,
    memory_events,
    peak,
    relative_error,
)
from public_calls import of_units
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fused_losses
from fused_losses import TokenStats, reference
from fused_losses.engine import workspace

B, T, D, V = 3, 7, 8, 37
# Bytes of a logit: fp32 logits, their copy, its gradient and four more; with row-pass scratch.
FEW_ROWS = 4 * V * 4 * 9
LossFn = Callable[[TokenStats, Tensor, Tensor], Tensor]
TRANSFORMS: list[dict[str, Any]] = [
    {},
    {"temperature": 2.0, "logit_scale": 0.7},
    {"softcap": 5.0, "temperature": 1.5, "logit_scale": 0.7},
]


def _teacher(batch: HeadBatch, vocabulary: int = V) -> Tensor:
    """Log-probs (N, V) of another model, constant."""
    g = torch.Generator().manual_seed(5)
    scores = 2.0 * torch.randn(batch.y.numel(), vocabulary, generator=g, dtype=torch.float64)
    return scores.log_softmax(-1).to(batch.y.device)


def _distillation(teacher: Tensor, weight: Tensor | None = None) -> LossFn:
    """KL(teacher || student) of each token, its label's surprise beside it, weighted."""

    def loss_fn(stats: TokenStats, rows: Tensor, logits: Tensor) -> Tensor:
        wanted = teacher.to(logits.dtype)[rows]
        kl = F.kl_div(logits.log_softmax(-1), wanted, reduction="none", log_target=True).sum(-1)
        each = kl - 0.5 * stats.logps + 0.1 * stats.lse.square()
        return (each if weight is None else weight.flatten()[rows] * each).sum()

    return loss_fn


def _run(
    module: Any, batch: HeadBatch, loss_fn: Any, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    loss = module.linear_loss(
        batch.x, batch.w, batch.y, loss_fn, linear_bias=batch.bias, logits=True, **options
    )
    return loss, gradients(loss, batch)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("shift", [False, True])
def test_a_distillation_equals_eager_torch_in_several_chunks(
    transform: dict[str, Any], shift: bool, backend: str
) -> None:
    batch = head_batch((B, T), D, V, bias=True).leaves()
    loss_fn = _distillation(_teacher(batch), torch.linspace(-1.0, 2.0, B * T))
    options = {**transform, "shift": shift}
    call = (batch.x, batch.w, batch.y, loss_fn)
    more = {"workspace_bytes": FEW_ROWS, "backend": backend, "linear_bias": batch.bias}
    plan = fused_losses.explain(fused_losses.linear_loss, *call, logits=True, **more, **options)
    assert plan.route == "unit"
    assert len(plan.chunks) > 2
    got, found = _run(
        fused_losses, batch, loss_fn, workspace_bytes=FEW_ROWS, backend=backend, **options
    )
    exact = batch.to(torch.float64).leaves()
    want, truth = _run(reference, exact, loss_fn, **options)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=0.0)
    for g, t in zip(found, truth, strict=True):
        assert relative_error(g, t) <= 2e-6


def test_by_hand_the_mean_logit_of_a_row() -> None:
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    w = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], requires_grad=True)
    seen = []

    def loss_fn(stats: TokenStats, rows: Tensor, logits: Tensor) -> Tensor:
        seen.append((rows.tolist(), logits.tolist()))
        return logits.square().sum() / 2.0

    loss = fused_losses.linear_loss(x, w, torch.tensor([0]), loss_fn, logits=True)
    assert seen == [([0], [[1.0, 2.0, 3.0]])]
    assert loss == 7.0
    loss.backward()
    # dz = z: dx = z W = (1 + 3, 2 + 3); dW = z' x.
    assert x.grad is not None
    assert w.grad is not None
    assert x.grad.tolist() == [[4.0, 5.0]]
    assert w.grad.tolist() == [[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_gradcheck(transform: dict[str, Any], backend: str) -> None:
    batch = head_batch((3,), 3, 5, dtype=torch.float64, ignored=1 / 3, bias=True).leaves()
    teacher = _teacher(batch, 5)

    def loss_fn(stats: TokenStats, rows: Tensor, logits: Tensor) -> Tensor:
        assert logits.dtype == torch.float64
        assert stats.entropy is not None
        kl = (teacher[rows].exp() * (teacher[rows] - logits.log_softmax(-1))).sum()
        return (
            kl + (stats.logps * stats.entropy).sum() + (logits * stats.lse[:, None]).mean(1).sum()
        )

    def call(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        options = {"linear_bias": bias, "entropy": True, "logits": True, "backend": backend}
        return fused_losses.linear_loss(x, w, batch.y, loss_fn, **options, **transform)

    assert torch.autograd.gradcheck(call, (batch.x * 0.1, batch.w, batch.bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [True, False])
def test_16_bit_operands_give_fp32_logits_and_eager_torchs_precision(
    dtype: torch.dtype, wide: bool, backend: str
) -> None:
    batch = head_batch((B, T), D, V, dtype=dtype).leaves()
    teacher = _teacher(batch)
    seen = set()
    inner = _distillation(teacher)

    def loss_fn(stats: TokenStats, rows: Tensor, logits: Tensor) -> Tensor:
        seen.add((logits.dtype, stats.logps.dtype))
        return inner(stats, rows, logits)

    given = {} if wide or dtype == torch.float16 else {"logits_dtype": dtype}
    _, found = _run(fused_losses, batch, loss_fn, backend=backend, **given)
    assert seen == {(torch.float32, torch.float32)}
    exact = batch.to(torch.float64).leaves()
    _, truth = _run(reference, exact, inner)
    eager = batch.leaves()
    z = F.linear(eager.x, eager.w)[eager.y != -100]
    rows = (eager.y.flatten() != -100).nonzero()[:, 0]
    logps = z.log_softmax(-1)
    stats = TokenStats(
        logps.gather(-1, eager.y[eager.y != -100][:, None])[:, 0], z.logsumexp(-1), None, rows > 0
    )
    theirs = gradients(inner(stats, rows, z), eager)
    for mine, other, exactly in zip(found, theirs, truth, strict=True):
        assert mine.dtype == dtype
        assert relative_error(mine, exactly) <= 2.0 * relative_error(other, exactly)


@pytest.mark.parametrize("trained", ["all", "head", "hidden", "bias", "nothing"])
@pytest.mark.parametrize("budget", [None, FEW_ROWS])
def test_products_are_6_4_and_2_ndv_at_odd_shapes(trained: str, budget: int | None) -> None:
    batch = head_batch((B, T), D, V, bias=True)
    leaves = batch.leaves(
        x=trained in ("all", "hidden"), w=trained in ("all", "head"), bias=trained == "bias"
    )
    loss_fn = _distillation(_teacher(batch))

    def run() -> None:
        loss = fused_losses.linear_loss(
            leaves.x, leaves.w, leaves.y, loss_fn, linear_bias=leaves.bias, logits=True,
            workspace_bytes=budget,
        )  # fmt: skip
        if trained != "nothing":
            gradients(loss, leaves)

    products = {"all": 6, "head": 4, "hidden": 4, "bias": 2, "nothing": 2}[trained]
    assert gemm_flops(run) == products * batch.ndv
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == products * batch.ndv
    call = (leaves.x, leaves.w, leaves.y, loss_fn)
    plan = fused_losses.explain(
        fused_losses.linear_loss, *call, linear_bias=leaves.bias, logits=True
    )
    assert plan.flops == products * batch.ndv
    assert "loss function" in str(plan)


@pytest.mark.parametrize("trained", ["all", "hidden", "nothing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transform", [TRANSFORMS[0], TRANSFORMS[2]], ids=str)
def test_a_budget_of_1_mib_holds_and_nothing_of_tokens_times_vocabulary_is_made(
    trained: str, dtype: torch.dtype, transform: dict[str, Any]
) -> None:
    N, D, V, budget = 300, 96, 5003, 2**20
    batch = head_batch((N,), D, V, dtype=dtype)
    leaves = batch.leaves(w=trained == "all") if trained != "nothing" else batch
    teacher = torch.randn(V).log_softmax(-1)

    def loss_fn(stats: TokenStats, rows: Tensor, logits: Tensor) -> Tensor:
        logp = logits.log_softmax(-1)
        return F.kl_div(logp, teacher.expand_as(logp), reduction="sum", log_target=True)

    def run() -> None:
        options = {"logits": True, "workspace_bytes": budget, **transform}
        loss = fused_losses.linear_loss(leaves.x, leaves.w, leaves.y, loss_fn, **options)
        if trained != "nothing":
            gradients(loss, leaves)

    workspace.release()
    with NewTensors(*leaves.tensors) as seen:
        run()
    accumulator = V * D * 4
    assert seen.largest <= (max(budget, accumulator) if trained == "all" else budget)
    workspace.release()
    events = memory_events(run)
    kept = sum(t.numel() * t.itemsize for t in leaves.tensors if t.requires_grad)
    if dtype == torch.bfloat16:  # the sum of the head's gradient; upcast pieces of the head
        kept += accumulator * (trained == "all") + 2**20
    assert peak(events) <= kept + budget + 2**17
    assert peak(events) < kept + 200 * V * 4


def test_it_sees_whole_units(backend: str) -> None:
    batch = head_batch((B, T), D, V).leaves()
    units = torch.arange(B, device=batch.y.device)[:, None].expand(B, T)
    of_stats = of_units(units)
    sizes = []

    def loss_fn(stats: TokenStats, rows: Tensor, logits: Tensor) -> Tensor:
        of_row = units.reshape(-1)[rows]
        counted = (batch.y != -100).sum(1)
        for unit in of_row.unique().tolist():
            sizes.append(unit)
            assert (of_row == unit).sum() == counted[unit]
        means = logits.new_zeros(B, V).index_add(0, of_row, logits)
        return of_stats(stats, rows) + (means**2).mean()

    options = {"units": units, "backend": backend}
    _, found = _run(fused_losses, batch, loss_fn, workspace_bytes=2 * FEW_ROWS, **options)
    assert sizes == [0, 1, 2]
    _, truth = _run(reference, batch.to(torch.float64).leaves(), loss_fn, units=units)
    for g, t in zip(found, truth, strict=True):
        assert relative_error(g, t) <= 2e-6


def test_a_unit_that_does_not_fit_is_refused_with_the_bytes_that_it_takes() -> None:
    batch = head_batch((B, T), D, V).leaves()
    units = torch.zeros_like(batch.y)
    loss_fn = _distillation(_teacher(batch))
    with pytest.raises(ValueError, match=r"unit of 14 tokens takes \d+ bytes.*raise it") as caught:
        _run(fused_losses, batch, loss_fn, units=units, workspace_bytes=FEW_ROWS)
    needed = int(str(caught.value).split(" takes ")[1].split()[0])
    got, _ = _run(fused_losses, batch, loss_fn, units=units, workspace_bytes=needed)
    torch.testing.assert_close(got, _run(reference, batch, loss_fn, units=units)[0])
    with pytest.raises(ValueError, match="the least that works is"):
        _run(fused_losses, batch, loss_fn, workspace_bytes=10)


def test_a_loss_of_the_statistics_or_of_the_logits_alone_is_the_same() -> None:
    batch = head_batch((B, T), D, V).leaves()
    of_stats, a = _run(fused_losses, batch, lambda s, r, z: (s.logps * r).sum())

    def of_logits(stats: TokenStats, rows: Tensor, logits: Tensor) -> Tensor:
        y = batch.y.flatten()[rows]
        return (logits.log_softmax(-1).gather(-1, y[:, None])[:, 0] * rows).sum()

    alone, b = _run(fused_losses, batch, of_logits)
    torch.testing.assert_close(alone, of_stats)
    for g, t in zip(a, b, strict=True):
        assert relative_error(g, t) <= 2e-6


@pytest.mark.parametrize("trained", [{}, {"w": False}, {"x": False, "w": False}], ids=str)
def test_a_captured_tensor_that_wants_a_gradient_is_refused_by_name(
    trained: dict[str, bool], backend: str
) -> None:
    batch = head_batch((B, T), D, V).leaves(**trained)
    teacher = _teacher(batch).requires_grad_()
    with pytest.raises(ValueError, match=r"captured teacher, \(21, 37\).*Detach it"):
        _run(fused_losses, batch, _distillation(teacher), backend=backend)
    with torch.no_grad():
        fused_losses.linear_loss(
            batch.x, batch.w, batch.y, _distillation(teacher), logits=True, backend=backend
        )


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (lambda s, r, z: z.sum(-1), ValueError, r"0-d tensor.*got \(14,\)"),
        (lambda s, r, z: 1.0, ValueError, "0-d tensor.*got float"),
        (lambda s, r, z: z.detach().sum(), ValueError, "would train nothing"),
        (lambda s, r: s.logps.sum(), TypeError, r"called with \(stats, rows, logits\).*leave out"),
        (3, TypeError, "must be a function, got int"),
    ],
)
def test_what_returns_or_takes_something_else_is_named(
    loss_fn: Any, error: type[Exception], message: str
) -> None:
    batch = head_batch((B, T), D, V).leaves()
    with pytest.raises(error, match=message):
        _run(fused_losses, batch, loss_fn)


def test_a_function_of_logits_without_the_option_is_told_of_it() -> None:
    batch = head_batch((B, T), D, V).leaves()
    call = (batch.x, batch.w, batch.y, lambda stats, rows, logits: logits.sum())
    with pytest.raises(TypeError, match="pass logits=True"):
        fused_losses.linear_loss(*call)
    with pytest.raises(TypeError, match="logits must be True or False, got 1"):
        fused_losses.linear_loss(*call, logits=1)


def test_nothing_counted_gives_0_and_zero_gradients() -> None:
    batch = head_batch((B, T), D, V, ignored=1.0).leaves()
    loss, found = _run(fused_losses, batch, lambda s, r, z: z.sum() / 0)
    assert loss == 0.0
    assert all(not g.any() for g in found)


def test_nan_at_ignored_positions_and_in_place_mistakes_leave_no_trace() -> None:
    batch = head_batch((B, T), D, V).leaves()
    loss_fn = _distillation(_teacher(batch))
    _, clean = _run(fused_losses, batch, loss_fn)
    dirty = batch.leaves()
    with torch.no_grad():
        dirty.x[dirty.y == -100] = math.nan
    _, found = _run(fused_losses, dirty, loss_fn)
    for a, b in zip(clean, found, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="in-place"):
        _run(fused_losses, batch, lambda s, r, z: z.mul_(2.0).sum())


def test_checkpointing_no_grad_and_statistics_change_nothing() -> None:
    batch = head_batch((B, T), D, V).leaves()
    loss_fn = _distillation(_teacher(batch))

    def call(x: Tensor, w: Tensor) -> Tensor:
        return fused_losses.linear_loss(x, w, batch.y, loss_fn, logits=True)

    loss, found = _run(fused_losses, batch, loss_fn)
    again = checkpoint(call, batch.x, batch.w, use_reentrant=False)
    assert torch.equal(again, loss)
    for a, b in zip(found, gradients(again, batch), strict=True):
        assert torch.equal(a, b)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(call(batch.x, batch.w), loss)
    watched, stats = fused_losses.with_stats(call, batch.x, batch.w)
    torch.testing.assert_close(watched, loss)
    want = fused_losses.linear_token_stats(batch.x, batch.w, batch.y, entropy=True)
    torch.testing.assert_close(stats.logps, want.logps)
    torch.testing.assert_close(stats.entropy, want.entropy)


def test_second_derivatives_are_an_error() -> None:
    batch = head_batch((B, T), D, V).leaves()
    loss = fused_losses.linear_loss(
        batch.x, batch.w, batch.y, _distillation(_teacher(batch)), logits=True
    )
    (dx,) = torch.autograd.grad(loss, batch.x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        dx.sum().backward()
