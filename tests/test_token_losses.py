"""The members of the family: phi, phi' and the continuation, in torch and on the device."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_losses
from fused_losses.token_losses import TOKEN_LOSSES, TokenLoss
from fused_losses_kernels.language import device_function, tl

MEMBERS = list(TOKEN_LOSSES.values())
CONTINUED = [member for member in MEMBERS if member.r0 is not None]
CAPS = (1.5, 4.0, 50.0)

# phi, phi' and their domains, written out again from the objectives' table.
TABLE = {
    "mle": (lambda r: r, lambda r: 1.0, -math.inf),
    "pearson": (lambda r: r - r * r / 4, lambda r: 1 - r / 2, -math.inf),
    "hellinger": (lambda r: r / (1 + r), lambda r: (1 + r) ** -2, -1.0),
    "neyman": (lambda r: 2 * math.sqrt(1 + r) - 2, lambda r: (1 + r) ** -0.5, -1.0),
    "jensen_shannon": (
        lambda r: math.log(2 - math.exp(-r)),
        lambda r: 1 / (2 * math.exp(r) - 1),
        -math.log(2),
    ),
    "kl": (lambda r: 1 - math.exp(-r), lambda r: math.exp(-r), -math.inf),
    "dft": (lambda r: r * math.exp(r), math.exp, -math.inf),
}
# r0 and phi(r0) at cap G, from the same place.
CONTINUATION = {
    "hellinger": (lambda G: G**-0.5 - 1, lambda G: 1 - math.sqrt(G)),
    "neyman": (lambda G: G**-2 - 1, lambda G: 2 / G - 2),
    "jensen_shannon": (lambda G: math.log((1 + G) / (2 * G)), lambda G: math.log(2 / (1 + G))),
    "kl": (lambda G: -math.log(G), lambda G: 1 - G),
}

each_member = pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
# dft is no divergence's: its weight rises with the reward, and phi is not concave.
each_concave = pytest.mark.parametrize(
    "member", [m for m in MEMBERS if m.name != "dft"], ids=lambda member: member.name
)
each_continued = pytest.mark.parametrize("member", CONTINUED, ids=lambda member: member.name)
each_cap = pytest.mark.parametrize("cap", CAPS)


def _around(member: TokenLoss, cap: float) -> list[float]:
    """Points on both sides of every threshold: the continuation's, 0, 1 (stable forms) and 2."""
    thresholds = [0.0, 1.0, 2.0] + ([member.r0(cap)] if member.r0 else [])
    near = [t + d for t in thresholds for d in (-0.3, -1e-3, -1e-9, 0.0, 1e-9, 1e-3, 0.3)]
    return [*near, -100.0, -5.0, -1.0, 7.0, 100.0]


def _float64(points: list[float]) -> Tensor:
    return torch.tensor(points, dtype=torch.float64)


def test_the_table_of_this_file_covers_the_family() -> None:
    assert set(TABLE) == set(TOKEN_LOSSES)
    assert set(CONTINUATION) == {member.name for member in CONTINUED}


@each_member
def test_phi_and_weight_are_those_of_the_table_inside_the_domain(member: TokenLoss) -> None:
    phi_of, weight_of, left = TABLE[member.name]
    points = [r for r in (-2.5, -0.9, -0.6, -0.1, 0.0, 0.5, 1.0, 1.5, 3.0, 20.0) if r > left]
    phi, weight = member.phi_and_weight(_float64(points), 1e9)
    for i, r in enumerate(points):
        assert phi[i].item() == pytest.approx(phi_of(r), rel=1e-12, abs=1e-14)
        assert weight[i].item() == pytest.approx(weight_of(r), rel=1e-7, abs=1e-14)


@each_member
def test_phi_is_zero_with_slope_one_at_zero(member: TokenLoss) -> None:
    phi, weight = member.phi_and_weight(_float64([0.0]), 4.0)
    assert phi.item() == 0.0
    assert weight.item() == 1.0


@each_member
@pytest.mark.parametrize("r", [1e-9, -1e-9])
def test_phi_keeps_its_relative_accuracy_near_zero_in_float32(member: TokenLoss, r: float) -> None:
    phi, _ = member.phi_and_weight(torch.tensor([r]), 4.0)
    assert phi.item() == pytest.approx(r, rel=1e-6)


@each_member
@each_cap
def test_the_weight_is_the_derivative_of_phi_on_both_sides_of_every_threshold(
    member: TokenLoss, cap: float
) -> None:
    r = _float64(_around(member, cap)).requires_grad_()
    phi, weight = member.phi_and_weight(r, cap)
    (derivative,) = torch.autograd.grad(phi.sum(), r)
    torch.testing.assert_close(derivative, weight, rtol=1e-9, atol=1e-12)


@each_continued
@each_cap
def test_the_continuation_begins_where_the_weight_reaches_the_cap(
    member: TokenLoss, cap: float
) -> None:
    r0_of, phi_of = CONTINUATION[member.name]
    assert member.left_end(cap) == pytest.approx(r0_of(cap), rel=1e-14)
    phi, weight = member.phi_and_weight(_float64([r0_of(cap)]), cap)
    assert weight.item() == pytest.approx(cap, rel=1e-9)
    assert phi.item() == pytest.approx(phi_of(cap), rel=1e-12)


@each_continued
@each_cap
def test_the_continuation_is_the_tangent_and_the_weight_stays_at_the_cap(
    member: TokenLoss, cap: float
) -> None:
    r0_of, phi_of = CONTINUATION[member.name]
    depth = _float64([0.0, 1e-6, 1.0, 1e3, 1e6])
    phi, weight = member.phi_and_weight(r0_of(cap) - depth, cap)
    torch.testing.assert_close(phi, phi_of(cap) - cap * depth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight, torch.full_like(weight, cap), rtol=1e-9, atol=0.0)


@each_concave
@each_cap
def test_phi_with_its_continuation_is_concave_and_finite(member: TokenLoss, cap: float) -> None:
    r = torch.linspace(-10.0, 10.0, 4001, dtype=torch.float64)
    phi, weight = member.phi_and_weight(r, cap)
    assert torch.isfinite(phi).all()
    assert (weight.diff() <= 1e-12).all()
    # The chord of a concave function lies below it.
    assert (phi[2:] - 2 * phi[1:-1] + phi[:-2] <= 1e-12).all()
    if member.r0 is not None:
        assert (weight <= cap * (1 + 1e-9)).all()


@each_member
def test_reversal_beyond_two_is_pearsons_alone(member: TokenLoss) -> None:
    _, weight = member.phi_and_weight(_float64([2.0 - 1e-6, 2.0, 2.0 + 1e-6, 5.0]), 4.0)
    if member.name == "pearson":
        torch.testing.assert_close(weight, _float64([5e-7, 0.0, -5e-7, -1.5]), rtol=1e-6, atol=0)
    else:
        assert (weight > 0).all()


@each_member
def test_infinite_rewards_give_no_nan_and_nan_stays_nan(member: TokenLoss) -> None:
    phi, weight = member.phi_and_weight(_float64([math.inf, -math.inf, math.nan]), 4.0)
    assert not phi[:2].isnan().any()
    assert not weight[:2].isnan().any()
    assert phi[1].item() == (0.0 if member.name == "dft" else -math.inf)  # 0 log 0 is 0
    assert phi[2].isnan().item()
    limit = {"mle": 1.0, "pearson": -math.inf, "dft": math.inf}.get(member.name, 0.0)
    assert weight[0].item() == limit


@each_member
def test_second_derivatives_are_finite_across_the_continuation(member: TokenLoss) -> None:
    r = _float64([-1e3, -1.0, -0.5, 0.0, 0.5, 1.5]).requires_grad_()
    phi, _ = member.phi_and_weight(r, 4.0)
    (first,) = torch.autograd.grad(phi.sum(), r, create_graph=True)
    if first.requires_grad:  # mle's derivative is constant, dft's taken as one
        (second,) = torch.autograd.grad(first.sum(), r)
        assert torch.isfinite(second).all()
        assert (second <= 0).all()


@device_function
def _phi_and_weight_kernel(
    r_ptr, phi_ptr, weight_ptr, N, r0: tl.constexpr, DEVICE_FN: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.arange(0, BLOCK)
    r = tl.load(r_ptr + i, mask=i < N, other=0.0)
    # A bare float would become fp32 in tl.where, also beside fp64.
    left = tl.full([BLOCK], r0, r.dtype)
    phi, weight = DEVICE_FN(tl.where(r < left, left, r))
    if r0 != -float("inf"):
        phi += weight * tl.where(r < left, r - left, 0.0)
    tl.store(phi_ptr + i, phi, mask=i < N)
    tl.store(weight_ptr + i, weight, mask=i < N)


_QUARTER = 0.25
_EIGHTH = None if tl is None else tl.constexpr(0.125)


@device_function
def _with_a_global(r):
    return r - 0.5 * _QUARTER * r * r, 1.0 - _QUARTER * r


@device_function
def _with_a_constant(r):
    return r - _EIGHTH * r * r, 1.0 - 2.0 * _EIGHTH * r


# Branches that tl.where does not take warn in numpy, which the interpreter runs on.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
class TestDeviceFunctions:
    """Each member's device function in a tiny kernel, against its torch twin."""

    @pytest.fixture(autouse=True)
    def _needs_triton(self) -> None:
        pytest.importorskip("triton")

    @staticmethod
    def _run(member: TokenLoss, r: Tensor, cap: float) -> tuple[Tensor, Tensor]:
        phi, weight = torch.full_like(r, math.nan), torch.full_like(r, math.nan)
        _phi_and_weight_kernel[(1,)](
            r,
            phi,
            weight,
            r.numel(),
            r0=member.left_end(cap),
            DEVICE_FN=member.device_fn,
            BLOCK=1 << (r.numel() - 1).bit_length(),
        )
        return phi, weight

    @each_member
    @each_cap
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_device_function_equals_its_torch_twin(
        self, member: TokenLoss, cap: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        wide = torch.linspace(-1e3, 1e3, 401, dtype=torch.float64)
        near = torch.linspace(-3.0, 3.0, 501, dtype=torch.float64)
        edges = _float64(_around(member, cap))
        special = _float64([0.0, 1e-9, -1e-9, 1e-30, math.inf, -math.inf, math.nan])
        r = torch.cat([wide, near, edges, special]).to(device, dtype)
        got = self._run(member, r, cap)
        expected = member.phi_and_weight(r, cap)
        eps = torch.finfo(dtype).eps
        for x, y in zip(got, expected, strict=True):
            # kl and jensen_shannon form their small weights as 1 - (1 - w): absolute to one eps.
            torch.testing.assert_close(x, y, rtol=64 * eps, atol=8 * eps, equal_nan=True)

    @each_member
    def test_the_device_function_keeps_its_relative_accuracy_near_zero(
        self, member: TokenLoss, device: torch.device
    ) -> None:
        r = torch.tensor([1e-9, -1e-9, 3e-7, -2e-5], device=device)
        phi, _ = self._run(member, r, 4.0)
        expected, _ = member.phi_and_weight(r.double(), 4.0)
        torch.testing.assert_close(phi.double(), expected, rtol=1e-6, atol=0.0)


def _own(device_fn: Any) -> TokenLoss:
    return TokenLoss("own", device_fn, lambda r: (r - 0.125 * r * r, 1.0 - 0.25 * r))


class TestNumbersFromOutside:
    """What the interpreter takes and a GPU's compiler does not is refused when the loss is made."""

    @pytest.mark.parametrize("number", [0.25, 3, True], ids=repr)
    def test_a_number_of_an_enclosing_function_is_refused_by_name(self, number: float) -> None:
        @device_function
        def phi(r):
            return r * number, number

        message = rf"device_fn of loss 'own' reads number = {number!r}.*tl\.constexpr\({number!r}\)"
        with pytest.raises(TypeError, match=message):
            _own(phi)

    def test_a_number_of_a_function_that_is_called_is_refused_too(self) -> None:
        quarter = 0.25

        @device_function
        def weight(r):
            return 1.0 - quarter * r

        @device_function
        def phi(r):
            return r * weight(0.5 * r), weight(r)

        with pytest.raises(TypeError, match=r"reads quarter = 0\.25"):
            _own(phi)

    def test_a_number_of_the_module_is_refused(self) -> None:
        with pytest.raises(TypeError, match=r"reads _QUARTER = 0\.25"):
            _own(_with_a_global)

    def test_constants_are_taken(self, device: torch.device) -> None:
        pytest.importorskip("triton")
        z = torch.randn(3, 11, device=device)
        y, ref = torch.tensor([1, 5, 10], device=device), torch.full((3,), -2.0, device=device)
        kernels, torch_twin = (
            fused_losses.token_loss(z, y, ref, loss=_own(_with_a_constant), backend=backend)
            for backend in ("triton", "torch")
        )
        torch.testing.assert_close(kernels, torch_twin)
