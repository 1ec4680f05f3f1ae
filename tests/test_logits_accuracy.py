"""The logits path against float64 on the same rounded inputs, and beside eager torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    in_double,
    interpreted,
    loss_and_gradients,
    own_losses,
    planted,
    relative_error,
    truth_of,
    use_small_blocks,
)
from torch import Tensor

import fused_losses
from fused_losses import TOKEN_LOSSES, reference

B, T, V = 3, 5, 37
MAX_WEIGHT = 4.0
each_member = pytest.mark.parametrize("name", list(TOKEN_LOSSES))
low_precision = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_blocks(monkeypatch)


def _n1(lse: Tensor) -> Tensor:
    return 2.0**-22 * lse.abs() + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_statistics_lie_within_n1_of_float64(
    backend: str, device: torch.device, dtype: torch.dtype
) -> None:
    z, y, _ = planted(B, T, V=V, dtype=dtype, device=device)
    got = fused_losses.token_stats(z, y, entropy=True, backend=backend)
    truth = reference.token_stats(z.double(), y, entropy=True)
    for name in ("logps", "lse", "entropy"):
        value, want = getattr(got, name), getattr(truth, name)
        assert value.dtype == torch.float32
        assert ((value - want).abs() <= _n1(truth.lse)).all(), name
    assert torch.equal(got.is_top1, truth.is_top1)
    assert truth.is_top1.any()


@each_member
def test_per_token_losses_lie_within_n1_of_float64(
    backend: str, device: torch.device, name: str
) -> None:
    z, y, ref = planted(B, T, V=V, dtype=torch.float32, device=device)
    options: dict[str, Any] = {"loss": name, "reduction": "none", "max_weight": MAX_WEIGHT}
    got, _ = loss_and_gradients("token_loss", z, y, ref, backend=backend, **options)
    want, _ = truth_of("token_loss", z, y, ref, **options)
    lse = reference.token_stats(z.double(), y).lse
    # An error in logp reaches the loss times the weight, which max_weight caps here.
    assert ((got - want).abs() <= MAX_WEIGHT * _n1(lse)).all()
    assert got.dtype == torch.float32


@each_member
def test_float32_gradients_lie_within_n2_and_twice_the_error_of_eager(
    backend: str, device: torch.device, name: str
) -> None:
    z, y, ref = planted(4, 8, V=61, dtype=torch.float32, device=device)
    options = {"loss": name, "beta": 0.5, "reduction": "sum"}
    _, (got,) = loss_and_gradients("token_loss", z, y, ref, backend=backend, **options)
    _, (truth,) = truth_of("token_loss", z, y, ref, **options)
    _, (eager,) = loss_and_gradients("token_loss", z, y, ref, source=reference, **options)
    assert got.dtype == torch.float32
    assert relative_error(got, truth) <= 1e-5
    assert relative_error(got, truth) <= 2.0 * relative_error(eager, truth)


@low_precision
def test_low_precision_gradients_are_rounded_once(
    backend: str, device: torch.device, dtype: torch.dtype
) -> None:
    z, y, _ = planted(4, 8, V=61, dtype=dtype, device=device)
    _, (got,) = loss_and_gradients("mle_loss", z, y, reduction="sum", backend=backend)
    _, (truth,) = truth_of("mle_loss", z, y, reduction="sum")
    leaf = z.clone().requires_grad_()
    loss = F.cross_entropy(leaf.view(-1, 61), y.view(-1), reduction="sum")
    (eager,) = torch.autograd.grad(2.0 * loss, leaf)
    # The interpreter truncates where a GPU rounds to nearest: one unit of the last place more.
    truncates = dtype == torch.bfloat16 and interpreted(backend)
    slack = 2.0 if truncates else 1.0
    one_rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    floor = 1e-5 * truth.abs().max() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert got.dtype == dtype
    assert ((got.double() - truth).abs() <= slack * one_rounding * truth.abs() + floor).all()
    assert relative_error(got, truth) <= 2.0 * slack * relative_error(eager, truth)


@pytest.mark.parametrize("gap", [21.0, 24.5])
def test_the_gradient_of_a_confident_target_keeps_its_relative_accuracy(
    backend: str, device: torch.device, gap: float
) -> None:
    z = torch.randn(2, V, device=device) * 0.1
    y = torch.tensor([3, 30], device=device)
    z[0, 3] = z[1, 30] = gap
    loss, (dz,) = loss_and_gradients("mle_loss", z, y, reduction="none", backend=backend)
    want, (truth,) = truth_of("mle_loss", z, y, reduction="none")
    assert want.max() < 5e-8  # far below the resolution of fp32 around 1
    assert ((loss.double() - want).abs() <= 1e-5 * want).all()
    # Subtracting p from 1 in fp32 would give 0 at the target.
    assert ((dz.double() - truth).abs() <= 2e-5 * truth.abs()).all()


def test_a_confident_log_prob_keeps_its_relative_accuracy(
    backend: str, device: torch.device
) -> None:
    # log p near -1e-8: written as a difference it would be 0.
    z = torch.randn(4, V, device=device)
    y = torch.tensor([0, 5, 20, V - 1], device=device)
    z[torch.arange(4, device=device), y] += torch.tensor([6.0, 14.0, 20.0, 26.0], device=device)
    got = fused_losses.token_stats(z, y, backend=backend).logps
    truth = reference.token_stats(z.double(), y).logps
    assert ((got - truth).abs() <= 1e-6 * truth.abs()).all()


def test_log_probs_of_hopeless_targets_are_right(backend: str, device: torch.device) -> None:
    z = torch.zeros(2, V, device=device)
    y = torch.tensor([0, 36], device=device)
    z[0, 20], z[1, 1] = 95.0, 1e4
    got = fused_losses.token_stats(z, y, backend=backend).logps
    truth = reference.token_stats(z.double(), y).logps
    assert torch.allclose(got.double(), truth, rtol=1e-6, atol=0.0)


def test_logits_of_magnitude_1e4_lose_nothing(backend: str, device: torch.device) -> None:
    z, y, _ = planted(B, T, V=V, dtype=torch.float32, device=device)
    z = z * 1e3 - 1e4
    loss, (dz,) = loss_and_gradients("mle_loss", z, y, reduction="none", backend=backend)
    want, (truth,) = truth_of("mle_loss", z, y, reduction="none")
    lse = reference.token_stats(z.double(), y).lse
    assert ((loss - want).abs() <= _n1(lse)).all()
    assert relative_error(dz, truth) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_three_runs_give_the_same_bits(
    backend: str, device: torch.device, dtype: torch.dtype
) -> None:
    z, y, ref = planted(B, T, V=V, dtype=dtype, device=device)
    runs = [
        loss_and_gradients("hellinger_loss", z, y, ref, reduction="none", backend=backend)
        for _ in range(3)
    ]
    for loss, (dz,) in runs[1:]:
        assert torch.equal(loss, runs[0][0])
        assert torch.equal(dz, runs[0][1][0])


def test_a_row_gives_the_same_bits_alone_and_in_any_batch(
    backend: str, device: torch.device
) -> None:
    z, y, _ = planted(7, V=V, dtype=torch.float32, device=device, ignored=0.0)
    options = {"entropy": True, "backend": backend}
    whole = fused_losses.token_stats(z, y, **options)
    for rows in (slice(0, 1), slice(3, 4), slice(2, 7)):
        part = fused_losses.token_stats(z[rows].clone(), y[rows], **options)
        for got, want in zip(part, whole, strict=True):
            assert torch.equal(got, want[rows])


def test_dft_has_the_gradient_of_a_likelihood_weighted_by_its_own_probabilities(
    backend: str, device: torch.device
) -> None:
    z, y, _ = planted(2, 3, V=11, device=device)
    z.requires_grad_()
    p = reference.token_stats(z.detach(), y).logps.exp()
    loss = fused_losses.token_loss(z, y, loss="dft", backend=backend)
    weighted = fused_losses.mle_loss(z, y, token_weight=p, backend=backend)
    torch.testing.assert_close(loss, weighted, rtol=1e-12, atol=0.0)
    found, expected = (torch.autograd.grad(value, z)[0] for value in (loss, weighted))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


# dft's gradient is none of a function: its weight is not differentiated.
@pytest.mark.parametrize("name", [name for name in TOKEN_LOSSES if name != "dft"])
def test_gradcheck_holds_through_the_kernels(backend: str, device: torch.device, name: str) -> None:
    z, y, ref = planted(2, 3, V=11, device=device)
    value = 0.1 * torch.randn(3, dtype=torch.float64, device=device)
    options = {"loss": name, "beta": 0.7, "max_weight": 1.3, "backend": backend}

    def loss(z: Tensor, value: Tensor) -> Tensor:
        return fused_losses.token_loss(z, y, ref, value=value, reduction="none", **options)

    inputs = (z.requires_grad_(), value.requires_grad_())
    if name == "mle":  # value cancels: nothing depends on it
        assert torch.autograd.gradcheck(lambda z: loss(z, value), inputs[:1], fast_mode=True)
    else:
        assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


GRADCHECKED = {
    "softcap": {"softcap": 2.5},
    "logit_scale": {"logit_scale": 0.6},
    "temperature": {"temperature": 1.7},
    "all transforms": {"softcap": 4.0, "logit_scale": 1.3, "temperature": 0.8},
    "label_smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.05},
    "everything": {
        "softcap": 4.0,
        "logit_scale": 1.3,
        "temperature": 0.8,
        "label_smoothing": 0.2,
        "z_loss": 0.05,
        "num_items": 7,
        "shift": True,
    },
}


@pytest.mark.parametrize("options", GRADCHECKED.values(), ids=GRADCHECKED)
def test_gradcheck_holds_with_every_option(
    backend: str, device: torch.device, options: dict[str, Any]
) -> None:
    z, y, _ = planted(2, 3, V=11, device=device)
    weight = torch.randn(2, 3, device=device)

    def loss(z: Tensor) -> Tensor:
        return fused_losses.mle_loss(z, y, token_weight=weight, backend=backend, **options)

    assert torch.autograd.gradcheck(loss, (z.requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize("transform", [{}, GRADCHECKED["all transforms"]], ids=["plain", "capped"])
def test_gradcheck_holds_for_every_statistic(
    backend: str, device: torch.device, transform: dict[str, Any]
) -> None:
    z, y, _ = planted(4, V=11, device=device)

    def stats(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return fused_losses.token_stats(z, y, entropy=True, backend=backend, **transform)[:3]

    assert torch.autograd.gradcheck(stats, (z.requires_grad_(),), fast_mode=True)


def test_full_gradcheck_holds_on_a_tiny_shape(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_small_blocks(monkeypatch, 2)
    z, y, ref = planted(2, V=3, device=device, ignored=0.0)
    options = {"softcap": 3.0, "z_loss": 0.1, "backend": backend}

    def outputs(z: Tensor) -> tuple[Tensor, ...]:
        loss = fused_losses.pearson_loss(z, y, ref, reduction="none", **options)
        return loss, *fused_losses.token_stats(z, y, entropy=True, backend=backend)[:3]

    assert torch.autograd.gradcheck(outputs, (z.requires_grad_(),))


@pytest.mark.parametrize("name", list(own_losses()))
def test_a_loss_of_ones_own_is_as_accurate(backend: str, device: torch.device, name: str) -> None:
    z, y, ref = planted(4, 8, V=61, dtype=torch.float32, device=device)
    options = {"loss": own_losses()[name], "beta": 0.5, "reduction": "none"}
    got = loss_and_gradients("token_loss", z, y, ref, backend=backend, **options)
    want = truth_of("token_loss", z, y, ref, **options)
    assert relative_error(got[0], want[0]) <= 1e-5
    assert relative_error(got[1][0], want[1][0]) <= 1e-5


def test_float64_stays_float64(backend: str, device: torch.device) -> None:
    z, y, ref = planted(B, T, V=V, device=device)
    got, (dz,) = loss_and_gradients("hellinger_loss", z, y, ref, backend=backend)
    want, (truth,) = truth_of("hellinger_loss", z, y, in_double(ref))
    assert got.dtype == dz.dtype == torch.float64
    assert relative_error(got, want) < 1e-13
    assert relative_error(dz, truth) < 1e-13
