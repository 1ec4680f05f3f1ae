"""Loss and gradients of the linear path against float64: N1 and N4 to N7 of the criteria.

Truth is float64 on the same rounded inputs; gradients may be wrong by at most twice what eager
torch is in the same dtype, and never by more than the caps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_oracle import (
    IGNORED,
    HeadBatch,
    gradients,
    head_batch,
    near_reference,
    relative_error,
    row_errors,
)
from torch import Tensor

import fused_losses
from fused_losses import reference
from fused_losses.engine import head as head_products

CAPS = {torch.float32: 5e-6, torch.bfloat16: 2.5e-3, torch.float16: 3e-4}
EAGER_FACTOR = 2.0
MEMBERS = list(fused_losses.TOKEN_LOSSES)

Loss = Callable[..., Tensor]


def _squares(stats: fused_losses.TokenStats, rows: Tensor) -> Tensor:
    return (stats.logps**2).sum() / 50.0 + 0.1 * stats.lse.sum()


def _stats_loss(module: Any, batch: HeadBatch, ref: Tensor, **options: Any) -> Tensor:
    stats = module.linear_token_stats(batch.x, batch.w, batch.y, entropy=True, **options)
    return (stats.logps**2).mean() - stats.entropy.mean() + 0.1 * stats.lse.mean()


def _named(name: str) -> Callable[..., Tensor]:
    def loss(module: Any, batch: HeadBatch, ref: Tensor, **options: Any) -> Tensor:
        fn = getattr(module, f"linear_{name}")
        args = [] if name == "mle_loss" else [_squares] if name == "loss" else [ref]
        return fn(batch.x, batch.w, batch.y, *args, linear_bias=batch.bias, **options)

    return loss


LOSSES: dict[str, Loss] = {
    "mle": _named("mle_loss"),
    "hellinger": _named("hellinger_loss"),
    "dpo": _named("dpo_loss"),
    "linear_loss": _named("loss"),
    "statistics": _stats_loss,
}


class _Eager:
    """The losses as plain torch has them: a product in the batch's own dtype, then the rest."""

    @staticmethod
    def _call(fn: str, x: Tensor, w: Tensor, y: Tensor, *args: Any, **options: Any) -> Any:
        logits = F.linear(x, w, options.pop("linear_bias", None))
        return getattr(reference, fn)(logits, y, *args, **options)

    linear_mle_loss = partial(_call, "mle_loss")
    linear_hellinger_loss = partial(_call, "hellinger_loss")
    linear_dpo_loss = partial(_call, "dpo_loss")
    linear_token_stats = partial(_call, "token_stats")

    @staticmethod
    def linear_loss(x: Tensor, w: Tensor, y: Tensor, loss_fn: Any, **options: Any) -> Tensor:
        stats = _Eager.linear_token_stats(x, w, y, **options)
        rows = (y != IGNORED).flatten().nonzero()[:, 0]
        return loss_fn(
            fused_losses.TokenStats(*(None if t is None else t.flatten()[rows] for t in stats)),
            rows,
        )


def _as_eager_in_fp32(batch: HeadBatch) -> HeadBatch:
    # fp16 on a CPU computes in fp32, so eager fp32 is what it is measured by.
    return batch.to(torch.float32) if batch.x.dtype == torch.float16 else batch


def _check_gradients(loss: Loss, batch: HeadBatch, ref: Tensor, cap: float, **options: Any) -> None:
    """N4, whole and row by row."""
    dtype = batch.x.dtype
    exact = batch.to(torch.float64).leaves()
    truth = gradients(loss(reference, exact, ref), exact)
    rival = _as_eager_in_fp32(batch).leaves()
    eager = [g.to(dtype) for g in gradients(loss(_Eager, rival, ref), rival)]
    leaves = batch.leaves()
    got = gradients(loss(fused_losses, leaves, ref, **options), leaves)
    for name, g, e, t in zip(("dx", "dw"), got, eager, truth, strict=False):
        assert g.dtype == dtype
        error, rival_error = relative_error(g, t), relative_error(e, t)
        assert error <= EAGER_FACTOR * rival_error, (name, error, rival_error)
        assert error <= cap, name
        rows, rival_rows = row_errors(g, t).flatten(), row_errors(e, t).flatten()
        median = rival_rows[rival_rows > 0].median().item()
        ratio = rows / rival_rows.clamp(min=median)
        if dtype == torch.float32:
            # All words of a token share the error of its log-normaliser, and eager's may happen to
            # be tiny: a few rows of dw are beyond the factor, and ten times as many of eager's.
            beyond, eagers = (ratio > EAGER_FACTOR).sum(), (ratio < 1 / EAGER_FACTOR).sum()
            assert beyond <= 0.1 * eagers, name
            assert ratio.max() <= 16.0, name
        else:
            assert ratio.max() <= EAGER_FACTOR, name


@pytest.mark.parametrize("chunk_rows", [7, 40, 1000])
@pytest.mark.parametrize("dtype", list(CAPS), ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_within_twice_eagers_error(
    name: str, dtype: torch.dtype, chunk_rows: int
) -> None:
    T = 10 if name == "dpo" else 48
    batch = head_batch((10, T) if name == "dpo" else (2, T), 64, 1531, dtype=dtype)
    # A pair of 20 tokens needs more rows.
    rows = max(chunk_rows, 25) if name == "dpo" else chunk_rows
    options = {"workspace_bytes": rows * 1531 * 12}
    if dtype == torch.bfloat16 and name == "mle":
        # With logits in bf16 both are far off, and the same.
        _check_gradients(LOSSES[name], batch, near_reference(batch), 2e-2, **options)
        options["logits_dtype"] = torch.float32
    cap = CAPS[dtype]
    if dtype == torch.bfloat16:
        # Rounding dz and then dx to bf16 is 2.4e-3 by itself: a few tokens more or less.
        cap *= 1.1
    _check_gradients(LOSSES[name], batch, near_reference(batch), cap, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_rare_tokens_are_not_lost_in_the_sum_over_chunks(dtype: torch.dtype) -> None:
    """64 chunks, one rare token in the first of them: a 16-bit sum would round it away."""
    V, N, rare = 257, 512, 256
    batch = head_batch((N,), 32, V, dtype=dtype, ignored=0.0)
    batch.y.clamp_(max=rare - 1)
    batch.y[3] = rare
    ref = near_reference(batch)
    exact, leaves, rival = batch.to(torch.float64).leaves(), batch.leaves(), batch.leaves()
    mle = LOSSES["mle"]
    truth = gradients(mle(reference, exact, ref), exact)[1][rare]
    eager = gradients(mle(_Eager, rival, ref), rival)[1][rare]
    budget = 8 * V * (4 if dtype == torch.float32 else 6)
    plan = fused_losses.explain(mle, fused_losses, leaves, ref, workspace_bytes=budget)
    assert len(plan.chunks) >= 64
    got = gradients(mle(fused_losses, leaves, ref, workspace_bytes=budget), leaves)[1][rare]
    assert relative_error(got, truth) <= EAGER_FACTOR * relative_error(eager, truth)
    assert relative_error(got, truth) <= 2 * CAPS[dtype]


def test_the_rule_rejects_a_sum_in_16_bits() -> None:
    """What fp32 accumulation is for, seen by asking for the opposite."""
    batch = head_batch((512,), 32, 257, dtype=torch.bfloat16, ignored=0.0)
    exact, leaves = batch.to(torch.float64).leaves(), batch.leaves()
    truth = gradients(LOSSES["mle"](reference, exact, exact.x), exact)[1]
    errors = {}
    for accum_dtype in (torch.float32, torch.bfloat16):
        loss = LOSSES["mle"](
            fused_losses,
            leaves,
            leaves.x,
            workspace_bytes=8 * 257 * 6,
            accum_dtype=accum_dtype,
            logits_dtype=torch.float32,
        )
        errors[accum_dtype] = relative_error(gradients(loss, leaves)[1], truth)
    assert errors[torch.float32] <= CAPS[torch.bfloat16]
    assert errors[torch.bfloat16] > 2 * errors[torch.float32]


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_per_token_losses_are_within_n1_of_float64(name: str, dtype: torch.dtype) -> None:
    batch = head_batch((3, 20), 32, 999, dtype=dtype)
    ref = near_reference(batch)
    exact = batch.to(torch.float64)
    options: dict[str, Any] = {"loss": name, "reduction": "none"}
    truth = reference.linear_token_loss(exact.x, exact.w, exact.y, ref, **options)
    lse = reference.linear_token_stats(exact.x, exact.w, exact.y).lse
    got = fused_losses.linear_token_loss(
        batch.x, batch.w, batch.y, ref, logits_dtype=torch.float32, **options
    )
    assert got.dtype == torch.float32
    # The product in fp32 comes before N1: its error is that of D terms of this size.
    product = 2**-23 * 32**0.5 * exact.x.norm(dim=-1)
    # A ratio loss is Lipschitz in logp by its weight; the cap bounds it where r is negative.
    slope = 4.0 if name != "pearson" else 2.0
    bound = slope * (2**-22 * lse.abs() + 1e-5 + product)
    assert ((got - truth).abs() <= bound).all()


def test_fp32_gradients_do_not_depend_on_the_chunk_size() -> None:
    N, V = 24, 131
    batch = head_batch((N,), 16, V, ignored=0.0)
    # A product's own rounding depends on its number of rows; logits of modest size keep it small.
    batch.x.mul_(0.25)
    ref = near_reference(batch)
    found = {}
    for rows in range(1, N + 1):
        # Logits, hidden states times a factor, five times the results; a hidden state to spare.
        budget = rows * (V * 4 + 16 * 4 + 5 * 10 * 4) + 16 * 4
        for name in ("mle", "hellinger"):
            leaves = batch.leaves()
            plan = fused_losses.explain(
                LOSSES[name], fused_losses, leaves, ref, workspace_bytes=budget
            )
            assert max(plan.chunks) <= rows
            loss = LOSSES[name](fused_losses, leaves, ref, workspace_bytes=budget)
            found[name, rows] = [loss, *gradients(loss, leaves)]
    for (name, _), got in found.items():
        whole = found[name, N]
        assert abs(got[0] - whole[0]) <= 2**-22 * abs(whole[0]) + 1e-5
        assert relative_error(got[1], whole[1]) <= 1e-6
        assert relative_error(got[2], whole[2]) <= 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_the_same_call_gives_the_same_bits(name: str, backend: str) -> None:
    batch = head_batch((4, 3), 8, 45) if backend == "triton" else head_batch((4, 30), 32, 701)
    ref = near_reference(batch)
    rows = 8 if name == "dpo" and backend == "triton" else 70
    options = {"backend": backend, "workspace_bytes": rows * batch.w.shape[0] * 8}
    runs = []
    for _ in range(3):
        leaves = batch.leaves()
        loss = LOSSES[name](fused_losses, leaves, ref, **options)
        runs.append([loss, *gradients(loss, leaves)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_the_kernels_give_what_the_reference_gives(name: str, dtype: torch.dtype) -> None:
    batch = head_batch((4, 3), 8, 37, dtype=dtype, bias=name != "statistics")
    ref = near_reference(batch)
    exact = batch.to(torch.float64).leaves()
    leaves = batch.leaves()
    truth = LOSSES[name](reference, exact, ref.double())
    options: dict[str, Any] = {"backend": "triton", "logits_dtype": None}
    if dtype == torch.bfloat16:
        options["logits_dtype"] = torch.float32
    loss = LOSSES[name](fused_losses, leaves, ref, **options)
    tolerance = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    assert relative_error(loss, truth) <= min(tolerance, 1e-4)
    for got, expected in zip(gradients(loss, leaves), gradients(truth, exact), strict=True):
        assert got.dtype == dtype
        assert relative_error(got, expected) <= tolerance


def _differentiable(case: str, backend: str, dtype: torch.dtype) -> tuple[Any, list[Tensor]]:
    """A function of (x, w, bias[, value]) in float64 and points to differentiate it at."""
    batch = head_batch((4, 2), 3, 6, dtype=dtype, ignored=0.25, bias=True).leaves()
    assert batch.bias is not None
    ref = near_reference(batch).to(dtype)
    y = batch.y
    shared: dict[str, Any] = {"backend": backend, "workspace_bytes": 2 * 600, "softcap": 30.0}
    value = torch.full((4, 1), 0.2, dtype=dtype, requires_grad=True)
    inputs = [(0.2 * batch.x).detach().requires_grad_(), batch.w, batch.bias]

    def fused(x: Tensor, w: Tensor, b: Tensor, *v: Tensor) -> Any:
        options = {"linear_bias": b, **shared}
        if case == "mle":
            return fused_losses.linear_mle_loss(
                x, w, y, label_smoothing=0.1, z_loss=0.01, **options
            )
        if case in ("value", "value, none"):
            reduction = "mean" if case == "value" else "none"
            return fused_losses.linear_hellinger_loss(
                x, w, y, ref, beta=0.5, value=v[0], reduction=reduction, **options
            )
        if case == "value, sequence":
            return fused_losses.linear_pearson_loss(
                x, w, y, ref, value=v[0][:, 0], level="sequence", **options
            )
        if case == "dpo":
            return fused_losses.linear_dpo_loss(x, w, y, ref, beta=0.5, **options)
        if case == "units":
            return fused_losses.linear_loss(
                x, w, y, lambda s, r: (s.logps**2).sum() + s.entropy.sum(), entropy=True, **options
            )
        stats = fused_losses.linear_token_stats(x, w, y, entropy=case == "entropy", **options)
        return tuple(t for t in stats[:3] if t is not None)

    return fused, inputs + ([value] if case.startswith("value") else [])


GRADCHECKS = [
    "mle",
    "value",
    "value, none",
    "value, sequence",
    "dpo",
    "units",
    "stats",
    "entropy",
]


@pytest.mark.parametrize("case", GRADCHECKS)
def test_gradcheck_of_every_route(case: str, backend: str) -> None:
    fn, inputs = _differentiable(case, backend, torch.float64)
    assert torch.autograd.gradcheck(fn, inputs, fast_mode=backend == "triton")


@pytest.mark.parametrize("case", ["mle", "value, none", "units", "stats", "entropy"])
def test_gradcheck_with_a_frozen_head(case: str, backend: str) -> None:
    fn, inputs = _differentiable(case, backend, torch.float64)
    inputs[1:3] = [t.detach() for t in inputs[1:3]]
    assert torch.autograd.gradcheck(fn, inputs, fast_mode=backend == "triton")


def test_gradients_are_not_flushed_for_confident_targets() -> None:
    w = torch.eye(4)
    x = torch.zeros(4, 4)
    x[torch.arange(4), torch.arange(4)] = torch.tensor([5.0, 12.0, 14.0, 17.0])
    batch = HeadBatch(x, w, torch.arange(4))
    exact, leaves = batch.to(torch.float64).leaves(), batch.leaves()
    truth = gradients(LOSSES["mle"](reference, exact, x), exact)[0]
    got = gradients(LOSSES["mle"](fused_losses, leaves, x), leaves)[0]
    # Row by row: the last one is a millionth of the first.
    for row, expected in zip(got, truth, strict=True):
        assert relative_error(row, expected) <= 1e-5


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 5), (5, 1, 9), (3, 13, 1), (33, 17, 1025)])
def test_odd_and_single_sizes(shape: tuple[int, int, int], backend: str) -> None:
    N, D, V = shape
    batch = head_batch((N,), D, V, ignored=0.0, bias=True)
    if backend == "triton":
        batch = HeadBatch(batch.x[:4], batch.w, batch.y[:4], batch.bias)
    exact, leaves = batch.to(torch.float64).leaves(), batch.leaves()
    truth = LOSSES["mle"](reference, exact, exact.x)
    loss = LOSSES["mle"](fused_losses, leaves, leaves.x, backend=backend)
    assert relative_error(loss, truth) <= 1e-5
    for got, expected in zip(gradients(loss, leaves), gradients(truth, exact), strict=True):
        assert (got - expected).norm() <= 1e-5 * expected.norm() + 1e-7


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("sizes", [(3, 50, 5), (40, 6, 4), (4, 6, 40), (5, 1, 5)], ids=str)
def test_a_product_in_blocks_is_the_product(
    sizes: tuple[int, int, int], accumulate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The sum, the rows or the columns are the longest: each is cut in its own way.
    monkeypatch.setattr(head_products, "_BLOCK_BYTES", 300)
    rows, summed, columns = sizes
    a, b = torch.randn(rows, summed).bfloat16(), torch.randn(summed, columns).bfloat16()
    out = torch.randn(rows, columns)
    expected = a.double() @ b.double() + accumulate * out.double()
    head_products._product(a, b, out, accumulate=accumulate)
    assert relative_error(out, expected) < 1e-6


def test_logits_of_16_bit_operands_are_fp32_where_a_reference_is_compared() -> None:
    batch = head_batch((40,), 64, 500, dtype=torch.bfloat16)
    exact = batch.to(torch.float64)
    truth = reference.linear_token_stats(exact.x, exact.w, exact.y).logps
    stats = fused_losses.linear_token_stats
    precise = stats(batch.x, batch.w, batch.y).logps
    rounded = stats(batch.x, batch.w, batch.y, logits_dtype=torch.bfloat16).logps
    assert (precise - truth).abs().max() <= 2e-5
    assert (rounded - truth).abs().max() > 100 * (precise - truth).abs().max()
