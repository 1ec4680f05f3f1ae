"""The planner: pure functions of shapes and a budget, checked without running anything."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fused_losses import strips as ways_to_cut
from fused_losses.chunk_bytes import workspace_budget
from fused_losses.cost import Step, bytes_moved, cost, flops, step_bytes
from fused_losses.plan import (
    LinearShape,
    Plan,
    forced_route,
    plan_linear,
    plan_logits,
    plan_units,
    routes_for,
)

SHAPE = LinearShape(64, 1000, torch.float32, torch.float32, "torch", True, True)
ROUTE_NAMES = ["forward", "token", "unit", "frozen", "recompute"]
ROUTES: Any = st.sampled_from(ROUTE_NAMES)
DTYPES = st.sampled_from(
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ]
)
CPU = torch.device("cpu")
# Of SHAPE, a row's logits, and what else it has: two hidden states and five times its results.
ROW = 1000 * 4 + 2 * 64 * 4 + 5 * 10 * 4


@st.composite
def shapes(draw: st.DrawFn) -> LinearShape:
    compute, logits = draw(DTYPES)
    flags = [draw(st.booleans()) for _ in range(7)]
    backend = draw(st.sampled_from(["torch", "triton"]))
    V = draw(st.integers(1, 300_000))
    return LinearShape(draw(st.integers(1, 8192)), V, compute, logits, backend, *flags)


def _least(route: Any, shape: LinearShape) -> int:
    with pytest.raises(ValueError, match="the least that works is") as caught:
        plan_linear([route], 1, shape, 1)
    return int(str(caught.value).rsplit(" ", 1)[1])


@given(ROUTES, shapes(), st.integers(0, 100_000), st.floats(1.0, 5000.0))
def test_tiles_add_up_evenly_within_the_budget(
    route: Any, shape: LinearShape, tokens: int, factor: float
) -> None:
    budget = int(_least(route, shape) * factor)
    plan = plan_linear([route], tokens, shape, budget)
    assert sum(plan.chunks) == plan.tokens == tokens
    assert sum(plan.columns) == shape.vocabulary
    assert plan.budget_bytes == budget
    if plan.workspace_bytes > budget:
        # In place of chunks that fill the budget, and a sum of dW that is wider than its gradient.
        assert (len(plan.chunks), shape.need_dw) == (1, True)
        head = shape.hidden * shape.vocabulary
        assert plan.peak_bytes <= 1.05 * (4 * head + max(budget, 2 * head))
        assert shape.compute_dtype == torch.bfloat16
    ends = set(accumulate(plan.strips))
    assert ends.issuperset(accumulate(plan.chunks))
    assert max(ends, default=0) == tokens
    assert len(plan.strips) == len(plan.chunks) or shape.takes_strips(route)
    for parts in (plan.chunks, plan.columns):
        assert all(size > 0 for size in parts)
        assert len(set(parts[:-1])) <= 1
        assert not parts or parts[-1] <= parts[0]


@given(ROUTES, shapes(), st.integers(1, 100_000), st.floats(1.0, 100.0), st.floats(1.0, 8.0))
def test_more_budget_never_costs_more(
    route: Any, shape: LinearShape, tokens: int, factor: float, more: float
) -> None:
    budget = int(_least(route, shape) * factor)
    small, large = (plan_linear([route], tokens, shape, b) for b in (budget, int(budget * more)))
    assert large.flops == small.flops
    if shape.takes_whole_rows(route):
        # One chunk within the budget may hold less in all than one beyond a smaller budget.
        less = shape.takes_strips(route) and large.peak_bytes < small.peak_bytes
        assert large.bytes_moved <= small.bytes_moved or less
    else:
        # Ranges and blocks are whole numbers: a little more memory may divide less well.
        assert large.bytes_moved <= 1.1 * small.bytes_moved


def test_a_range_of_all_words_may_take_less_than_one_of_all_but_one() -> None:
    shape = LinearShape(2, 3, torch.bfloat16, torch.bfloat16, "triton", True, False)
    plan = plan_linear(["recompute"], 2, shape, _least("recompute", shape))
    assert (plan.chunks, plan.columns) == ((1, 1), (3,))


@given(ROUTES, shapes())
def test_the_least_budget_that_an_error_names_works_and_one_byte_less_does_not(
    route: Any, shape: LinearShape
) -> None:
    least = _least(route, shape)
    plan = plan_linear([route], 3, shape, least)
    assert plan.chunks == (1, 1, 1) or (plan.chunks == (3,) and plan.workspace_bytes > least)
    with pytest.raises(ValueError, match=f"workspace_bytes={least - 1} is too small"):
        plan_linear([route], 3, shape, least - 1)
    columns = shape.vocabulary
    if not shape.takes_whole_rows(route):
        columns = min(columns, 256)
    # What is passed over at a time is the least that anyone could do with.
    assert least >= columns * shape.logits_dtype.itemsize
    # Of several routes the most modest tells.
    both = min(_least("token", shape), _least("recompute", shape))
    with pytest.raises(ValueError, match=f"the least that works is {both}$"):
        plan_linear(["token", "recompute"], 3, shape, 1)


def test_chunks_are_multiples_of_128_where_that_fits() -> None:
    plan = plan_linear(["token"], 1000, SHAPE, 400 * ROW)
    assert plan.chunks == (384, 384, 232)
    # 334 rows a chunk is even; rounded up to 384 they no longer fit.
    plan = plan_linear(["token"], 1000, SHAPE, 340 * ROW)
    assert plan.chunks == (334, 334, 332)


@pytest.mark.parametrize("route", ROUTE_NAMES)
def test_one_tile_takes_everything_that_fits(route: Any) -> None:
    plan = plan_linear([route], 77, SHAPE, 2**20)
    assert (plan.chunks, plan.columns) == ((77,), (1000,))
    assert plan_linear([route], 0, SHAPE, 2**20).chunks == ()


def test_few_tokens_take_ranges_and_many_take_blocks_as_well() -> None:
    wide = replace(SHAPE, vocabulary=100_000)
    few = plan_linear(["recompute"], 100, wide, 2**22)
    assert len(few.chunks) == 1 < len(few.columns)
    many = plan_linear(["forward"], 100_000, wide, 2**22)
    assert len(many.chunks) > 1 < len(many.columns)
    # Close to squares, which read hidden states and head the least often.
    assert 0.2 < many.chunks[0] / many.columns[0] < 5


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(30, 200))
def test_units_stay_whole_and_in_order(sizes: list[int], rows: int) -> None:
    shape = replace(SHAPE, backend="triton")
    with forced_route("unit"):
        plan = plan_units(list(accumulate(sizes)), shape, rows * ROW)
    assert plan is not None
    assert sum(plan.chunks) == plan.tokens == sum(sizes)
    assert max(plan.chunks, default=0) <= rows
    ends = {sum(sizes[:i]) for i in range(len(sizes) + 1)}
    end = 0
    for size in plan.chunks:
        end += size
        assert end in ends


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(30, 200), st.integers(1, 60))
def test_strips_hold_whole_units_too(sizes: list[int], rows: int, hidden: int) -> None:
    wide = LinearShape(hidden, 1000, BF16, torch.float32, "triton", True, True)
    ends = list(accumulate(sizes))
    with forced_route("unit"):
        plan = plan_units(ends, wide, rows * (1000 * 6 + 2 * hidden * 4 + 200))
    assert plan is not None
    assert set(accumulate(plan.strips)) <= set(ends)
    assert set(accumulate(plan.chunks)) <= set(accumulate(plan.strips))
    assert sum(plan.strips) == sum(plan.chunks) == sum(sizes)
    if plan.workspace_bytes > plan.budget_bytes:
        assert len(plan.chunks) == 1
        head = hidden * 1000
        assert plan.peak_bytes <= 1.05 * (4 * head + max(plan.budget_bytes, 2 * head))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 29))
def test_a_unit_that_does_not_fit_makes_no_plan(sizes: list[int], rows: int) -> None:
    shape = replace(SHAPE, backend="triton")
    with forced_route("unit"):
        plan = plan_units(list(accumulate(sizes)), shape, rows * ROW)
    assert (plan is None) == (max(sizes) > rows)


@pytest.mark.parametrize(
    ("dx", "dw", "db", "known", "changes", "routes", "products"),
    [
        (False, False, False, True, {}, ["forward"], [1]),
        (False, False, False, False, {"entropy_gradient": True}, ["forward"], [1]),
        (True, False, False, True, {}, ["frozen"], [2]),
        (True, False, False, False, {}, ["frozen"], [2]),
        (True, False, False, True, {"smoothing": True}, ["frozen"], [2]),
        (True, False, False, True, {"smoothing": True, "softcap": True}, ["token", "recompute"],
         [2, 3]),
        (True, True, True, True, {}, ["token", "recompute"], [3, 4]),
        (False, True, False, True, {}, ["token", "recompute"], [2, 3]),
        (False, False, True, True, {}, ["token", "recompute"], [1, 2]),
        (True, False, False, False, {"entropy_gradient": True}, ["recompute"], [3]),
        (True, False, True, False, {}, ["recompute"], [3]),
        (True, True, False, False, {}, ["recompute"], [4]),
        (False, True, False, False, {}, ["recompute"], [3]),
    ],
)  # fmt: skip
def test_the_routes_and_their_products(
    dx: bool,
    dw: bool,
    db: bool,
    known: bool,
    changes: dict[str, bool],
    routes: list[str],
    products: list[int],
) -> None:
    shape = replace(SHAPE, need_dx=dx, need_dw=dw, need_db=db, **changes)
    possible = routes_for(shape, known=known)
    assert list(possible) == routes
    for route, count in zip(possible, products, strict=True):
        assert plan_linear([route], 50, shape, 2**24).flops == 2 * count * 50 * 64 * 1000


def test_the_model_is_the_table_that_is_written_down() -> None:
    N, D, V, b, k = 1000, 64, 5000, 3, 2
    shape = LinearShape(D, V, torch.bfloat16, torch.float32, "triton", True, True)
    x, w, z = N * D, V * D, N * V
    logits = k * x * 2 + b * w * 2 + z * 4
    gradient = z * 4 + z * 2
    dx = z * 2 + b * w * 2 + (2 * k - 1) * x * 4
    dw = z * 2 + k * x * 2 + (2 * b - 1) * w * 4 + w * (2 + 4)
    assert bytes_moved("forward", N, shape, b, k) == logits + z * 4
    assert bytes_moved("token", N, shape, b, k) == logits + z * 4 + gradient + dx + dw
    assert bytes_moved("recompute", N, shape, b, k) == 2 * logits + z * 4 + gradient + dx + dw
    assert bytes_moved("frozen", N, shape, b, k) == logits + (z * 4 + z * 2) + dx
    one = bytes_moved("token", N, shape, 1, 1)
    assert one == (x * 2 + w * 2 + z * 4) + z * 4 + gradient + (z * 2 + w * 2 + x * 2) + (
        z * 2 + x * 2 + w * 2
    )
    # Logits in strips read the head once more for each.
    in_strips = bytes_moved("token", N, shape, b, 1, 7)
    assert in_strips == bytes_moved("token", N, shape, b, 1) + (7 - b) * w * 2
    assert flops("recompute", N, shape) == 8 * N * D * V
    assert cost("token", N, shape, b, k) == flops("token", N, shape) + 180.0 * bytes_moved(
        "token", N, shape, b, k
    )


@given(shapes(), st.integers(1, 20_000), st.floats(1.0, 3000.0))
def test_of_several_routes_the_cheapest_is_taken(
    shape: LinearShape, tokens: int, factor: float
) -> None:
    budget = int(max(_least("token", shape), _least("recompute", shape)) * factor)
    both = plan_linear(["token", "recompute"], tokens, shape, budget)

    def price(plan: Plan) -> float:
        return plan.cost

    alone = [plan_linear([route], tokens, shape, budget) for route in ("token", "recompute")]
    # What is beyond the budget, to hold less in all, is no way of one route to beat the other.
    assume(all(plan.workspace_bytes <= budget for plan in (both, *alone)))
    assert price(both) == min(price(plan) for plan in alone)


def test_tight_budgets_recompute_and_wide_ones_do_not() -> None:
    # Shape A of the project's figures, on a GPU: 6 NDV down to 256 MiB, 8 below 100.
    shape = LinearShape(4096, 128256, torch.bfloat16, torch.bfloat16, "triton", True, True)
    found = {
        mib: plan_linear(["token", "recompute"], 8192, shape, mib * 2**20).route
        for mib in (32, 64, 256, 1024)
    }
    assert found == {32: "recompute", 64: "recompute", 256: "token", 1024: "token"}


BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("tokens", "hidden", "vocabulary", "gib", "changes", "chunks", "peak"),
    [
        (8192, 4096, 128256, 1.0, {}, 1, 2.94),
        (8192, 4096, 128256, 0.5, {}, 1, 2.94),
        (8192, 4096, 151936, 1.0, {}, 1, 3.48),
        # Twice as many tokens as hidden units, and few at a time: a sum of dW is smaller.
        (16384, 2304, 256000, 1.0, {}, 8, 3.30),
        # Three times as many: a third less.
        (12288, 4096, 128256, 1.0, {}, 3, 2.94),
        (8192, 4096, 128256, 1.0, {"accum_dtype": BF16}, 2, 1.96),
        # The head's copy, a bf16 gradient, and then its fp32 form instead of the logits.
        (8192, 4096, 128256, 1.0, {"weight_dtype": torch.float32}, 1, 3.91),
        (8192, 4096, 128256, 1.0, {"compute_dtype": torch.float16, "logits_dtype": torch.float16},
         2, 2.94),
    ],
)  # fmt: skip
def test_one_chunk_is_taken_where_it_holds_no_more_in_all(
    tokens: int,
    hidden: int,
    vocabulary: int,
    gib: float,
    changes: dict[str, Any],
    chunks: int,
    peak: float,
) -> None:
    shape = LinearShape(hidden, vocabulary, BF16, BF16, "triton", True, True, all_rows=True)
    shape, budget = replace(shape, **changes), int(gib * 2**30)
    plan = plan_linear(["token", "recompute"], tokens, shape, budget)
    assert (plan.route, len(plan.chunks)) == ("token", chunks)
    assert plan.peak_bytes / 2**30 == pytest.approx(peak, rel=0.02)
    units = plan_units(range(1, tokens + 1), shape, budget)
    assert units is not None
    assert len(units.chunks) == chunks


@pytest.mark.parametrize(
    ("tokens", "hidden", "vocabulary", "gib", "cut", "peak"),
    [
        (8192, 4096, 128256, 0.5, (1, 4), 2.94),
        (8192, 4096, 128256, 1.0, (1, 4), 2.94),
        (8192, 4096, 151936, 1.0, (1, 4), 3.48),
        (16384, 2304, 256000, 1.0, (12, 48), 3.30),
        (12288, 4096, 128256, 1.0, (5, 15), 2.94),
    ],
)
def test_wide_logits_feed_chunks_in_strips(
    tokens: int, hidden: int, vocabulary: int, gib: float, cut: tuple[int, int], peak: float
) -> None:
    wide = LinearShape(hidden, vocabulary, BF16, torch.float32, "triton", True, True, all_rows=True)
    budget = int(gib * 2**30)
    plan = plan_linear(["token", "recompute"], tokens, wide, budget)
    assert (plan.route, len(plan.chunks), len(plan.strips)) == ("token", *cut)
    assert plan.peak_bytes / 2**30 == pytest.approx(peak, rel=0.01)
    units = plan_units(range(1, tokens + 1), wide, budget)
    assert units is not None
    assert len(units.chunks) == cut[0]
    # Pairs of 512 tokens.
    pairs = plan_units(range(512, tokens + 1, 512), wide, budget)
    if cut[0] == 1:
        assert pairs is not None
        assert (pairs.chunks, pairs.strips) == (plan.chunks, plan.strips)
    assert not replace(wide, compute_dtype=torch.float32).takes_strips("token")


def _gradient_products(plan: Plan, shape: LinearShape) -> int:
    cut = len(plan.chunks), len(plan.columns), len(plan.strips)
    return sum(step_bytes(step, plan.tokens, shape, *cut) for step in (Step.DX, Step.DW))


@pytest.mark.parametrize(
    ("tokens", "hidden", "vocabulary", "rows"),
    [(8192, 4096, 128256, 1300), (257, 301, 1003, 40), (999, 1001, 5003, 300), (65, 70, 503, 9)],
)
def test_gradients_of_wide_logits_move_the_bytes_of_narrow_ones(
    tokens: int, hidden: int, vocabulary: int, rows: int
) -> None:
    """What a strip reads of the head beside that is counted, and weighed."""
    plain = LinearShape(hidden, vocabulary, BF16, BF16, "triton", True, True)
    wide = replace(plain, logits_dtype=torch.float32)
    budget = rows * (vocabulary * 6 + hidden * 8)
    with forced_route("token"):
        of = [plan_linear(["token", "recompute"], tokens, shape, budget) for shape in (plain, wide)]
    with forced_route("unit"):
        units = plan_units(range(1, tokens + 1), wide, budget)
    assert units is not None
    likelihood = _gradient_products(of[0], plain)
    for plan in (of[1], units):
        assert len(plan.strips) > len(plan.chunks) == 1
        assert _gradient_products(plan, wide) <= 1.05 * likelihood
        assert plan.peak_bytes <= 1.05 * of[0].peak_bytes
        more = (len(plan.strips) - 1) * vocabulary * hidden * 2
        assert step_bytes(Step.LOGITS, tokens, wide, 1, 1, len(plan.strips)) == more + step_bytes(
            Step.LOGITS, tokens, wide, 1, 1, 1
        )


def test_strips_are_taken_where_they_are_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = LinearShape(2304, 256000, BF16, torch.float32, "triton", True, True)
    routes: Any = ("token", "recompute")
    with_strips = [plan_linear([route], 16384, wide, 2**30).cost for route in routes]
    assert with_strips[0] < with_strips[1]
    monkeypatch.setattr(ways_to_cut, "_STRIPS", (1,))
    without = [plan_linear([route], 16383, wide, 2**30).cost for route in routes]
    assert with_strips[0] < 0.95 * without[0]
    assert with_strips[0] < min(without)


def test_a_tight_budget_recomputes_and_never_takes_one_chunk_beyond_it() -> None:
    shape = LinearShape(4096, 128256, BF16, BF16, "triton", True, True)
    plan = plan_linear(["token", "recompute"], 8192, shape, 2**26)
    assert plan.workspace_bytes <= plan.budget_bytes
    # A frozen head has no sum of dW.
    frozen = replace(shape, need_dw=False, entropy_gradient=True)
    assert len(plan_linear(["token"], 8192, frozen, 2**30).chunks) > 1


def test_a_forced_route_is_taken_where_it_is_possible() -> None:
    for route in ("token", "recompute"):
        with forced_route(route):
            assert plan_linear(["token", "recompute"], 300, SHAPE, 2**20).route == route
            assert plan_linear(["frozen"], 300, SHAPE, 2**20).route == "frozen"


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_a_unit_plan_calls_the_loss_before_the_gradient_products(entropy_gradient: bool) -> None:
    plan = plan_units([3, 7], replace(SHAPE, entropy_gradient=entropy_gradient), 2**20)
    assert plan is not None
    assert plan.route == "unit"
    assert plan.flops == 6 * 7 * 64 * 1000
    assert plan.exponentials == (not entropy_gradient)
    named = list(plan.kernels)
    first = ["row pass"] if entropy_gradient else ["row pass with exponentials"]
    then = ["row gradient"] if entropy_gradient else []
    assert named[1:4] == [*first, "loss function", *then, "dX += dz W"][:3]
    assert named[-2:] == ["dX += dz W", "dW += dz' X"]


def test_what_needs_more_scratch_gets_smaller_chunks() -> None:
    def rows(**changes: Any) -> int:
        return max(plan_linear(["token"], 10_000, replace(SHAPE, **changes), 2**20).chunks)

    assert rows() > rows(softcap=True) > rows(softcap=True, entropy=True)
    assert rows(backend="triton") == rows(backend="triton", softcap=True)
    # fp32 logits and their bf16 gradient are two buffers.
    mixed = {"backend": "triton", "compute_dtype": torch.bfloat16}
    assert rows(**mixed) < rows(**mixed, logits_dtype=torch.bfloat16)


def test_a_plan_reads_as_one_line() -> None:
    text = str(plan_linear(["token"], 1000, SHAPE, 400 * ROW))
    assert "\n" not in text
    for part in ("token route on torch", "1000 tokens x 1000", "3 chunk(s)", "384", "6.0 NDV"):
        assert part in text
    assert "strips" not in text
    wide = replace(SHAPE, compute_dtype=BF16, backend="triton")
    assert "chunk(s) of up to 1000 tokens, 4 strips of up to" in str(
        plan_linear(["token"], 1000, wide, 1000 * (2 * 1000 + 1000 + 64 * 8 + 200))
    )
    empty = str(plan_linear(["token"], 0, SHAPE, 2**20))
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
