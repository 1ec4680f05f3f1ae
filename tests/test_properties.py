"""What holds of every public function whatever the numbers: of words, rows and padding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linear_oracle import relative_error
from public_calls import CASES, Case, V
from test_every_function import run
from torch import Tensor

import fused_losses

Numbers = dict[str, Tensor]
CLOSE = 1e-10  # of float64
# Operands with an entry, or a row, per word.
WORDS_FIRST = (
    "linear_weight", "linear_bias", "teacher_weight", "teacher_bias", "anchor_weight_matrix",
    "anchor_bias",
)  # fmt: skip
WORDS_LAST = ("logits", "teacher_logits")
BIASES = ("linear_bias", "teacher_bias", "anchor_bias")
PER_SEQUENCE = ("ref_sums", "advantages", "desirable")
pytestmark = pytest.mark.filterwarnings("ignore:target rows")


def of_cases(*, but: Callable[[Case], bool] = lambda case: False) -> Any:
    """For each function three draws of numbers and shape.

    On torch's backend, where a call takes milliseconds: kernels are held to the same specification
    call by call (``test_every_function.py``).
    """

    def decorate(check: Callable[[Case, Numbers, Any], None]) -> Any:
        @pytest.mark.parametrize("case", [c for c in CASES if not but(c)], ids=str)
        @settings(max_examples=3, suppress_health_check=list(HealthCheck))
        @given(
            seed=st.integers(0, 2**31),
            B=st.sampled_from([2, 4]),
            T=st.integers(2, 4),
        )
        def test(case: Case, device: Any, seed: int, B: int, T: int) -> None:
            torch.manual_seed(seed)
            tensors = {
                name: t.double() if t.is_floating_point() else t
                for name, t in case.tensors((B, T)).items()
            }
            check(case, tensors, functools.partial(run, case, backend="torch"))

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate


def same(found: Any, expected: Any) -> None:
    """Results and the gradients that both have."""
    for got, want in zip(found[0], expected[0], strict=True):
        assert relative_error(got, want) < CLOSE
    for name in found[1].keys() & expected[1].keys():
        assert relative_error(found[1][name], expected[1][name]) < CLOSE, name


def reads_words(case: Case) -> bool:
    """Whether its own function tells words apart."""
    return bool(case.options.get("logits"))


def reads_normaliser(case: Case) -> bool:
    return case.name == "linear_loss" or case.name.endswith("token_stats")


@of_cases(but=reads_words)
def test_words_may_have_any_order(case: Case, tensors: Numbers, call: Any) -> None:
    order = torch.randperm(V)
    place = order.argsort()
    moved = dict(tensors)
    for name in tensors.keys() & {*WORDS_FIRST}:
        moved[name] = tensors[name][order]
    for name in tensors.keys() & {*WORDS_LAST}:
        moved[name] = tensors[name][..., order]
    for name in tensors.keys() & {"target", "teacher_ids"}:
        ids = tensors[name]
        moved[name] = torch.where(ids < 0, ids, place[ids.clamp(min=0)])
    results, slopes = call(moved)
    for name in slopes.keys() & {*WORDS_FIRST}:
        slopes[name] = slopes[name][place]
    for name in slopes.keys() & {*WORDS_LAST}:
        slopes[name] = slopes[name][..., place]
    same((results, slopes), call(tensors))


@of_cases(but=reads_normaliser)
def test_a_common_shift_of_a_rows_logits_changes_nothing(
    case: Case, tensors: Numbers, call: Any
) -> None:
    moved = dict(tensors)
    for name in tensors.keys() & {*BIASES}:
        moved[name] = tensors[name] + 3.0
    for name in tensors.keys() & {*WORDS_LAST}:
        moved[name] = tensors[name] + 7.0 * torch.randn(*tensors[name].shape[:-1], 1).double()
    found = call(moved)
    same(found, call(tensors))
    if "logits" in found[1]:
        assert found[1]["logits"].sum(-1).abs().max() < CLOSE


@of_cases(but=reads_words)
def test_words_of_no_probability_change_nothing_and_have_no_gradient(
    case: Case, tensors: Numbers, call: Any
) -> None:
    padded = dict(tensors)
    for name in tensors.keys() & {*WORDS_FIRST}:
        t = tensors[name]
        fill = -torch.inf if name in BIASES else 1.0
        padded[name] = torch.cat([t, torch.full((3, *t.shape[1:]), fill).to(t)])
    for name in tensors.keys() & {*WORDS_LAST}:
        t = tensors[name]
        padded[name] = torch.cat([t, torch.full((*t.shape[:-1], 3), -torch.inf).to(t)], -1)
    results, slopes = call(padded)
    for name, t in slopes.items():
        if name in (*WORDS_FIRST, *WORDS_LAST):
            t = t if name in WORDS_FIRST else t.movedim(-1, 0)
            assert torch.count_nonzero(t[V:]) == 0, name
            slopes[name] = t[:V] if name in WORDS_FIRST else t[:V].movedim(0, -1)
    same((results, slopes), call(tensors))


@of_cases(but=lambda case: case.name == "linear_loss")  # a function of places in the batch
def test_positions_that_do_not_count_may_follow(case: Case, tensors: Numbers, call: Any) -> None:
    B, T = tensors["target"].shape
    longer = dict(tensors)
    for name, t in tensors.items():
        if t.shape[:2] == (B, T) and name not in (*WORDS_FIRST, *PER_SEQUENCE):
            fill: Any = torch.nan if t.is_floating_point() else 0
            if name == "value":
                fill = 0.0
            fill = -100 if name == "target" else fill
            more = torch.full((B, 2, *t.shape[2:]), fill).to(t)
            longer[name] = torch.cat([t, more], 1)
    results, slopes = call(longer)
    expected = call(tensors)
    for name in slopes:
        if slopes[name].shape[:2] == (B, T + 2) and name in ("input", "logits"):
            assert torch.count_nonzero(slopes[name][:, T:]) == 0
            slopes[name] = slopes[name][:, :T]
    results = [t[:, :T] if t.shape[:2] == (B, T + 2) else t for t in results]
    if results[0].dim() == 2:  # the numbers of the tests' own upstream gradient differ
        slopes = {}
    same((results, slopes), expected)


def sums(case: Case) -> bool:
    """Whether it adds up over pairs, sequences or tokens when asked to."""
    together = case.name.endswith(("kto_loss", "token_stats")) or case.name == "linear_loss"
    return not (together or "reduction" in case.options or "segment_ids" in case.takes)


@of_cases(but=lambda case: not sums(case))
def test_of_two_batches_the_sum_is_that_of_both(case: Case, tensors: Numbers, call: Any) -> None:
    B = tensors["target"].shape[0]
    pairs = case.name.endswith("dpo_loss")
    if pairs and B < 4:
        tensors = {
            name: torch.cat([t, t.flip(0)]) if _per_sequence(name) else t
            for name, t in tensors.items()
        }
        B = 4
    # The two halves of a batch of pairs are the chosen and the rejected.
    parts = ([0, 2], [1, 3]) if pairs else ([0], list(range(1, B)))
    whole, slopes = call(tensors, reduction="sum")
    found = []
    for part in parts:
        some = {n: t[part] if _per_sequence(n) else t for n, t in tensors.items()}
        found.append(call(some, reduction="sum"))
    assert relative_error(sum(f[0][0] for f in found), whole[0]) < CLOSE
    for name, want in slopes.items():
        if _per_sequence(name):
            got = torch.empty_like(want)
            for part, f in zip(parts, found, strict=True):
                got[part] = f[1][name]
        else:
            got = sum(f[1][name] for f in found)
        assert relative_error(got, want) < CLOSE, name


def _per_sequence(name: str) -> bool:
    return name not in WORDS_FIRST


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("name", ["pearson_loss", "hellinger_loss", "token_loss"])
def test_towards_beta_0_every_member_is_maximum_likelihood(name: str, linear: bool) -> None:
    case = next(c for c in CASES if c.name == "linear_" * linear + name)
    tensors = {
        n: t.double() if t.is_floating_point() else t for n, t in case.tensors((2, 3)).items()
    }
    tensors.pop("value", None)
    tensors.pop("token_weight", None)
    tensors.pop("segment_ids", None)
    ref = tensors.pop("ref_logps")
    mle = Case("linear_" * linear + "mle_loss")
    expected, slopes = run(mle, tensors, backend="torch", reduction="sum")
    kind = {"loss": "kl"} if name == "token_loss" else {}
    distances = []
    for beta in (1e-2, 1e-4):
        one = Case(case.name, ("ref_logps",), kind | {"beta": beta})
        found, gradients = run(one, tensors | {"ref_logps": ref}, backend="torch", reduction="sum")
        counted = tensors["target"] != -100
        assert abs(found[0] - expected[0] - ref[counted].sum()) < 40.0 * beta
        distances += [max(relative_error(gradients[n], want) for n, want in slopes.items())]
    assert distances[1] < 0.02 * distances[0] < 0.01  # of first order in beta


def test_every_function_is_asked(device: torch.device) -> None:
    asked = {case.name for case in CASES if sums(case)}
    assert {"linear_policy_loss", "divergence_loss", "linear_sparse_divergence_loss"} <= asked
    assert {n for n in fused_losses.__all__ if n.startswith("linear_")} == {
        case.name for case in CASES if case.linear
    }
