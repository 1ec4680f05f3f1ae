"""A weight with a ``main_grad``, and one whose ``grad`` is wider than itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_oracle import HeadBatch, head_batch, near_reference
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fused_losses
from fused_losses.plan import forced_route

V, D = 23, 8
BATCH = head_batch((4, 5), D, V)
REF = near_reference(BATCH)


def _squares(stats: fused_losses.TokenStats, rows: Tensor) -> Tensor:
    return (stats.logps**2).sum() / 20.0


def _loss(route: str, x: Tensor, w: Tensor, **options: Any) -> Tensor:
    """A 0-d loss by each of the routes on which a head is trained."""
    y, ref = BATCH.y.to(x.device), REF.to(x.device)
    if route == "units":
        return fused_losses.linear_loss(x, w, y, _squares, **options)
    if route == "dpo":
        return fused_losses.linear_dpo_loss(x, w, y, ref, beta=0.3, **options)
    if route == "statistics":
        stats = fused_losses.linear_token_stats(x, w, y, **options)
        return (stats.logps * stats.lse).sum() / 20.0
    if route == "per token":
        losses = fused_losses.linear_hellinger_loss(x, w, y, ref, reduction="none", **options)
        return (losses * torch.linspace(-1.0, 2.0, 20).view(4, 5)).sum()
    if route == "sequences":
        return fused_losses.linear_pearson_loss(x, w, y, ref, level="sequence", **options)
    if route == "token":
        return fused_losses.linear_mle_loss(x, w, y, **options)
    with forced_route("recompute"):
        return fused_losses.linear_mle_loss(x, w, y, **options)


ROUTES = ["token", "recompute", "per token", "statistics", "units", "dpo", "sequences"]


def _copy(t: Tensor) -> Tensor:
    """On the default device: the GPU's, where the test runs kernels on one."""
    return t.to(torch.get_default_device(), copy=True)


def _weight(*, main_grad: bool = True, told: bool = False) -> Any:
    w: Any = torch.nn.Parameter(_copy(BATCH.w))
    if main_grad:
        w.main_grad = torch.full((V, D), 0.5)
    if told:
        w.grad_added_to_main_grad = False
    return w


def _plain(x: Tensor, w: Any, route: str, **options: Any) -> None:
    _loss(route, x, w, **options).backward()


def _checkpointed(x: Tensor, w: Any, route: str, **options: Any) -> None:
    checkpoint(lambda x: _loss(route, x, w, **options), x, use_reentrant=False).backward()


def _checkpointed_argument(x: Tensor, w: Any, route: str, **options: Any) -> None:
    checkpoint(lambda x, w: _loss(route, x, w, **options), x, w, use_reentrant=False).backward()


def _reentrant(x: Tensor, w: Any, route: str, **options: Any) -> None:
    checkpoint(lambda x: _loss(route, x, w, **options), x, use_reentrant=True).backward()


def _offloaded(x: Tensor, w: Any, route: str, **options: Any) -> None:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        loss = _loss(route, x, w, **options)
    loss.backward()


def _asked_for(x: Tensor, w: Any, route: str, **options: Any) -> None:
    torch.autograd.grad(_loss(route, x, w, **options), [x, w], allow_unused=True)


def _halves(x: Tensor, w: Any, route: str, **options: Any) -> None:
    """Two backward passes through a kept graph."""
    loss = _loss(route, x, w, **options) / 2.0
    loss.backward(retain_graph=True)
    loss.backward()


WAYS = [
    _plain,
    _checkpointed,
    _checkpointed_argument,
    _reentrant,
    _offloaded,
    _asked_for,
    _halves,
]
each_route = pytest.mark.parametrize("route", ROUTES)


@pytest.mark.parametrize("way", WAYS)
@each_route
def test_it_gets_the_whole_gradient_and_grad_gets_nothing(route: str, way: Callable) -> None:
    x, plain = BATCH.x.clone().requires_grad_(), _weight(main_grad=False)
    _loss(route, x, plain).backward()
    for told in (False, True):
        w = _weight(told=told)
        for _ in range(2):  # micro-batches add up
            way(BATCH.x.clone().requires_grad_(), w, route)
        torch.testing.assert_close(w.main_grad, 0.5 + 2.0 * plain.grad, rtol=1e-5, atol=1e-6)
        assert w.grad is None or torch.count_nonzero(w.grad) == 0
        assert w.grad is None or told
        assert getattr(w, "grad_added_to_main_grad", False) == told


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("way", [_plain, _checkpointed])
@pytest.mark.parametrize("route", ["token", "per token", "units"])
def test_it_gets_the_whole_gradient_from_the_kernels(route: str, way: Callable) -> None:
    x, plain = _copy(BATCH.x).requires_grad_(), _weight(main_grad=False)
    _loss(route, x, plain, backend="triton").backward()
    w = _weight()
    way(_copy(BATCH.x).requires_grad_(), w, route, backend="triton")
    torch.testing.assert_close(w.main_grad, 0.5 + plain.grad, rtol=1e-5, atol=1e-6)
    assert w.grad is None


@each_route
def test_it_is_left_alone_where_nobody_asks_for_the_weights_gradient(route: str) -> None:
    w = _weight(told=True)
    x = BATCH.x.clone().requires_grad_()
    torch.autograd.grad(_loss(route, x, w), [x])
    _loss(route, x, w).backward(inputs=[x])
    with torch.no_grad():
        _loss(route, x, w)
    _loss(route, x, w.detach()).backward()
    w.requires_grad_(False)
    _loss(route, x, w).backward()
    assert (w.main_grad == 0.5).all()
    assert w.grad is None
    assert w.grad_added_to_main_grad is False


@pytest.mark.parametrize("told", [False, True])
@each_route
def test_with_a_tied_embedding_main_grad_and_grad_are_the_whole(route: str, told: bool) -> None:
    tokens = torch.arange(20).view(4, 5) * 3 % V

    def run(w: Tensor) -> None:
        _loss(route, F.embedding(tokens, w).tanh(), w).backward()

    plain, w = _weight(main_grad=False), _weight(told=told)
    w.zero_out_wgrad = True
    run(plain)
    torch.use_deterministic_algorithms(True)  # new memory holds NaN
    try:
        run(w)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(w.main_grad - 0.5 + w.grad, plain.grad, rtol=1e-4, atol=1e-5)


def test_a_pass_that_wants_second_derivatives_does_not_get_zeros_for_them() -> None:
    w, x = _weight(told=True), BATCH.x.clone().requires_grad_()
    _loss("token", x, w).backward(create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        w.grad.sum().backward()


@pytest.mark.parametrize("route", ["token", "per token"])
def test_compiled_it_is_refused_by_name_or_filled(route: str) -> None:
    """In one graph it is an error; with graph breaks the call runs eagerly."""
    torch._dynamo.reset()
    w, x = _weight(), BATCH.x.clone().requires_grad_()
    whole = torch.compile(lambda x: _loss(route, x, w), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="main_grad is filled eagerly only"):
        whole(x)
    torch._dynamo.reset()
    torch.compile(lambda x: _loss(route, x, w), backend="aot_eager")(x).backward()
    plain = _weight(main_grad=False)
    _loss(route, x, plain).backward()
    torch.testing.assert_close(w.main_grad, 0.5 + plain.grad, rtol=1e-5, atol=1e-6)
    assert w.grad is None
    # A weight without one compiles as ever.
    torch._dynamo.reset()
    other = _weight(main_grad=False)
    torch.compile(lambda x: _loss(route, x, other), fullgraph=True, backend="aot_eager")(x)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
@pytest.mark.parametrize(
    ("route", "compiled"),
    [
        ("token", False),
        ("per token", False),
        ("units", False),
        ("token", True),
        ("per token", True),
    ],
)
def test_a_16_bit_weight_may_have_an_fp32_grad(route: str, compiled: bool) -> None:
    w: Any = torch.nn.Parameter(BATCH.w.bfloat16())
    w.grad_dtype = torch.float32
    plain = torch.nn.Parameter(BATCH.w.bfloat16())
    step = _loss
    if compiled:
        torch._dynamo.reset()
        step = torch.compile(_loss, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        step(route, BATCH.x.bfloat16().requires_grad_(), w).backward()
    _loss(route, BATCH.x.bfloat16().requires_grad_(), plain).backward()
    assert w.grad.dtype == torch.float32
    torch.testing.assert_close(w.grad, 2.0 * plain.grad.float(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["mle", "mle, none", "dpo"])
@pytest.mark.parametrize("told", [False, True])
def test_a_main_grad_gets_what_autograd_would(name: str, told: bool) -> None:
    """K micro-batches add up in it; ``grad`` stays empty, or is a tensor that nobody reads."""

    def run(batch: HeadBatch) -> None:
        if name == "dpo":
            fused_losses.linear_dpo_loss(batch.x, batch.w, batch.y, ref).backward()
            return
        reduction = "none" if "none" in name else "mean"
        loss = fused_losses.linear_mle_loss(batch.x, batch.w, batch.y, reduction=reduction)
        (3.0 * loss.sum()).backward()

    batch = head_batch((4, 6), 8, 50, dtype=torch.bfloat16)
    ref = near_reference(batch)
    plain, with_main_grad = batch.leaves(), batch.leaves()
    w: Any = with_main_grad.w
    w.main_grad = torch.full(w.shape, 0.5)
    if told:
        w.grad_added_to_main_grad = False
    run(plain)
    for _ in range(2):
        run(with_main_grad)
    assert plain.w.grad is not None
    torch.testing.assert_close(w.main_grad, 0.5 + 2.0 * plain.w.grad.float())
    assert (w.grad is None) == (not told)
    assert getattr(w, "grad_added_to_main_grad", False) == told
    w.main_grad = torch.zeros(3)
    with pytest.raises(ValueError, match=r"main_grad must have the weight's shape \(50, 8\)"):
        run(with_main_grad)
