"""The logits path as a citizen of autograd, torch.compile, autocast, checkpointing and opcheck."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from oracle import loss_and_gradients, own_losses, planted, relative_error, use_small_blocks
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fused_losses
from fused_losses.backends import Objective, RowMaths
from fused_losses.engine.call import Call
from fused_losses.engine.logits_rows import logits_gradient, logits_rows
from fused_losses.engine.segment_sum import segment_sum, sum_between

B, T, V = 4, 3, 13
SECOND = "second derivatives are not implemented"


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch, 8)


@pytest.fixture
def batch(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    z, y, ref = planted(B, T, V=V, dtype=torch.float32, device=device)
    y[:, 0] = 1
    return z.requires_grad_(), y, ref.nan_to_num(0.0)


def _losses(backend: str, y: Tensor, ref: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    options = {"backend": backend}
    return {
        "mle": lambda z: fused_losses.mle_loss(z, y, label_smoothing=0.1, **options),
        "hellinger": lambda z: fused_losses.hellinger_loss(z, y, ref, **options),
        "sequence": lambda z: fused_losses.pearson_loss(z, y, ref, level="sequence", **options),
        "dpo": lambda z: fused_losses.dpo_loss(z, y, ref, **options),
        "entropy": lambda z: fused_losses.token_stats(z, y, entropy=True, **options).entropy.sum(),
        "logps": lambda z: fused_losses.token_stats(z, y, **options).logps.sum(),
    }


each_loss = pytest.mark.parametrize(
    "name", ["mle", "hellinger", "sequence", "dpo", "entropy", "logps"]
)


@each_loss
def test_gradients_are_linear_in_the_upstream_gradient(
    backend: str, batch: tuple[Tensor, Tensor, Tensor], name: str
) -> None:
    z, y, ref = batch
    loss = _losses(backend, y, ref)[name]
    (one,) = torch.autograd.grad(loss(z), z)
    # Powers of two are exact, as a GradScaler's are.
    (scaled,) = torch.autograd.grad(loss(z) * 1024.0, z)
    assert torch.equal(scaled, 1024.0 * one)
    (negative,) = torch.autograd.grad(loss(z) * -3.0, z)
    assert relative_error(negative, -3.0 * one) < 1e-6
    (zero,) = torch.autograd.grad(loss(z) * 0.0, z)
    assert (zero == 0.0).all()


def test_upstream_gradients_per_token_weigh_their_tokens(
    backend: str, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    z, y, ref = batch
    up = torch.randn(B, T, device=z.device)
    loss = fused_losses.pearson_loss(z, y, ref, reduction="none", backend=backend)
    (got,) = torch.autograd.grad(loss, z, up)
    weighted = fused_losses.pearson_loss(
        z, y, ref, reduction="sum", token_weight=up, backend=backend
    )
    (want,) = torch.autograd.grad(weighted, z)
    assert relative_error(got, want) < 1e-6
    # Of the first token alone: all other rows stay 0.
    only = torch.zeros_like(up)
    only[0, 0] = 1.0
    loss = fused_losses.pearson_loss(z, y, ref, reduction="none", backend=backend)
    (got,) = torch.autograd.grad(loss, z, only)
    assert (got[0, 0] != 0.0).any()
    assert (got.flatten(0, 1)[1:] == 0.0).all()


@each_loss
def test_a_second_backward_over_a_kept_graph_is_the_same(
    backend: str, batch: tuple[Tensor, Tensor, Tensor], name: str
) -> None:
    z, y, ref = batch
    loss = _losses(backend, y, ref)[name](z)
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    (second,) = torch.autograd.grad(loss, z)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, z)


@each_loss
@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "mixed"])
def test_a_second_derivative_raises_also_in_a_mixed_loss(
    backend: str, batch: tuple[Tensor, Tensor, Tensor], name: str, mixed: bool
) -> None:
    z, y, ref = batch
    loss = _losses(backend, y, ref)[name](z)
    if mixed:
        loss = loss + z.square().sum()
    (dz,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match=SECOND):
        torch.autograd.grad(dz.square().sum(), z)


def test_a_second_derivative_through_inplace_or_value_raises(
    backend: str, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    z, y, ref = batch
    w = torch.ones((), device=z.device, requires_grad=True)
    loss = fused_losses.mle_loss(z * w, y, inplace=True, backend=backend) + w.square()
    (dw,) = torch.autograd.grad(loss, w, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dw, w)
    value = torch.zeros(T, device=z.device, requires_grad=True)
    loss = fused_losses.pearson_loss(z, y, ref, value=value, backend=backend)
    (dvalue,) = torch.autograd.grad(loss + value.square().sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match=SECOND):
        torch.autograd.grad(dvalue.sum(), value)


@each_loss
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_loss_is_the_same_and_detached(
    backend: str, batch: tuple[Tensor, Tensor, Tensor], name: str, mode: Any
) -> None:
    z, y, ref = batch
    loss = _losses(backend, y, ref)[name]
    want = loss(z)
    with mode():
        got = loss(z)
    assert not got.requires_grad
    assert torch.equal(got, want)
    assert torch.equal(loss(z.detach()), want)


def test_references_get_no_gradient(backend: str, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    z, y, ref = batch
    ref.requires_grad_()
    loss = fused_losses.pearson_loss(z, y, ref, backend=backend)
    loss = loss + fused_losses.dpo_loss(z, y, ref, backend=backend)
    gradients = torch.autograd.grad(loss, (z, ref), allow_unused=True)
    assert gradients[0] is not None
    assert gradients[1] is None


@each_loss
def test_compiled_losses_equal_eager_ones_and_compile_once(
    backend: str, batch: tuple[Tensor, Tensor, Tensor], name: str
) -> None:
    z, y, ref = batch
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(z: Tensor, y: Tensor, ref: Tensor) -> Tensor:
        return _losses(backend, y, ref)[name](z)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for _ in range(3):
        fresh = z.detach().clone().requires_grad_()
        got, want = compiled(fresh, y, ref), step(z, y, ref)
        assert torch.equal(got, want)
        (dz,), (truth,) = torch.autograd.grad(got, fresh), torch.autograd.grad(want, z)
        assert torch.equal(dz, truth)
        z, y, ref = z.detach().flip(0).requires_grad_(), y.flip(0), ref.flip(0)
    assert counter.frame_count == 1


def test_a_token_loss_of_ones_own_is_refused_under_compile(
    batch: tuple[Tensor, Tensor, Tensor],
) -> None:
    z, y, ref = batch
    own = own_losses()["mild"]
    compiled = torch.compile(
        lambda z: fused_losses.token_loss(z, y, ref, loss=own), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match="TokenLoss of your own and runs eagerly only"):
        compiled(z)


def test_checkpointing_changes_no_bit(backend: str, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    z, y, ref = batch
    losses = _losses(backend, y, ref)
    for loss in (losses["hellinger"], losses["dpo"]):
        want = loss(z * 2.0)
        (truth,) = torch.autograd.grad(want, z)
        for reentrant in (False, True):
            got = checkpoint(lambda z, loss=loss: loss(z * 2.0), z, use_reentrant=reentrant)
            assert torch.equal(got, want)
            if reentrant:  # it supports .backward() only
                z.grad = None
                got.backward()
                assert torch.equal(z.grad, truth)
            else:
                assert torch.equal(torch.autograd.grad(got, z)[0], truth)


def test_saved_tensors_go_through_the_hooks_of_autograd(
    backend: str, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    z, y, ref = batch
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: seen.append(t) or t.clone(), lambda t: t
    ):
        loss = fused_losses.hellinger_loss(z, y, ref, backend=backend)
    assert any(t.shape == z.shape for t in seen)
    (dz,) = torch.autograd.grad(loss, z)
    (want,) = torch.autograd.grad(fused_losses.hellinger_loss(z, y, ref, backend=backend), z)
    assert torch.equal(dz, want)


@each_loss
def test_autocast_leaves_the_result_alone(
    backend: str, batch: tuple[Tensor, Tensor, Tensor], name: str
) -> None:
    z, y, ref = batch
    loss = _losses(backend, y, ref)[name]
    want = loss(z)
    with torch.autocast(z.device.type, dtype=torch.bfloat16):
        got = loss(z)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    assert torch.equal(torch.autograd.grad(got, z)[0], torch.autograd.grad(want, z)[0])


@each_loss
def test_torch_func_grad_is_refused_and_never_wrong(
    backend: str, batch: tuple[Tensor, Tensor, Tensor], name: str
) -> None:
    # Custom operators of torch.library do not take part in functorch's gradients.
    z, y, ref = batch
    with pytest.raises(RuntimeError, match=r"torch\.func|functorch"):
        torch.func.grad(_losses(backend, y, ref)[name])(z.detach())


def test_vmap_gives_what_a_loop_gives(backend: str, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    z, y, _ = batch

    def loss(z: Tensor) -> Tensor:
        return fused_losses.mle_loss(z, y[0], backend=backend)

    got = torch.func.vmap(loss)(z.detach())
    assert torch.equal(got, torch.stack([loss(row) for row in z.detach()]))


def test_forward_mode_is_refused(backend: str, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    z, y, _ = batch
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(
            lambda z: fused_losses.mle_loss(z, y, backend=backend),
            (z.detach(),),
            (torch.ones_like(z),),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operators_pass_opcheck(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    z, y, ref = planted(2, 2, V=5, dtype=dtype, device=device)
    y, ref = y.view(-1), ref.view(-1).nan_to_num(0.0)
    value = torch.zeros(4, device=device)
    hellinger = Objective(fused_losses.TOKEN_LOSSES["hellinger"], beta=0.5, z_loss=0.1)
    call, changing = Call(RowMaths(1.0, 5.0, 0.8), hellinger, -100, True, backend).encode()
    leaves = (z.clone().requires_grad_(), y, ref, value.clone().requires_grad_())
    torch.library.opcheck(logits_rows, (*leaves, changing, call))
    loss, rows = logits_rows(z, y, ref, value, changing, call)
    up = (torch.ones_like(loss), torch.ones_like(rows))
    # It has no formula, on purpose, and an upstream NaN-free row is all that its maths needs.
    torch.library.opcheck(
        logits_gradient,
        (z, y, rows, *up, changing, call, True),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_the_segment_sum_passes_opcheck_and_gradcheck(backend: str, device: torch.device) -> None:
    ids = torch.tensor([0, 0, 2, 2, 2, 2, 2], device=device)
    x = torch.randn(7, dtype=torch.float64, device=device, requires_grad=True)
    offsets = torch.tensor([0, 2, 2, 7], device=device)
    torch.library.opcheck(sum_between, (x.detach(), offsets, backend))
    assert torch.autograd.gradcheck(lambda x: segment_sum(x, ids, 4, backend), (x,))
    assert torch.autograd.gradgradcheck(lambda x: segment_sum(x, ids, 4, backend), (x,))
    got = segment_sum(x, ids, 4, backend)
    want = torch.stack([x[:2].sum(), x[2:2].sum(), x[2:7].sum(), x[7:].sum()])
    assert torch.allclose(got, want, rtol=1e-14, atol=1e-15)
    long = torch.randn(5000, device=device)
    which = (torch.arange(5000, device=device) >= 1500).long()
    sums = segment_sum(long, which, 2, backend)
    exact = torch.stack([long[:1500].double().sum(), long[1500:].double().sum()])
    assert torch.allclose(sums.double(), exact, rtol=1e-6, atol=1e-4)
    assert torch.equal(sums, segment_sum(long, which, 2, backend))


def test_statistics_differentiate_together_as_one_by_one(
    backend: str, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    z, y, _ = batch
    stats = fused_losses.token_stats(z, y, entropy=True, backend=backend)
    outputs = (stats.logps, stats.lse, stats.entropy)
    ups = [torch.randn_like(out) for out in outputs]
    (together,) = torch.autograd.grad(outputs, z, ups, retain_graph=True)
    parts = [
        torch.autograd.grad(out, z, up, retain_graph=True)[0]
        for out, up in zip(outputs, ups, strict=True)
    ]
    assert relative_error(together, sum(parts)) < 1e-6
    assert not stats.is_top1.requires_grad


def test_the_loss_and_the_rows_of_one_pass_differentiate_together(
    backend: str, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    z, y, ref = batch
    o = Objective(fused_losses.TOKEN_LOSSES["hellinger"], beta=0.5, z_loss=0.1)
    call, _ = Call(RowMaths(), o, -100, True, backend).encode()
    loss, rows = logits_rows(z, y.flatten(), ref.flatten(), None, None, call)
    ups = torch.randn_like(loss), torch.randn_like(rows)
    (together,) = torch.autograd.grad((loss, rows), z, ups, retain_graph=True)
    parts = [
        torch.autograd.grad(out, z, up, retain_graph=True)[0]
        for out, up in zip((loss, rows), ups, strict=True)
    ]
    assert relative_error(together, sum(parts)) < 1e-6


def test_the_loss_and_gradient_come_in_their_documented_dtypes(
    backend: str, device: torch.device
) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        z, y, _ = planted(2, V=V, dtype=dtype, device=device)
        loss, (dz,) = loss_and_gradients("mle_loss", z, y, backend=backend)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert dz.dtype == dtype
