"""Options of the wrong kind are named, by every function, its module and its specification."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from public_calls import CASES, FUNCTIONS, Case, case_of
from torch import Tensor, nn

import fused_losses
from fused_losses import TokenStats, reference
from fused_losses.functional.options import keywords_of

B, T = 2, 3


def _module(name: str) -> type[nn.Module]:
    (module,) = (
        member
        for member in vars(fused_losses).values()
        if isinstance(member, type)
        and issubclass(member, nn.Module)
        and getattr(member.function, "__name__", "") == name
    )
    return module


class _Modules:
    """Functions that go through their modules, options held or given in the call."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(**arguments: Any) -> Any:
            module = _module(name)
            held = keywords_of(module.function) & set(arguments)
            options = {name: arguments.pop(name) for name in held}
            return module(**options)(**arguments)

        return call


SOURCES = {"functions": fused_losses, "modules": _Modules(), "specification": reference}
each_source = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
each_function = pytest.mark.parametrize("name", FUNCTIONS)

FLAGS = {"shift", "validate", "inplace", "entropy"}
NUMBERS = {
    "beta", "softcap", "logit_scale", "temperature", "z_loss", "label_smoothing", "max_weight",
    "sft_weight", "value", "num_items", "sft_num_items", "desirable_weight", "undesirable_weight",
    "kl", "epsilon", "epsilon_high", "entropy_weight", "sampler_cap", "mle_weight",
    "teacher_softcap", "teacher_logit_scale",
}  # fmt: skip
CHOICES = {"reduction", "backend", "level", "loss_type", "loss", "divergence", "rest"}


def _taken(case: Case, options: set[str]) -> set[str]:
    """Those options that the function takes, and does not refuse as none of its own."""
    loss_fn = {"reduction", "num_items", "z_loss", "label_smoothing", "token_weight"}
    taken = keywords_of(getattr(fused_losses, case.name)) & options
    if case.name.endswith(("token_stats", "linear_loss")):
        return taken - loss_fn
    if case.sequences:
        none = {"z_loss"} if case.name.endswith("dpo_loss") else {"z_loss", "label_smoothing"}
        return taken - none
    return taken


@each_source
@each_function
def test_a_flag_is_true_or_false_and_nothing_else(name: str, source: Any) -> None:
    case = case_of(name)
    tensors = case.tensors((B, T))
    flags = _taken(case, FLAGS)
    assert {"shift", "validate"} <= flags
    for flag in flags:
        for wrong in (2, -1, 0, 1, "no", None, np.True_, torch.tensor(True)):
            with pytest.raises(TypeError, match=f"{flag} must be True or False, got"):
                case(tensors, source, **{flag: wrong})
        case(tensors, source, **{flag: True})


@each_source
@each_function
def test_a_choice_is_one_of_the_names(name: str, source: Any) -> None:
    case = case_of(name)
    tensors = case.tensors((B, T))
    for option in _taken(case, CHOICES):
        for wrong in ("Mean", "", None, 3, ("sum",)):
            with pytest.raises((ValueError, TypeError), match=f"{option} must be"):
                case(tensors, source, **{option: wrong})


@each_source
@each_function
def test_a_number_is_a_number_of_any_library_and_no_tensor(name: str, source: Any) -> None:
    case = replace(case_of(name), options={})
    tensors = case.tensors((B, T))
    tensors.pop("value", None)
    for option in _taken(case, NUMBERS):
        one = 2.0 if option == "max_weight" else 0.25
        if option == "label_smoothing" and name not in ("mle_loss", "linear_mle_loss", "dpo_loss"):
            one = 0.0
        want = case(tensors, source, **{option: one})
        for same in (np.float32(one), np.float64(one), Fraction(one)):
            got = case(tensors, source, **{option: same})
            got, expected = (t if isinstance(t, Tensor) else t[0] for t in (got, want))
            assert torch.equal(got, expected)
        wrong: tuple[Any, ...] = (True, "1", [1.0], np.ones(1))
        if option not in ("value", "num_items", "sft_num_items", "kl"):
            wrong = (*wrong, torch.tensor(1.0))
        for bad in wrong:
            with pytest.raises(TypeError, match=rf"{option} must be a.*got"):
                case(tensors, source, **{option: bad})


@each_function
def test_an_unknown_option_is_told_all_that_there_are(name: str) -> None:
    case = case_of(name)
    with pytest.raises(TypeError) as raised:
        case(case.tensors((B, T)), lable_smoothing=0.1)
    said = str(raised.value)
    assert f"{name}() got an unexpected keyword argument 'lable_smoothing'" in said
    listed = set(said.rsplit("it takes ", 1)[1].split(", "))
    own = inspect.signature(getattr(fused_losses, name)).parameters.values()
    assert {p.name for p in own if p.kind is p.KEYWORD_ONLY} <= listed
    assert {"ignore_index", "shift", "softcap"} <= listed
    assert ("workspace_bytes" in listed) == ("linear_bias" in listed) == case.linear
    assert ("inplace" in listed) == (not case.linear and name != "token_stats")


TOKEN_WEIGHT = [
    case
    for case in CASES
    if "token_weight" in case.takes and case.options.get("reduction") != "none"
]


@each_source
@pytest.mark.parametrize("case", TOKEN_WEIGHT, ids=str)
def test_a_weight_that_wants_a_gradient_gets_one_or_is_refused(case: Case, source: Any) -> None:
    tensors = case.tensors((B, T))
    weight = tensors["token_weight"].requires_grad_()
    for reduction in ("mean", "sum"):
        with pytest.raises(ValueError, match=r"token_weight requires a gradient.*'none'.*detach"):
            case(tensors, source, reduction=reduction)
        with torch.no_grad():  # nobody asks for one
            case(tensors, source, reduction=reduction)
    losses = case(tensors, source, reduction="none")
    up = torch.rand(B, T)
    (got,) = torch.autograd.grad(losses, weight, up)
    plain = {k: t for k, t in tensors.items() if k != "token_weight"}
    want = up * case(plain, source, reduction="none")
    torch.testing.assert_close(got, want)
    assert got.view(-1)[-1] == 0.0  # an ignored position


@each_source
@each_function
def test_a_count_that_wants_a_gradient_is_refused(name: str, source: Any) -> None:
    case = replace(case_of(name), options={})
    for option in _taken(case, {"num_items", "sft_num_items"}):
        count = torch.tensor(3.0, requires_grad=True)
        more = {"sft_weight": 1.0} if option == "sft_num_items" else {}
        with pytest.raises(ValueError, match=f"{option} requires a gradient.*detached"):
            case(case.tensors((B, T)), source, **{option: count}, **more)
        case(case.tensors((B, T)), source, **{option: count.detach()}, **more)


def test_lengths_of_responses_that_want_a_gradient_are_refused() -> None:
    lengths = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="rejected_lengths requires a gradient"):
        fused_losses.preference_loss(
            torch.randn(3), torch.randn(3), loss_type="simpo",
            chosen_lengths=lengths.detach(), rejected_lengths=lengths,
        )  # fmt: skip


def test_log_probs_of_responses_that_are_no_tensors_are_named() -> None:
    with pytest.raises(TypeError, match=r"policy_rejected_logps must be .* tensor, got list"):
        fused_losses.preference_loss(torch.randn(2), [0.0, 1.0])
    with pytest.raises(TypeError, match=r"chosen_lengths must be a \(B,\) tensor, got int"):
        fused_losses.preference_loss(
            torch.randn(2), torch.randn(2), loss_type="simpo", chosen_lengths=3, rejected_lengths=3
        )


VALUES = [
    *(c for c in CASES if "value" in c.takes and "segment_ids" not in c.takes),
    Case("pearson_loss", ("ref_logps", "value"), {"level": "sequence"}),
    Case("linear_pearson_loss", ("ref_logps", "value"), {"level": "sequence"}),
    Case(
        "linear_token_loss",
        ("ref_logps", "value"),
        {"level": "sequence", "reduction": "none", "loss": "kl"},
    ),
]


@pytest.mark.parametrize("case", VALUES, ids=str)
def test_the_offset_of_the_reward_is_differentiable_everywhere(case: Case, backend: str) -> None:
    tensors = case.tensors((B, T))
    if case.options.get("level") == "sequence":
        tensors["value"] = tensors["value"][:, 0]
    # By itself: nothing else wants a gradient, and no head is trained.
    value = tensors["value"].requires_grad_()
    found = []
    for module, more in ((fused_losses, {"backend": backend}), (reference, {})):
        loss = case(tensors, module, **more)
        found.append(torch.autograd.grad(loss.sum(), value)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert found[1].norm() > 0


def _of_sequences(stats: TokenStats, rows: Tensor) -> Tensor:
    return (stats.logps.new_zeros(B * T).index_add(0, rows // T, stats.logps) ** 2).sum()


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("module", [fused_losses, reference], ids=["fused", "specification"])
def test_units_of_sequences_are_units_of_their_tokens(module: Any, shift: bool) -> None:
    tensors = Case("linear_loss").tensors((B, T))
    tensors["linear_weight"].requires_grad_()
    args = (*(tensors[k] for k in ("input", "linear_weight", "target")), _of_sequences)
    ids = torch.tensor([7, 0])
    options: dict[str, Any] = {"shift": shift}
    if module is fused_losses:  # room for one sequence at a time, so that units matter
        options["workspace_bytes"] = 28 * 11 * 4
        plan = fused_losses.explain(fused_losses.linear_loss, *args, units=ids, **options)
        assert plan.route == "unit"
    got = module.linear_loss(*args, units=ids, **options)
    want = module.linear_loss(*args, units=ids[:, None].expand(B, T), **options)
    assert torch.equal(got, want)
    torch.testing.assert_close(got, reference.linear_loss(*args, shift=shift))


@pytest.mark.parametrize("module", [fused_losses, reference], ids=["fused", "specification"])
def test_units_of_another_shape_are_told_how_to_fit(module: Any) -> None:
    tensors = Case("linear_loss").tensors((B, T))
    args = [tensors[k] for k in ("input", "linear_weight", "target")]
    for shape in ((B, 1), (T,), (1, T), (B * T,)):
        with pytest.raises(ValueError, match=r"units must have target's shape \(2, 3\).*\(2,\)"):
            module.linear_loss(*args, _of_sequences, units=torch.zeros(shape, dtype=torch.long))
    flat = [args[0].flatten(0, 1), args[1], args[2].flatten()]
    with pytest.raises(ValueError, match=r"units must have target's shape \(6,\) for the unit of"):
        module.linear_loss(*flat, _of_sequences, units=torch.zeros(B, dtype=torch.long))
    for wrong in (torch.zeros(B), torch.zeros(B, T, dtype=torch.bool), [0, 1]):
        with pytest.raises(TypeError, match="units must be an integer tensor"):
            module.linear_loss(*args, _of_sequences, units=wrong)


@pytest.mark.parametrize("module", [fused_losses, reference], ids=["fused", "specification"])
@pytest.mark.parametrize("name", ["pearson_loss", "linear_pearson_loss"])
def test_segments_are_integers(module: Any, name: str) -> None:
    case = Case(name, ("ref_logps",), {"level": "sequence"})
    for wrong in (torch.zeros(B, T), torch.zeros(B, T, dtype=torch.bool)):
        with pytest.raises(TypeError, match="segment_ids must be an integer tensor"):
            case(case.tensors((B, T)), module, segment_ids=wrong)
