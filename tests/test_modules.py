"""The nn.Module twins hold the options of their function, and nothing else."""

from __future__ import annotations

import copy
import pickle
import typing
from typing import Any

import pytest
import torch
from linear_oracle import head_batch, near_reference
from torch import nn

import fused_losses
from fused_losses.preference import PAIR_LOSSES

BATCH = head_batch((4, 6), 8, 21)
REFERENCE = near_reference(BATCH)
LOGITS = BATCH.x @ BATCH.w.T
HEAD = (BATCH.x, BATCH.w, BATCH.y)
TOKENS = (LOGITS, BATCH.y)
RATIO = {"beta": 0.5, "value": 0.1, "reduction": "sum", "temperature": 0.8, "z_loss": 0.01}
LINEAR = {"logit_scale": 0.5, "workspace_bytes": 10_000}


def _sum_of_squares(stats: fused_losses.TokenStats, rows: torch.Tensor) -> torch.Tensor:
    return (stats.logps**2).sum()


TWINS: list[tuple[type[nn.Module], Any, tuple[Any, ...], dict[str, Any]]] = [
    (fused_losses.MLELoss, fused_losses.mle_loss, TOKENS, {"label_smoothing": 0.1}),
    (fused_losses.PearsonLoss, fused_losses.pearson_loss, (*TOKENS, REFERENCE), RATIO),
    (
        fused_losses.HellingerLoss,
        fused_losses.hellinger_loss,
        (*TOKENS, REFERENCE),
        RATIO | {"max_weight": 2.0},
    ),
    (
        fused_losses.TokenLossModule,
        fused_losses.token_loss,
        (*TOKENS, REFERENCE),
        RATIO | {"loss": "kl"},
    ),
    (
        fused_losses.DPOLoss,
        fused_losses.dpo_loss,
        (*TOKENS, REFERENCE),
        {"beta": 0.3, "loss_type": "hinge", "reduction": "none"},
    ),
    (
        fused_losses.TokenStatistics,
        fused_losses.token_stats,
        TOKENS,
        {"entropy": True, "softcap": 3.0},
    ),
    (
        fused_losses.LinearMLELoss,
        fused_losses.linear_mle_loss,
        HEAD,
        LINEAR | {"label_smoothing": 0.1, "shift": True},
    ),
    (
        fused_losses.LinearPearsonLoss,
        fused_losses.linear_pearson_loss,
        (*HEAD, REFERENCE),
        LINEAR | RATIO,
    ),
    (
        fused_losses.LinearHellingerLoss,
        fused_losses.linear_hellinger_loss,
        (*HEAD, REFERENCE),
        LINEAR | RATIO | {"max_weight": 2.0},
    ),
    (
        fused_losses.LinearTokenLoss,
        fused_losses.linear_token_loss,
        (*HEAD, REFERENCE),
        LINEAR | RATIO | {"loss": "neyman"},
    ),
    (
        fused_losses.LinearDPOLoss,
        fused_losses.linear_dpo_loss,
        (*HEAD, REFERENCE),
        {"beta": 0.3, "loss_type": "robust", "label_smoothing": 0.1},
    ),
    (
        fused_losses.LinearLoss,
        fused_losses.linear_loss,
        (*HEAD, _sum_of_squares),
        {"softcap": 5.0, "entropy": True},
    ),
    (
        fused_losses.LinearTokenStatistics,
        fused_losses.linear_token_stats,
        HEAD,
        {"entropy": True, "shift": True},
    ),
    (
        fused_losses.KTOLoss,
        fused_losses.kto_loss,
        (*TOKENS, REFERENCE, torch.tensor([True, False, True, False])),
        {"beta": 0.3, "kl": 0.5, "undesirable_weight": 1.5},
    ),
    (
        fused_losses.LinearKTOLoss,
        fused_losses.linear_kto_loss,
        (*HEAD, REFERENCE, torch.tensor([True, False, True, False])),
        {"beta": 0.3, "desirable_weight": 0.5, "reduction": "none"},
    ),
    (
        fused_losses.LinearPolicyLoss,
        fused_losses.linear_policy_loss,
        (*HEAD, REFERENCE, torch.tensor([1.0, -1.0, 0.5, -0.5]), REFERENCE),
        {"loss_type": "dapo", "beta": 0.3, "entropy_weight": 0.1, "shift": True},
    ),
    (
        fused_losses.PolicyLoss,
        fused_losses.policy_loss,
        (REFERENCE + 0.3, REFERENCE, torch.tensor([1.0, -1.0, 0.5, -0.5]), BATCH.y >= 0),
        {"loss_type": "cispo", "epsilon_high": 1.1},
    ),
    (
        fused_losses.DivergenceLoss,
        fused_losses.divergence_loss,
        (TOKENS[0], TOKENS[0].flip(-1), TOKENS[1]),
        {"divergence": "jensen_shannon", "mixture": 0.2, "mle_weight": 0.1},
    ),
    (
        fused_losses.LinearDivergenceLoss,
        fused_losses.linear_divergence_loss,
        (*HEAD[:2], HEAD[0].flip(-1), HEAD[1], HEAD[2]),
        {"divergence": "hellinger", "softcap": 5.0, "reduction": "none"},
    ),
    (
        fused_losses.LinearSparseDivergenceLoss,
        fused_losses.linear_sparse_divergence_loss,
        (
            *HEAD[:2],
            torch.arange(HEAD[2].numel() * 2).view(*HEAD[2].shape, 2) % HEAD[1].shape[0],
            torch.full((*HEAD[2].shape, 2), -1.0),
            HEAD[2],
        ),
        {"rest": "bucket", "divergence": "jensen_shannon", "mixture": 0.3},
    ),
    (
        fused_losses.PreferenceLoss,
        fused_losses.preference_loss,
        (torch.randn(3), torch.randn(3)),
        {"beta": 0.2, "loss_type": "sigmoid", "label_smoothing": 0.1},
    ),
]
each_twin = pytest.mark.parametrize(
    ("module", "function", "args", "options"), TWINS, ids=[twin[0].__name__ for twin in TWINS]
)


def _assert_equal(a: Any, b: Any) -> None:
    for x, y in zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]:
        assert (x is None and y is None) or torch.equal(x, y)


def test_every_module_is_here() -> None:
    exported = {
        name
        for name in fused_losses.__all__
        if isinstance(getattr(fused_losses, name), type)
        and issubclass(getattr(fused_losses, name), nn.Module)
    }
    assert exported == {twin[0].__name__ for twin in TWINS}


@each_twin
def test_a_module_gives_what_its_function_gives(
    module: type[nn.Module], function: Any, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    held = module(**options)
    expected = function(*args, **options)
    _assert_equal(held(*args), expected)
    # The options matter: the defaults give something else.
    plain = function(*args)
    first, other = (t[0] if isinstance(t, tuple) else t for t in (expected, plain))
    assert first.shape != other.shape or not torch.equal(first, other)


@each_twin
def test_a_module_holds_options_and_nothing_else(
    module: type[nn.Module], function: Any, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    held = module(**options)
    assert not list(held.parameters())
    assert not list(held.buffers())
    assert not held.state_dict()
    text = repr(held)
    assert text.startswith(module.__name__)
    for name, value in options.items():
        assert f"{name}={value!r}" in text


@each_twin
def test_a_module_can_be_copied_and_pickled(
    module: type[nn.Module], function: Any, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    held = module(**options)
    expected = held(*args)
    for other in (copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
        _assert_equal(other(*args), expected)


@each_twin
def test_an_option_that_does_not_exist_is_refused_at_construction(
    module: type[nn.Module], function: Any, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with pytest.raises(TypeError, match=f"{module.__name__}.*'no_such_option'"):
        module(no_such_option=1)
    linear = module.__name__.startswith("Linear")
    wrong = "inplace" if linear else "workspace_bytes"
    with pytest.raises(TypeError, match=wrong):
        module(**{wrong: 1})


@each_twin
def test_a_module_says_what_it_returns(
    module: type[nn.Module], function: Any, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    said, returned = (typing.get_type_hints(f)["return"] for f in (module.forward, function))
    assert said == returned


def test_the_names_of_pair_losses_are_a_public_type() -> None:
    assert typing.get_args(fused_losses.LossType) == tuple(PAIR_LOSSES)


def test_what_belongs_to_a_batch_is_given_in_the_call_and_wins() -> None:
    held = fused_losses.LinearMLELoss(reduction="mean", num_items=7)
    expected = fused_losses.linear_mle_loss(*HEAD, num_items=3)
    assert torch.equal(held(*HEAD, num_items=3), expected)
    assert torch.equal(held(*HEAD), fused_losses.linear_mle_loss(*HEAD, num_items=7))
