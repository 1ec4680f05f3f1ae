"""Operands of any strides: operators give what their fakes promise, and compiled code runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config
from linear_oracle import relative_error
from torch import Tensor

import fused_losses
from fused_losses import reference
from fused_losses.backends import Objective, RowMaths
from fused_losses.engine.call import Call, HeadOptions, Needs
from fused_losses.engine.linear_rows import linear_rows, linear_rows_gradient
from fused_losses.engine.linear_sum import linear_loss_sum
from fused_losses.engine.logits_rows import logits_gradient, logits_rows
from fused_losses.engine.segment_sum import segment_sum, sum_between

N, D, V = 5, 4, 11


def _transposed(t: Tensor) -> Tensor:
    return t.t().contiguous().t() if t.dim() == 2 else _sliced(t)


def _sliced(t: Tensor) -> Tensor:
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), 7.0, dtype=t.dtype)
    wide[..., 1::2] = t
    return wide[..., 1::2]


def _expanded(t: Tensor) -> Tensor:
    return t[..., :1].expand(t.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": _transposed,
    "sliced": _sliced,
    "expanded": _expanded,
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)

HELLINGER = Objective(fused_losses.TOKEN_LOSSES["hellinger"], beta=0.5, z_loss=0.01)
Y = torch.tensor([1, 4, -100, 0, 10])
REF = torch.zeros(N)  # losses are positive: opcheck takes the magnitudes of what it adds up


def _float(*shape: int) -> Tensor:
    return torch.randn(shape)


def _operands(layout: str, which: str, **sizes: tuple[int, ...]) -> dict[str, Tensor]:
    """Floating-point operands, all strided or one of them."""
    made = {name: _float(*size) for name, size in sizes.items()}
    return {n: LAYOUTS[layout](t) if which in (n, "all") else t for n, t in made.items()}


def _wanting(t: Tensor, wanted: bool) -> Tensor:
    """A leaf of the same strides."""
    return t.detach().requires_grad_(wanted)


WANTED = [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]


@pytest.mark.parametrize("needs", WANTED)
@each_layout
def test_sums_and_rows_keep_their_promises(layout: str, needs: tuple[bool, ...]) -> None:
    made = _operands(layout, "all", x=(N, D), w=(V, D), bias=(V,), value=(N,))
    x, w, bias = (
        _wanting(made[n], need) for n, need in zip(("x", "w", "bias"), needs, strict=True)
    )
    value = _wanting(made["value"], True)
    head = HeadOptions(torch.float32, torch.float32, torch.float32, 8 * V * 4, Needs(*needs))
    call, _ = Call(RowMaths(), HELLINGER, -100, False, "torch", head=head).encode()
    factor = torch.tensor(0.1, dtype=torch.float64)
    torch.library.opcheck(
        linear_loss_sum, (x, w, bias, Y, REF, value, None, factor, None, call, 1.0)
    )
    arguments = (x, w, bias, Y, REF, value, None, call, None, -1)
    torch.library.opcheck(linear_rows, arguments)
    _, rows, kept = (t.detach() for t in linear_rows(*arguments))
    detached = [t.detach() for t in (x, w, bias)]
    upstream = LAYOUTS[layout](torch.ones(N))
    torch.library.opcheck(
        linear_rows_gradient,
        (*detached, Y, rows, kept, upstream, None, None, call, None, -1, True),
    )


@each_layout
def test_logits_and_segments_keep_their_promises(layout: str, backend: str) -> None:
    z, value = LAYOUTS[layout](_float(N, V)), LAYOUTS[layout](_float(N))
    y, ref = Y.to(z.device), REF.to(z.device)
    call, _ = Call(RowMaths(), HELLINGER, -100, True, backend).encode()
    torch.library.opcheck(
        logits_rows, (_wanting(z, True), y, ref, _wanting(value, True), None, call)
    )
    _, rows = logits_rows(z, y, ref, value, None, call)
    upstream = LAYOUTS[layout](torch.ones(N)), LAYOUTS[layout](torch.ones_like(rows))
    torch.library.opcheck(
        logits_gradient,
        (z, y, rows, *upstream, None, call, True),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    x, ids = LAYOUTS[layout](_float(7)), LAYOUTS[layout](torch.tensor([0, 0, 2, 2, 2, 2, 2]))
    torch.library.opcheck(sum_between, (x, torch.tensor([0, 2, 2, 7]), backend))
    want = segment_sum(x.contiguous(), ids.contiguous(), 3, backend)
    assert torch.equal(segment_sum(_wanting(x, True), ids, 3, backend), want)


def _call(route: str, module: Any, x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    y, ref = Y[None].expand(2, N), REF[None].expand(2, N)
    options = {"linear_bias": bias}
    if route == "token":
        return module.linear_mle_loss(x, w, y, **options)
    if route == "dpo":
        return module.linear_dpo_loss(x, w, y, ref, beta=0.3, **options)
    if route == "statistics":
        stats = module.linear_token_stats(x, w, y, entropy=True, **options)
        return (stats.logps + stats.lse - stats.entropy).sum()
    if route == "logits":
        return module.pearson_loss(x @ w.t() + bias, y, ref)
    losses = module.linear_hellinger_loss(x, w, y, ref, reduction="none", **options)
    return losses.sum()


def _compiled_equals_float64(route: str, layout: str, compiler: str) -> None:
    made = _operands(layout, "all", x=(2, N, D), w=(V, D), bias=(V,))
    leaves = [_wanting(t, True) for t in made.values()]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    torch._dynamo.reset()
    step = torch.compile(_call, backend=compiler, fullgraph=True)
    loss, truth = step(route, fused_losses, *leaves), _call(route, reference, *exact)
    assert relative_error(loss, truth) <= 1e-5
    found, expected = torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, exact)
    for got, value in zip(found, expected, strict=True):
        assert relative_error(got, value) <= 1e-5


@each_layout
@pytest.mark.parametrize("route", ["token", "per token", "statistics", "dpo", "logits"])
def test_compiled_calls_take_operands_of_any_strides(route: str, layout: str) -> None:
    _compiled_equals_float64(route, layout, "aot_eager")


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
@pytest.mark.parametrize("route", ["per token"])
def test_inductor_takes_a_transposed_weight(route: str) -> None:
    # One small graph is not worth compiling torch's headers for.
    with torch._inductor.config.patch(cpp_cache_precompile_headers=False):
        _compiled_equals_float64(route, "transposed", "inductor")
