"""``with_stats`` and ``explain``: looking at a call without changing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from linear_oracle import gemm_flops, gradients, head_batch, near_reference
from torch import Tensor

import fused_losses
from fused_losses import PairStats, TokenStats, reference
from fused_losses.functional import observe

B, T, D, V = 4, 7, 8, 41
BATCH = head_batch((B, T), D, V, bias=True)
REFERENCE = near_reference(BATCH)
LOGITS = BATCH.x @ BATCH.w.T + BATCH.bias

TOKEN = ["mle_loss", "pearson_loss", "hellinger_loss", "token_loss"]
NAMES = [*TOKEN, "dpo_loss", *(f"linear_{name}" for name in (*TOKEN, "dpo_loss"))]
# A few rows a chunk; a pair of 14 tokens still fits, beside the scratch that entropy takes.
BUDGET = 14 * (V * 12 + 2 * D * 4 + 5 * 10 * 4)


def _arguments(name: str, leaves: Any, logits: Tensor) -> list[Any]:
    linear = name.startswith("linear_")
    args = [leaves.x, leaves.w, leaves.y] if linear else [logits, leaves.y]
    return args if name.endswith("mle_loss") else [*args, REFERENCE]


def _options(name: str, **more: Any) -> dict[str, Any]:
    if not name.startswith("linear_"):
        return more
    return {"linear_bias": BATCH.bias, "workspace_bytes": BUDGET, **more}


def _variants(name: str) -> list[dict[str, Any]]:
    shared: list[dict[str, Any]] = [{}, {"reduction": "none"}, {"shift": True, "softcap": 20.0}]
    if name.endswith(("pearson_loss", "hellinger_loss")):
        shared.append({"level": "sequence"})
    return shared


def _assert_stats(got: TokenStats, options: dict[str, Any]) -> None:
    transform = {k: v for k, v in options.items() if k in ("shift", "softcap")}
    truth = reference.token_stats(LOGITS.double(), BATCH.y, entropy=True, **transform)
    assert got.entropy is not None
    for a, b in zip(got[:3], truth[:3], strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=2e-5)
    assert torch.equal(got.is_top1, truth.is_top1)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_and_its_gradients_stay_what_they_are(name: str) -> None:
    fn = getattr(fused_losses, name)
    for variant in _variants(name):
        results = []
        for watched in (False, True):
            leaves = BATCH.leaves(bias=False)
            logits = LOGITS.clone().requires_grad_()
            args, options = _arguments(name, leaves, logits), _options(name, **variant)
            if watched:
                loss, _ = fused_losses.with_stats(fn, *args, **options)
            else:
                loss = fn(*args, **options)
            wanted = [leaves.x, leaves.w] if name.startswith("linear_") else [logits]
            results.append([loss, *torch.autograd.grad(loss.sum(), wanted)])
        (plain, *expected), (loss, *found) = results
        # Entropy takes scratch and may make the chunks smaller, and with them other products.
        torch.testing.assert_close(loss, plain, rtol=2e-6, atol=1e-5)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_where_the_chunks_are_the_same_the_loss_is_bitwise_the_same(name: str) -> None:
    fn = getattr(fused_losses, name)
    leaves = BATCH.leaves(bias=False)
    args = _arguments(name, leaves, LOGITS.clone().requires_grad_())
    options = {"linear_bias": BATCH.bias} if name.startswith("linear_") else {}
    loss, _ = fused_losses.with_stats(fn, *args, **options)
    assert torch.equal(loss, fn(*args, **options))


@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_those_of_the_reference_and_detached(name: str) -> None:
    fn = getattr(fused_losses, name)
    for variant in _variants(name):
        leaves = BATCH.leaves(bias=False)
        args = _arguments(name, leaves, LOGITS.clone().requires_grad_())
        loss, stats = fused_losses.with_stats(fn, *args, **_options(name, **variant))
        assert loss.requires_grad
        tokens = TokenStats(*stats[:4])
        assert isinstance(stats, PairStats) == name.endswith("dpo_loss")
        _assert_stats(tokens, variant)
        assert not any(t.requires_grad for t in tokens if t is not None)


@pytest.mark.parametrize("name", ["dpo_loss", "linear_dpo_loss"])
@pytest.mark.parametrize("per_token", [True, False])
def test_pair_statistics_are_sums_and_rewards(name: str, per_token: bool) -> None:
    fn = getattr(fused_losses, name)
    args = _arguments(name, BATCH.leaves(bias=False), LOGITS)
    ref = REFERENCE.nan_to_num(0.0)
    args[-1] = ref if per_token else ref.sum(1)
    _, stats = fused_losses.with_stats(fn, *args, **_options(name, beta=0.3))
    assert isinstance(stats, PairStats)
    sums = reference.token_stats(LOGITS.double(), BATCH.y).logps.sum(1)
    rewards = 0.3 * (sums - ref.double().sum(1))
    got = torch.cat([stats.chosen_logps, stats.rejected_logps])
    torch.testing.assert_close(got, sums.float(), rtol=1e-5, atol=1e-4)
    got = torch.cat([stats.chosen_rewards, stats.rejected_rewards])
    torch.testing.assert_close(got, rewards.float(), rtol=1e-4, atol=1e-4)
    assert not any(t.requires_grad for t in stats[:4])


LINEAR = [name for name in NAMES if name.startswith("linear_")]


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in LINEAR]
    + [(name, {"reduction": "none"}) for name in LINEAR]
    + [("linear_pearson_loss", {"level": "sequence"})]
    + [("linear_pearson_loss", {"level": "sequence", "reduction": "none"})],
    ids=lambda value: value if isinstance(value, str) else "-".join(value.values()),
)
@pytest.mark.parametrize("frozen", [False, True])
def test_statistics_cost_no_product(name: str, options: dict[str, Any], frozen: bool) -> None:
    fn = getattr(fused_losses, name)

    def spent(call: Callable[..., Any], *first: Any) -> int:
        leaves = BATCH.leaves(w=not frozen, bias=False)
        args = _arguments(name, leaves, LOGITS)

        def run() -> None:
            out = call(*first, *args, **_options(name, **options))
            loss = out[0] if isinstance(out, tuple) else out
            gradients(loss.sum(), leaves)

        return gemm_flops(run)

    assert spent(fused_losses.with_stats, fn) == spent(fn) > 0


def test_a_module_can_be_watched() -> None:
    module = fused_losses.LinearHellingerLoss(beta=0.5, linear_bias=BATCH.bias)
    args = (BATCH.x, BATCH.w, BATCH.y, REFERENCE)
    loss, stats = fused_losses.with_stats(module, *args)
    assert torch.equal(loss, module(*args))
    assert isinstance(stats, TokenStats)
    _assert_stats(stats, {})


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("trained", [{}, {"w": False}], ids=["head trained", "head frozen"])
def test_a_loss_of_ones_own_can_be_watched(trained: dict[str, bool], entropy: bool) -> None:
    seen: list[bool] = []

    def own(stats: TokenStats, rows: Tensor) -> Tensor:
        seen.append(stats.entropy is not None)  # what it gets does not depend on the watcher
        return (stats.logps**2).sum()

    options = _options("linear_loss", shift=True, softcap=20.0, entropy=entropy)
    results = []
    for watched in (False, True):
        leaves = BATCH.leaves(bias=False, **trained)
        args = (leaves.x, leaves.w, leaves.y, own)
        if watched:
            loss, stats = fused_losses.with_stats(fused_losses.linear_loss, *args, **options)
        else:
            loss = fused_losses.linear_loss(*args, **options)
        results.append([loss, *gradients(loss, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert set(seen) == {entropy}
    assert isinstance(stats, TokenStats)
    _assert_stats(stats, options)
    assert not any(t.requires_grad for t in stats if t is not None)


@pytest.mark.usefixtures("device")
def test_the_kernels_tell_the_same() -> None:
    small = head_batch((2, 3), 4, 9)
    results = [
        fused_losses.with_stats(
            fused_losses.linear_mle_loss, small.x, small.w, small.y, backend=backend
        )
        for backend in ("torch", "triton")
    ]
    (a, torch_stats), (b, triton_stats) = results
    torch.testing.assert_close(a, b)
    for x, y in zip(torch_stats, triton_stats, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_what_has_no_statistics_is_refused_by_name() -> None:
    args = (BATCH.x, BATCH.w, BATCH.y)
    with pytest.raises(TypeError, match="got linear_token_stats"):
        fused_losses.with_stats(fused_losses.linear_token_stats, *args)
    with pytest.raises(TypeError, match="got preference_loss"):
        fused_losses.with_stats(fused_losses.preference_loss, torch.zeros(2), torch.zeros(2))
    with pytest.raises(TypeError, match="got preference_loss"):
        fused_losses.explain(fused_losses.preference_loss, torch.zeros(2), torch.zeros(2))


def test_an_error_ends_the_watching() -> None:
    args = (BATCH.x, BATCH.w, BATCH.y)
    for look in (fused_losses.with_stats, fused_losses.explain):
        with pytest.raises(ValueError, match="temperature"):
            look(fused_losses.linear_mle_loss, *args, temperature=-1.0)
        # Nobody watches any more: a call that is only explained would not return.
        assert not observe.statistics_wanted()
        assert torch.isfinite(fused_losses.linear_mle_loss(*args))
        look(fused_losses.linear_mle_loss, *args)
        assert not observe.statistics_wanted()


def test_each_watcher_gets_its_own_statistics() -> None:
    """A loss that itself watches another one, as a callback might."""
    args = (BATCH.x, BATCH.w, BATCH.y)
    inner: list[Any] = []

    def outer(*given: Any) -> Tensor:
        loss = fused_losses.linear_mle_loss(*given)
        inner.append(
            fused_losses.with_stats(fused_losses.linear_mle_loss, *given, temperature=2.0)[1]
        )
        inner.append(fused_losses.explain(fused_losses.linear_mle_loss, *given))
        return loss

    _, stats = fused_losses.with_stats(outer, *args)
    expected = reference.linear_token_stats(*args)
    torch.testing.assert_close(stats.logps, expected.logps, rtol=1e-5, atol=1e-5)
    heated = reference.linear_token_stats(*args, temperature=2.0)
    torch.testing.assert_close(inner[0].logps, heated.logps, rtol=1e-5, atol=1e-5)
    assert inner[1].route == "forward"


@pytest.mark.parametrize("name", [*NAMES, "token_stats", "linear_token_stats"])
def test_explain_runs_nothing(name: str) -> None:
    fn = getattr(fused_losses, name)
    leaves = BATCH.leaves(bias=False)
    logits = LOGITS.clone().requires_grad_()
    args = _arguments(name, leaves, logits)
    if name.endswith("token_stats"):
        args = args[:-1]
    plans = []
    flops = gemm_flops(lambda: plans.append(fused_losses.explain(fn, *args, **_options(name))))
    assert flops == 0
    (plan,) = plans
    assert isinstance(plan, fused_losses.Plan)
    assert plan.tokens == BATCH.counted
    assert plan.vocabulary == V
    assert plan.backend == "torch"
    assert (plan.route == "logits") == (not name.startswith("linear_"))
    assert plan.has_gradient or plan.route in ("logits", "recompute")
    assert leaves.x.grad is None
    assert logits.grad is None


def test_explain_takes_modules_and_obeys_no_grad() -> None:
    leaves = BATCH.leaves()
    args = (leaves.x, leaves.w, leaves.y)
    assert fused_losses.explain(fused_losses.LinearMLELoss(), *args).route == "token"
    with torch.no_grad():
        assert fused_losses.explain(fused_losses.LinearMLELoss(), *args).route == "forward"


def test_watching_is_eager_and_says_so() -> None:
    def watched(x: Tensor) -> Tensor:
        return fused_losses.with_stats(fused_losses.linear_mle_loss, x, BATCH.w, BATCH.y)[0]

    torch._dynamo.reset()
    with pytest.raises(Exception, match="with_stats is eager only"):
        torch.compile(watched, fullgraph=True, backend="aot_eager")(BATCH.x)
