"""A TokenLoss of the user's own that nobody but the call holds."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fused_losses
from fused_losses import TokenLoss
from fused_losses.engine import call as calls
from fused_losses.plan import forced_route
from fused_losses.token_losses import TOKEN_LOSSES

V, D = 19, 8


def _own() -> TokenLoss:
    """Pearson's functions under another name, new every time."""
    pearson = TOKEN_LOSSES["pearson"]
    return TokenLoss("own", pearson.device_fn, lambda r: pearson.torch_fn(r))


def _inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, w = torch.randn(2, 5, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    return x, w, torch.randint(V, (2, 5)), torch.full((2, 5), -3.0)


def _linear(loss: Any, x: Tensor, w: Tensor, y: Tensor, ref: Tensor, **options: Any) -> Tensor:
    return fused_losses.linear_token_loss(x, w, y, ref, loss=loss, **options)


def _logits(loss: Any, x: Tensor, w: Tensor, y: Tensor, ref: Tensor, **options: Any) -> Tensor:
    return fused_losses.token_loss(x @ w.t(), y, ref, loss=loss, **options)


CASES: dict[str, tuple[Callable[..., Tensor], Any, dict[str, Any]]] = {
    "linear": (_linear, "token", {}),
    "linear, recomputed": (_linear, "recompute", {}),
    "linear, per token": (_linear, "recompute", {"reduction": "none"}),
    "linear, sequences": (_linear, "unit", {"level": "sequence"}),
    "linear, per sequence": (_linear, "recompute", {"level": "sequence", "reduction": "none"}),
    "logits": (_logits, "logits", {}),
    "logits, per token": (_logits, "logits", {"reduction": "none"}),
    "logits, sequences": (_logits, "logits", {"level": "sequence"}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_lives_until_backward(case: str, backend: str) -> None:
    fn, route, options = CASES[case]
    x, w, y, ref = _inputs()
    found = []
    for make in (lambda: "pearson", _own):
        with forced_route(route):
            loss = fn(make(), x, w, y, ref, backend=backend, **options)
        gc.collect()
        found.append(torch.autograd.grad(loss.sum(), [x, w]))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_it_lives_through_checkpointing_and_offloading(use_reentrant: bool, backend: str) -> None:
    x, w, y, ref = _inputs()
    found = []
    for make in (lambda: "pearson", _own):

        def block(x: Tensor, w: Tensor, make: Callable[[], Any] = make) -> Tensor:
            return _linear(make(), x, w, y, ref, reduction="none", backend=backend)

        with torch.autograd.graph.save_on_cpu():
            loss = checkpoint(block, x, w, use_reentrant=use_reentrant).sum()
        gc.collect()
        found.append(
            torch.autograd.grad(loss, [x, w]) if not use_reentrant else _leaves(loss, x, w)
        )
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def _leaves(loss: Tensor, *leaves: Tensor) -> list[Tensor | None]:
    """Reentrant checkpointing knows ``backward`` only."""
    for leaf in leaves:
        leaf.grad = None
    loss.backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_new_one_at_every_step_is_not_kept(reduction: str) -> None:
    x, w, y, ref = _inputs()
    seen = []
    before = len(calls._users)
    for _ in range(3):
        own = _own()
        seen.append(weakref.ref(own))
        for fn in (_linear, _logits):
            fn(own, x, w, y, ref, reduction=reduction).sum().backward()
    del own
    gc.collect()
    assert all(ref() is None for ref in seen)
    assert len(calls._users) == before
