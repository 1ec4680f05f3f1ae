"""Every pair loss through the fused calls: cost, likelihood term, rewards, compilation, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
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
from fused_losses import reference
from fused_losses.preference import PAIR_LOSSES

B, T, D, V = 6, 9, 16, 83
# In float64: a pair fits, the batch of 36 tokens does not.
# Logits and their scratch, two hidden states, five times the results.
FEW_ROWS = 24 * (V * 8 + 2 * D * 4 + 5 * 10 * 4)
each_loss = pytest.mark.parametrize("loss_type", list(PAIR_LOSSES))


@pytest.fixture
def batch() -> HeadBatch:
    """Three pairs; every sequence has counted tokens."""
    return head_batch((B, T), D, V)


def _ref(batch: HeadBatch, loss_type: str) -> Tensor | None:
    return near_reference(batch) if takes_reference(loss_type) else None


def _same(module_results: list[list[Tensor]], bound: float) -> None:
    for a, b in zip(*module_results, strict=True):
        assert relative_error(a, b) <= bound


@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
@each_loss
def test_a_trained_head_costs_six_and_a_frozen_one_four(
    loss_type: str, sft_weight: float, batch: HeadBatch
) -> None:
    ref = _ref(batch, loss_type)
    options = {"sft_weight": sft_weight, **needed(loss_type)}
    dpo = fused_losses.linear_dpo_loss
    for trained, expected in ((True, 6.0), (False, 4.0)):
        leaves = batch.leaves(w=trained)
        args = (leaves.x, leaves.w, leaves.y, ref)
        spent = gemm_flops(lambda args=args: dpo(*args, **options).backward())
        plan = fused_losses.explain(dpo, *args, **options)
        assert spent / batch.ndv == pytest.approx(expected)
        assert plan.flops == spent
        assert plan.route == ("unit" if trained else plan.route)


def test_aot_that_does_not_fit_is_recomputed(batch: HeadBatch) -> None:
    leaves = batch.leaves()
    args = (leaves.x, leaves.w, leaves.y, near_reference(batch))
    plans = [
        fused_losses.explain(
            fused_losses.linear_dpo_loss, *args, loss_type=name, workspace_bytes=FEW_ROWS // 2
        )
        for name in ("aot", "sigmoid")
    ]
    assert [plan.route for plan in plans] == ["recompute", "unit"]


@pytest.mark.filterwarnings("ignore:.*no counted token")
@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("workspace_bytes", [None, FEW_ROWS])
def test_a_pair_without_tokens_takes_no_part_in_aots_order(
    batch: HeadBatch, workspace_bytes: int | None, per: str
) -> None:
    exact = batch.to(torch.float64)
    exact.y[[1, 4]] = IGNORED
    ref = near_reference(exact)
    ref = ref if per == "token" else ref.nan_to_num(0.0).sum(1)
    keep = [0, 2, 3, 5]
    results = []
    for rows in (list(range(B)), keep):
        leaves = exact.leaves()
        loss = fused_losses.linear_dpo_loss(
            leaves.x[rows], leaves.w, leaves.y[rows], ref[rows],
            loss_type="aot", workspace_bytes=workspace_bytes,
        )  # fmt: skip
        results.append([loss, *gradients(loss, leaves)])
    _same(results, 1e-12)
    logits = exact.x @ exact.w.T
    _same([[fused_losses.dpo_loss(logits, exact.y, ref, loss_type="aot")], [results[0][0]]], 1e-12)


SFT_OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "num_items": {"num_items": 8},
    "both divisors": {"num_items": 8, "sft_num_items": torch.tensor(50.0)},
    "only the term's": {"sft_num_items": 50},
    "of nothing": {"num_items": 0},
}


@pytest.mark.parametrize("loss_type", ["sigmoid", "aot", "orpo"])
@pytest.mark.parametrize("options", SFT_OPTIONS.values(), ids=SFT_OPTIONS)
def test_the_likelihood_term_is_the_references(
    options: dict[str, Any], loss_type: str, batch: HeadBatch
) -> None:
    exact = batch.to(torch.float64)
    ref = _ref(exact, loss_type)
    given = {**options, **needed(loss_type), "sft_weight": 0.7, "shift": True}
    truth = None
    for module, budget in ((reference, None), (fused_losses, None), (fused_losses, FEW_ROWS)):
        leaves = exact.leaves()
        loss = module.linear_dpo_loss(
            leaves.x, leaves.w, leaves.y, ref, workspace_bytes=budget, **given
        )
        found = [loss, *gradients(loss, leaves)]
        truth = found if truth is None else truth
        _same([found, truth], 1e-11)
    leaves = exact.leaves()
    loss = fused_losses.dpo_loss(leaves.x @ leaves.w.T, leaves.y, ref, **given)
    _same([[loss, *gradients(loss, leaves)], truth], 1e-11)


def test_the_likelihood_term_is_the_mean_over_the_chosen_tokens(batch: HeadBatch) -> None:
    x, w, y, ref = batch.x, batch.w, batch.y, near_reference(batch)
    dpo, mle = fused_losses.linear_dpo_loss, fused_losses.linear_mle_loss
    nll = mle(x[: B // 2], w, y[: B // 2])
    torch.testing.assert_close(dpo(x, w, y, ref, sft_weight=0.7), dpo(x, w, y, ref) + 0.7 * nll)
    # With num_items: the batch's own mean, weighted by its share of the pairs.
    torch.testing.assert_close(
        dpo(x, w, y, ref, sft_weight=0.7, num_items=12),
        dpo(x, w, y, ref, num_items=12) + 0.7 * nll * 3 / 12,
    )


def test_micro_batches_add_up_to_one_batch(batch: HeadBatch) -> None:
    ref = near_reference(batch)
    P = B // 2
    tokens = int((batch.y[:P] != IGNORED).sum())
    whole, parts = batch.leaves(), batch.leaves()
    one = fused_losses.linear_dpo_loss(whole.x, whole.w, whole.y, ref, sft_weight=0.7)
    total = sum(
        fused_losses.linear_dpo_loss(
            parts.x[[i, i + P]], parts.w, parts.y[[i, i + P]], ref[[i, i + P]],
            sft_weight=0.7, num_items=P, sft_num_items=tokens,
        )
        for i in range(P)
    )  # fmt: skip
    _same([[one, *gradients(one, whole)], [total, *gradients(total, parts)]], 1e-6)


@pytest.mark.filterwarnings("ignore:.*no counted token")
def test_without_chosen_tokens_the_likelihood_term_is_zero(batch: HeadBatch) -> None:
    y = batch.y.clone()
    y[: B // 2] = IGNORED
    args = (batch.x, batch.w, y, near_reference(batch))
    plain, joint = (fused_losses.linear_dpo_loss(*args, sft_weight=w) for w in (0.0, 1.0))
    assert torch.equal(plain, joint)


@each_loss
def test_stats_are_those_of_the_pass(loss_type: str, batch: HeadBatch) -> None:
    ref = _ref(batch, loss_type)
    options = {"beta": 0.3, **needed(loss_type)}
    logps = reference.linear_token_stats(batch.x, batch.w, batch.y).logps
    ratio = logps if ref is None else (logps - ref.nan_to_num(0.0))
    n = (batch.y != IGNORED).sum(1)
    scores = ratio.sum(1) / (n if loss_type in ("simpo", "orpo") else 1)
    P = B // 2
    logits = batch.x @ batch.w.T
    for fn, args in (
        (fused_losses.linear_dpo_loss, (batch.leaves().x, batch.w)),
        (fused_losses.dpo_loss, (logits,)),
    ):
        for more in ({"sft_weight": 0.5}, {"reduction": "none"}):
            loss, stats = fused_losses.with_stats(fn, *args, batch.y, ref, **options, **more)
            torch.testing.assert_close(loss, fn(*args, batch.y, ref, **options, **more))
            torch.testing.assert_close(stats.logps, logps, rtol=1e-4, atol=1e-4)
            for got, expected in (
                (stats.chosen_logps, logps.sum(1)[:P]),
                (stats.rejected_logps, logps.sum(1)[P:]),
                (stats.chosen_rewards, 0.3 * scores[:P]),
                (stats.rejected_rewards, 0.3 * scores[P:]),
            ):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
                assert not got.requires_grad


@pytest.mark.parametrize("loss_type", ["aot", "orpo"])
def test_dpo_compiles_without_a_graph_break(loss_type: str, batch: HeadBatch) -> None:
    ref = _ref(batch, loss_type)
    options = {"sft_weight": 0.5, **needed(loss_type)}

    def linear(x: Tensor, w: Tensor) -> Tensor:
        return fused_losses.linear_dpo_loss(x, w, batch.y, ref, **options)

    def logits(x: Tensor, w: Tensor) -> Tensor:
        return fused_losses.dpo_loss(x @ w.T, batch.y, ref, **options)

    for fn in (linear, logits):
        torch._dynamo.reset()
        results = []
        for call in (fn, torch.compile(fn, fullgraph=True, backend="aot_eager")):
            leaves = batch.leaves()
            loss = call(leaves.x, leaves.w)
            results.append([loss, *gradients(loss, leaves)])
        _same(results, 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "simpo"}, "loss_type='simpo' has no reference: ref_logps must be None"),
        ({"loss_type": "best"}, "loss_type must be one of 'sigmoid', .*'orpo', got 'best'"),
        ({"loss_type": "exo_pair"}, r"label_smoothing must be in \(0, 1\)"),
        ({"simpo_gamma": 0.5}, "simpo_gamma belongs to loss_type='simpo'"),
        (
            {"sft_weight": 0.5, "reduction": "none"},
            "sft_weight .*not taken with\\s*reduction='none'",
        ),
    ],
)
def test_a_mistake_is_named_by_both_forms_and_the_reference(
    options: dict[str, Any], message: str, batch: HeadBatch
) -> None:
    ref = near_reference(batch)
    for module in (fused_losses, reference):
        with pytest.raises(ValueError, match=message):
            module.linear_dpo_loss(batch.x, batch.w, batch.y, ref, **options)
        with pytest.raises(ValueError, match=message):
            module.dpo_loss(batch.x @ batch.w.T, batch.y, ref, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sft_weight": -0.1}, "sft_weight must be a finite number >= 0"),
        ({"sft_num_items": -1}, "sft_num_items must be a finite number >= 0"),
        ({"sft_num_items": 3, "reduction": "sum"}, "sft_num_items replaces the divisor"),
        ({"sft_num_items": torch.ones(2)}, "sft_num_items must be a number or a 0-d tensor"),
    ],
)
def test_a_bad_likelihood_term_is_named(
    options: dict[str, Any], message: str, batch: HeadBatch
) -> None:
    with pytest.raises(ValueError, match=message):
        fused_losses.linear_dpo_loss(batch.x, batch.w, batch.y, None, **options)


def test_modules_take_the_options_of_all_losses(batch: HeadBatch) -> None:
    options = {"sft_weight": 0.5, **CASES["simpo, wide"]}
    args = (batch.x, batch.w, batch.y, None)
    expected = fused_losses.linear_dpo_loss(*args, **options)
    assert torch.equal(fused_losses.LinearDPOLoss(**options)(*args), expected)
