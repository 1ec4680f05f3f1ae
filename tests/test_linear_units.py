"""Losses of whole units: ``linear_loss``, sequence level and DPO from hidden states."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_oracle import (
    IGNORED,
    HeadBatch,
    gemm_flops,
    gradients,
    head_batch,
    near_reference,
    relative_error,
)
from pair_cases import CASES, needed, takes_reference
from torch import Tensor

import fused_losses
from fused_losses import TokenStats, reference
from fused_losses.preference import PAIR_LOSSES

B, T, D, V = 6, 9, 16, 83
MEMBERS = list(fused_losses.TOKEN_LOSSES)
# Chunks of a few rows: with scratch of the torch backend, about 14 of them.
FEW_ROWS = 28 * V * 4

LossFn = Callable[[TokenStats, Tensor], Tensor]


@pytest.fixture
def batch() -> HeadBatch:
    """Three pairs; every sequence has counted tokens."""
    made = head_batch((B, T), D, V)
    assert ((made.y != IGNORED).sum(1) > 0).all()
    return made


def _units(name: str) -> Tensor | None:
    """Which unit every token belongs to."""
    row = torch.arange(B)[:, None].expand(B, T)
    if name == "tokens":
        return None
    if name == "sequences":
        return row
    if name == "pairs":
        return row % (B // 2)
    # Ids with holes, out of order, scattered over the batch.
    return (torch.arange(B * T).view(B, T) * 7 % 5) * 10 + 3


def _additive(units: Tensor | None) -> LossFn:
    """Additive over the units, not over their tokens; uses all that is differentiable."""
    ids = torch.arange(B * T) if units is None else units.flatten()

    def loss_fn(stats: TokenStats, rows: Tensor) -> Tensor:
        total = stats.logps.new_zeros(())
        for unit in ids[rows].unique():
            at = ids[rows] == unit
            total = total + stats.logps[at].sum() ** 2 / 50.0 + stats.lse[at].mean().sin()
            if stats.entropy is not None:
                total = total - stats.entropy[at].sum() * (1.0 + 0.1 * unit)
        return total

    return loss_fn


def _both(batch: HeadBatch, call: Callable[[Any, HeadBatch, dict], Tensor], **options: Any) -> None:
    """The fused call gives the reference's loss and gradients, in float64."""
    results = []
    for module, given in ((reference, {}), (fused_losses, options)):
        leaves = batch.to(torch.float64).leaves()
        loss = call(module, leaves, given)
        results.append((loss, gradients(loss, leaves)))
    (truth, expected), (loss, found) = results
    assert loss.dtype == torch.float64
    assert relative_error(loss, truth) <= 1e-11
    for got, value in zip(found, expected, strict=True):
        assert value.norm() > 0
        assert relative_error(got, value) <= 1e-11


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("kind", ["tokens", "sequences", "pairs", "groups"])
def test_any_additive_loss_equals_the_references(
    kind: str, entropy: bool, batch: HeadBatch
) -> None:
    units = _units(kind)
    for shift in (False, True):

        def call(module: Any, b: HeadBatch, options: dict, shift: bool = shift) -> Tensor:
            return module.linear_loss(
                b.x, b.w, b.y, _additive(units), units=units, entropy=entropy, shift=shift,
                softcap=20.0, temperature=0.9, **options,
            )  # fmt: skip

        for budget in (None, 60 * V * 8):
            _both(batch, call, workspace_bytes=budget)


@pytest.mark.usefixtures("device")
def test_any_additive_loss_runs_on_the_kernels() -> None:
    batch = head_batch((2, 4), 4, 11)
    units = torch.tensor([[0, 0, 1, 1], [2, 0, 1, 2]])

    def loss_fn(stats: TokenStats, rows: Tensor) -> Tensor:
        sums = torch.zeros(3, dtype=stats.logps.dtype).index_add(
            0, units.flatten()[rows], stats.logps
        )
        assert stats.entropy is not None
        return (sums**2).sum() + stats.entropy.sum() + stats.lse.sum()

    def call(module: Any, b: HeadBatch, options: dict) -> Tensor:
        return module.linear_loss(b.x, b.w, b.y, loss_fn, units=units, entropy=True, **options)

    _both(batch, call, backend="triton", workspace_bytes=2 * 600)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("kind", ["tokens", "sequences", "groups"])
def test_the_function_sees_each_counted_token_once_in_whole_units(
    kind: str, shift: bool, batch: HeadBatch
) -> None:
    units = _units(kind)
    ids = torch.arange(B * T) if units is None else units.flatten()
    truth = reference.linear_token_stats(batch.x, batch.w, batch.y, shift=shift)
    calls: list[Tensor] = []

    def loss_fn(stats: TokenStats, rows: Tensor) -> Tensor:
        assert rows.dtype == torch.int64
        assert stats.entropy is None
        assert stats.is_top1.dtype == torch.bool
        # Rows are flat positions in target: what stands there is what is given.
        torch.testing.assert_close(stats.logps, truth.logps.flatten()[rows])
        torch.testing.assert_close(stats.lse, truth.lse.flatten()[rows])
        assert torch.equal(stats.is_top1, truth.is_top1.flatten()[rows])
        calls.append(rows)
        return stats.logps.sum()

    budget = 20 * V * 4
    leaves = batch.leaves()
    plan = fused_losses.explain(
        fused_losses.linear_loss, leaves.x, leaves.w, leaves.y, loss_fn,
        units=units, shift=shift, workspace_bytes=budget,
    )  # fmt: skip
    assert not calls
    fused_losses.linear_loss(
        leaves.x, leaves.w, leaves.y, loss_fn, units=units, shift=shift, workspace_bytes=budget
    )
    assert [rows.numel() for rows in calls] == list(plan.chunks)
    assert len(calls) > 1
    counted = batch.y != IGNORED
    if shift:
        counted = counted & (torch.arange(T) > 0)
    assert torch.equal(torch.cat(calls).sort().values, counted.flatten().nonzero()[:, 0])
    seen = [set(ids[rows].tolist()) for rows in calls]
    assert sum(map(len, seen)) == len(set().union(*seen))


def test_a_unit_too_large_for_the_workspace_gives_the_same(batch: HeadBatch) -> None:
    units = torch.zeros(B, T, dtype=torch.int32)
    fn = _additive(units)
    results = []
    for budget in (None, 3 * V * 8):
        leaves = batch.leaves()
        args = (leaves.x, leaves.w, leaves.y, fn)
        options = {"units": units, "entropy": True, "workspace_bytes": budget}
        plan = fused_losses.explain(fused_losses.linear_loss, *args, **options)
        assert plan.route == ("unit" if budget is None else "recompute")
        loss = fused_losses.linear_loss(*args, **options)
        results.append([loss, *gradients(loss, leaves)])
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) <= 1e-5


def test_a_sum_over_nothing_has_zero_gradients(batch: HeadBatch) -> None:
    """What a loss returns for a chunk that holds nothing of interest to it."""
    for budget in (None, 3 * V * 8):
        leaves = batch.leaves()
        loss = fused_losses.linear_loss(
            leaves.x, leaves.w, leaves.y, lambda stats, rows: torch.zeros(()),
            units=torch.zeros(B, T, dtype=torch.int64), workspace_bytes=budget,
        )  # fmt: skip
        assert loss == 0.0
        assert loss.requires_grad
        loss.backward()
        assert torch.count_nonzero(leaves.x.grad) == 0
        assert torch.count_nonzero(leaves.w.grad) == 0


def test_without_a_counted_token_the_function_is_not_called(batch: HeadBatch) -> None:
    leaves = batch.leaves()
    nothing = torch.full_like(batch.y, IGNORED)

    def loss_fn(stats: TokenStats, rows: Tensor) -> Tensor:
        raise AssertionError("called")

    loss = fused_losses.linear_loss(leaves.x, leaves.w, nothing, loss_fn)
    assert loss == 0.0
    loss.backward()
    assert torch.count_nonzero(leaves.x.grad) == torch.count_nonzero(leaves.w.grad) == 0


@pytest.mark.parametrize("budget", [None, 3 * V * 8])
@pytest.mark.parametrize(
    ("loss_fn", "got"),
    [
        (lambda stats, rows: stats.logps, r"\("),
        (lambda stats, rows: stats.logps.sum().item(), "float"),
        (lambda stats, rows: None, "NoneType"),
    ],
    ids=["vector", "float", "None"],
)
def test_a_result_that_is_no_0d_tensor_is_named(
    loss_fn: Any, got: str, budget: int | None, batch: HeadBatch
) -> None:
    units = torch.zeros(B, T, dtype=torch.int64)
    leaves = batch.leaves()
    with pytest.raises(ValueError, match=f"loss_fn must return a 0-d tensor.*got {got}"):
        fused_losses.linear_loss(
            leaves.x, leaves.w, leaves.y, loss_fn, units=units, workspace_bytes=budget
        )


@pytest.mark.parametrize(
    ("units", "error", "message"),
    [
        (torch.zeros(B, T), TypeError, "units must be an integer tensor"),
        (torch.zeros(B, T, dtype=torch.bool), TypeError, "units must be an integer tensor"),
        ([[0] * T] * B, TypeError, "units must be an integer tensor"),
        (torch.zeros(B, T + 1, dtype=torch.int64), ValueError, "units must have target's shape"),
        (torch.full((B, T), -1), ValueError, "units must be >= 0"),
    ],
    ids=["float", "bool", "list", "shape", "negative"],
)
def test_bad_units_are_named(
    units: Any, error: type[Exception], message: str, batch: HeadBatch
) -> None:
    with pytest.raises(error, match=message):
        fused_losses.linear_loss(batch.x, batch.w, batch.y, _additive(None), units=units)


def test_units_of_ignored_tokens_are_never_read(batch: HeadBatch) -> None:
    units = torch.arange(B)[:, None].expand(B, T).clone()
    fn = _additive(units)
    expected = fused_losses.linear_loss(batch.x, batch.w, batch.y, fn, units=units)
    units[batch.y == IGNORED] = -7
    got = fused_losses.linear_loss(batch.x, batch.w, batch.y, fn, units=units)
    assert torch.equal(got, expected)


def test_a_loss_that_cannot_be_called_is_named(batch: HeadBatch) -> None:
    with pytest.raises(TypeError, match="loss_fn must be a function, got Tensor"):
        fused_losses.linear_loss(batch.x, batch.w, batch.y, torch.zeros(()))


def test_an_error_in_the_function_comes_out_and_leaves_nothing_behind(batch: HeadBatch) -> None:
    leaves = batch.leaves()

    def loss_fn(stats: TokenStats, rows: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fused_losses.linear_loss(leaves.x, leaves.w, leaves.y, loss_fn)
    assert torch.is_grad_enabled()
    assert leaves.x.grad is None


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", MEMBERS)
def test_sequence_level_equals_the_references(name: str, reduction: str, batch: HeadBatch) -> None:
    ref = near_reference(batch.to(torch.float64))
    for budget in (None, FEW_ROWS):

        def call(module: Any, b: HeadBatch, options: dict) -> Tensor:
            loss = module.linear_token_loss(
                b.x, b.w, b.y, ref, loss=name, level="sequence", beta=0.3, reduction=reduction,
                shift=True, **options,
            )  # fmt: skip
            return (loss * torch.linspace(0.5, 2.0, loss.numel()).view(loss.shape)).sum()

        _both(batch, call, workspace_bytes=budget)


def test_segments_of_packed_rows_are_sequences(batch: HeadBatch, backend: str) -> None:
    ref = near_reference(batch.to(torch.float64))
    ids = (torch.arange(T) // 4).expand(B, T).flip(1)
    value = torch.linspace(-0.2, 0.2, 1, dtype=torch.float64)
    if backend == "triton":
        batch = HeadBatch(batch.x[:2, :6], batch.w[:20], batch.y[:2, :6].clamp(max=19))
        ref, ids = ref[:2, :6].nan_to_num(-3.0), ids[:2, :6]

    def call(module: Any, b: HeadBatch, options: dict) -> Tensor:
        return module.linear_hellinger_loss(
            b.x, b.w, b.y, ref, level="sequence", segment_ids=ids, value=value, **options
        )

    _both(batch, call, backend=backend, workspace_bytes=FEW_ROWS * 2)


def test_a_segment_without_counted_tokens_is_no_sequence(batch: HeadBatch) -> None:
    ids, y = (torch.arange(T) // 2).expand(B, T), batch.y.clone()
    y[0, 2:4] = y[1, :2] = y[2] = IGNORED
    ref = near_reference(HeadBatch(batch.x, batch.w, y).to(torch.float64))

    def call(module: Any, b: HeadBatch, options: dict) -> Tensor:
        return module.linear_hellinger_loss(
            b.x, b.w, b.y, ref, level="sequence", segment_ids=ids, **options
        )

    _both(HeadBatch(batch.x, batch.w, y), call, workspace_bytes=FEW_ROWS * 2)


@pytest.mark.parametrize(
    ("case", "per"),
    [
        (case, per)
        for case, options in CASES.items()
        for per in ("token", "sequence", "no")
        # What is special about a form of the reference is special to sigmoid and aot at most.
        if per == ("token" if takes_reference(options["loss_type"]) else "no")
        or case in ("sigmoid", "aot")
    ],
)
def test_dpo_equals_the_references(case: str, per: str, batch: HeadBatch) -> None:
    token = near_reference(batch.to(torch.float64))
    ref = {"token": token, "sequence": token.nan_to_num(0.0).sum(1), "no": None}[per]
    for reduction in ("mean", "sum", "none"):

        def call(module: Any, b: HeadBatch, options: dict, reduction: str = reduction) -> Tensor:
            loss = module.linear_dpo_loss(
                b.x, b.w, b.y, ref, **CASES[case], beta=0.3, reduction=reduction, **options
            )
            return (loss * torch.linspace(0.5, 2.0, loss.numel()).view(loss.shape)).sum()

        # Units in chunks, the whole batch in one, recomputation; no units make no difference.
        for budget in (FEW_ROWS * 2, None, 5 * V * 8)[: 3 if reduction == "mean" else 1]:
            _both(batch, call, workspace_bytes=budget)


@pytest.mark.parametrize(
    "loss_type", [name for name, loss in PAIR_LOSSES.items() if not loss.whole_batch]
)
def test_dpo_is_linear_loss_of_preference_loss(loss_type: str, batch: HeadBatch) -> None:
    """Loss maths exist once: the same function of the same sums on the same units."""
    with_reference = takes_reference(loss_type)
    ref = near_reference(batch) if with_reference else torch.zeros(B, T)
    P = B // 2
    units = torch.arange(B)[:, None].expand(B, T) % P
    lengths = (batch.y != IGNORED).sum(1).float()

    def loss_fn(stats: TokenStats, rows: Tensor) -> Tensor:
        ratio = stats.logps - ref.flatten()[rows]
        sums = torch.zeros(B).index_add(0, rows // T, ratio)
        here = units.flatten()[rows].unique()
        losses, _, _ = fused_losses.preference_loss(
            sums[here], sums[here + P], beta=0.3, **needed(loss_type),
            chosen_lengths=lengths[here], rejected_lengths=lengths[here + P],
        )  # fmt: skip
        return losses.sum() / P

    results = []
    for own in (False, True):
        leaves = batch.leaves()
        args = (leaves.x, leaves.w, leaves.y)
        if own:
            loss = fused_losses.linear_loss(
                *args, loss_fn, units=units, workspace_bytes=FEW_ROWS * 2
            )
        else:
            loss = fused_losses.linear_dpo_loss(
                *args, ref if with_reference else None, beta=0.3, workspace_bytes=FEW_ROWS * 2,
                **needed(loss_type),
            )  # fmt: skip
        results.append([loss, *gradients(loss, leaves)])
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) <= 1e-6


@pytest.mark.parametrize("workspace_bytes", [None, FEW_ROWS * 2])
def test_with_the_reference_equal_to_the_policy_margins_are_bitwise_zero(
    workspace_bytes: int | None, batch: HeadBatch, backend: str
) -> None:
    if backend == "triton":
        batch = HeadBatch(batch.x[:2, :5], batch.w, batch.y[:2, :5])
    options = {"backend": backend, "workspace_bytes": workspace_bytes}
    x, w, y = batch.x, batch.w, batch.y

    # Chunk by chunk the same products: log-probs from the very pass that is differentiated.
    def policy(ref: Tensor) -> tuple[Tensor, fused_losses.PairStats]:
        leaves = batch.leaves()
        return fused_losses.with_stats(
            fused_losses.linear_dpo_loss, leaves.x, leaves.w, y, ref, **options
        )

    _, first = policy(torch.zeros(y.shape))
    loss, stats = policy(first.logps)
    assert torch.count_nonzero(stats.chosen_rewards) == 0
    assert torch.count_nonzero(stats.rejected_rewards) == 0
    assert loss.item() == pytest.approx(math.log(2.0), rel=1e-7)
    # By the no-gradient route the products are others, and the margin is rounding.
    with torch.no_grad():
        ref = fused_losses.linear_token_stats(x, w, y, **options).logps
    _, stats = policy(ref)
    assert (stats.chosen_rewards - stats.rejected_rewards).abs().max() <= 1e-4


def test_at_margin_zero_every_token_pulls_with_half_beta(batch: HeadBatch) -> None:
    """Equation (11): minus beta times one half, shared among the pairs."""
    exact = batch.to(torch.float64)
    ref = reference.linear_token_stats(exact.x, exact.w, exact.y).logps
    leaves = exact.leaves()
    loss = fused_losses.linear_dpo_loss(leaves.x, leaves.w, leaves.y, ref, beta=0.1)
    other = exact.leaves()
    stats = fused_losses.linear_token_stats(other.x, other.w, other.y)
    signs = torch.ones(B, 1)
    signs[B // 2 :] = -1.0
    expected = -(0.1 * 0.5 / (B // 2)) * (signs * stats.logps).sum()
    for a, b in zip(gradients(loss, leaves), gradients(expected, other), strict=True):
        assert relative_error(a, b) <= 1e-10


def test_an_empty_response_counts_as_zero_and_warns_once(batch: HeadBatch) -> None:
    y = batch.y.clone()
    y[1] = IGNORED
    exact = HeadBatch(batch.x, batch.w, y)
    ref = near_reference(exact.to(torch.float64))

    def call(module: Any, b: HeadBatch, options: dict) -> Tensor:
        with pytest.warns(UserWarning, match="no counted token") as caught:
            loss = module.linear_dpo_loss(b.x, b.w, b.y, ref, **options)
        assert len(caught) == 1
        return loss

    _both(exact, call)


def test_a_pair_without_counted_tokens_has_no_loss_and_no_part_in_the_mean(
    batch: HeadBatch,
) -> None:
    ref = near_reference(batch)
    y = batch.y.clone()
    y[[2, 5]] = IGNORED
    keep = [0, 1, 3, 4]
    dpo = fused_losses.linear_dpo_loss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        each = dpo(batch.x, batch.w, y, ref, reduction="none")
        mean = dpo(batch.x, batch.w, y, ref)
    expected = dpo(batch.x[keep], batch.w, y[keep], ref[keep])
    assert each[2] == 0.0
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(mean, each[:2].mean())


def test_huge_margins_stay_finite() -> None:
    batch = head_batch((2, 8), D, V, ignored=0.0)
    for shift in (1e4, -1e4):
        ref = near_reference(batch)
        ref[0] -= shift / 8
        for loss_type in PAIR_LOSSES:
            leaves = batch.leaves()
            given = ref if takes_reference(loss_type) else None
            loss = fused_losses.linear_dpo_loss(
                leaves.x, leaves.w, leaves.y, given, beta=1.0, **needed(loss_type)
            )
            assert torch.isfinite(loss)
            assert all(torch.isfinite(g).all() for g in gradients(loss, leaves))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "sum"}])
def test_linear_mle_is_cross_entropy_of_the_product(
    options: dict[str, Any], batch: HeadBatch, backend: str
) -> None:
    rows = slice(0, 2) if backend == "triton" else slice(None)
    x, y = batch.x[rows].double().requires_grad_(), batch.y[rows]
    w = batch.w.double().requires_grad_()
    bias = torch.randn(V, dtype=torch.float64, requires_grad=True)
    expected = F.cross_entropy(F.linear(x, w, bias).flatten(0, 1), y.flatten(), **options)
    got = fused_losses.linear_mle_loss(x, w, y, linear_bias=bias, backend=backend, **options)
    torch.testing.assert_close(got, expected)
    for a, b in zip(
        torch.autograd.grad(got, [x, w, bias]),
        torch.autograd.grad(expected, [x, w, bias]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_leading_dimensions_are_free_and_a_shift_is_a_slice(batch: HeadBatch) -> None:
    w, ref = batch.w, near_reference(batch)
    x4, y4, ref4 = (t.view(2, 3, *t.shape[1:]) for t in (batch.x, batch.y, ref))
    flat = (batch.x.flatten(0, 1), w, batch.y.flatten(), ref.flatten())
    each = fused_losses.linear_pearson_loss(*flat, reduction="none")
    assert torch.equal(
        fused_losses.linear_pearson_loss(x4, w, y4, ref4, reduction="none"), each.view(2, 3, T)
    )
    shifted = fused_losses.linear_pearson_loss(x4, w, y4, ref4, reduction="none", shift=True)
    by_hand = fused_losses.linear_pearson_loss(
        x4[..., :-1, :], w, y4[..., 1:], ref4[..., 1:], reduction="none"
    )
    assert torch.count_nonzero(shifted[..., 0]) == 0
    torch.testing.assert_close(shifted[..., 1:], by_hand)


def test_a_mask_that_keeps_one_token_of_4096_gives_the_right_gradient() -> None:
    x, w = torch.randn(4096, D), torch.randn(V, D)
    y = torch.full((4096,), IGNORED)
    y[1234] = 7
    leaves = HeadBatch(x, w, y).leaves()
    loss = fused_losses.linear_mle_loss(leaves.x, leaves.w, leaves.y)
    dx, dw = gradients(loss, leaves)
    one = HeadBatch(x[1234:1235].double(), w.double(), y[1234:1235]).leaves()
    expected = F.cross_entropy(one.x @ one.w.T, one.y)
    dx_one, dw_one = gradients(expected, one)
    assert relative_error(loss, expected) <= 1e-6
    assert relative_error(dx[1234], dx_one[0]) <= 1e-6
    assert relative_error(dw, dw_one) <= 1e-6
    assert torch.count_nonzero(dx.norm(dim=1)) == 1
    spent = gemm_flops(lambda: fused_losses.linear_mle_loss(leaves.x, leaves.w, leaves.y))
    # Forward of a call that will be differentiated makes the gradients too.
    assert spent == 6 * D * V
