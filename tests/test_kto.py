"""KTO: by hand, against TRL's own code, and both functions against the reference."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from linear_oracle import (
    IGNORED,
    HeadBatch,
    NewTensors,
    gemm_flops,
    gradients,
    head_batch,
    near_reference,
    relative_error,
)
from torch import Tensor

import fused_losses
from fused_losses import KTOStats, reference

B, T, D, V = 5, 6, 8, 31
DESIRABLE = torch.tensor([True, False, True, True, False])
OPTIONS = {"beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.6, "kl": 0.4}


def _head() -> tuple[HeadBatch, Tensor]:
    batch = head_batch((B, T), D, V, dtype=torch.float64)
    return batch, near_reference(batch)


def _sums(batch: HeadBatch, ref: Tensor) -> Tensor:
    return torch.where(batch.y == IGNORED, 0.0, ref).sum(-1)


def test_two_responses_worked_out_by_hand(backend: str, device: torch.device) -> None:
    # p = 1/2 of both labels: l = log(1/2) - log(1/8) = log 4, and log(1/2) - log(2) = -log 4.
    z = torch.zeros(2, 1, 2, dtype=torch.float64, device=device, requires_grad=True)
    y = torch.zeros(2, 1, dtype=torch.int64, device=device)
    ref = torch.tensor([[1 / 8], [2.0]], dtype=torch.float64, device=device).log()
    desirable = torch.tensor([True, False], device=device)
    # beta (l - z0) = log 2 and -log 4 at beta = 1, z0 = log 2 and for the second log 2 again:
    # 1 - 2/3 = 1/3; 1 - sigma(log 2 + log 4) = 1/9, times 3.
    options = {"beta": 1.0, "undesirable_weight": 3.0, "backend": backend}
    each = fused_losses.kto_loss(z, y, ref, desirable, kl=math.log(2), reduction="none", **options)
    torch.testing.assert_close(each, each.new_tensor([1 / 3, 1 / 3]))
    # Of mismatched responses the mean, at least 0.
    for kl in (torch.tensor([0.0, 2 * math.log(2)], device=device), math.log(2)):
        loss = fused_losses.kto_loss(z, y, ref, desirable, kl=kl, **options)
        assert loss.item() == pytest.approx(1 / 3)
    for kl in (None, 0.0, -1.0, torch.tensor([-3.0, 1.0], device=device)):
        loss = fused_losses.kto_loss(z, y, ref, desirable, kl=kl, **options)
        assert loss.item() == pytest.approx((1 / 5 + 3 / 5) / 2)  # sigma(log 4) = 4/5, twice
    # -beta s (1 - s) times 1 - p of its label, over two responses: s = 1/3; 3 times s = 1/9.
    loss = fused_losses.kto_loss(z, y, ref, desirable, kl=math.log(2), **options)
    (dz,) = torch.autograd.grad(loss, z)
    first, second = 2 / 9 / 4, 3 * 8 / 81 / 4
    assert dz.flatten().tolist() == pytest.approx([-first, first, second, -second])


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_loss_gradients_and_rewards_are_those_of_trls_own_code(loss_type: str) -> None:
    kto = pytest.importorskip("trl.trainer.kto_trainer")
    batch, ref = _head()
    # TRL scores labels by the position before: ours stand one to the right of theirs.
    mask = torch.cat([torch.zeros(B, 1, dtype=torch.bool), batch.y != IGNORED], 1)
    leaves = batch.leaves()
    logps = reference.linear_token_stats(leaves.x, leaves.w, leaves.y).logps
    drift = torch.tensor([0.9, -0.2, 1.1, 0.3, 0.4], dtype=torch.float64)
    ids = torch.zeros(B, T + 1, dtype=torch.int64)
    inputs = {
        "input_ids": ids, "attention_mask": ids + 1, "completion_mask": mask.long(),
        "KL_input_ids": ids.clone(), "KL_attention_mask": ids + 1, "KL_completion_mask": ids + 1,
        "label": DESIRABLE, "ref_logps": _sums(batch, ref), "ref_KL_logps": -drift,
    }  # fmt: skip
    nothing = torch.zeros(B, T, dtype=torch.float64)

    def model(input_ids: Tensor, **_: Any) -> Any:
        scored = nothing if input_ids is inputs["KL_input_ids"] else logps
        return SimpleNamespace(log_probs=scored, entropy=nothing, mean_logits=nothing)

    model.training = True
    metrics: dict[str, list[float]] = defaultdict(list)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x), model=model,
        calculate_KL=loss_type == "kto", loss_type=loss_type, precompute_ref_logps=True,
        aux_loss_enabled=False, beta=OPTIONS["beta"], _metrics={"train": metrics},
        desirable_weight=OPTIONS["desirable_weight"], _total_train_tokens=0, _tp_size=1,
        undesirable_weight=OPTIONS["undesirable_weight"],
    )  # fmt: skip
    trainer._compute_kl_logps = lambda *args: kto.KTOTrainer._compute_kl_logps(trainer, *args)
    theirs = kto.KTOTrainer._compute_loss(trainer, model, inputs, False)
    ours = batch.leaves()
    options = OPTIONS | {"kl": drift if loss_type == "kto" else None}
    loss, stats = fused_losses.with_stats(
        fused_losses.linear_kto_loss, ours.x, ours.w, ours.y, ref, DESIRABLE, **options
    )
    torch.testing.assert_close(loss, theirs, rtol=1e-10, atol=0.0)
    for a, b in zip(gradients(loss, ours), gradients(theirs, leaves), strict=True):
        assert relative_error(a, b) <= 1e-9
    assert isinstance(stats, KTOStats)
    rewards, sums = stats.rewards, stats.response_logps
    assert rewards[DESIRABLE].mean().item() == pytest.approx(metrics["rewards/chosen"][0])
    assert rewards[~DESIRABLE].mean().item() == pytest.approx(metrics["rewards/rejected"][0])
    assert sums[DESIRABLE].mean().item() == pytest.approx(metrics["logps/chosen"][0])
    assert not rewards.requires_grad


@pytest.mark.parametrize("per", ["token", "response"])
def test_both_functions_are_the_references_in_every_plan(per: str) -> None:
    batch, ref = _head()
    batch.y[3] = IGNORED
    ref = ref.masked_fill(batch.y == IGNORED, math.nan)
    if per == "response":
        ref = _sums(batch, ref)
        ref[3] = math.nan  # never read
    plans: list[dict[str, Any]] = [
        {}, {"reduction": "sum", "softcap": 20.0}, {"reduction": "none"}, {"num_items": 9},
        {"shift": True, "temperature": 0.9},
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for plan in plans:
            leaves, logits = batch.leaves(), (batch.x @ batch.w.T).requires_grad_()
            truth = reference.linear_kto_loss(
                leaves.x, leaves.w, leaves.y, ref, DESIRABLE, **OPTIONS, **plan
            )
            exact = gradients(truth.sum(), leaves)
            from_logits = fused_losses.kto_loss(logits, batch.y, ref, DESIRABLE, **OPTIONS, **plan)
            assert relative_error(from_logits, truth) <= 1e-11
            (dz,) = torch.autograd.grad(from_logits.sum(), logits)
            assert relative_error(dz @ batch.w, exact[0]) <= 1e-10
            for budget in (None, 16 * V * 8, 6 * V * 8):
                for w in (True, False):
                    ours = batch.leaves(w=w)
                    loss = fused_losses.linear_kto_loss(
                        ours.x, ours.w, ours.y, ref, DESIRABLE, workspace_bytes=budget,
                        **OPTIONS, **plan,
                    )  # fmt: skip
                    assert loss.shape == truth.shape
                    assert relative_error(loss, truth) <= 1e-11
                    for got, value in zip(gradients(loss.sum(), ours), exact, strict=False):
                        assert relative_error(got, value) <= 1e-10


def test_gradcheck_holds_through_both_backends(backend: str, device: torch.device) -> None:
    batch = head_batch((2, 3), 3, 7, dtype=torch.float64).leaves()
    ref, desirable = near_reference(batch), torch.tensor([True, False], device=device)
    z = (batch.x @ batch.w.T).detach().requires_grad_()

    def linear(x: Tensor, w: Tensor) -> Tensor:
        return fused_losses.linear_kto_loss(
            x, w, batch.y, ref, desirable, backend=backend, **OPTIONS
        )

    def logits(z: Tensor) -> Tensor:
        return fused_losses.kto_loss(z, batch.y, ref, desirable, backend=backend, **OPTIONS)

    assert torch.autograd.gradcheck(linear, (batch.x, batch.w), fast_mode=True)
    assert torch.autograd.gradcheck(logits, (z,), fast_mode=True)


def test_the_reference_is_right_to_second_order() -> None:
    batch, ref = _head()
    z = (batch.x @ batch.w.T)[:, :2].detach().requires_grad_()

    def loss(z: Tensor) -> Tensor:
        return reference.kto_loss(z, batch.y[:, :2], ref[:, :2], DESIRABLE, **OPTIONS)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.autograd.gradcheck(loss, [z], fast_mode=True)
        assert torch.autograd.gradgradcheck(loss, [z], fast_mode=True)


@pytest.mark.parametrize(("frozen", "factor"), [(False, 6), (True, 4)])
def test_flops_are_6ndv_and_4_with_a_frozen_head(frozen: bool, factor: int) -> None:
    batch = head_batch((5, 7), 13, 101).leaves(w=not frozen)
    args = (batch.x, batch.w, batch.y, near_reference(batch), DESIRABLE)
    options = {"workspace_bytes": 7 * 101 * 12}
    plan = fused_losses.explain(fused_losses.linear_kto_loss, *args, **options)
    assert plan.flops == factor * batch.ndv
    assert len(plan.chunks) > 1
    fn = fused_losses.linear_kto_loss
    assert gemm_flops(lambda: fn(*args, **options).backward()) == factor * batch.ndv
    watched = gemm_flops(lambda: fused_losses.with_stats(fn, *args, **options)[0].backward())
    assert watched == factor * batch.ndv


def test_no_tensor_of_all_logits_is_made_within_one_mebibyte() -> None:
    batch = head_batch((30, 12), 16, 5003).leaves()
    args = (batch.x, batch.w, batch.y, near_reference(batch), torch.arange(30) % 2 > 0)
    with NewTensors(batch.x, batch.w) as seen:
        fused_losses.linear_kto_loss(*args, workspace_bytes=1 << 20).backward()
    assert seen.largest <= 1 << 20 < 4 * batch.counted * 5003


def test_it_compiles_in_one_graph() -> None:
    batch, ref = _head()
    results = []
    for compiled in (False, True):
        fn = fused_losses.linear_kto_loss
        fn = torch.compile(fn, backend="aot_eager", fullgraph=True) if compiled else fn
        leaves = batch.leaves()
        loss = fn(leaves.x, leaves.w, leaves.y, ref, DESIRABLE, **OPTIONS)
        results.append([loss, *gradients(loss, leaves)])
    for truth, got in zip(*results, strict=True):
        assert relative_error(got, truth) <= 1e-11


def test_a_response_without_tokens_is_named_and_left_out_of_the_mean() -> None:
    batch, ref = _head()
    kept = torch.tensor([0, 1, 3, 4])
    expected = fused_losses.linear_kto_loss(
        batch.x[kept], batch.w, batch.y[kept], ref[kept], DESIRABLE[kept]
    )
    batch.y[2] = IGNORED
    for module in (fused_losses, reference):
        with pytest.warns(UserWarning, match=r"target rows \[2\] have no counted token"):
            loss = module.linear_kto_loss(batch.x, batch.w, batch.y, ref, DESIRABLE)
        torch.testing.assert_close(loss, expected)
        leaves = batch.leaves()
        with pytest.warns(UserWarning, match=r"rows \[0, 1, 2, 3, 4\]"):
            loss = module.linear_kto_loss(
                leaves.x, leaves.w, torch.full_like(batch.y, IGNORED), ref, DESIRABLE
            )
        assert loss.item() == 0.0
        assert not any(g.any() for g in gradients(loss, leaves))


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"ref_logps": None}, ValueError, "ref_logps is required by KTO"),
    ({"ref_logps": torch.zeros(B, T).half()}, ValueError, "ref_logps must be float32"),
    ({"desirable": DESIRABLE.long()}, TypeError, "desirable must be a bool tensor"),
    ({"desirable": DESIRABLE[1:]}, ValueError, r"one entry per response, \(5,\), got \(4,\)"),
    ({"kl": torch.ones(3).requires_grad_()}, ValueError, "kl requires a gradient.*no_grad"),
    ({"kl": torch.ones(0)}, ValueError, r"kl must hold .*\(0,\).*None"),
    ({"kl": torch.ones(3).long()}, TypeError, "kl must be a number or a tensor of floats"),
    ({"kl": math.nan}, ValueError, "kl must be a finite number"),
    ({"beta": 0.0}, ValueError, "beta must be"),
    ({"desirable_weight": -1.0}, ValueError, "desirable_weight must be"),
    ({"undesirable_weight": "1"}, TypeError, "undesirable_weight must be a number"),
    ({"num_items": -1}, ValueError, "num_items must be"),
]


@pytest.mark.parametrize(("given", "error", "message"), REFUSED, ids=[r[2][:40] for r in REFUSED])
def test_what_does_not_fit_is_refused_by_name(
    given: dict[str, Any], error: type[Exception], message: str
) -> None:
    batch, ref = _head()
    options = {"ref_logps": ref, "desirable": DESIRABLE, **given}
    logits = batch.x @ batch.w.T
    for module in (fused_losses, reference):
        with pytest.raises(error, match=message):
            module.kto_loss(logits, batch.y, **options)
        with pytest.raises(error, match=message):
            module.linear_kto_loss(batch.x, batch.w, batch.y, **options)


def test_what_belongs_to_tokens_and_wrong_shapes_are_refused() -> None:
    batch, ref = _head()
    args = (batch.x, batch.w, batch.y, ref, DESIRABLE)
    refused = {"token_weight": torch.ones(B, T), "z_loss": 0.1, "label_smoothing": 0.1}
    for module in (fused_losses, reference):
        for name, value in refused.items():
            with pytest.raises(ValueError, match=name):
                module.linear_kto_loss(*args, **{name: value})
        with pytest.raises(ValueError, match=r"target must be \(..., T\)"):
            module.linear_kto_loss(batch.x[0], batch.w, batch.y[0], ref[0], DESIRABLE[0])
    with pytest.raises(ValueError, match=r"per token, \(5, 6\), or per response, \(5,\), got"):
        fused_losses.linear_kto_loss(*args[:3], ref[:, 1:], DESIRABLE)
