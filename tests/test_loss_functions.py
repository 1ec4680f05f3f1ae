"""What a loss function of the user's own sees on every route, and what it may not do in silence."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from linear_oracle import HeadBatch, head_batch, near_reference
from torch import Tensor

import fused_losses
from fused_losses import TokenLoss, TokenStats

B, T, D, V = 2, 6, 8, 31
BATCH = head_batch((B, T), D, V)
UNITS = torch.arange(B)[:, None].expand(B, T).contiguous()
ALPHA = torch.full((3,), 0.5, requires_grad=True)

LossFn = Callable[[TokenStats, Tensor], Tensor]

# Options and who wants a gradient, by the route that results.
ROUTES: dict[str, tuple[dict[str, Any], dict[str, bool]]] = {
    "unit": ({"units": UNITS}, {}),
    "recompute": ({"units": torch.zeros_like(UNITS), "workspace_bytes": 3 * V * 8}, {}),
    "frozen": ({"units": UNITS}, {"w": False}),
    "forward": ({"units": UNITS}, {"x": False, "w": False}),
}
each_route = pytest.mark.parametrize("route", ROUTES)
trained_route = pytest.mark.parametrize("route", ["unit", "recompute", "frozen"])


def _call(route: str, loss_fn: LossFn, backend: str = "torch") -> tuple[Tensor, HeadBatch]:
    options, wanted = ROUTES[route]
    leaves = BATCH.leaves(**wanted)
    options = options | {"units": options["units"].to(leaves.y.device)}
    args = (leaves.x, leaves.w, leaves.y, loss_fn)
    plan = fused_losses.explain(fused_losses.linear_loss, *args, backend=backend, **options)
    assert plan.route == route
    return fused_losses.linear_loss(*args, backend=backend, **options), leaves


def _global_one(stats: TokenStats, rows: Tensor) -> Tensor:
    return (ALPHA.sum() * stats.logps).sum()


class _Weighted:
    """A loss function that is an object with a parameter."""

    def __init__(self) -> None:
        self.scale = torch.nn.Parameter(torch.ones(3))

    def __call__(self, stats: TokenStats, rows: Tensor) -> Tensor:
        return (self.scale.sum() * stats.logps).sum()

    def loss(self, stats: TokenStats, rows: Tensor) -> Tensor:
        return self(stats, rows)


def _capturing() -> dict[str, tuple[str, LossFn]]:
    beta = torch.ones(3, requires_grad=True)
    made = beta * 2.0
    module = torch.nn.Linear(1, 1)
    both = {"first": beta}

    def helper(stats: TokenStats) -> Tensor:
        return (stats.logps * beta.sum()).sum()

    def default(stats: TokenStats, rows: Tensor, given: Tensor = beta) -> Tensor:
        return (stats.logps * given.sum()).sum()

    def keyword(stats: TokenStats, rows: Tensor, scale: Tensor) -> Tensor:
        return (stats.logps * scale.sum()).sum()

    return {
        "a closure": (r"beta, \(3,\)", lambda stats, rows: (beta.sum() * stats.logps).sum()),
        "a global": (r"ALPHA, \(3,\)", _global_one),
        "no leaf": (r"made, \(3,\)", lambda stats, rows: (made.sum() * stats.logps).sum()),
        "a module": ("module.weight", lambda stats, rows: module(stats.logps[:, None]).sum()),
        "a container": (r"both\['first'\]", lambda stats, rows: stats.lse.sum() * both["first"][0]),
        "a helper": (r"beta, \(3,\)", lambda stats, rows: helper(stats)),
        "a default": ("a default of default", default),
        "a partial": (r"scale, \(3,\)", functools.partial(keyword, scale=beta)),
        "an object": (r"loss_fn.scale, \(3,\)", _Weighted()),
        "a method": (r"self.scale, \(3,\)", _Weighted().loss),
        "alone": (r"beta, \(3,\)", lambda stats, rows: beta.sum()),
        "unknown": (
            r"a tensor of shape \(2, 2\)",
            lambda stats, rows: stats.lse.sum() * torch.ones(2, 2, requires_grad=True).sum(),
        ),
    }


@pytest.mark.parametrize("kind", _capturing())
def test_a_captured_tensor_that_wants_a_gradient_is_refused_by_name(kind: str) -> None:
    name, loss_fn = _capturing()[kind]
    with pytest.raises(ValueError, match=f"captured {name}.*Detach it, or compose"):
        _call("unit", loss_fn)


@each_route
def test_it_is_refused_on_every_route_and_every_backend(route: str, backend: str) -> None:
    """Where only the captured tensor wants a gradient, too."""
    with pytest.raises(ValueError, match="ALPHA"):
        _call(route, _global_one, backend)
    with torch.no_grad():
        loss, _ = _call("forward", _global_one, backend)
    assert not loss.requires_grad


@trained_route
def test_what_is_detached_is_a_constant(route: str) -> None:
    loss, leaves = _call(route, lambda stats, rows: (ALPHA.detach().sum() * stats.logps).sum())
    expected, others = _call(route, lambda stats, rows: 1.5 * stats.logps.sum())
    loss.backward()
    expected.backward()
    assert ALPHA.grad is None
    torch.testing.assert_close(leaves.x.grad, others.x.grad)


@trained_route
@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda stats, rows: stats.logps.detach().sum(),
        lambda stats, rows: torch.tensor(stats.logps.sum().item()),
        torch.no_grad()(lambda stats, rows: stats.logps.sum()),
        lambda stats, rows: torch.tensor(2.0),
    ],
)
def test_a_result_that_would_train_nothing_is_refused(loss_fn: LossFn, route: str) -> None:
    with pytest.raises(ValueError, match=r"detached from them and would train nothing.*detach\(\)"):
        _call(route, loss_fn)


def test_without_gradients_a_detached_result_is_as_good_as_any() -> None:
    loss, _ = _call("forward", lambda stats, rows: stats.logps.detach().sum())
    assert loss < 0.0


@pytest.mark.parametrize("state", ["off", "on", "off inside"])
@each_route
def test_the_function_sees_the_callers_autocast_and_grad_mode(route: str, state: str) -> None:
    seen: list[tuple[Any, ...]] = []

    def loss_fn(stats: TokenStats, rows: Tensor) -> Tensor:
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        enabled = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        seen.append((*enabled, product.dtype, torch.is_grad_enabled()))
        return stats.logps.sum()

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=state != "off"):
        with torch.autocast("cpu", enabled=state == "on"):
            expected = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
            _call(route, loss_fn)
        after = torch.is_autocast_enabled("cpu")
    on = state == "on"
    assert set(seen) == {(*expected, torch.bfloat16 if on else torch.float32, True)}
    assert expected[0] == on
    assert after == (state != "off")
    for mode in (torch.no_grad, torch.inference_mode):
        seen.clear()
        with mode():
            _call("forward", loss_fn)
        assert not any(grad for *_, grad in seen)


def _pearson_by(alpha: Tensor) -> TokenLoss:
    """A TokenLoss whose torch_fn reads a tensor."""
    return TokenLoss("own", None, lambda r: (alpha * r - r * r / 4.0, alpha - r / 2.0))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("linear", [False, True])
def test_a_token_loss_with_a_tensor_to_train_trains_it_or_is_refused(
    linear: bool, level: Any
) -> None:
    alpha = torch.ones((), requires_grad=True)
    ref = near_reference(BATCH)

    def call(alpha: Tensor, reduction: Any) -> Tensor:
        leaves = BATCH.leaves()
        options: dict[str, Any] = {"level": level, "reduction": reduction, "backend": "torch"}
        options["loss"] = _pearson_by(alpha)
        if linear:
            return fused_losses.linear_token_loss(leaves.x, leaves.w, leaves.y, ref, **options)
        z = leaves.x @ leaves.w.t()
        return fused_losses.token_loss(z, leaves.y, ref, **options)

    for reduction in ("mean", "none"):
        followed = level == "sequence" and (reduction == "none" or not linear)
        if followed:
            (found,) = torch.autograd.grad(call(alpha, reduction).sum(), alpha)
            assert found != 0.0
            continue
        with pytest.raises(ValueError, match=r"torch_fn.* has captured alpha, \(\)"):
            call(alpha, reduction)
        call(alpha.detach(), reduction).sum().backward()
        with torch.no_grad():
            call(alpha, reduction)
