"""How the linear path lives with autograd: dtypes, freezing, graphs, compilers, threads."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_oracle import HeadBatch, gradients, head_batch, near_reference, relative_error
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fused_losses
from fused_losses import TOKEN_LOSSES, reference
from fused_losses.backends import Objective, RowMaths
from fused_losses.engine.call import Call, HeadOptions, Needs

V, D = 67, 16
SECOND = "second derivatives"


def _squares(stats: fused_losses.TokenStats, rows: Tensor) -> Tensor:
    return ((stats.logps**2).sum() + stats.lse.sum()) / 100.0


def _call(
    name: str,
    batch: HeadBatch,
    module: Any = fused_losses,
    ref: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """A 0-d loss by each of the routes."""
    args = [batch.x, batch.w, batch.y]
    ref = near_reference(batch.to(torch.float32)) if ref is None else ref
    options["linear_bias"] = batch.bias
    if name == "mle":
        return module.linear_mle_loss(*args, label_smoothing=0.1, z_loss=1e-3, **options)
    if name == "hellinger":
        return module.linear_hellinger_loss(*args, ref, beta=0.5, **options)
    if name == "none":
        losses = module.linear_pearson_loss(*args, ref, reduction="none", **options)
        return (losses * torch.linspace(-1.0, 2.0, losses.numel()).view(losses.shape)).sum()
    if name == "stats":
        stats = module.linear_token_stats(*args, entropy=True, **options)
        return (stats.logps**2 + stats.lse - stats.entropy).sum() / 40.0
    if name == "units":
        return module.linear_loss(*args, _squares, **options)
    if name == "dpo":
        return module.linear_dpo_loss(*args, ref, beta=0.3, **options)
    return module.linear_pearson_loss(*args, ref, level="sequence", **options)


ROUTES = ["mle", "hellinger", "none", "stats", "units", "dpo", "sequence"]
each_route = pytest.mark.parametrize("name", ROUTES)


@pytest.fixture
def batch() -> HeadBatch:
    """Two pairs of sequences, with a bias."""
    return head_batch((4, 12), D, V, bias=True)


def _truth(name: str, batch: HeadBatch, ref: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    exact = batch.to(torch.float64).leaves()
    loss = _call(name, exact, reference, ref)
    return loss, gradients(loss, exact)


@each_route
def test_frozen_parts_get_no_gradient_and_change_nothing(name: str, batch: HeadBatch) -> None:
    truth, (dx, dw, db) = _truth(name, batch)
    for x, w, bias in [(True, False, False), (False, True, False), (False, False, True)]:
        leaves = batch.leaves(x=x, w=w, bias=bias)
        loss = _call(name, leaves)
        assert relative_error(loss, truth) <= 1e-5
        (got,) = gradients(loss, leaves)
        assert relative_error(got, dx if x else dw if w else db) <= 1e-5


@each_route
def test_without_gradients_nothing_is_attached(name: str, batch: HeadBatch) -> None:
    leaves = batch.leaves()
    trained = _call(name, leaves)
    with torch.no_grad():
        assert not _call(name, leaves).requires_grad
        torch.testing.assert_close(_call(name, leaves), trained.detach())
    with torch.inference_mode():
        torch.testing.assert_close(_call(name, batch), trained.detach())
    assert not _call(name, batch).requires_grad


@each_route
def test_gradients_are_linear_in_the_upstream_gradient(name: str, batch: HeadBatch) -> None:
    """What loss scaling and accumulation rest on."""
    leaves = batch.leaves()
    plain = gradients(_call(name, leaves), leaves)
    for scale in (3.0, -0.5, 2.0**16):
        scaled = gradients(_call(name, leaves) * scale, leaves)
        for a, b in zip(scaled, plain, strict=True):
            torch.testing.assert_close(a, b * scale, rtol=1e-5, atol=1e-6 * abs(scale))


@each_route
def test_a_retained_graph_gives_the_same_twice(name: str, batch: HeadBatch) -> None:
    leaves = batch.leaves()
    loss = _call(name, leaves) * 2.0
    first = torch.autograd.grad(loss, leaves.tensors, retain_graph=True)
    kept = [g.clone() for g in first]
    again = torch.autograd.grad(loss, leaves.tensors)
    for a, b, c in zip(first, kept, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(b, c)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves.tensors)


@each_route
@pytest.mark.parametrize("trained", ["input", "weight", "all"])
def test_a_second_derivative_is_an_error(name: str, trained: str, batch: HeadBatch) -> None:
    everything = trained == "all"
    leaves = batch.leaves(
        x=everything or trained == "input", w=everything or trained == "weight", bias=everything
    )
    wanted = [t for t in leaves.tensors if t.requires_grad]
    for loss in (_call(name, leaves), _call(name, leaves) + sum((t**3).sum() for t in wanted)):
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        with pytest.raises(RuntimeError, match=SECOND):
            torch.autograd.grad(sum(g.pow(2).sum() for g in first), wanted)


@each_route
def test_a_second_derivative_by_the_upstream_gradient_is_an_error(
    name: str, batch: HeadBatch
) -> None:
    leaves = batch.leaves()
    scale = torch.ones((), requires_grad=True)
    first = torch.autograd.grad(_call(name, leaves) * scale, leaves.tensors, create_graph=True)
    with pytest.raises(RuntimeError, match=SECOND):
        torch.autograd.grad(sum(g.pow(2).sum() for g in first), scale)


@each_route
def test_inputs_are_never_modified(name: str, batch: HeadBatch) -> None:
    leaves = batch.leaves()
    inputs = [*leaves.tensors, leaves.y]
    before = [(t.detach().clone(), t._version) for t in inputs]
    _call(name, leaves).backward()
    for t, (expected, version) in zip(inputs, before, strict=True):
        assert torch.equal(t, expected)
        assert t._version == version


@each_route
@pytest.mark.parametrize(
    ("x_dtype", "w_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_of_mixed_dtypes_the_wider_computes_and_each_gets_its_own(
    name: str, x_dtype: torch.dtype, w_dtype: torch.dtype, batch: HeadBatch
) -> None:
    mixed = HeadBatch(batch.x.to(x_dtype), batch.w.to(w_dtype), batch.y, batch.bias)
    truth, expected = _truth(name, mixed)
    leaves = mixed.leaves()
    loss = _call(name, leaves)
    assert loss.dtype == torch.float32
    assert relative_error(loss, truth) <= 1e-5
    for got, leaf, value in zip(gradients(loss, leaves), leaves.tensors, expected, strict=True):
        assert got.dtype == leaf.dtype
        assert relative_error(got, value) <= (1e-5 if leaf.dtype == torch.float32 else 2.5e-3)


@each_route
def test_under_autocast_its_dtype_computes(name: str, batch: HeadBatch) -> None:
    leaves = batch.leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = fused_losses.explain(_call, name, leaves)
        loss = _call(name, leaves)
    # Backward may run outside autocast, as usual.
    found = gradients(loss, leaves)
    rounded = HeadBatch(batch.x.bfloat16().float(), batch.w.bfloat16().float(), batch.y, batch.bias)
    truth, expected = _truth(name, rounded, near_reference(batch))
    assert plan.tokens == batch.counted
    assert loss.dtype == torch.float32
    assert relative_error(loss, truth) <= 2e-2
    for got, value in zip(found, expected, strict=True):
        assert got.dtype == torch.float32
        assert relative_error(got, value) <= 3e-2
    # It did compute in bf16: in fp32 the bound would be met a thousandfold.
    assert relative_error(found[0], expected[0]) > 1e-4


def test_float64_stays_float64_under_autocast(batch: HeadBatch) -> None:
    exact = batch.to(torch.float64).leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = _call("hellinger", exact)
    assert loss.dtype == torch.float64
    assert relative_error(loss, _truth("hellinger", batch)[0]) <= 1e-7


@each_route
def test_fp16_survives_a_large_count_and_a_large_scale(name: str) -> None:
    """The factor 1 / n is applied after fp16 has done its part, so nothing is flushed."""
    batch = head_batch((4, 12), D, V, dtype=torch.float16, bias=True)
    _, expected = _truth(name, batch)
    leaves = batch.leaves()
    found = gradients(_call(name, leaves) * 1024.0, leaves)
    for got, value in zip(found, expected, strict=True):
        assert got.dtype == torch.float16
        assert relative_error(got, value * 1024.0) <= 1e-3


@pytest.mark.parametrize("name", ["mle", "none", "divergence"])
def test_fp16_as_gpus_multiply_it_survives_what_it_has_no_room_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU computes fp16 in fp32 unless it is made to; counts and scales are beyond fp16."""
    for module in ("linear_source", "teacher"):
        place = f"fused_losses.functional.{module}.compute_dtype"
        monkeypatch.setattr(place, lambda x, w: torch.promote_types(x.dtype, w.dtype))
    batch = head_batch((4, 12), D, V, dtype=torch.float16, bias=True)
    batch.x.mul_(0.01)
    batch.w.mul_(0.03)
    ref = near_reference(batch.to(torch.float32))

    def loss(module: Any, leaves: HeadBatch) -> Tensor:
        args = (leaves.x, leaves.w)
        if name == "mle":  # each token's part is 0 in fp16
            return module.linear_mle_loss(*args, leaves.y, num_items=3e8, z_loss=1e-3) * 3e8
        if name == "none":  # infinite at each target
            losses = module.linear_pearson_loss(*args, leaves.y, ref, reduction="none")
            return losses.sum() * 7e4
        teacher = (batch.x.flip(0).to(leaves.x.dtype), batch.w.to(leaves.w.dtype))
        losses = module.linear_divergence_loss(*args, *teacher, leaves.y, reduction="none")
        return losses.sum() * 3e7

    exact, leaves = batch.to(torch.float64).leaves(bias=False), batch.leaves(bias=False)
    expected = torch.autograd.grad(loss(reference, exact), [exact.x, exact.w])
    found = torch.autograd.grad(loss(fused_losses, leaves), [leaves.x, leaves.w])
    for got, value in zip(found, expected, strict=True):
        assert got.dtype == torch.float16
        assert relative_error(got, value) <= 5e-3


def test_gradients_of_tied_weights_add(batch: HeadBatch) -> None:
    tokens = torch.randint(V, (4, 12))
    for module in (fused_losses, reference):
        w = batch.w.double().requires_grad_()
        hidden = F.embedding(tokens, w).tanh()
        loss = module.linear_mle_loss(hidden, w, batch.y)
        (found,) = torch.autograd.grad(loss, w)
        if module is fused_losses:
            got = found
    assert relative_error(got, found) <= 1e-12


@each_route
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(
    name: str, use_reentrant: bool, batch: HeadBatch
) -> None:
    leaves = batch.leaves()
    expected = gradients(_call(name, leaves), leaves)

    def block(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return _call(name, HeadBatch(x, w, batch.y, bias))

    loss = checkpoint(block, *leaves.tensors, use_reentrant=use_reentrant)
    loss.backward()
    for leaf, value in zip(leaves.tensors, expected, strict=True):
        assert torch.equal(leaf.grad, value)


@pytest.mark.parametrize("name", ["mle", "hellinger", "none", "stats", "dpo", "sequence"])
def test_it_compiles_without_a_graph_break(name: str) -> None:
    batch = head_batch((4, 6), 8, 33, bias=True)

    def loss_of(x: Tensor, w: Tensor, bias: Tensor, ref: Tensor) -> Tensor:
        args = (x, w, batch.y)
        if name == "mle":
            return fused_losses.linear_mle_loss(*args, linear_bias=bias, label_smoothing=0.1)
        if name == "hellinger":
            return fused_losses.linear_hellinger_loss(*args, ref, linear_bias=bias)
        if name == "none":
            return fused_losses.linear_pearson_loss(
                *args, ref, linear_bias=bias, reduction="none"
            ).mean()
        if name == "dpo":
            return fused_losses.linear_dpo_loss(*args, ref, linear_bias=bias)
        if name == "sequence":
            return fused_losses.linear_pearson_loss(*args, ref, level="sequence", linear_bias=bias)
        stats = fused_losses.linear_token_stats(*args, linear_bias=bias, entropy=True)
        return (stats.logps**2 + stats.lse - stats.entropy).mean()

    ref = near_reference(batch)
    eager, compiled = batch.leaves(), batch.leaves()
    expected = loss_of(*eager.tensors, ref)
    torch._dynamo.reset()
    got = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(*compiled.tensors, ref)
    torch.testing.assert_close(got, expected)
    for a, b in zip(gradients(got, compiled), gradients(expected, eager), strict=True):
        torch.testing.assert_close(a, b)


def _own_phi(r: Tensor) -> tuple[Tensor, Tensor]:
    return r, torch.ones_like(r)


def test_what_calls_a_users_function_refuses_to_compile_by_name(batch: HeadBatch) -> None:
    own = fused_losses.TokenLoss("own", None, _own_phi)
    ref = near_reference(batch)

    def units(x: Tensor) -> Tensor:
        return fused_losses.linear_loss(x, batch.w, batch.y, _squares)

    def token(x: Tensor) -> Tensor:
        return fused_losses.linear_token_loss(x, batch.w, batch.y, ref, loss=own)

    for fn, named in ((units, "linear_loss"), (token, "own")):
        assert torch.isfinite(fn(batch.x))
        torch._dynamo.reset()
        with pytest.raises(Exception, match=named):
            torch.compile(fn, fullgraph=True, backend="aot_eager")(batch.x)


def _operator_arguments(batch: HeadBatch, *, frozen: bool) -> dict[str, tuple[Any, ...]]:
    """Arguments of the three operators, small, with a bias and a value."""
    x, w, bias = (t.flatten(0, -2) if t.dim() == 3 else t for t in batch.tensors)
    y = batch.y.flatten()
    ref = near_reference(batch).flatten().nan_to_num()
    value = torch.full(y.shape, 0.1, requires_grad=not frozen)
    factor = torch.tensor(0.1, dtype=torch.float64)
    needs = Needs(True, not frozen, not frozen)
    head = HeadOptions(torch.float32, torch.float32, torch.float32, 3 * V * 4, needs)
    hellinger = Objective(TOKEN_LOSSES["hellinger"], beta=0.5, z_loss=0.01)
    call, _ = Call(RowMaths(), hellinger, -100, False, "torch", head=head).encode()
    rows = torch.ops.fused_losses.linear_rows(x, w, bias, y, ref, value, None, call, None, -1)
    _, kept_rows, kept_dx = (t.detach() for t in rows)
    upstream = torch.ones(y.shape)
    detached = [t.detach() for t in (x, w, bias)]
    return {
        "linear_loss_sum": (x, w, bias, y, ref, value, None, factor, None, call, 1.0),
        "linear_rows": (x, w, bias, y, ref, value, None, call, None, -1),
        "linear_rows_gradient": (
            *detached, y, kept_rows, kept_dx, upstream, None, None, call, None, -1, True
        ),
    }  # fmt: skip


@pytest.mark.parametrize("operator", ["linear_loss_sum", "linear_rows", "linear_rows_gradient"])
@pytest.mark.parametrize("frozen", [False, True])
def test_operators_pass_torchs_own_checks(operator: str, frozen: bool) -> None:
    batch = head_batch((2, 5), 4, V, bias=True).leaves(w=not frozen, bias=not frozen)
    arguments = _operator_arguments(batch, frozen=frozen)[operator]
    torch.library.opcheck(getattr(torch.ops.fused_losses, operator).default, arguments)


def test_two_threads_at_once_get_their_own_results() -> None:
    batches = [head_batch((4, 12), D, V, seed=seed) for seed in range(2)]
    expected = [_run(batch) for batch in batches]
    found: dict[int, list[Tensor]] = {}
    start = threading.Barrier(2)

    def work(index: int) -> None:
        start.wait()
        for _ in range(5):
            found[index] = _run(batches[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, values in enumerate(expected):
        assert all(torch.equal(a, b) for a, b in zip(found[index], values, strict=True))


def _run(batch: HeadBatch) -> list[Tensor]:
    results: list[Tensor] = []
    for name in ("mle", "units", "dpo", "stats"):
        leaves = batch.leaves()
        results += gradients(_call(name, leaves), leaves)
    return results


@pytest.mark.parametrize("name", ["mle", "hellinger", "dpo", "sequence"])
def test_micro_batches_sum_to_one_batch(name: str) -> None:
    """K calls with ``num_items`` of the whole give its gradients."""
    batch = head_batch((8, 6), D, V)
    ref = near_reference(batch)
    fns: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
        "mle": (fused_losses.linear_token_loss, {"loss": "mle"}),
        "hellinger": (fused_losses.linear_hellinger_loss, {}),
        "dpo": (fused_losses.linear_dpo_loss, {}),
        "sequence": (fused_losses.linear_pearson_loss, {"level": "sequence"}),
    }
    fn, options = fns[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = batch.leaves()
        loss = fn(whole.x, whole.w, whole.y, ref, **options)
        loss.backward()
        items = {"mle": batch.counted, "hellinger": batch.counted, "dpo": 4, "sequence": 8}[name]
        pairs = [[i, i + 4] for i in range(4)]
        rows = pairs if name == "dpo" else [[2 * i, 2 * i + 1] for i in range(4)]
        parts = batch.leaves()
        total = torch.zeros(())
        for at in rows:
            part = fn(
                parts.x[at], parts.w, parts.y[at], ref[at], num_items=torch.tensor(items), **options
            )
            part.backward()
            total += part.detach()
    torch.testing.assert_close(total, loss.detach(), rtol=1e-6, atol=1e-6)
    assert relative_error(parts.x.grad, whole.x.grad) <= 1e-6
    assert relative_error(parts.w.grad, whole.w.grad) <= 1e-6


@each_route
def test_strides_of_the_inputs_do_not_matter(name: str, batch: HeadBatch) -> None:
    truth, expected = _truth(name, batch)
    wide = torch.zeros(4, 12, 2 * D)
    wide[..., ::2] = batch.x
    strided = HeadBatch(
        wide.requires_grad_(),
        batch.w.t().contiguous().requires_grad_(),
        batch.y.t().contiguous().t(),
        batch.bias,
    )
    views = HeadBatch(strided.x[..., ::2], strided.w.t(), strided.y, strided.bias)
    assert not views.x.is_contiguous()
    assert not views.w.is_contiguous()
    loss = _call(name, views)
    assert relative_error(loss, truth) <= 1e-5
    dx, dw = torch.autograd.grad(loss, [strided.x, strided.w])
    assert relative_error(dx[..., ::2], expected[0]) <= 1e-5
    assert relative_error(dw.t(), expected[1]) <= 1e-5
