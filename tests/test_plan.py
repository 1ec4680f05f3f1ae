"""The planner: pure functions of shapes and a budget, checked without running anything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fused_losses.plan import (
    LinearShape,
    Plan,
    choose_route,
    plan_linear,
    plan_logits,
    plan_units,
    workspace_budget,
)

SHAPE = LinearShape(64, 1000, torch.float32, torch.float32, "torch", True, True)
ROUTES: Any = st.sampled_from(["forward", "token", "unit", "frozen", "recompute"])
DTYPES = st.sampled_from(
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ]
)
CPU = torch.device("cpu")


@st.composite
def shapes(draw: st.DrawFn) -> LinearShape:
    compute, logits = draw(DTYPES)
    flags = [draw(st.booleans()) for _ in range(5)]
    backend = draw(st.sampled_from(["torch", "triton"]))
    V = draw(st.integers(1, 300_000))
    return LinearShape(draw(st.integers(1, 8192)), V, compute, logits, backend, *flags)


def _least(route: Any, shape: LinearShape) -> int:
    with pytest.raises(ValueError, match="the least that works is") as caught:
        plan_linear(route, 1, shape, 1)
    return int(str(caught.value).rsplit(" ", 1)[1])


@given(ROUTES, shapes(), st.integers(0, 100_000), st.floats(1.0, 5000.0))
def test_chunks_add_up_evenly_within_the_budget(
    route: Any, shape: LinearShape, tokens: int, factor: float
) -> None:
    budget = int(_least(route, shape) * factor)
    plan = plan_linear(route, tokens, shape, budget)
    assert sum(plan.chunks) == plan.tokens == tokens
    assert all(size > 0 for size in plan.chunks)
    assert plan.workspace_bytes <= plan.budget_bytes == budget
    assert len(set(plan.chunks[:-1])) <= 1
    assert not plan.chunks or plan.chunks[-1] <= plan.chunks[0]


@given(ROUTES, shapes(), st.integers(1, 100_000), st.floats(1.0, 100.0), st.floats(1.0, 8.0))
def test_more_budget_never_means_more_chunks(
    route: Any, shape: LinearShape, tokens: int, factor: float, more: float
) -> None:
    budget = int(_least(route, shape) * factor)
    small, large = (plan_linear(route, tokens, shape, b) for b in (budget, int(budget * more)))
    assert len(large.chunks) <= len(small.chunks)
    assert large.flops == small.flops


@given(ROUTES, shapes())
def test_the_least_budget_that_an_error_names_works_and_one_byte_less_does_not(
    route: Any, shape: LinearShape
) -> None:
    least = _least(route, shape)
    assert plan_linear(route, 3, shape, least).chunks == (1, 1, 1)
    with pytest.raises(ValueError, match=f"workspace_bytes={least - 1} is too small"):
        plan_linear(route, 3, shape, least - 1)
    # A row of logits is the least that anyone could do with.
    assert least >= shape.vocabulary * shape.logits_dtype.itemsize


def test_chunks_are_multiples_of_128_where_that_fits() -> None:
    plan = plan_linear("token", 1000, SHAPE, 400 * 1000 * 4)
    assert plan.chunks == (384, 384, 232)
    # 334 rows a chunk is even; rounded up to 384 they no longer fit.
    plan = plan_linear("token", 1000, SHAPE, 340 * 1000 * 4)
    assert plan.chunks == (334, 334, 332)


def test_one_chunk_takes_everything_that_fits() -> None:
    assert plan_linear("token", 77, SHAPE, 2**20).chunks == (77,)
    assert plan_linear("token", 0, SHAPE, 2**20).chunks == ()


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(30, 200))
def test_units_stay_whole_and_in_order(sizes: list[int], rows: int) -> None:
    shape = replace(SHAPE, backend="triton")
    plan = plan_units(sizes, shape, rows * 1000 * 4)
    assert plan is not None
    assert sum(plan.chunks) == plan.tokens == sum(sizes)
    assert max(plan.chunks, default=0) <= rows
    ends = {sum(sizes[:i]) for i in range(len(sizes) + 1)}
    end = 0
    for size in plan.chunks:
        end += size
        assert end in ends


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 29))
def test_a_unit_that_does_not_fit_makes_no_plan(sizes: list[int], rows: int) -> None:
    shape = replace(SHAPE, backend="triton")
    plan = plan_units(sizes, shape, rows * 1000 * 4)
    assert (plan is None) == (max(sizes) > rows)


@pytest.mark.parametrize(
    ("dx", "dw", "db", "reduced", "entropy", "route", "products"),
    [
        (False, False, False, True, False, "forward", 1),
        (False, False, False, False, True, "forward", 1),
        (True, False, False, True, False, "token", 2),
        (True, True, True, True, False, "token", 3),
        (False, True, False, True, False, "token", 2),
        (False, False, True, True, False, "token", 1),
        (True, False, False, False, False, "frozen", 2),
        (True, False, False, False, True, "recompute", 3),
        (True, False, True, False, False, "recompute", 3),
        (True, True, False, False, False, "recompute", 4),
        (False, True, False, False, False, "recompute", 3),
    ],
)
def test_the_route_and_its_products(
    dx: bool, dw: bool, db: bool, reduced: bool, entropy: bool, route: str, products: int
) -> None:
    shape = replace(SHAPE, need_dx=dx, need_dw=dw, need_db=db)
    chosen = choose_route(shape, reduced=reduced, entropy_gradient=entropy)
    assert chosen == route
    plan = plan_linear(chosen, 50, shape, 2**24)
    assert plan.flops == 2 * products * 50 * 64 * 1000


@pytest.mark.parametrize("exponentials", [True, False])
def test_a_unit_plan_calls_the_loss_before_the_gradient_products(exponentials: bool) -> None:
    plan = plan_units([3, 4], replace(SHAPE, exponentials=exponentials), 2**20)
    assert plan is not None
    assert plan.route == "unit"
    assert plan.flops == 6 * 7 * 64 * 1000
    named = list(plan.kernels)
    first = ["row pass with exponentials"] if exponentials else ["row pass"]
    then = [] if exponentials else ["row gradient"]
    assert named[1:4] == [*first, "loss function", *then, "dX = dz W"][:3]
    assert named[-2:] == ["dX = dz W", "dW += dz' X"]
    frozen = plan_units([3], replace(SHAPE, need_dx=False, need_dw=False), 2**20)
    assert frozen is not None
    assert frozen.route == "forward"


def test_what_needs_more_scratch_gets_smaller_chunks() -> None:
    def rows(**changes: Any) -> int:
        return max(plan_linear("token", 10_000, replace(SHAPE, **changes), 2**20).chunks)

    assert rows() > rows(softcap=True) > rows(softcap=True, entropy=True)
    assert rows(backend="triton") == rows(backend="triton", softcap=True)
    # fp32 logits and their bf16 gradient are two buffers.
    mixed = {"backend": "triton", "compute_dtype": torch.bfloat16}
    assert rows(**mixed) < rows(**mixed, logits_dtype=torch.bfloat16)


def test_a_plan_reads_as_one_line() -> None:
    text = str(plan_linear("token", 1000, SHAPE, 400 * 1000 * 4))
    assert "\n" not in text
    for part in ("token route on torch", "1000 tokens x 1000", "3 chunk(s)", "384", "6.0 NDV"):
        assert part in text
    empty = str(plan_linear("token", 0, SHAPE, 2**20))
    assert "0 tokens" in empty
    assert "NDV" not in empty


def test_a_plan_of_logits_multiplies_nothing() -> None:
    plan = plan_logits(10, 50, "triton", need_gradient=True)
    assert (plan.route, plan.flops, plan.workspace_bytes) == ("logits", 0, 0)
    assert plan.has_gradient
    assert not plan_logits(10, 50, "torch", need_gradient=False).has_gradient
    assert isinstance(plan, Plan)


def test_the_budget_is_the_argument_else_the_environment_else_the_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FUSED_LOSSES_WORKSPACE_BYTES", raising=False)
    assert workspace_budget(None, CPU) == 256 * 2**20
    assert workspace_budget(None, torch.device("cuda")) == 2**30
    monkeypatch.setenv("FUSED_LOSSES_WORKSPACE_BYTES", "12345")
    assert workspace_budget(None, CPU) == 12345
    assert workspace_budget(77, CPU) == 77


@pytest.mark.parametrize("text", ["", "1 MiB", "-5", "0", "1e6", "2.5"])
def test_a_bad_budget_in_the_environment_is_named(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSED_LOSSES_WORKSPACE_BYTES", text)
    with pytest.raises(ValueError, match="FUSED_LOSSES_WORKSPACE_BYTES must be a positive integer"):
        workspace_budget(None, CPU)


@pytest.mark.parametrize(("budget", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError),
                                               (True, TypeError), ("9", TypeError)])  # fmt: skip
def test_a_bad_budget_is_named(budget: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="workspace_bytes must be"):
        workspace_budget(budget, CPU)
