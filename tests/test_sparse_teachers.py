"""Distillation from the teacher's likeliest words of each position."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from linear_oracle import (
    HeadBatch,
    NewTensors,
    gemm_flops,
    gradients,
    head_batch,
    memory_events,
    peak,
    relative_error,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fused_losses
from fused_losses import DIVERGENCES, Divergence, reference
from fused_losses.engine import workspace

B, T, D, V = 3, 7, 8, 37
FEW_ROWS = 4 * V * 4 * 9
BATCH = head_batch((B, T), D, V, bias=True)
FULL = (3.0 * torch.randn(B, T, V, generator=torch.Generator().manual_seed(2))).log_softmax(-1)
CASES: dict[str, dict[str, Any]] = {
    **{rest: {"rest": rest} for rest in ("ignore", "renormalise", "bucket")},
    **{f"bucket, {name}": {"rest": "bucket", "divergence": name} for name in DIVERGENCES[1:]},
    "all": {
        "rest": "bucket", "mle_weight": 0.3, "z_loss": 0.01, "softcap": 5.0, "temperature": 1.5,
        "shift": True, "num_items": 3,
    },
    "none": {"rest": "renormalise", "reduction": "none", "mle_weight": 0.5},
}  # fmt: skip


def _known(K: int) -> tuple[Tensor, Tensor]:
    """Ids and log-probs of the K likeliest words."""
    logps, ids = FULL.topk(K, dim=-1)
    device = torch.get_default_device()
    return ids.to(device), logps.to(device)


def _run(
    module: Any, batch: HeadBatch, K: int = 4, known: Any = None, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    ids, logps = known or _known(K)
    loss = module.linear_sparse_divergence_loss(
        batch.x, batch.w, ids, logps, batch.y, linear_bias=batch.bias, **options
    )
    up = torch.linspace(1.0, 2.0, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return loss, gradients((loss * up).sum(), batch) if loss.requires_grad else []


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("K", [1, 4, V])
def test_it_equals_the_specification_in_several_chunks(
    options: dict[str, Any], K: int, backend: str
) -> None:
    if backend == "triton" and K != 4:
        pytest.skip("kernels know no K: one is enough under the interpreter")
    batch, exact = BATCH.leaves(), BATCH.to(torch.float64).leaves()
    more = {"token_weight": torch.linspace(-1.0, 2.0, B * T).view(B, T), **options}
    got, found = _run(fused_losses, batch, K, backend=backend, workspace_bytes=FEW_ROWS, **more)
    want, truth = _run(reference, exact, K, **more)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-6)
    _, eager = _run(reference, BATCH.leaves(), K, **more)
    for mine, theirs, true in zip(found, eager, truth, strict=True):
        # Eager torch's may be far below the rounding of a single number.
        assert relative_error(mine, true) <= max(2.0 * relative_error(theirs, true), 2.0**-21)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_of_all_words_it_is_the_whole_teachers(divergence: Any) -> None:
    dense, sparse = BATCH.leaves(), BATCH.leaves()
    # The teacher's own head: one-hot hidden states give its log-probs.
    options = {"divergence": divergence, "linear_bias": dense.bias}
    want = fused_losses.linear_divergence_loss(
        dense.x, dense.w, FULL, torch.eye(V), dense.y, **options
    )
    got, found = _run(fused_losses, sparse, V, divergence=divergence, rest="bucket")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for g, t in zip(found, gradients(want, dense), strict=True):
        assert relative_error(g, t) <= 5e-5


def test_by_hand() -> None:
    # p = (1/2, 1/4, 1/4); the teacher says 1/2 for word 2, and 1/4 for word 0.
    x = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    w = torch.tensor([[0.5], [0.25], [0.25]], dtype=torch.float64).log().requires_grad_()
    ids, logps = torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.25]], dtype=torch.float64).log()
    two = 0.5 * math.log(2.0) + 0.25 * math.log(0.5)
    scaled = 2 / 3 * math.log(8 / 3) + 1 / 3 * math.log(2 / 3)
    values = {"ignore": two, "renormalise": scaled, "bucket": two + 0.25 * math.log(1.0)}
    # dz = p * sum(q) - q over the words that are named; the bucket's q counts where p has it.
    slopes = {
        "ignore": [0.375 - 0.25, 0.1875, 0.1875 - 0.5],
        "renormalise": [0.5 - 1 / 3, 0.25, 0.25 - 2 / 3],
        "bucket": [0.25, 0.0, -0.25],
    }
    for rest, value in values.items():
        loss = fused_losses.linear_sparse_divergence_loss(
            x, w, ids, logps, torch.tensor([0]), rest=rest
        )
        assert loss.item() == pytest.approx(value, abs=1e-12)
        (dw,) = torch.autograd.grad(loss, w)
        assert dw[:, 0].tolist() == pytest.approx(slopes[rest], abs=1e-12)


@pytest.mark.parametrize(
    ("rest", "name"),
    [("ignore", "forward_kl"), ("renormalise", "forward_kl"), ("bucket", "jensen_shannon"),
     ("bucket", "hellinger"), ("bucket", "total_variation")],
)  # fmt: skip
def test_gradcheck(rest: Any, name: Any, backend: str) -> None:
    batch = head_batch((3,), 3, 5, dtype=torch.float64, bias=True).leaves()
    full = torch.randn(3, 5, dtype=torch.float64).log_softmax(-1)
    logps, ids = full.topk(2)

    def call(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return fused_losses.linear_sparse_divergence_loss(
            x, w, ids, logps, batch.y, rest=rest, divergence=name, linear_bias=bias, backend=backend
        )

    inputs = (batch.x * 0.1, batch.w, batch.bias)
    assert torch.autograd.gradcheck(call, inputs, fast_mode=backend == "triton")


@pytest.mark.parametrize("rest", ["ignore", "renormalise", "bucket"])
def test_words_that_fill_up_count_for_nothing(rest: Any) -> None:
    batch = BATCH.leaves()
    ids, logps = _known(3)
    filled = torch.cat([ids, ids[..., :1], ids[..., :1] * 0], -1)
    nothing = torch.full((B, T, 2), -math.inf)
    got, found = _run(
        fused_losses, batch, known=(filled, torch.cat([logps, nothing], -1)), rest=rest
    )
    want, truth = _run(fused_losses, BATCH.leaves(), 3, rest=rest)
    torch.testing.assert_close(got, want)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b)
    none, found = _run(fused_losses, batch, known=(ids, torch.full_like(logps, -math.inf)))
    assert none == 0.0
    assert all(not g.any() for g in found)


def test_ids_and_log_probs_of_ignored_positions_are_never_read() -> None:
    ids, logps = (t.clone() for t in _known(4))
    want, truth = _run(fused_losses, BATCH.leaves())
    ids[BATCH.y == -100] = V + 7
    logps[BATCH.y == -100] = math.nan
    got, found = _run(fused_losses, BATCH.leaves(), known=(ids.int(), logps))
    assert torch.equal(got, want)
    for a, b in zip(found, truth, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("trained", ["all", "hidden", "nothing"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_products_are_6_4_and_2_ndv(trained: str, reduction: Any) -> None:
    batch = head_batch((B, T), D, V)
    leaves = batch.leaves(w=trained == "all") if trained != "nothing" else batch
    products = {"all": 6, "hidden": 4, "nothing": 2}[trained]
    products += 2 * (reduction == "none" and trained != "nothing")

    def run(rest: Any = "bucket") -> None:
        _run(fused_losses, leaves, rest=rest, reduction=reduction, workspace_bytes=FEW_ROWS)

    for rest in ("ignore", "bucket"):
        assert gemm_flops(functools.partial(run, rest)) == products * batch.ndv
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == products * batch.ndv
    args = (leaves.x, leaves.w, *_known(4), leaves.y)
    plan = fused_losses.explain(
        fused_losses.linear_sparse_divergence_loss, *args, reduction=reduction
    )
    assert plan.flops == products * batch.ndv


@pytest.mark.parametrize("rest", ["ignore", "bucket"])
def test_a_budget_of_1_mib_holds(rest: Any) -> None:
    N, D, V, budget = 300, 64, 3001, 2**20
    batch = head_batch((N,), D, V).leaves()
    logps, ids = torch.randn(N, V).log_softmax(-1).topk(64)

    def run() -> None:
        loss = fused_losses.linear_sparse_divergence_loss(
            batch.x, batch.w, ids, logps, batch.y, rest=rest, workspace_bytes=budget,
            divergence="jensen_shannon" if rest == "bucket" else "forward_kl",
        )  # fmt: skip
        gradients(loss, batch)

    workspace.release()
    with NewTensors(*batch.tensors) as seen:
        run()
    assert seen.largest <= budget
    workspace.release()
    kept = sum(t.numel() * t.itemsize for t in batch.tensors)
    # Checking the words takes a few tensors of their size.
    assert peak(memory_events(run)) <= kept + budget + 2**17
    assert batch.counted * V * 4 > 2 * budget


def test_without_a_bucket_a_chunk_holds_only_logits_and_so_more_rows() -> None:
    batch = head_batch((300,), 8, 3001).leaves()
    logps, ids = torch.randn(300, 3001).log_softmax(-1).topk(64)
    rows = {
        rest: max(
            fused_losses.explain(
                fused_losses.linear_sparse_divergence_loss, batch.x, batch.w, ids, logps, batch.y,
                rest=rest, workspace_bytes=2**20, backend="triton",
            ).chunks
        )
        for rest in ("ignore", "renormalise", "bucket")
    }  # fmt: skip
    assert rows["ignore"] == rows["renormalise"] >= 5 * rows["bucket"]


def _wrong() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    ids, logps = _known(4)
    return {
        "too many words": ({"teacher_ids": torch.zeros(B, T, V + 1, dtype=torch.long),
                            "teacher_logps": torch.zeros(B, T, V + 1)}, ValueError,
                           "teacher_ids has K = 38 words of each position, and the vocabulary has"),
        "positions": ({"teacher_ids": ids[:, 1:]}, ValueError,
                      r"each of the student's positions \(3, 7\), got \(3, 6, 4\).*same padding"),
        "shapes": ({"teacher_logps": logps[..., :2]}, ValueError,
                   r"teacher_logps must have teacher_ids' shape \(3, 7, 4\)"),
        "floats": ({"teacher_ids": logps}, TypeError, "teacher_ids must be an integer tensor"),
        "integers": ({"teacher_logps": ids}, TypeError, "teacher_logps must be a floating-point"),
        "outside": ({"teacher_ids": ids + V}, IndexError, r"outside the student's vocabulary \[0"),
        "twice": ({"teacher_ids": ids * 0}, ValueError, r"names a word twice, in \[0, 0, 0, 0\]"),
        "logits": ({"teacher_logps": logps + 9.0}, ValueError, "sum to .* more than 1: .*log_soft"),
        "nan": ({"teacher_logps": logps * math.nan}, ValueError, "sum to nan"),
        "gradient": ({"teacher_logps": logps.clone().requires_grad_()}, ValueError,
                     "teacher_logps requires a gradient"),
        "rest": ({"rest": "drop"}, ValueError, "rest must be one of 'ignore', 'renormalise'"),
        "reverse": ({"divergence": "reverse_kl"}, ValueError, "pass rest='bucket'"),
        "own": ({"divergence": Divergence("own", lambda p, q: (p, p))}, TypeError,
                "use linear_divergence_loss"),
    }  # fmt: skip


@pytest.mark.parametrize("module", [fused_losses, reference], ids=["fused", "specification"])
@pytest.mark.parametrize("kind", _wrong())
def test_bad_input_is_named_with_the_cure(kind: str, module: Any) -> None:
    given, error, message = _wrong()[kind]
    ids, logps = _known(4)
    arguments = {"teacher_ids": ids, "teacher_logps": logps} | given
    if kind == "gradient" and module is reference:
        pytest.skip("the specification takes it as the constant that it is")
    with pytest.raises(error, match=message):
        module.linear_sparse_divergence_loss(BATCH.x, BATCH.w, target=BATCH.y, **arguments)
