"""Policy losses: by hand, against TRL's own code, and from hidden states against the reference."""

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
from fused_losses import PolicyStats, reference
from fused_losses.policy import POLICY_LOSSES

B, T, D, V = 4, 6, 8, 31
LENGTH = {"dr_grpo": {"max_length": 7}}
CASES = [
    {"loss_type": loss_type, "ratio_level": level, **LENGTH.get(loss_type, {})}
    for loss_type, loss in POLICY_LOSSES.items()
    for level in loss.ratio_levels
]
FULL = {
    "beta": 0.3,
    "entropy_weight": 0.2,
    "epsilon": 0.1,
    "epsilon_high": 0.25,
    "sampler_cap": 1.1,
}


def _name(case: dict[str, Any]) -> str:
    return f"{case['loss_type']}-{case['ratio_level']}"


each_case = pytest.mark.parametrize("case", CASES, ids=_name)


def _rollouts(seed: int = 0) -> dict[str, Tensor]:
    """Log-probs of four sequences, (B, T) fp64, with what may not be read set to NaN."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 0.3) -> Tensor:
        return scale * torch.randn(*shape, generator=g, dtype=torch.float64)

    mask = torch.arange(T) < torch.tensor([6, 3, 1, 5])[:, None]
    logps = -2.0 - draw(B, T).abs()
    made = {
        "old_logps": logps + draw(B, T),
        "ref_logps": logps + draw(B, T),
        "sampler_logps": logps + draw(B, T),
        "entropy": 1.0 + draw(B, T).abs(),
    }
    made = {name: t.masked_fill(~mask, math.nan) for name, t in made.items()}
    advantages = torch.tensor([1.0, -0.7, 0.4, -1.3], dtype=torch.float64)
    return {"logps": logps, "mask": mask, "advantages": advantages, **made}


def _policy_loss(data: dict[str, Tensor], **options: Any) -> Tensor:
    names = ("logps", "old_logps", "advantages", "mask", "ref_logps")
    rest = {name: data[name] for name in ("entropy", "sampler_logps") if name in data}
    return fused_losses.policy_loss(*(data.get(name) for name in names), **rest, **options)


class TestByHand:
    """Two sequences of two tokens and one, ratios 3/2, 1/2 and 2, advantages 1 and -1."""

    LOGPS = torch.tensor([[1.5, 0.5], [2.0, 1.0]], dtype=torch.float64).log() - 3.0
    OLD = torch.full((2, 2), -3.0, dtype=torch.float64)
    MASK = torch.tensor([[1, 1], [1, 0]])
    ADVANTAGES = torch.tensor([1.0, -1.0], dtype=torch.float64)

    def _loss(self, **options: Any) -> float:
        args = (self.LOGPS, self.OLD, self.ADVANTAGES, self.MASK)
        return fused_losses.policy_loss(*args, **options).item()

    def test_the_clipped_surrogate(self) -> None:
        # -min(3/2, 6/5) = -6/5; -min(1/2, 4/5) = -1/2; -min(-2, -6/5) = 2.
        each = fused_losses.policy_loss(
            self.LOGPS, self.OLD, self.ADVANTAGES, self.MASK, reduction="none"
        )
        torch.testing.assert_close(each, each.new_tensor([[-1.2, -0.5], [2.0, 0.0]]))
        assert self._loss() == pytest.approx((-0.85 + 2.0) / 2)
        assert self._loss(reduction="sum") == pytest.approx(-0.85 + 2.0)
        assert self._loss(num_items=8) == pytest.approx((-0.85 + 2.0) / 8)
        for loss_type in ("bnpo", "dapo"):
            assert self._loss(loss_type=loss_type) == pytest.approx(0.3 / 3)
            assert self._loss(loss_type=loss_type, num_items=8) == pytest.approx(0.3 / 8)
        assert self._loss(loss_type="dr_grpo", max_length=5) == pytest.approx(0.3 / 2 / 5)
        # The upper bound: -min(3/2, 13/10).
        assert self._loss(epsilon_high=0.3) == pytest.approx((-0.9 + 2.0) / 2)

    def test_the_ratio_of_sequences(self) -> None:
        # sqrt(3/2 1/2) = 0.866, unclipped; and 2.
        assert self._loss(loss_type="gspo") == pytest.approx((-math.sqrt(0.75) + 2.0) / 2)

    def test_cispo(self) -> None:
        # -min(w, 8/5) A logp; three tokens.
        logps = self.LOGPS
        expected = -1.5 * logps[0, 0] - 0.5 * logps[0, 1] + 1.6 * logps[1, 0]
        loss = self._loss(loss_type="cispo", epsilon_high=1.6)
        assert loss == pytest.approx(expected.item() / 3)

    def test_the_estimate_of_the_kl_and_the_entropy(self) -> None:
        # ref - logp = log 2: 2 - 1 - log 2 per token.
        ref, entropy = self.LOGPS + math.log(2), torch.full((2, 2), 0.5, dtype=torch.float64)
        args = (self.LOGPS, self.OLD, 0.0 * self.ADVANTAGES, self.MASK)
        loss = fused_losses.policy_loss(*args, ref, beta=0.1, entropy=entropy, entropy_weight=0.4)
        assert loss.item() == pytest.approx(0.1 * (1 - math.log(2)) - 0.4 * 0.5)

    def test_truncated_importance_sampling(self) -> None:
        # old - sampler = log 4 is cut at 3, log 1/2 is not.
        sampler = self.OLD - torch.tensor([[4.0, 0.5], [1.0, 1.0]]).double().log()
        loss = self._loss(loss_type="bnpo", sampler_logps=sampler)
        assert loss == pytest.approx((-1.2 * 3 - 0.5 * 0.5 + 2.0) / 3)

    def test_without_old_log_probs_the_ratio_is_one_and_has_a_gradient(self) -> None:
        logps = self.LOGPS.clone().requires_grad_()
        loss = fused_losses.policy_loss(logps, None, self.ADVANTAGES, self.MASK)
        assert loss.item() == pytest.approx((-1.0 + 1.0) / 2)
        (d,) = torch.autograd.grad(loss, logps)
        assert d.tolist() == [[-0.25, -0.25], [0.5, 0.0]]


def test_gspo_token_is_gspo_where_a_sequence_has_one_advantage_and_not_elsewhere() -> None:
    data = _rollouts()
    del data["sampler_logps"]  # its weights differ from token to token
    per_token = data["advantages"][:, None] * torch.linspace(0.2, 1.8, T).double()
    for advantages, alike in ((data["advantages"], True), (per_token, False)):
        results = []
        for level in ("sequence", "sequence_token"):
            leaf = data["logps"].clone().requires_grad_()
            given = data | {"logps": leaf, "advantages": advantages}
            loss = _policy_loss(given, loss_type="gspo", ratio_level=level)
            results.append((loss, torch.autograd.grad(loss, leaf)[0]))
        (value, slope), (other, slope_of_tokens) = results
        torch.testing.assert_close(other, value)
        assert torch.allclose(slope_of_tokens, slope, rtol=1e-10, atol=1e-14) == alike


def _trl(case: dict[str, Any], data: dict[str, Tensor], num_items: float) -> tuple[Tensor, Any]:
    """The loss and the metrics of TRL's own method, with a trainer that holds what it reads."""
    grpo = pytest.importorskip("trl.trainer.grpo_trainer")
    filled = {name: t if t.dtype == torch.bool else t.nan_to_num() for name, t in data.items()}
    mask = filled["mask"].long()
    loss_type = {"gspo": "grpo"}.get(case["loss_type"], case["loss_type"])
    metrics: dict[str, list[float]] = defaultdict(list)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            filled["logps"], filled["entropy"], None,
        ),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level=case["ratio_level"], loss_type=loss_type,
        beta=FULL["beta"], epsilon_low=FULL["epsilon"], epsilon_high=case["epsilon_high"],
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        use_vllm=True, vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1, max_completion_length=case.get("max_length"),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        _entropy_bonus_enabled=True, use_adaptive_entropy=False,
        entropy_coef=FULL["entropy_weight"], model=SimpleNamespace(training=True),
        _metrics={"train": metrics},
    )  # fmt: skip
    trainer.accelerator.sync_gradients = False
    drift = ((filled["old_logps"] - filled["sampler_logps"]) * mask).exp()
    inputs = {
        "prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1],
        "completion_ids": mask, "completion_mask": mask,
        "advantages": filled["advantages"], "old_per_token_logps": filled["old_logps"],
        "ref_per_token_logps": filled["ref_logps"],
        "importance_sampling_ratio": drift.clamp(max=FULL["sampler_cap"]),
        "num_items_in_batch": torch.tensor(num_items),
    }  # fmt: skip
    return grpo.GRPOTrainer._compute_loss(trainer, None, inputs), metrics


@pytest.mark.parametrize(
    "case", [case for case in CASES if case["ratio_level"] != "sequence_token"], ids=_name
)
def test_loss_and_gradients_are_those_of_trls_own_code(case: dict[str, Any]) -> None:
    data = _rollouts()
    case = case | {"epsilon_high": 1.02 if case["loss_type"] == "cispo" else 0.25}
    # TRL divides the summed tokens of these two by a global count, and by nothing else.
    counts_all = case["loss_type"] in ("dapo", "cispo")
    num_items = 29.0 if counts_all else None
    results = []
    for theirs in (True, False):
        leaves = {name: data[name].clone().requires_grad_() for name in ("logps", "entropy")}
        given = data | leaves
        if theirs:
            loss, _ = _trl(case, given, 29.0)
        else:
            # The entropy's mean is there over this batch's tokens, whatever divides the loss.
            weight = FULL["entropy_weight"] * (29.0 / 15.0 if counts_all else 1.0)
            options = FULL | case | {"entropy_weight": weight}
            loss = _policy_loss(given, num_items=num_items, **options)
        results.append([loss, *torch.autograd.grad(loss, list(leaves.values()))])
    for ours, trl in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours.nan_to_num(), trl.nan_to_num(), rtol=1e-10, atol=1e-13)


# TRL logs means over sequences at sequence level.
@pytest.mark.parametrize("loss_type", ["grpo", "cispo"])
def test_the_statistics_are_trls_metrics(loss_type: str) -> None:
    high = 1.02 if loss_type == "cispo" else 0.1
    case = {"loss_type": loss_type, "ratio_level": "token", "epsilon_high": high}
    batch, data = _head()
    _, stats = fused_losses.with_stats(_linear, fused_losses, batch, data, **FULL | case)
    assert isinstance(stats, PolicyStats)
    mask = batch.y != IGNORED
    given = data | {"logps": stats.logps, "entropy": stats.entropy, "mask": mask}
    _, metrics = _trl(case, given, 1.0)

    def mean(t: Tensor) -> float:
        return t[mask].double().mean().item()

    ours = {"entropy": mean(stats.entropy), "kl": mean(stats.kl)}
    if loss_type == "cispo":
        ours["cispo_clip_ratio"] = stats.clip_fraction.item()
    else:
        ours |= {
            "clip_ratio/low_mean": mean(stats.low_clipped),
            "clip_ratio/high_mean": mean(stats.high_clipped),
            "clip_ratio/region_mean": stats.clip_fraction.item(),
        }
        assert stats.low_clipped.any()
    assert stats.high_clipped.any()
    assert {name: metrics[name][0] for name in ours} == pytest.approx(ours)
    torch.testing.assert_close(stats.ratios[mask], (stats.logps - data["old_logps"])[mask].exp())
    assert not stats.ratios[~mask].any()


def _head(dtype: torch.dtype = torch.float64) -> tuple[HeadBatch, dict[str, Tensor]]:
    """Hidden states and a head; what is per token near the policy, NaN where nothing counts."""
    batch = head_batch((B, T), D, V, dtype=dtype)
    names = ("old_logps", "ref_logps", "sampler_logps")
    data = {name: near_reference(batch, seed=i) for i, name in enumerate(names)}
    return batch, data | {"advantages": torch.tensor([1.0, -0.7, 0.4, -1.3])}


def _linear(module: Any, batch: HeadBatch, data: dict[str, Tensor], **options: Any) -> Tensor:
    args = [data[name] for name in ("old_logps", "advantages", "ref_logps")]
    more = {"sampler_logps": data["sampler_logps"]} if "sampler_logps" in data else {}
    return module.linear_policy_loss(batch.x, batch.w, batch.y, *args, **more, **options)


@each_case
def test_the_fused_loss_is_the_references_in_every_plan(case: dict[str, Any]) -> None:
    batch, data = _head()
    per_token = data | {"advantages": data["advantages"][:, None] * torch.linspace(0.5, 1.5, T)}
    options = FULL | case
    plans: list[dict[str, Any]] = [
        {}, {"workspace_bytes": 28 * V * 8}, {"workspace_bytes": 6 * V * 8}, {"shift": True},
        {"reduction": "sum", "softcap": 20.0}, {"num_items": 9},
    ]  # fmt: skip
    for given, more in [*((data, plan) for plan in plans), (per_token, {})]:
        results = []
        for module in (reference, fused_losses):
            leaves = batch.leaves()
            loss = _linear(module, leaves, given, **options, **more)
            results.append([loss, *gradients(loss, leaves)])
        for truth, got in zip(*results, strict=True):
            assert truth.norm() > 0
            assert relative_error(got, truth) <= 1e-11
        frozen = batch.leaves(w=False)
        dx = torch.autograd.grad(_linear(fused_losses, frozen, given, **options, **more), frozen.x)
        assert relative_error(dx[0], results[0][1]) <= 1e-11


def test_those_plans_are_one_chunk_several_and_recomputation() -> None:
    batch, data = _head()
    leaves = batch.leaves()
    args = (leaves.x, leaves.w, leaves.y, *(data[n] for n in ("old_logps", "advantages")))

    def plans(loss_type: str) -> list[fused_losses.Plan]:
        options = FULL | {"loss_type": loss_type}
        args_ = (fused_losses.linear_policy_loss, *args, data["ref_logps"])
        return [
            fused_losses.explain(*args_, workspace_bytes=b, **options)
            for b in (None, 28 * V * 8, 6 * V * 8)
        ]

    found = plans("gspo")
    assert [plan.route for plan in found] == ["unit", "unit", "recompute"]
    assert len(found[0].chunks) == 1 < len(found[1].chunks)
    # Ratios of tokens: the longest sequence need not fit.
    found = plans("grpo")
    assert [plan.flops for plan in found] == [6 * batch.ndv] * 3
    assert max(found[2].chunks) < int((batch.y != IGNORED).sum(-1).max())


@pytest.mark.parametrize("shift", [False, True])
def test_losses_of_tokens_have_targets_shape(shift: bool) -> None:
    batch, data = _head()
    each, truth = (
        _linear(module, batch, data, reduction="none", shift=shift, **FULL)
        for module in (fused_losses, reference)
    )
    torch.testing.assert_close(each, truth)
    assert each.shape == batch.y.shape
    assert not each[batch.y == IGNORED].any()


# Where a factor is constant to the gradient, there is no function whose gradient it would be.
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "gspo", "dr_grpo"])
def test_gradcheck_holds_through_both_backends(
    backend: str, device: torch.device, loss_type: str
) -> None:
    batch = head_batch((2, 3), 3, 7, dtype=torch.float64).leaves()
    data = {
        name: near_reference(batch, seed=i)
        for i, name in enumerate(("old_logps", "ref_logps", "sampler_logps"))
    }
    data["advantages"] = torch.tensor([1.0, -0.7], device=device)
    options = FULL | {"loss_type": loss_type, **LENGTH.get(loss_type, {}), "backend": backend}

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return _linear(fused_losses, HeadBatch(x, w, batch.y), data, **options)

    assert torch.autograd.gradcheck(loss, (batch.x, batch.w), fast_mode=True)


def test_all_losses_run_on_the_kernels(device: torch.device) -> None:
    batch, data = _head()
    data = {name: t.to(device) for name, t in data.items()}
    for case in CASES[2::3]:
        results = []
        for backend in ("torch", "triton"):
            leaves = batch.leaves()
            loss = _linear(fused_losses, leaves, data, backend=backend, **FULL, **case)
            results.append([loss, *gradients(loss, leaves)])
        for truth, got in zip(*results, strict=True):
            assert relative_error(got, truth) <= 1e-11


@pytest.mark.parametrize("loss_type", ["grpo", "gspo", "dapo", "dr_grpo"])
def test_the_pure_loss_is_right_to_second_order(loss_type: str) -> None:
    data = _rollouts()
    leaves = [data["logps"].requires_grad_(), data["entropy"].nan_to_num().requires_grad_()]

    def loss(logps: Tensor, entropy: Tensor) -> Tensor:
        given = data | {"logps": logps, "entropy": entropy}
        options = {"loss_type": loss_type, **LENGTH.get(loss_type, {})}
        return _policy_loss(given, **FULL, **options)

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves, fast_mode=True)


@each_case
def test_batches_of_a_step_add_up_by_num_items(case: dict[str, Any]) -> None:
    batch, data = _head()
    counted = batch.y != IGNORED
    options = {"beta": 0.3, **case}
    whole = _linear(fused_losses, batch, data, **options)
    per_token = POLICY_LOSSES[case["loss_type"]].per == "token"
    num_items = torch.tensor(int(counted.sum()) if per_token else B)
    parts = []
    for half in (slice(0, 1), slice(1, None)):
        part = HeadBatch(batch.x[half], batch.w, batch.y[half])
        given = {name: t[half] for name, t in data.items()}
        parts.append(_linear(fused_losses, part, given, num_items=num_items, **options))
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_entropies_of_a_step_add_up_too(loss_type: str) -> None:
    batch, data = _head()
    counted = batch.y != IGNORED
    # A mean over tokens; or a mean over tokens of each batch, that weighs as its sequences do.
    per_token = POLICY_LOSSES[loss_type].per == "token"
    num_items = int(counted.sum()) if per_token else B
    terms, expected = [], 0.0
    entropy = fused_losses.linear_token_stats(batch.x, batch.w, batch.y, entropy=True).entropy
    for half in (slice(0, 1), slice(1, None)):
        part = HeadBatch(batch.x[half], batch.w, batch.y[half])
        given = {name: t[half] for name, t in data.items()}
        with_term, without = (
            _linear(
                fused_losses, part, given, num_items=num_items, loss_type=loss_type,
                entropy_weight=weight,
            )
            for weight in (0.5, 0.0)
        )  # fmt: skip
        terms.append(with_term - without)
        here = counted[half]
        items = here.sum() if per_token else here.any(-1).sum()
        expected = expected - 0.5 * items / num_items * entropy[half].sum() / here.sum()
    torch.testing.assert_close(sum(terms), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("frozen", "factor"), [(False, 6), (True, 4)])
def test_flops_are_6ndv_and_4_with_a_frozen_head(frozen: bool, factor: int) -> None:
    batch = head_batch((5, 7), 13, 101).leaves(w=not frozen)
    data = {"old_logps": near_reference(batch), "ref_logps": near_reference(batch)}
    data["advantages"] = torch.randn(5)
    options = FULL | {"workspace_bytes": 12 * 101 * 12}
    args = (batch.x, batch.w, batch.y, *(data[n] for n in ("old_logps", "advantages", "ref_logps")))
    plan = fused_losses.explain(fused_losses.linear_policy_loss, *args, **options)
    assert plan.flops == factor * batch.ndv
    assert len(plan.chunks) > 1

    def run() -> None:
        _linear(fused_losses, batch, data, **options).backward()

    assert gemm_flops(run) == factor * batch.ndv
    watched = gemm_flops(
        lambda: fused_losses.with_stats(_linear, fused_losses, batch, data, **options)[0].backward()
    )
    assert watched == factor * batch.ndv


def test_no_tensor_of_all_logits_is_made_within_one_mebibyte() -> None:
    batch = head_batch((30, 12), 16, 5003).leaves()
    data = {name: near_reference(batch) for name in ("old_logps", "ref_logps")}
    data["advantages"] = torch.randn(30)
    with NewTensors(batch.x, batch.w) as seen:
        _linear(fused_losses, batch, data, workspace_bytes=1 << 20, beta=0.1).backward()
    assert seen.largest <= 1 << 20 < 4 * batch.counted * 5003


def test_it_compiles_in_one_graph() -> None:
    batch, data = _head()
    options = FULL | {"loss_type": "gspo"}
    results = []
    for fn in (_linear, torch.compile(_linear, backend="aot_eager", fullgraph=True)):
        leaves = batch.leaves()
        loss = fn(fused_losses, leaves, data, **options)
        results.append([loss, *gradients(loss, leaves)])
    for truth, got in zip(*results, strict=True):
        assert relative_error(got, truth) <= 1e-11


class TestEmpty:
    """Sequences without a counted token, and nothing but those."""

    def test_a_sequence_without_tokens_is_named_and_left_out_of_the_mean(self) -> None:
        batch, data = _head()
        kept = torch.tensor([0, 1, 3])
        part = HeadBatch(batch.x[kept], batch.w, batch.y[kept])
        expected = _linear(fused_losses, part, {k: t[kept] for k, t in data.items()}, **FULL)
        batch.y[2] = IGNORED
        for module in (fused_losses, reference):
            message = r"rows \[2\] have no counted token: .*num_items"
            with pytest.warns(UserWarning, match=message) as caught:
                loss = _linear(module, batch, data, **FULL)
            assert module is reference or caught[0].filename == __file__
            torch.testing.assert_close(loss, expected)

    @each_case
    def test_where_nothing_counts_the_loss_is_zero_and_attached(self, case: dict[str, Any]) -> None:
        batch, data = _head()
        batch.y.fill_(IGNORED)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for module in (fused_losses, reference):
                leaves = batch.leaves()
                loss = _linear(module, leaves, data, **FULL, **case)
                assert loss.item() == 0.0
                assert not any(g.any() for g in gradients(loss, leaves))


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"old_logps": torch.zeros(B, T - 1)}, ValueError, r"old_logps must have .*\(4, 5\).*shift"),
    ({"old_logps": torch.zeros(B, T).bfloat16()}, ValueError, "old_logps must be float32.*keep"),
    ({"old_logps": torch.zeros(B, T).long()}, TypeError, "old_logps must be a float32"),
    ({"ref_logps": torch.zeros(B)}, ValueError, r"ref_logps must be \(..., T\)"),
    ({"sampler_logps": torch.zeros(T, B)}, ValueError, "sampler_logps must have"),
    ({"advantages": torch.zeros(B + 1)}, ValueError, r"advantages must be one per sequence, \(4,"),
    ({"advantages": torch.zeros(B).long()}, TypeError, "advantages must be a tensor of floats"),
    (
        {"advantages": torch.zeros(B, requires_grad=True)},
        ValueError,
        r"advantages requires a gradient.*advantages\.detach\(\)",
    ),
    ({"ref_logps": None, "beta": 0.1}, ValueError, r"ref_logps is required by beta=0\.1"),
    ({"loss_type": "ppo"}, ValueError, "loss_type must be one of 'grpo'"),
    ({"loss_type": "gspo", "ratio_level": "token"}, ValueError, "use one of 'sequence'.*'grpo'"),
    ({"ratio_level": "word"}, ValueError, "ratio_level must be one of 'token'"),
    ({"loss_type": "dr_grpo"}, ValueError, "max_length is required by loss_type='dr_grpo'"),
    ({"max_length": 7}, ValueError, "max_length belongs to loss_type='dr_grpo'"),
    ({"epsilon": 1.5}, ValueError, "epsilon must be a finite number > 0 and < 1"),
    ({"epsilon_high": -0.1}, ValueError, "epsilon_high must be"),
    ({"beta": -0.1}, ValueError, "beta must be"),
    ({"entropy_weight": torch.tensor(0.1)}, TypeError, "entropy_weight must be a number"),
    ({"sampler_cap": 0.0}, ValueError, "sampler_cap must be"),
    ({"num_items": 3, "reduction": "sum"}, ValueError, "num_items replaces the divisor"),
    ({"reduction": "batch"}, ValueError, "reduction must be one of"),
]


@pytest.mark.parametrize(("given", "error", "message"), REFUSED, ids=[r[2][:40] for r in REFUSED])
def test_what_does_not_fit_is_refused_by_name(
    given: dict[str, Any], error: type[Exception], message: str
) -> None:
    batch, data = _head()
    linear = {"old_logps": data["old_logps"], "advantages": data["advantages"], **given}
    calls = [
        lambda: fused_losses.linear_policy_loss(batch.x, batch.w, batch.y, **linear),
        lambda: reference.linear_policy_loss(batch.x, batch.w, batch.y, **linear),
    ]
    for call in calls:
        with pytest.raises(error, match=message):
            call()


def test_what_only_one_of_the_functions_takes_is_refused_by_name() -> None:
    data = _rollouts()
    with pytest.raises(TypeError, match=r"mask must be a bool or integer.*mask\.bool\(\)"):
        _policy_loss(data | {"mask": data["mask"].double()})
    with pytest.raises(ValueError, match="mask must have logps's shape"):
        _policy_loss(data | {"mask": data["mask"][:, 1:]})
    with pytest.raises(ValueError, match=r"entropy is required by entropy_weight=0\.1"):
        _policy_loss({k: t for k, t in data.items() if k != "entropy"}, entropy_weight=0.1)
    batch, rest = _head()
    with pytest.raises(ValueError, match=r"target must be \(..., T\).*\(1, T\)"):
        fused_losses.linear_policy_loss(batch.x[0], batch.w, batch.y[0], None, torch.ones(()))
    refused = {"token_weight": torch.ones(B, T), "z_loss": 0.1, "label_smoothing": 0.1}
    for name, value in refused.items():
        for module in (fused_losses, reference):
            with pytest.raises(ValueError, match=f"{name} is not taken by policy losses"):
                _linear(module, batch, rest, **{name: value})
