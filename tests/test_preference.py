"""Preference losses on whole responses against numpy, by hand, and at their edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pair_cases import CASES, takes_reference
from scipy.special import expit
from torch import Tensor

from fused_losses.preference import PAIR_LOSSES, LossType, preference_loss

Array = NDArray[np.float64]

each_case = pytest.mark.parametrize("case", CASES)


def _lost(x: Array) -> Array:
    """-log sigma(x) = log(1 + e^-x)."""
    return np.logaddexp(0.0, -x)


def _in_numpy(
    options: dict[str, Any], beta: float, logps: list[Array], n: tuple[Array, Array]
) -> Array:
    """The formulas of the papers; ``logps`` as preference_loss takes them, reference 0 if none."""
    l_w, l_l = logps[0] - logps[2], logps[1] - logps[3]
    mean_w, mean_l = l_w / n[0], l_l / n[1]
    eps = options.get("label_smoothing", 0.0)
    m, r_w, r_l = beta * (l_w - l_l), beta * l_w, beta * l_l
    lost, won = _lost(m), _lost(-m)
    match options["loss_type"]:
        case "sigmoid":
            return (1 - eps) * lost + eps * won
        case "hinge":
            return np.maximum(0.0, 1 - m)
        case "ipo":
            return (l_w / n[0] - l_l / n[1] - 1 / (2 * beta)) ** 2
        case "robust":
            return ((1 - eps) * lost - eps * won) / (1 - 2 * eps)
        case "exo_pair":
            return expit(m) * (-lost - np.log(1 - eps)) + expit(-m) * (-won - np.log(eps))
        case "nca_pair":
            return _lost(r_w) + 0.5 * (_lost(-r_w) + _lost(-r_l))
        case "sppo_hard":
            return (l_w - 0.5 / beta) ** 2 + (l_l + 0.5 / beta) ** 2
        case "aot":
            margins = logps[0] - logps[1]
            delta = beta * (np.sort(margins) - np.sort(logps[2] - logps[3]))
            sorted_losses = (1 - eps) * _lost(delta) + eps * _lost(-delta)
            return sorted_losses[np.searchsorted(np.sort(margins), margins)]
        case "apo_zero":
            return 1 - expit(r_w) + expit(r_l)
        case "apo_down":
            return expit(r_w) + 1 - expit(m)
        case "discopop":
            share = expit(m / options.get("discopop_tau", 0.05))
            return (1 - share) * lost + share * np.exp(-m)
        case "sigmoid_norm":
            return _lost(beta * (mean_w - mean_l))
        case "simpo":
            return _lost(beta * (mean_w - mean_l) - options.get("simpo_gamma", 0.5))
        case "cpo":
            return lost
        case "orpo":
            odds = [np.exp(mean) / (1 - np.exp(mean)) for mean in (mean_w, mean_l)]
            return -beta * np.log(odds[0] / odds[1] / (1 + odds[0] / odds[1]))
    raise AssertionError(options)


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


def _losses(
    l_w: Tensor, l_l: Tensor, loss_type: str, eps: float, beta: float, **options: Any
) -> Tensor:
    ones = torch.ones_like(l_w)
    return preference_loss(
        l_w,
        l_l,
        beta=beta,
        loss_type=loss_type,
        label_smoothing=eps,
        chosen_lengths=ones,
        rejected_lengths=ones,
        **options,
    )[0]


def test_every_loss_is_named_and_tested_here() -> None:
    tested = {options["loss_type"] for options in CASES.values()}
    assert set(PAIR_LOSSES) == set(get_args(LossType)) == tested


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
    case: str, beta: float, with_reference: bool
) -> None:
    options = CASES[case]
    logps, lengths = _batch()
    if not takes_reference(options["loss_type"]) or not with_reference:
        logps = logps[:2]
    got = preference_loss(*logps, beta=beta, **options, **lengths)
    arrays = [x.numpy() for x in logps]
    arrays += [np.zeros_like(arrays[0])] * (4 - len(arrays))
    n = lengths["chosen_lengths"].numpy(), lengths["rejected_lengths"].numpy()
    rewards = [beta * (arrays[i] - arrays[i + 2]) for i in range(2)]
    if options["loss_type"] in ("simpo", "orpo"):
        rewards = [reward / length for reward, length in zip(rewards, n, strict=True)]
    expected = _in_numpy(options, beta, arrays, n), *rewards
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x.numpy(), y, rtol=1e-11, atol=1e-13)


@each_case
def test_gradients_are_right_to_second_order(case: str) -> None:
    options = CASES[case]
    logps, lengths = _batch(B=4)
    policy = [x.clone().requires_grad_() for x in logps[:2]]
    reference = logps[2:] if takes_reference(options["loss_type"]) else []

    def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
        return preference_loss(chosen, rejected, *reference, beta=0.3, **options, **lengths)[0]

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
def test_huge_margins_stay_finite(case: str, dtype: torch.dtype) -> None:
    options = {"eps": 0.0, **CASES[case]}
    options["eps"] = options.pop("label_smoothing", 0.0)
    for zero in (0.0, -2e4):  # as log-ratios, and as log-probs that are no more than 0
        l_w = torch.tensor([1e4, -1e4, 0.0], dtype=dtype) + zero
        l_l = torch.full_like(l_w, zero).requires_grad_()
        losses = _losses(l_w.requires_grad_(), l_l, beta=1.0, **options)
        gradients = torch.autograd.grad(losses.sum(), [l_w, l_l])
        assert losses.dtype == dtype
        assert losses.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients)
        if zero == 0.0:
            # A lost pair costs more than an undecided one; apo_down is as far from 0 as from 2.
            assert losses[1] > losses[2] or (case == "apo_down" and losses[1] == losses[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odds_of_certain_responses_are_finite_and_those_near_it_exact(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    near = torch.tensor([-1e-5, -2 * eps, -eps, 0.0], dtype=dtype, requires_grad=True)
    other = torch.full_like(near, -1.0)
    losses = _losses(near, other, "orpo", 0.0, 1.0)
    (gradient,) = torch.autograd.grad(losses.sum(), near)
    exact = near.detach().double()
    # log(1 + odds_l / odds_w), odds_l = 1 / (e - 1), 1 / odds_w = e^-l - 1
    expected = torch.log1p(torch.expm1(-exact) / (math.e - 1))
    torch.testing.assert_close(losses.detach()[:3].double(), expected[:3], rtol=1e-2, atol=eps)
    assert losses[3] == losses[2]
    assert gradient.isfinite().all()
    assert gradient[3] == 0.0
    # -odds_l / (odds_l + odds_w) / (1 - p_w) tends to -odds_l.
    torch.testing.assert_close(
        gradient[:1], torch.full_like(gradient[:1], -1 / (math.e - 1)), rtol=1e-3, atol=0.0
    )


# What a loss is worth where policy and reference agree (without one: where both responses do).
AT_ZERO = {
    "sigmoid": math.log(2),
    "hinge": 1.0,
    "ipo": 1 / (4 * 0.3**2),
    "robust": math.log(2),
    "exo_pair": 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1),
    "nca_pair": 2 * math.log(2),
    "sppo_hard": 2 / (2 * 0.3) ** 2,
    "aot": math.log(2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * math.log(2) + 0.5,
    "sigmoid_norm": math.log(2),
    "simpo": math.log(1 + math.exp(0.5)),
    "cpo": math.log(2),
    "orpo": 0.3 * math.log(2),
}


@pytest.mark.parametrize("loss_type", PAIR_LOSSES)
def test_at_margin_zero(loss_type: str) -> None:
    logps, lengths = _batch(B=3)
    given = logps[:2] * 2 if takes_reference(loss_type) else [logps[0]] * 2
    lengths["rejected_lengths"] = lengths["chosen_lengths"]
    losses, *_ = preference_loss(*given, beta=0.3, **CASES[loss_type], **lengths)
    torch.testing.assert_close(losses, torch.full_like(losses, AT_ZERO[loss_type]))


def test_aot_meets_the_quantiles_of_the_reference_by_hand() -> None:
    # Policy margins 1, 3, 2; reference margins 0, 5, -1. Ranks 0, 2, 1 meet -1, 5, 0.
    policy = torch.tensor([1.0, 3.0, 2.0], requires_grad=True)
    zero = torch.zeros(3)
    reference = torch.tensor([0.0, 5.0, -1.0])
    losses, *_ = preference_loss(policy, zero, reference, zero, beta=1.0, loss_type="aot")
    delta = torch.tensor([2.0, -2.0, 2.0])
    torch.testing.assert_close(losses, -torch.nn.functional.logsigmoid(delta))
    losses.sum().backward()
    torch.testing.assert_close(policy.grad, -torch.sigmoid(-delta))
    # The order of the pairs is no matter, and alone a pair is plain DPO.
    order = torch.tensor([2, 0, 1])
    again, *_ = preference_loss(
        policy[order], zero, reference[order], zero, beta=1.0, loss_type="aot"
    )
    torch.testing.assert_close(again, losses[order])
    one = [x[:1] for x in (policy, zero, reference, zero)]
    torch.testing.assert_close(preference_loss(*one, loss_type="aot")[0], preference_loss(*one)[0])


# L(l_w, l_l) - L(l_l, l_w) with log-ratios x > y, beta = 1 and lengths 1, in closed form.
SWAPPED: dict[str, Callable[[float, float], float]] = {
    "sigmoid": lambda x, y: y - x,
    "hinge": lambda x, y: max(0.0, 1 - x + y) - (1 + x - y),
    "ipo": lambda x, y: -2 * (x - y),
    "robust": lambda x, y: y - x,
    "exo_pair": lambda x, y: math.tanh((x - y) / 2) * math.log(0.1 / 0.9),
    "nca_pair": lambda x, y: math.log1p(math.exp(-x)) - math.log1p(math.exp(-y)),
    "sppo_hard": lambda x, y: -2 * (x - y),
    "aot": lambda x, y: y - x,
    "apo_zero": lambda x, y: 2 * (float(expit(y)) - float(expit(x))),
    "apo_down": lambda x, y: float(expit(x)) - float(expit(y)) - math.tanh((x - y) / 2),
    "sigmoid_norm": lambda x, y: y - x,
    "cpo": lambda x, y: y - x,
    "simpo": lambda x, y: math.log1p(math.exp(y - x + 0.5)) - math.log1p(math.exp(x - y + 0.5)),
    "orpo": lambda x, y: -(x - y) + math.log(math.expm1(x) / math.expm1(y)),
    "discopop": lambda x, y: (
        math.tanh((x - y) / 0.1) * (math.exp(y - x) - math.exp(x - y)) / 2
        + (math.exp(y - x) - math.exp(x - y)) / 2
        + (math.log1p(math.exp(y - x)) - math.log1p(math.exp(x - y))) / 2
        - math.tanh((x - y) / 0.1) * (math.log1p(math.exp(y - x)) + math.log1p(math.exp(x - y))) / 2
        + math.tanh((x - y) / 0.1) * math.exp(x - y)
    ),
}


@pytest.mark.parametrize("loss_type", PAIR_LOSSES)
def test_a_swapped_pair_costs_what_the_formula_says(loss_type: str) -> None:
    options = dict(CASES[loss_type])
    eps = options.pop("label_smoothing", 0.0)
    x, y = -0.4, -1.7
    l_w, l_l = torch.tensor([x], dtype=torch.float64), torch.tensor([y], dtype=torch.float64)
    kept = _losses(l_w, l_l, eps=eps, beta=1.0, **options)
    swapped = _losses(l_l, l_w, eps=eps, beta=1.0, **options)
    assert (kept - swapped).item() == pytest.approx(SWAPPED[loss_type](x, y), abs=1e-10)


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
def test_it_compiles_without_a_graph_break(case: str) -> None:
    logps, lengths = _batch()
    options = {**CASES[case], **lengths}
    logps = logps if takes_reference(options["loss_type"]) else logps[:2]
    torch._dynamo.reset()  # one graph per loss is more than it keeps
    compiled = torch.compile(preference_loss, fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(*logps, **options), preference_loss(*logps, **options), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss_type": "dpo"},
            "loss_type must be one of 'sigmoid', .*'simpo', 'cpo', 'orpo', got 'dpo'",
        ),
        ({"loss_type": "ipo"}, "chosen_lengths must be a .B,. tensor"),
        ({"loss_type": "ipo", "chosen_lengths": torch.ones(2)}, "rejected_lengths must be"),
        ({"chosen_lengths": torch.ones(3)}, r"shape \(2,\), got \(3,\)"),
        *(
            ({"loss_type": name, "label_smoothing": 0.1}, "label_smoothing must be 0")
            for name in PAIR_LOSSES
            if name not in ("sigmoid", "robust", "exo_pair", "aot")
        ),
        *(
            ({"loss_type": name, "chosen_lengths": torch.ones(2)}, "rejected_lengths must be")
            for name in ("sigmoid_norm", "simpo", "orpo")
        ),
        *(
            (
                {
                    "loss_type": name,
                    "reference_chosen_logps": torch.zeros(2),
                    "reference_rejected_logps": torch.zeros(2),
                },
                f"'{name}' has no reference: reference_chosen_logps must be None",
            )
            for name in ("simpo", "cpo", "orpo")
        ),
        ({"loss_type": "exo_pair"}, r"label_smoothing must be in \(0, 1\).*got 0.0"),
        ({"loss_type": "exo_pair", "label_smoothing": 1.0}, r"in \(0, 1\)"),
        ({"loss_type": "aot", "label_smoothing": 1.0}, r"in \[0, 1\)"),
        ({"simpo_gamma": 0.5}, "simpo_gamma belongs to loss_type='simpo'"),
        ({"loss_type": "cpo", "discopop_tau": 0.1}, "discopop_tau belongs to loss_type='discopop'"),
        ({"loss_type": "simpo", "simpo_gamma": -0.1}, "simpo_gamma must be a finite number >= 0"),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, "discopop_tau must be a finite number >"),
        ({"loss_type": "discopop", "discopop_tau": math.inf}, "discopop_tau must be a finite"),
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


@pytest.mark.parametrize(
    "options",
    [{"beta": "1"}, {"label_smoothing": True}, {"loss_type": "simpo", "simpo_gamma": "1"}],
)
def test_an_option_that_is_no_number_is_a_type_error(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="must be a number"):
        preference_loss(torch.zeros(2), torch.zeros(2), **options)


def test_integer_log_probs_are_a_type_error() -> None:
    with pytest.raises(TypeError, match="policy_rejected_logps"):
        preference_loss(torch.zeros(2), torch.zeros(2, dtype=torch.int64))


def test_no_pairs_give_no_losses() -> None:
    assert all(x.shape == (0,) for x in preference_loss(torch.zeros(0), torch.zeros(0)))
