"""The pair losses are TRL's: its own code runs here on made-up log-probs, without a model."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pair_cases import CASES, takes_reference
from torch import Tensor

import fused_losses
from fused_losses import reference
from fused_losses.preference import PAIR_LOSSES

trl = pytest.importorskip("trl")

B, T, V = 6, 7, 11
BETA = 0.3
LENGTHS = torch.tensor([5, 3, 6, 2, 6, 4])
MASK = (torch.arange(T) >= 1) & (torch.arange(T) <= LENGTHS[:, None])  # position 0 is the prompt


@pytest.fixture
def case() -> dict[str, Tensor]:
    """Logits of three pairs, labels, and reference log-probs, aligned with the labels."""
    logits = 2.0 * torch.randn(B, T, V)
    target = torch.randint(V, (B, T)).masked_fill(~MASK, -100)
    logps = fused_losses.token_stats(logits, target, shift=True).logps
    ref = (logps + 0.5 * torch.randn(B, T)) * MASK
    return {"logits": logits, "target": target, "logps": logps, "ref": ref}


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _trl_dpo(case: dict[str, Tensor], logps: Tensor, **options: Any) -> Tensor:
    """Call the loss code of TRL's DPO trainer with everything around it left out."""
    trainer = SimpleNamespace(
        **{"label_smoothing": 0.0, "beta": BETA, "use_weighting": False, "ld_alpha": None},
        **{"f_divergence_type": "reverse_kl", "precompute_ref_logps": True},
        **{"aux_loss_enabled": False, "model": SimpleNamespace(training=False)},
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=_as_it_is, gather_for_metrics=_as_it_is
        ),
        args=SimpleNamespace(discopop_tau=options.get("discopop_tau", 0.05)),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    trainer.label_smoothing = options.get("label_smoothing", 0.0)
    trainer.loss_types = [options["loss_type"]]
    trainer.loss_weights = [1.0]
    if options.get("sft_weight"):
        trainer.loss_types.append("sft")
        trainer.loss_weights.append(options["sft_weight"])
    nothing = torch.zeros(B, T - 1)
    outputs = SimpleNamespace(
        log_probs=logps[:, 1:], entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
    )
    sums = case["ref"].sum(1)
    inputs = {
        "input_ids": case["target"].clamp(min=0),
        "attention_mask": torch.ones(B, T),
        "completion_mask": MASK.long(),
        "ref_chosen_logps": sums[: B // 2],
        "ref_rejected_logps": sums[B // 2 :],
    }
    loss = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    loss.rewards = [
        trainer._metrics["eval"][f"rewards/{side}"][0] for side in ("chosen", "rejected")
    ]
    return loss


def _trl_without_reference(logps: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Call the loss code of TRL's CPO (with SimPO) and ORPO trainers."""
    name = options["loss_type"]
    sums = logps.sum(1) / (1 if name == "cpo" else LENGTHS)
    chosen, rejected = sums[: B // 2], sums[B // 2 :]
    trainer = SimpleNamespace(
        beta=BETA, alpha=0.0, label_smoothing=0.0,
        loss_type="simpo" if name == "simpo" else "sigmoid",
        simpo_gamma=options.get("simpo_gamma", 0.5),
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )  # fmt: skip
    nll = -logps[: B // 2].sum() / LENGTHS[: B // 2].sum()
    if name == "orpo":
        from trl.experimental.orpo import ORPOTrainer

        losses, *rewards, _, _ = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
        losses = -losses
    else:
        from trl.experimental.cpo import CPOTrainer

        losses, *rewards = CPOTrainer.cpo_loss(trainer, chosen, rejected)
    return losses.mean() + options.get("sft_weight", 0.0) * nll, rewards


@pytest.mark.parametrize("sft_weight", [0.0, 0.6])
@pytest.mark.parametrize(
    "name",
    [name for name in CASES if name != "sigmoid, smoothed"],  # TRL ignores its smoothing
)
def test_loss_gradient_and_rewards_are_trls(
    case: dict[str, Tensor], name: str, sft_weight: float
) -> None:
    options = {"sft_weight": sft_weight, **CASES[name]}
    with_reference = takes_reference(options["loss_type"])
    theirs, ours = (case["logits"].clone().requires_grad_() for _ in range(2))
    logps = reference.token_stats(theirs, case["target"], shift=True).logps
    if with_reference:
        expected = _trl_dpo(case, logps, **options)
        rewards = expected.rewards
    else:
        expected, found = _trl_without_reference(logps, **options)
        rewards = [reward.mean().item() for reward in found]

    loss, stats = fused_losses.with_stats(
        fused_losses.dpo_loss, ours, case["target"], case["ref"] if with_reference else None,
        beta=BETA, shift=True, **options,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    dours, dtheirs = (torch.autograd.grad(x, y)[0] for x, y in ((loss, ours), (expected, theirs)))
    torch.testing.assert_close(dours, dtheirs, rtol=1e-4, atol=1e-6)
    assert stats.chosen_rewards.mean().item() == pytest.approx(rewards[0], rel=1e-4, abs=1e-6)
    assert stats.rejected_rewards.mean().item() == pytest.approx(rewards[1], rel=1e-4, abs=1e-6)


def test_every_loss_is_compared() -> None:
    assert {options["loss_type"] for options in CASES.values()} == set(PAIR_LOSSES)
