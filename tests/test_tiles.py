"""Ranges of the vocabulary instead of whole rows: the same statistics, losses and gradients."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from linear_oracle import gradients, head_batch, near_reference, relative_error
from test_exponentials import V, adversarial_rows, small_blocks, truth
from torch import Tensor

import fused_losses
from fused_losses import reference
from fused_losses.backends import Coefficients, Objective, RowMaths, lines, load_backend
from fused_losses.plan import forced_route
from fused_losses.token_losses import TOKEN_LOSSES

__all__ = ["small_blocks"]
CUTS = [[0, V], [0, 1, V], [0, 20, 40, V], [0, 16, 17, 48, 60, V]]


def in_ranges(
    backend: str, z: Tensor, y: Tensor, cuts: list[int], **options: Any
) -> tuple[Tensor, Tensor]:
    """Rows of a pass range after range, and all exponentials, brought to the last shift."""
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    rows = torch.full((lines.LINES, len(y)), math.nan, dtype=wide)
    pieces: list[Tensor] = []
    for start, stop in itertools.pairwise(cuts):
        before = rows[lines.SHIFT].clone()
        piece = z[:, start:stop].clone()
        e = torch.full_like(piece, math.nan)
        load_backend(backend).row_pass(
            piece, y, rows, ignore_index=-100, exponentials=e, first_column=start,
            vocabulary=z.shape[1], **options,
        )  # fmt: skip
        if pieces:
            factor = torch.where(
                before == rows[lines.SHIFT], 1.0, (before - rows[lines.SHIFT]).exp()
            )
            pieces = [p * factor[:, None] for p in pieces]
        pieces.append(e.double())
    return rows, torch.cat(pieces, 1)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("cap", [None, 50.0])
def test_adversarial_rows_are_right_in_any_ranges(backend, cuts, cap):
    z, y = adversarial_rows()
    if cap is not None:
        z = z.clamp(-200, 200)
    maths = RowMaths(softcap=cap)
    rows, e = in_ranges(backend, z, y, cuts, maths=maths, entropy=True, top1=True)
    logp, lse, entropy, gradient = truth(z, y, cap)
    torch.testing.assert_close(rows[lines.LOGP], logp, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(rows[lines.LSE], lse, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(rows[lines.ENTROPY], entropy, rtol=1e-9, atol=1e-9)
    first_maximum = z.argmax(1) == y if cap is None else (cap * torch.tanh(z / cap)).argmax(1) == y
    assert torch.equal(rows[lines.TOP1] != 0, first_maximum)
    # The target's entry is not known before the last range: 0 until then.
    expected = gradient.scatter(1, y[:, None], 0.0) if len(cuts) > 2 else gradient
    found = e / rows[lines.SUM][:, None]
    assert (found - expected).abs().max() < 1e-11


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("top", [-1e4, -200.0, 0.0, 90.0])
def test_rows_whose_first_logits_are_minus_infinity_are_right_in_any_ranges(backend, cuts, top):
    # Nothing to take a shift from for a long time, and then numbers at any height.
    g = torch.Generator().manual_seed(4)
    z = top - torch.rand(4, V, generator=g, dtype=torch.float64)
    z[:, :35] = -math.inf
    z[:, 40] = top
    z[3, 58] = top + 30.0  # a second time too low
    y = torch.tensor([36, 40, 60, 41])
    rows, e = in_ranges(backend, z, y, cuts, maths=RowMaths(), entropy=True, top1=True)
    logp, lse, entropy, gradient = truth(z, y)
    torch.testing.assert_close(rows[lines.LOGP], logp, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(rows[lines.LSE], lse, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(rows[lines.ENTROPY], entropy, rtol=1e-9, atol=1e-9)
    assert rows[lines.TOP1].tolist() == [0.0, 1.0, 0.0, 0.0]
    expected = gradient.scatter(1, y[:, None], 0.0) if len(cuts) > 2 else gradient
    assert (e / rows[lines.SUM][:, None] - expected).abs().max() < 1e-11


@pytest.mark.parametrize("cuts", CUTS[2:], ids=str)
def test_rows_that_rise_a_little_are_right_in_any_ranges(backend, cuts):
    """By so little that what came before still counts where the shift has moved."""
    g = torch.Generator().manual_seed(5)
    z = torch.randn(3, V, generator=g, dtype=torch.float64)
    z += torch.tensor([0.0, 4.75, 9.0]).repeat_interleave(21)[:V]
    y = torch.tensor([3, 30, 55])
    smoothed = Objective(TOKEN_LOSSES["mle"], label_smoothing=0.25)
    rows, _ = in_ranges(backend, z, y, cuts, maths=RowMaths(), objective=smoothed, entropy=True)
    logp, lse, entropy, _ = truth(z, y)
    loss = -0.75 * logp - 0.25 * z.log_softmax(1).mean(1)
    for line, exact in (
        (lines.LOGP, logp), (lines.LSE, lse), (lines.ENTROPY, entropy), (lines.LOSS, loss)
    ):  # fmt: skip
        torch.testing.assert_close(rows[line], exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tie", [0, 8, 16, 60])
def test_top1_is_the_first_of_equal_logits_in_any_ranges(backend, tie):
    y = torch.tensor([0, 3, 7, 8, 9, 15, 16, 17, 20, 40, 60])
    z = torch.zeros(len(y), V)
    z[:, tie] = 2.0
    z[torch.arange(len(y)), y] = 2.0  # its own column, before or after the other
    for cuts in CUTS:
        rows, _ = in_ranges(backend, z, y, cuts, maths=RowMaths(), top1=True)
        assert torch.equal(rows[lines.TOP1] != 0, y <= tie)


@pytest.mark.parametrize("cuts", CUTS[1:], ids=str)
def test_a_loss_with_options_is_the_same_in_ranges(backend, cuts):
    g = torch.Generator().manual_seed(1)
    z = 3 * torch.randn(5, V, generator=g, dtype=torch.float64)
    y = torch.tensor([0, 60, 33, -100, V + 3])
    objective = Objective(TOKEN_LOSSES["mle"], label_smoothing=0.2, z_loss=0.1)
    options = dict(maths=RowMaths(scale=0.7, softcap=5.0, temperature=1.3), objective=objective)
    whole, _ = in_ranges(backend, z, y, [0, V], **options)
    rows, _ = in_ranges(backend, z, y, cuts, **options)
    # Shifts may differ, and with them the sums: together they are lse.
    own = [n for n in range(lines.LINES) if n not in (lines.SHIFT, lines.SUM)]
    torch.testing.assert_close(rows[own], whole[own], equal_nan=True, rtol=1e-12, atol=1e-12)
    assert (rows[:, 3] == 0).all()
    assert rows[[lines.LOSS, lines.LOGP, lines.DLOGP], 4].isnan().all()


@pytest.mark.parametrize("column", [2, 40, 60])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_logit_shows_whichever_range_holds_it(backend, value, column):
    z = torch.randn(2, V)
    z[0, column] = value
    rows, _ = in_ranges(backend, z, torch.tensor([7, 7]), CUTS[-1], maths=RowMaths())
    assert rows[lines.LOGP, 0].isnan()
    assert rows[lines.LOGP, 1].isfinite()


@pytest.mark.parametrize("cuts", CUTS[1:], ids=str)
def test_a_row_gradient_in_ranges_is_that_of_whole_rows(backend, cuts):
    g = torch.Generator().manual_seed(2)
    z = 3 * torch.randn(5, V, generator=g, dtype=torch.float64)
    y = torch.tensor([0, 60, 33, -100, 20])
    maths = RowMaths(softcap=4.0)
    rows, _ = in_ranges(backend, z, y, [0, V], maths=maths, entropy=True)
    c = Coefficients(*torch.randn(4, 5, generator=g, dtype=torch.float64))
    row_gradient = load_backend(backend).row_gradient
    whole = torch.full_like(z, math.nan)
    row_gradient(z, y, rows, c, maths=maths, ignore_index=-100, dz=whole)
    for start, stop in itertools.pairwise(cuts):
        dz = torch.full((5, stop - start), math.nan, dtype=torch.float64)
        row_gradient(
            z[:, start:stop], y, rows, c, maths=maths, ignore_index=-100, dz=dz,
            first_column=start, vocabulary=V,
        )  # fmt: skip
        torch.testing.assert_close(dz, whole[:, start:stop], rtol=1e-13, atol=1e-15)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "capped": {"softcap": 20.0, "logit_scale": 0.8, "temperature": 1.2},
    "z-loss": {"z_loss": 0.01, "softcap": 20.0},
    "smoothed": {"label_smoothing": 0.1, "logit_scale": 0.5},
    "smoothed and capped": {"label_smoothing": 0.1, "softcap": 20.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("route", ["token", "recompute", "frozen"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_route_gives_the_reference_on_a_tight_budget(backend, route, options, reduction):
    rows, words = (6, 301) if backend == "triton" else (40, 701)
    batch = head_batch((rows,), 8, words, dtype=torch.float64, bias=True)
    frozen = route == "frozen"
    g = torch.Generator().manual_seed(3)
    upstream = torch.randn(rows if reduction == "none" else (), generator=g, dtype=torch.float64)
    results = []
    for module in (reference, fused_losses):
        leaves = batch.leaves(w=not frozen, bias=not frozen)
        given: dict[str, Any] = {}
        if module is fused_losses:
            tight = 256 * 8 * (2 if backend == "triton" else 12)
            given = {"workspace_bytes": tight, "backend": backend}
            plan = fused_losses.explain(
                fused_losses.linear_mle_loss, leaves.x, leaves.w, leaves.y,
                linear_bias=leaves.bias, reduction=reduction, **options, **given,
            )  # fmt: skip
            assert len(plan.chunks) * len(plan.columns) > 1
        with forced_route(route):
            loss = module.linear_mle_loss(
                leaves.x, leaves.w, leaves.y, linear_bias=leaves.bias, reduction=reduction,
                **options, **given,
            )  # fmt: skip
        results.append([loss, *gradients((loss * upstream).sum(), leaves)])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_log_probs_of_a_frozen_head_serve_any_use_of_them(backend):
    batch = head_batch((4, 3), 8, 301, dtype=torch.float64)
    results = []
    for module in (reference, fused_losses):
        leaves = batch.leaves(w=False)
        given = {} if module is reference else {"backend": backend, "workspace_bytes": 1024 * 8}
        stats = module.linear_token_stats(leaves.x, leaves.w, leaves.y, softcap=9.0, **given)
        loss = (stats.logps**2).sum() - 0.3 * (stats.lse.exp()).mean()
        results.append([loss, *gradients(loss, leaves)])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rise", [2.5, -2.5, 30.0])
def test_a_frozen_head_follows_a_shift_that_rises(backend, rise):
    batch = head_batch((4,), 8, 701, dtype=torch.float64, bias=True)
    batch.bias.add_(rise * (torch.arange(701) // 256))
    results = []
    for module in (reference, fused_losses):
        leaves = batch.leaves(w=False, bias=False)
        given = {} if module is reference else {"backend": backend, "workspace_bytes": 8000}
        args = (leaves.x, leaves.w, leaves.y)
        if given:
            plan = fused_losses.explain(
                fused_losses.linear_mle_loss, *args, linear_bias=leaves.bias, **given
            )
            assert (plan.route, len(plan.columns)) == ("frozen", 3)
        loss = module.linear_mle_loss(*args, linear_bias=leaves.bias, **given)
        results.append([loss, *gradients(loss, leaves)])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["dpo", "pearson"])
def test_a_frozen_head_needs_no_chunk_that_holds_a_whole_unit(name):
    batch = head_batch((4, 30), 16, 701)
    ref = near_reference(batch)
    fn = getattr(fused_losses, f"linear_{name}_loss")
    truth_fn = getattr(reference, f"linear_{name}_loss")
    level = {} if name == "dpo" else {"level": "sequence"}
    leaves, exact = batch.leaves(w=False), batch.to(torch.float64).leaves(w=False)
    tight = {"workspace_bytes": 5 * 701 * 4}
    plan = fused_losses.explain(fn, leaves.x, leaves.w, leaves.y, ref, **level, **tight)
    assert plan.route == "frozen"
    assert plan.flops == 4 * batch.ndv
    loss = fn(leaves.x, leaves.w, leaves.y, ref, **level, **tight)
    expected = truth_fn(exact.x, exact.w, exact.y, ref.double(), **level)
    assert abs(loss - expected) < 1e-5  # a sum of differences that cancel
    assert relative_error(*gradients(loss, leaves), *gradients(expected, exact)) < 5e-6


def test_a_confident_target_keeps_its_gradient_in_ranges():
    # 1 - p_y near 1e-6: subtracting the target's row from a mean that holds it would cancel.
    D, words = 16, 1000
    w = torch.nn.functional.normalize(torch.randn(words, D), dim=1)
    y = torch.tensor([3, 500, 999])
    x = (17.0 * w[y]).requires_grad_()
    exact = x.detach().double().requires_grad_()
    tight = {"workspace_bytes": 3 * 256 * 4}
    gradient = torch.autograd.grad(fused_losses.linear_mle_loss(x, w, y, **tight), x)[0]
    expected = torch.autograd.grad(reference.linear_mle_loss(exact, w.double(), y), exact)[0]
    for got, row in zip(gradient, expected, strict=True):
        assert relative_error(got, row) < 2e-5
