"""What is promised of every public function, on both backends: one small call of each."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from linear_oracle import relative_error
from public_calls import CASES, FUNCTIONS, Case
from torch import Tensor

import fused_losses
from fused_losses import reference

IGNORED = -100
LEAVES = ("input", "linear_weight", "linear_bias", "logits")
# Operands that have an entry, or a row, for each label.
PER_TOKEN = (
    "input", "logits", "ref_logps", "token_weight", "old_logps", "sampler_logps",
    "teacher_logits", "teacher_input", "teacher_logps", "anchor_input",
)  # fmt: skip
SHAPE = (2, 3)
each_case = pytest.mark.parametrize("case", CASES, ids=str)
pytestmark = pytest.mark.filterwarnings("ignore:target rows")


def numbers(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Operands that are the same in each test, with one label ignored."""
    torch.manual_seed(1)
    made = case.tensors(SHAPE)
    wide = torch.promote_types(dtype, torch.float32)
    for name, t in made.items():
        if t.is_floating_point():
            made[name] = t.to(dtype if "logps" not in name and name != "ref_sums" else wide)
    return made


def run(
    case: Case,
    tensors: dict[str, Tensor],
    scale: float = 1.0,
    module: Any = fused_losses,
    **more: Any,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Results, and gradients of what is differentiable."""
    given = {name: t.detach().requires_grad_(name in LEAVES) for name, t in tensors.items()}
    if case.name.endswith("token_stats"):
        more = {"entropy": True, **more}
    out = case(given, module, **more)
    results = [out] if isinstance(out, Tensor) else [*out[:3], out.is_top1.to(out.logps.dtype)]
    total = sum((t * _upstream(t)).sum() for t in results if t.requires_grad)
    leaves = {name: t for name, t in given.items() if t.requires_grad}
    found = torch.autograd.grad(scale * total, list(leaves.values()))
    return [t.detach() for t in results], dict(zip(leaves, found, strict=True))


def _upstream(t: Tensor) -> Tensor:
    return torch.linspace(-0.5, 1.5, t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).to(t.device)


@functools.cache
def base(case: Case, backend: str) -> Any:
    """The call as it is; every test compares with it."""
    return run(case, numbers(case), backend=backend)


# Dataclasses with a dict have no hash.
Case.__hash__ = lambda self: hash(str(self) + str(self.takes))  # type: ignore[method-assign, assignment]


def same(one: Any, other: Any) -> bool:
    """Whether two runs gave the same bits."""
    pairs = [*zip(one[0], other[0], strict=True)]
    pairs += [(one[1][name], other[1][name]) for name in one[1]]
    return all(torch.equal(a, b) for a, b in pairs)


@each_case
def test_it_is_its_specification(case: Case, backend: str, device: torch.device) -> None:
    tensors = numbers(case, torch.float64)
    expected, slopes = run(case, tensors, module=reference)
    found, gradients = run(case, tensors, backend=backend)
    for got, want in zip(found, expected, strict=True):
        assert got.shape == want.shape
        assert relative_error(got, want) < 1e-11
    for name, want in slopes.items():
        assert want.norm() > 0
        assert relative_error(gradients[name], want) < 1e-11, name


@each_case
def test_it_gives_the_same_bits_again_and_changes_no_operand(
    case: Case, backend: str, device: torch.device
) -> None:
    tensors = numbers(case)
    before = {name: (t.clone(), t._version) for name, t in tensors.items()}
    assert same(run(case, tensors, backend=backend), base(case, backend))
    for name, t in tensors.items():
        assert torch.equal(t, before[name][0]), name
        assert t._version == before[name][1], name


@each_case
def test_nothing_at_an_ignored_label_is_read(
    case: Case, backend: str, device: torch.device
) -> None:
    tensors = numbers(case)
    ignored = tensors["target"] == IGNORED
    assert ignored.any()
    for name in PER_TOKEN:
        if name in tensors and tensors[name].shape[:2] == SHAPE:
            tensors[name] = tensors[name].clone()
            tensors[name][ignored] = torch.nan
    found = run(case, tensors, backend=backend)
    assert same(found, base(case, backend))
    for name in ("input", "logits"):
        if name in found[1]:
            assert torch.count_nonzero(found[1][name][ignored]) == 0


@each_case
def test_a_nan_at_a_label_that_counts_is_seen(
    case: Case, backend: str, device: torch.device
) -> None:
    tensors = numbers(case)
    name = "input" if case.linear else "logits"
    tensors[name] = tensors[name].clone()
    tensors[name][0, 0, 1] = torch.nan
    found, gradients = run(case, tensors, backend=backend)
    first = found[0].flatten()
    assert first[0].isnan()
    assert gradients[name][0, 0].isnan().any()
    if found[0].shape == SHAPE and not case.sequences:  # of its own token alone
        assert not first[1:].isnan().any()


@each_case
def test_gradients_are_linear_in_the_upstream_gradient_to_the_bit_in_powers_of_two(
    case: Case, backend: str, device: torch.device
) -> None:
    results, gradients = run(case, numbers(case), 2.0**7, backend=backend)
    expected, ones = base(case, backend)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    for name, got in gradients.items():
        assert torch.equal(got, 2.0**7 * ones[name]), name


@pytest.mark.parametrize("case", [case for case in CASES if case.linear], ids=str)
def test_hidden_states_may_be_large_where_the_head_is_small(
    case: Case, backend: str, device: torch.device
) -> None:
    tensors = numbers(case)
    tensors["input"] = tensors["input"] * 2.0**5
    tensors["linear_weight"] = tensors["linear_weight"] * 2.0**-5
    results, gradients = run(case, tensors, backend=backend)
    expected, plain = base(case, backend)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    for name, factor in (("input", 2.0**-5), ("linear_weight", 2.0**5), ("linear_bias", 1.0)):
        assert torch.equal(gradients[name], factor * plain[name]), name


# -- The number of chunks: N5, promised to users ---------------------------------------------------


def budgets_of(case: Case, tensors: dict[str, Tensor]) -> dict[int, int]:
    """Budgets by the number of pieces that they cut the call into."""
    given = {name: t.detach().requires_grad_(name in LEAVES) for name, t in tensors.items()}
    more = {"entropy": True} if case.name.endswith("token_stats") else {}
    explained = functools.partial(fused_losses.explain, lambda **o: case(given, **more, **o))
    with pytest.raises(ValueError, match=r"too small|takes \d+ bytes") as caught:
        explained(workspace_bytes=1)
    budget, found = int("".join(filter(str.isdigit, str(caught.value).rsplit(" ", 1)[1]))), {}
    for _ in range(12):
        try:
            plan = explained(workspace_bytes=budget)
        except ValueError:  # a whole unit has to fit
            budget = int(1.5 * budget)
            continue
        found.setdefault(len(plan.chunks) * len(plan.columns), budget)
        budget = int(1.5 * budget)
    return found


@pytest.mark.parametrize("case", [case for case in CASES if case.linear], ids=str)
def test_the_number_of_chunks_changes_no_function(case: Case) -> None:
    """Fused losses elsewhere change convergence with it."""
    torch.manual_seed(2)
    tensors = case.tensors((6, 4))
    budgets = budgets_of(case, tensors)
    assert len(budgets) > 1, budgets
    assert max(budgets) >= 6
    whole, gradients = run(case, tensors, workspace_bytes=budgets[min(budgets)])
    size = max(t.abs().max().item() for t in whole)
    for pieces, budget in budgets.items():
        results, found = run(case, tensors, workspace_bytes=budget)
        for got, want in zip(results, whole, strict=True):
            assert (got - want).abs().max() <= 2.0**-20 * size + 1e-5, pieces
        for name, want in gradients.items():
            assert relative_error(found[name], want) <= 1e-6, (pieces, name)


# -- Mistakes: what Python can see raises before anything runs, and names the argument -------------


def spoiled(case: Case, what: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Operands and options with one mistake, None if the function does not take the argument."""
    tensors, options = numbers(case), dict[str, Any]()
    name, _, how = what.partition(": ")
    known = set(tensors) | {"shift", "backend", "ignore_index", "softcap", "logit_scale"}
    known |= {"temperature", "unknown"}
    if not case.name.endswith("token_stats") and case.name != "linear_loss":
        known |= {"reduction"}
    if case.linear:
        known |= {"workspace_bytes", "accum_dtype", "logits_dtype"}
    if any(word in case.name for word in ("pearson", "hellinger", "dpo", "kto")):
        known |= {"beta"}
    if name == "num_items" and "reduction" in known and "reduction" not in case.options:
        known |= {"num_items"}
    if name not in known:
        return None
    t = tensors.get(name)
    if how in ("too large", "negative") and name == "target":
        tensors["target"] = t.clone()
        tensors["target"][0, 1] = 11 if how == "too large" else -3
    elif how == "of floats":
        tensors[name] = t.float()
    elif how == "bool":
        tensors[name] = t > 0
    elif how == "of integers":
        tensors[name] = t.long()
    elif how == "bf16":
        tensors[name] = t.bfloat16()
    elif how == "one too few":
        tensors[name] = t[..., :-1]
    elif how == "no tensor":
        tensors[name] = t.tolist()
    elif how == "of no words":
        tensors[name] = t[:0]
    elif how == "elsewhere":
        tensors[name] = t.to("meta")
    else:
        options[name] = eval(how, {"inf": float("inf"), "nan": float("nan"), "torch": torch})
    return tensors, options


MISTAKES: dict[str, tuple[type[Exception], str]] = {
    "target: too large": (IndexError, r"label 11 at position \(0, 1\) is outside \[0, 11\)"),
    "target: negative": (IndexError, r"label -3 at position \(0, 1\) is outside \[0, 11\)"),
    "target: of floats": (TypeError, "target must be an int64 or int32"),
    "target: bool": (TypeError, "target must be an int64 or int32"),
    "target: one too few": (ValueError, "target|teacher|advantages|units"),
    "target: no tensor": (TypeError, "target must be an int64 or int32"),
    "input: of integers": (TypeError, "input must be float64, float32"),
    "input: one too few": (ValueError, "linear_weight|input"),
    "input: no tensor": (TypeError, "input must be a tensor"),
    "logits: of integers": (TypeError, "logits must be float64, float32"),
    "logits: no tensor": (TypeError, "logits must be a tensor"),
    "linear_weight: of no words": (ValueError, "linear_weight.* has 0 rows"),
    "linear_weight: of integers": (TypeError, "linear_weight must be float64, float32"),
    "linear_weight: one too few": (ValueError, "linear_weight|input"),
    "linear_weight: elsewhere": (ValueError, "device"),
    "linear_bias: one too few": (ValueError, "linear_bias must"),
    "ref_logps: bf16": (ValueError, "ref_logps must be float32 or float64"),
    "ref_logps: of integers": (TypeError, "ref_logps must be a float32 or float64"),
    "ref_logps: one too few": (ValueError, "ref_logps must"),
    "ref_logps: elsewhere": (ValueError, "ref_logps must be on"),
    "ref_sums: bf16": (ValueError, "ref_logps must be float32 or float64"),
    "token_weight: of integers": (TypeError, "token_weight must be float64"),
    "token_weight: one too few": (ValueError, "token_weight must have"),
    "value: of integers": (TypeError, "value must be float64"),
    "segment_ids: of floats": (TypeError, "segment_ids must be an integer"),
    "segment_ids: one too few": (ValueError, "segment_ids must have"),
    "units: of floats": (TypeError, "units must be an integer"),
    "units: one too few": (ValueError, "units must have"),
    "old_logps: bf16": (ValueError, "old_logps must be float32 or float64"),
    "sampler_logps: one too few": (ValueError, "sampler_logps must have"),
    "advantages: of integers": (TypeError, "advantages must be a tensor of floats"),
    "desirable: of floats": (TypeError, "desirable must be a bool"),
    "teacher_logits: of integers": (TypeError, "teacher_logits must be float64"),
    "teacher_input: of integers": (TypeError, "teacher_input must be float64"),
    "teacher_weight: of no words": (ValueError, "teacher"),
    "teacher_ids: of floats": (TypeError, "teacher_ids must be an integer"),
    "teacher_logps: one too few": (ValueError, "teacher_logps must have"),
    "shift: 2": (TypeError, "shift must be True or False, got 2"),
    "shift: -1": (TypeError, "shift must be True or False"),
    "backend: 'cuda'": (ValueError, "backend must be one of 'auto', 'triton', 'torch'"),
    "ignore_index: 0.5": (TypeError, "ignore_index must be an int"),
    "reduction: 'avg'": (ValueError, "reduction must be one of"),
    "num_items: -1": (ValueError, "num_items must be a finite number >= 0"),
    "num_items: nan": (ValueError, "num_items must be a finite number >= 0"),
    "num_items: torch.tensor(-2.0)": (ValueError, "num_items must be a finite number >= 0"),
    "softcap: 0.0": (ValueError, "softcap must be a finite number > 0"),
    "softcap: nan": (ValueError, "softcap must be a finite number > 0"),
    "temperature: 0.0": (ValueError, "temperature must be a finite number > 0"),
    "temperature: inf": (ValueError, "temperature must be a finite number > 0"),
    "logit_scale: -1.0": (ValueError, "logit_scale must be a finite number > 0"),
    "beta: 0.0": (ValueError, "beta must be a finite number > 0"),
    "beta: nan": (ValueError, "beta must be a finite number > 0"),
    "workspace_bytes: 1": (ValueError, r"workspace_bytes=1 is too small .* is \d+$"),
    "workspace_bytes: 0": (ValueError, "workspace_bytes must be a positive integer"),
    "workspace_bytes: 1.5": (TypeError, "workspace_bytes must be an int"),
    "accum_dtype: torch.int32": (ValueError, "accum_dtype must be"),
    "logits_dtype: torch.int32": (ValueError, "logits_dtype must be"),
    "unknown: 1": (TypeError, "unexpected keyword argument 'unknown'; it takes .*shift"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_refused_by_every_function_it_concerns(what: str) -> None:
    error, message = MISTAKES[what]
    seen = 0
    for case in CASES:
        given = spoiled(case, what)
        if given is None:
            continue
        seen += 1
        with pytest.raises(error, match=message) as caught:
            case(given[0], **given[1])
        assert type(caught.value) is error, (case, caught.value)
    assert seen, "no function takes it"


def test_every_function_is_called_here() -> None:
    public = {n for n in fused_losses.__all__ if n.endswith(("_loss", "_stats")) and n[0].islower()}
    pure = {"preference_loss", "policy_loss", "with_stats"}  # no labels, no scores
    assert public - pure == set(FUNCTIONS) | {"pearson_loss", "hellinger_loss"} & public
