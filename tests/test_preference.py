"""Preference losses on whole responses against numpy, by hand, and at their edges."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from fused_losses.preference import PAIR_LOSSES, LossType, preference_loss

Array = NDArray[np.float64]

CASES = [("sigmoid", 0.0), ("sigmoid", 0.2), ("hinge", 0.0), ("ipo", 0.0)]
CASES += [("robust", 0.0), ("robust", 0.3)]
each_case = pytest.mark.parametrize(("loss_type", "eps"), CASES)


def _in_numpy(
    loss_type: str, eps: float, beta: float, ratios: tuple[Array, Array], n: tuple[Array, Array]
) -> Array:
    l_w, l_l = ratios
    m = beta * (l_w - l_l)
    # -log sigma(x) = log(1 + e^-x)
    lost, won = np.logaddexp(0.0, -m), np.logaddexp(0.0, m)
    match loss_type:
        case "sigmoid":
            return (1 - eps) * lost + eps * won
        case "hinge":
            return np.maximum(0.0, 1 - m)
        case "ipo":
            return (l_w / n[0] - l_l / n[1] - 1 / (2 * beta)) ** 2
        case "robust":
            return ((1 - eps) * lost - eps * won) / (1 - 2 * eps)
    raise AssertionError(loss_type)


def _batch(
    B: int = 7, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    logps = [-30 * torch.rand(B, generator=generator, dtype=torch.float64) for _ in range(4)]
    lengths = [torch.randint(1, 40, (B,), generator=generator) for _ in range(2)]
    return [x.to(dtype) for x in logps], {
        "chosen_lengths": lengths[0],
        "rejected_lengths": lengths[1],
    }


def _losses(l_w: Tensor, l_l: Tensor, loss_type: str, eps: float, beta: float) -> Tensor:
    ones = torch.ones_like(l_w)
    return preference_loss(
        l_w,
        l_l,
        beta=beta,
        loss_type=loss_type,
        label_smoothing=eps,
        chosen_lengths=ones,
        rejected_lengths=ones,
    )[0]


def test_every_loss_is_named_and_tested_here() -> None:
    assert set(PAIR_LOSSES) == set(get_args(LossType)) == {loss_type for loss_type, _ in CASES}


def test_by_hand() -> None:
    # Log-ratios: chosen -2 - (-3) = 1, rejected -4 - (-2) = -2, so Delta = 3; beta = 0.5: m = 1.5.
    logps = [torch.tensor([x], dtype=torch.float64) for x in (-2.0, -4.0, -3.0, -2.0)]
    lengths = {"chosen_lengths": torch.tensor([2]), "rejected_lengths": torch.tensor([4])}

    def loss(loss_type: LossType, eps: float = 0.0) -> float:
        options = {"beta": 0.5, "loss_type": loss_type, "label_smoothing": eps, **lengths}
        return preference_loss(*logps, **options)[0].item()

    # log(1 + e^-1.5) = 0.20141327798, log(1 + e^1.5) = 1.70141327798
    assert loss("sigmoid") == pytest.approx(0.20141327798, abs=1e-10)
    # 0.9 * 0.20141327798 + 0.1 * 1.70141327798
    assert loss("sigmoid", 0.1) == pytest.approx(0.35141327798, abs=1e-10)
    # (0.9 * 0.20141327798 - 0.1 * 1.70141327798) / 0.8
    assert loss("robust", 0.1) == pytest.approx(0.01391327798, abs=1e-10)
    assert loss("hinge") == 0.0  # 1 - 1.5 < 0
    # 1 / 2 - (-2 / 4) - 1 / (2 * 0.5) = 0.5 + 0.5 - 1
    assert loss("ipo") == pytest.approx(0.0, abs=1e-15)
    _, chosen_rewards, rejected_rewards = preference_loss(*logps, beta=0.5)
    assert chosen_rewards.tolist() == [0.5]
    assert rejected_rewards.tolist() == [-1.0]


@each_case
@pytest.mark.parametrize("beta", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("with_reference", [True, False])
def test_losses_and_rewards_equal_an_independent_transcription(
    loss_type: str, eps: float, beta: float, with_reference: bool
) -> None:
    logps, lengths = _batch()
    if not with_reference:
        logps = logps[:2]
    options = {"beta": beta, "loss_type": loss_type, "label_smoothing": eps}
    got = preference_loss(*logps, **options, **lengths)
    l_w, l_l = (
        logps[i].numpy() - (logps[i + 2].numpy() if with_reference else 0.0) for i in range(2)
    )
    n = lengths["chosen_lengths"].numpy(), lengths["rejected_lengths"].numpy()
    expected = _in_numpy(loss_type, eps, beta, (l_w, l_l), n), beta * l_w, beta * l_l
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x.numpy(), y, rtol=1e-12, atol=1e-14)


@each_case
def test_gradients_are_right_to_second_order(loss_type: str, eps: float) -> None:
    logps, lengths = _batch(B=4)
    policy = [x.clone().requires_grad_() for x in logps[:2]]

    def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
        options = {"beta": 0.3, "loss_type": loss_type, "label_smoothing": eps}
        return preference_loss(chosen, rejected, *logps[2:], **options, **lengths)[0]

    assert torch.autograd.gradcheck(losses, policy)
    assert torch.autograd.gradgradcheck(losses, policy)


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_policy_equal_to_reference_gives_log_two_and_the_gradient_of_eq_11(
    eps: float, dtype: torch.dtype
) -> None:
    logps, _ = _batch(dtype=dtype)
    chosen, rejected = (x.clone().requires_grad_() for x in logps[:2])
    losses, *rewards = preference_loss(chosen, rejected, *logps[:2], beta=0.3, label_smoothing=eps)
    losses.sum().backward()
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)))
    assert all((reward == 0).all() for reward in rewards)
    expected = torch.full_like(losses, -0.3 * (0.5 - eps))
    torch.testing.assert_close(chosen.grad, expected)
    torch.testing.assert_close(rejected.grad, -expected)


@given(
    margin=st.floats(-50, 50), eps=st.sampled_from([0.0, 0.1, 0.5, 0.9]), beta=st.floats(0.01, 2)
)
def test_swapping_a_pair_is_flipping_its_label(margin: float, eps: float, beta: float) -> None:
    l_w = torch.tensor([margin], dtype=torch.float64)
    l_l = torch.zeros_like(l_w)
    one_way = _losses(l_w, l_l, "sigmoid", eps, beta)
    # -log sigma(-m) = m - log sigma(m), so a swap adds (1 - 2 eps) m.
    torch.testing.assert_close(
        _losses(l_l, l_w, "sigmoid", eps, beta), one_way + (1 - 2 * eps) * beta * margin
    )
    if eps:
        torch.testing.assert_close(_losses(l_l, l_w, "sigmoid", 1 - eps, beta), one_way)


@given(margin=st.floats(-50, 50), eps=st.floats(0, 0.45))
def test_robust_is_unbiased_under_flips_with_probability_epsilon(margin: float, eps: float) -> None:
    l_w = torch.tensor([margin], dtype=torch.float64)
    l_l = torch.zeros_like(l_w)
    kept, flipped = (_losses(*pair, "robust", eps, 1.0) for pair in ((l_w, l_l), (l_l, l_w)))
    clean = _losses(l_w, l_l, "sigmoid", 0.0, 1.0)
    torch.testing.assert_close((1 - eps) * kept + eps * flipped, clean, rtol=1e-9, atol=1e-9)


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_margins_stay_finite(loss_type: str, eps: float, dtype: torch.dtype) -> None:
    l_w = torch.tensor([1e4, -1e4, 0.0], dtype=dtype, requires_grad=True)
    losses = _losses(l_w, torch.zeros_like(l_w), loss_type, eps, 1.0)
    (gradient,) = torch.autograd.grad(losses.sum(), l_w)
    assert losses.dtype == dtype
    assert losses.isfinite().all()
    assert gradient.isfinite().all()
    assert losses[1] > losses[2]  # a lost pair costs more than an undecided one


def test_nothing_flows_to_the_reference_or_out_of_the_rewards() -> None:
    logps, _ = _batch()
    for x in logps:
        x.requires_grad_()
    losses, *rewards = preference_loss(*logps)
    losses.sum().backward()
    assert not any(reward.requires_grad for reward in rewards)
    assert all(x.grad is not None for x in logps[:2])
    assert all(x.grad is None for x in logps[2:])


def test_a_response_of_length_zero_counts_as_length_one() -> None:
    zero, l_l = torch.zeros(1), torch.tensor([-2.0])
    lengths = {"chosen_lengths": torch.tensor([0]), "rejected_lengths": torch.tensor([4])}
    losses, *_ = preference_loss(zero, l_l, beta=0.5, loss_type="ipo", **lengths)
    assert losses.item() == pytest.approx((0.5 - 1.0) ** 2)


@each_case
def test_it_compiles_without_a_graph_break(loss_type: str, eps: float) -> None:
    logps, lengths = _batch()
    options = {"loss_type": loss_type, "label_smoothing": eps, **lengths}
    compiled = torch.compile(preference_loss, fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(*logps, **options), preference_loss(*logps, **options), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dpo"}, "loss_type must be one of 'sigmoid', 'hinge', 'ipo', 'robust'"),
        ({"loss_type": "ipo"}, "chosen_lengths must be a .B,. tensor"),
        ({"loss_type": "ipo", "chosen_lengths": torch.ones(2)}, "rejected_lengths must be"),
        ({"chosen_lengths": torch.ones(3)}, r"shape \(2,\), got \(3,\)"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing must be 0"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing must be 0"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, r"in \[0, 0.5\).*got 0.5"),
        ({"label_smoothing": -0.1}, r"in \[0, 1\).*got -0.1"),
        ({"label_smoothing": math.nan}, "label_smoothing"),
        ({"beta": 0.0}, "beta must be a finite number > 0, got 0.0"),
        ({"beta": math.nan}, "beta"),
        ({"reference_chosen_logps": torch.zeros(2)}, "go together"),
        ({"reference_rejected_logps": torch.zeros(2)}, "go together"),
        ({"policy_rejected_logps": torch.zeros(3)}, r"\(2,\), got \(3,\)"),
        ({"policy_chosen_logps": torch.zeros(2, 5)}, r"\(B,\).*\(2, 5\)"),
        ({"policy_chosen_logps": torch.zeros(2, dtype=torch.bfloat16)}, "float32 or float64"),
        ({"reference_chosen_logps": torch.zeros(2).half()}, "reference_chosen_logps must be float"),
    ],
)
def test_a_mistake_is_named(options: dict[str, object], message: str) -> None:
    logps = {"policy_chosen_logps": torch.zeros(2), "policy_rejected_logps": torch.zeros(2)}
    with pytest.raises(ValueError, match=message):
        preference_loss(**{**logps, **options})


def test_integer_log_probs_are_a_type_error() -> None:
    with pytest.raises(TypeError, match="policy_rejected_logps"):
        preference_loss(torch.zeros(2), torch.zeros(2, dtype=torch.int64))


def test_no_pairs_give_no_losses() -> None:
    assert all(x.shape == (0,) for x in preference_loss(torch.zeros(0), torch.zeros(0)))
