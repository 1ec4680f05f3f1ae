"""The theory: numbers by hand, eqs. (5)-(11), the limits, and (4) having the solution of (1)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from fused_losses import reference
from fused_losses.token_losses import TOKEN_LOSSES

LN2 = math.log(2)
MEMBERS = list(TOKEN_LOSSES)
RATIO_MEMBERS = [name for name in MEMBERS if TOKEN_LOSSES[name].uses_reference]
each_member = pytest.mark.parametrize("name", MEMBERS)
each_ratio_member = pytest.mark.parametrize("name", RATIO_MEMBERS)

# f of D_f(pi || pi_E) = sum pi_E f(pi / pi_E), from the objectives' table.
DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "pearson": lambda u: (u - 1) ** 2,
    "hellinger": lambda u: (u.sqrt() - 1) ** 2,
    "neyman": lambda u: (1 - u) ** 2 / u,
    "jensen_shannon": lambda u: u * u.log() - (1 + u) * ((1 + u) / 2).log(),
    "kl": lambda u: u * u.log() - u + 1,
}


def _by_hand() -> tuple[Tensor, Tensor, Tensor]:
    """Two rows of three logits, their labels and reference log-probs."""
    # e^z = (1, 1, 2) and (3, 1, 1): p = (1/4, 1/4, 1/2) and (3/5, 1/5, 1/5).
    logits = torch.tensor([[0.0, 0.0, LN2], [math.log(3), 0.0, 0.0]], dtype=torch.float64)
    # Labels 2 and 1: p = 1/2 and 1/5; reference 1/4 and 2/5: log-ratios ln 2 and -ln 2.
    target = torch.tensor([2, 1])
    ref_logps = torch.tensor([1 / 4, 2 / 5], dtype=torch.float64).log()
    return logits.requires_grad_(), target, ref_logps


# Losses of the two tokens at beta = 1, value = 0, G = 4, and their weights.
HAND = {
    "mle": ((LN2, math.log(5)), (1.0, 1.0)),
    # -l + l^2 / 4; 1 - l / 2
    "pearson": ((-LN2 + LN2**2 / 4, LN2 + LN2**2 / 4), (1 - LN2 / 2, 1 + LN2 / 2)),
    # -l / (1 + l); -ln 2 lies below r0 = -1/2: phi = -1 + 4 (-ln 2 + 1/2)
    "hellinger": ((-LN2 / (1 + LN2), 4 * LN2 - 1), ((1 + LN2) ** -2, 4.0)),
    # 2 - 2 sqrt(1 + l); r0 = -15/16 is not reached
    "neyman": (
        (2 - 2 * math.sqrt(1 + LN2), 2 - 2 * math.sqrt(1 - LN2)),
        ((1 + LN2) ** -0.5, (1 - LN2) ** -0.5),
    ),
    # -log(2 - 1/2); -ln 2 lies below r0 = log(5/8): phi = log(2/5) + 4 (log(1/2) - log(5/8))
    "jensen_shannon": ((-math.log(3 / 2), math.log(5 / 2) + 4 * math.log(5 / 4)), (1 / 3, 4.0)),
    # e^-l - 1; r0 = -log 4 is not reached
    "kl": ((-0.5, 1.0), (0.5, 2.0)),
    # -p log p; p
    "dft": ((LN2 / 2, math.log(5) / 5), (1 / 2, 1 / 5)),
}


@each_member
def test_two_tokens_worked_out_by_hand(name: str) -> None:
    logits, target, ref_logps = _by_hand()
    losses = reference.token_loss(logits, target, ref_logps, loss=name, reduction="none")
    losses.mean().backward()
    expected, (w0, w1) = HAND[name]
    torch.testing.assert_close(losses, losses.new_tensor(expected))
    # (8): -w (1[v = y] - p), halved by the mean.
    gradient = [
        [w0 / 4 / 2, w0 / 4 / 2, -w0 / 2 / 2],
        [w1 * 3 / 5 / 2, -w1 * 4 / 5 / 2, w1 / 5 / 2],
    ]
    torch.testing.assert_close(logits.grad, losses.new_tensor(gradient))


def test_a_sequence_worked_out_by_hand() -> None:
    # One sequence of both tokens and beta = 2, value = 1/2: the log-ratios cancel, r = 1/2,
    # phi = (1/2) / (3/2) = 1/3, loss = (1/2 - 1/3) / 2 = 1/12; w = 4/9 for both tokens.
    logits, target, ref_logps = _by_hand()
    options = {"beta": 2.0, "value": 0.5, "level": "sequence"}
    loss = reference.hellinger_loss(logits[None], target[None], ref_logps[None], **options)
    loss.backward()
    assert loss.item() == pytest.approx(1 / 12)
    assert logits.grad[0].tolist() == pytest.approx([1 / 9, 1 / 9, -2 / 9])
    assert logits.grad[1].tolist() == pytest.approx([4 / 15, -16 / 45, 4 / 45])


@pytest.mark.parametrize(
    ("eps", "lost"), [(0.0, math.log(5 / 4)), (0.1, math.log(5) - 0.9 * 2 * LN2)]
)
def test_a_pair_worked_out_by_hand(eps: float, lost: float) -> None:
    # Row 0 chosen, row 1 rejected, beta = 1: Delta = 2 ln 2, sigma(Delta) = 4/5.
    logits, target, ref_logps = _by_hand()
    loss = reference.dpo_loss(
        logits[:, None], target[:, None], ref_logps[:, None], beta=1.0, label_smoothing=eps
    )
    loss.backward()
    assert loss.item() == pytest.approx(lost)
    # (11): dlogp is -(1/5 - eps) for the chosen token and the opposite for the rejected one.
    d = 1 / 5 - eps
    assert logits.grad[0].tolist() == pytest.approx([d / 4, d / 4, -d / 2])
    assert logits.grad[1].tolist() == pytest.approx([-3 * d / 5, 4 * d / 5, -d / 5])


@pytest.mark.parametrize("name", ["mle", *RATIO_MEMBERS])
@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_derivatives_of_the_loss_are_those_of_eq_7(name: str, beta: float) -> None:
    # Log-ratios and values that put r on both sides of every threshold (-15/16 to 2).
    ratio = torch.linspace(-3.0, 3.0, 61, dtype=torch.float64) / beta
    value = 0.2 * torch.sin(7 * ratio)
    value.requires_grad_(name != "mle")
    # Two classes: logits (logp, log(1 - p)) give log-prob logp, for which p must be below 1.
    logp = (torch.full_like(ratio, -0.1)).requires_grad_()
    logits = torch.stack([logp, torch.log(-torch.expm1(logp))], dim=-1)
    target = torch.zeros(61, dtype=torch.int64)
    options = {"loss": name, "beta": beta, "value": value, "reduction": "sum"}
    loss = reference.token_loss(logits, target, logp.detach() - ratio, **options)
    weight = TOKEN_LOSSES[name].phi_and_weight(beta * ratio + value.detach(), 4.0)[1]
    if name == "mle":
        (dlogp,) = torch.autograd.grad(loss, logp)
    else:
        dlogp, dvalue = torch.autograd.grad(loss, [logp, value])
        torch.testing.assert_close(dvalue, (1 - weight) / beta, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dlogp, -weight, rtol=1e-9, atol=1e-12)


def _random_tokens(N: int = 40, V: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = torch.randn(N, V, dtype=torch.float64, requires_grad=True)
    target = torch.randint(V, (N,))
    logps = reference.token_stats(logits.detach(), target).logps
    (mle_gradient,) = torch.autograd.grad(reference.mle_loss(logits, target), logits)
    return logits, target, logps, mle_gradient


@each_ratio_member
@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_at_policy_equal_to_reference_the_gradient_is_mles(name: str, beta: float) -> None:
    logits, target, logps, mle_gradient = _random_tokens()
    loss = reference.token_loss(logits, target, logps, loss=name, beta=beta)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(0.0, abs=1e-15)
    torch.testing.assert_close(gradient, mle_gradient, rtol=1e-12, atol=1e-15)


@each_ratio_member
def test_as_beta_vanishes_loss_and_gradient_tend_to_mles_at_first_order(name: str) -> None:
    logits, target, logps, mle_gradient = _random_tokens()
    ref_logps = logps + torch.randn_like(logps)
    limit = (ref_logps - logps).mean()
    errors = []
    for beta in (1e-3, 1e-4, 1e-5):
        loss = reference.token_loss(logits, target, ref_logps, loss=name, beta=beta)
        (gradient,) = torch.autograd.grad(loss, logits)
        errors.append(((loss - limit).abs().item(), (gradient - mle_gradient).norm().item()))
    for small, large in zip(errors[1:], errors, strict=False):
        assert small == pytest.approx([error / 10 for error in large], rel=0.02)
    assert max(errors[-1]) < 1e-4


def _minimise(objective: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """L-BFGS in torch, then Newton steps to the last digit (singular along the softmax's gauge)."""
    x = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9, tolerance_change=0
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    x = x.detach()
    for _ in range(2):
        gradient = torch.autograd.functional.jacobian(objective, x)
        hessian = torch.autograd.functional.hessian(objective, x)
        x = x - torch.linalg.pinv(hessian, rtol=1e-12, hermitian=True) @ gradient
    return x


def _toy(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(2, 6 + seed % 2, generator=generator, dtype=torch.float64)
    expert, ref = draws.softmax(-1)
    return expert, ref


def _objective_1(name: str, expert: Tensor, ref: Tensor, beta: float) -> Callable[[Tensor], Tensor]:
    def objective(logits: Tensor) -> Tensor:
        pi = logits.softmax(-1)
        divergence = (expert * DIVERGENCES[name](pi / expert)).sum()
        return divergence + beta * (pi * (pi / ref).log()).sum()

    return objective


def _objective_4(
    name: str, expert: Tensor, ref: Tensor, beta: float, cap: float
) -> Callable[[Tensor], Tensor]:
    """(4) / beta over (logits, V): every outcome a token, weighted by pi_E."""
    V = len(expert)

    def objective(x: Tensor) -> Tensor:
        return reference.token_loss(
            x[:V].expand(V, V),
            torch.arange(V),
            ref.log(),
            loss=name,
            beta=beta,
            value=x[V],
            max_weight=cap,
            token_weight=expert,
            reduction="sum",
        )

    return objective


@each_ratio_member
@pytest.mark.parametrize(("beta", "seed"), [(0.1, 1), (1.0, 0), (4.0, 1)])
def test_eq_4_over_policy_and_offset_has_the_solution_of_eq_1(
    name: str, beta: float, seed: int
) -> None:
    expert, ref = _toy(seed)
    direct = _minimise(_objective_1(name, expert, ref, beta), ref.log()).softmax(-1)
    start = torch.cat([ref.log(), ref.new_zeros(1)])
    x = _minimise(_objective_4(name, expert, ref, beta, cap=1e6), start)
    pi, offset = x[:-1].softmax(-1), x[-1]
    torch.testing.assert_close(pi, direct, rtol=0.0, atol=1e-8)
    # The KL tie holds: the solution lies off the experts, and E_E[phi'] = 1 fixes the offset.
    assert (pi - expert).abs().max() > 1e-3
    r = beta * (pi / ref).log() + offset
    _, weight = TOKEN_LOSSES[name].phi_and_weight(r, 1e6)
    assert (expert * weight).sum().item() == pytest.approx(1.0, abs=1e-9)
    # The optimal reward's weight is the density ratio pi / pi_E.
    torch.testing.assert_close(weight, pi / expert, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("seed", [0, 1])
def test_mle_loses_the_tie_and_returns_the_experts(seed: int) -> None:
    expert, ref = _toy(seed)
    objective = _objective_4("mle", expert, ref, 1.0, 4.0)
    pi = _minimise(lambda logits: objective(torch.cat([logits, logits[:1]])), ref.log())
    torch.testing.assert_close(pi.softmax(-1), expert, rtol=0.0, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in RATIO_MEMBERS if TOKEN_LOSSES[name].r0])
def test_the_cap_is_the_constraint_that_the_policy_stays_below_cap_times_the_experts(
    name: str,
) -> None:
    cap, beta = 1.3, 1.0
    expert, ref = _toy(0)
    objective = _objective_1(name, expert, ref, beta)
    free = _minimise(objective, ref.log()).softmax(-1)
    assert (free > cap * expert).any()  # else the constraint would not bind
    result = minimize(
        lambda pi: objective(torch.from_numpy(pi).log()).item(),
        expert.numpy(),
        method="SLSQP",
        bounds=[(1e-9, cap * p) for p in expert.tolist()],
        constraints={"type": "eq", "fun": lambda pi: pi.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    start = torch.cat([ref.log(), ref.new_zeros(1)])
    pi = _minimise(_objective_4(name, expert, ref, beta, cap), start)[:-1].softmax(-1)
    torch.testing.assert_close(pi, torch.from_numpy(result.x), rtol=0.0, atol=1e-5)
