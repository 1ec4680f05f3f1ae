"""Several pair losses at once are their weighted sum, in one pass; names and weights as in TRL."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_oracle import gemm_flops, head_batch, near_reference
from tiny_training import dpo_config, history, llama, pair_rows

import fused_losses
from fused_losses.trainer import DPOConfig, DPOTrainer

MIXTURES: dict[str, dict[str, Any]] = {
    "with lengths": {"loss_type": {"sigmoid": 0.8, "ipo": 0.3}},
    "smoothed": {"loss_type": {"robust": 1.0, "hinge": 2.0}, "label_smoothing": 0.1},
    "over the batch": {"loss_type": {"aot": 1.0, "sigmoid": 0.5}},
    "without a reference": {"loss_type": {"simpo": 1.0, "cpo": 0.2}, "simpo_gamma": 1.0},
}
SMOOTHED = {"robust", "aot", "sigmoid"}


@pytest.mark.parametrize("name", MIXTURES)
def test_loss_and_gradients_are_the_weighted_sums_and_cost_one_pass(name, backend):
    mixture = MIXTURES[name]
    batch = head_batch((8, 7), 16, 61)
    ref = None if "simpo" in mixture["loss_type"] else near_reference(batch)
    dpo = fused_losses.linear_dpo_loss

    def run(**options: Any) -> tuple[Any, float]:
        leaves = batch.leaves()
        found = []

        def act() -> None:
            found.append(dpo(leaves.x, leaves.w, leaves.y, ref, backend=backend, **options))
            found[0].backward()

        flops = gemm_flops(act)
        return (found[0].detach(), leaves.x.grad, leaves.w.grad), flops

    together, flops = run(**mixture)
    expected = [torch.zeros_like(t) for t in together]
    for loss_type, weight in mixture["loss_type"].items():
        options: dict[str, Any] = {"loss_type": loss_type}
        if loss_type in SMOOTHED:
            options["label_smoothing"] = mixture.get("label_smoothing", 0.0)
        if loss_type == "simpo":
            options["simpo_gamma"] = 1.0
        single, cost = run(**options)
        assert flops == cost
        expected = [e + weight * t for e, t in zip(expected, single, strict=True)]
    for got, want in zip(together, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    compiled = torch.compile(dpo, backend="eager", fullgraph=True)
    args = (batch.x, batch.w, batch.y, ref)
    torch.testing.assert_close(compiled(*args, **mixture), together[0], rtol=1e-5, atol=1e-6)
    logits = batch.x.double() @ batch.w.double().T
    reference = fused_losses.reference.dpo_loss(logits, batch.y, ref, **mixture)
    assert together[0].item() == pytest.approx(reference.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("loss_type", "error", "said"),
    [
        ({}, ValueError, "loss_type names no loss"),
        ({"sigmoid": 1.0, "bco": 1.0}, ValueError, "loss_type must be one of .* got 'bco'"),
        ({"sigmoid": -1.0}, ValueError, r"loss_type\['sigmoid'\] must be a finite number >= 0"),
        ({"sigmoid": "1"}, TypeError, r"loss_type\['sigmoid'\] must be a number"),
        ({"sigmoid": 1.0, "simpo": 1.0}, ValueError, "cannot be added to losses that know none"),
    ],
)
def test_what_cannot_be_added_is_named(loss_type, error, said):
    logps = torch.full((2,), -1.0)
    with pytest.raises(error, match=said):
        fused_losses.preference_loss(logps, logps, loss_type=loss_type)


def test_options_of_losses_that_take_them_are_checked_in_a_mixture():
    logps, ones = torch.full((2,), -1.0), torch.ones(2)
    lengths = {"chosen_lengths": ones, "rejected_lengths": ones}
    call = fused_losses.preference_loss
    with pytest.raises(ValueError, match="divides by the response lengths"):
        call(logps, logps, loss_type={"sigmoid": 1.0, "ipo": 1.0})
    with pytest.raises(ValueError, match="label_smoothing must be 0"):
        call(logps, logps, loss_type={"hinge": 1.0, "ipo": 1.0}, label_smoothing=0.1, **lengths)
    with pytest.raises(ValueError, match="has no reference"):
        call(logps, logps, logps, logps, loss_type={"cpo": 1.0, "orpo": 1.0}, **lengths)
    own = {"loss_type": {"sigmoid": 1.0, "ipo": 1.0}}
    _, chosen, _ = call(logps, logps, beta=0.5, **lengths, **own)
    assert chosen.tolist() == [-0.5, -0.5]


def test_the_trainer_takes_trls_names_and_adds_up(tmp_path):
    def run(**options: Any) -> list[tuple[float, ...]]:
        config = dpo_config(tmp_path, max_steps=2, **options)
        trainer = DPOTrainer(llama(), config, pair_rows(4), pair_rows(3, seed=5))
        trainer.train()
        return [*history(trainer, "loss", "rewards/margins"), (trainer.evaluate()["eval_loss"],)]

    mixed = run(loss_type=["sigmoid", "ipo", "sft"], loss_weights=[0.8, 0.01, 0.5], beta=0.5)
    first = [run(loss_type=name, beta=0.5)[0][0] for name in ("sigmoid", "ipo")]
    with_term = run(loss_type=["sigmoid"], sft_weight=0.5, beta=0.5)
    term = with_term[0][0] - first[0]
    expected = 0.8 * first[0] + 0.01 * first[1] + term
    assert mixed[0][0] == pytest.approx(expected, rel=1e-5)
    assert run(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], beta=0.5) == with_term
    split = run(
        loss_type=["sigmoid", "ipo", "sft"], loss_weights=[0.8, 0.01, 0.5], beta=0.5,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, per_device_eval_batch_size=1,
    )  # fmt: skip
    for got, want in zip(split, mixed, strict=True):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "a weight for each"),
        ({"loss_type": ["sigmoid", "sigmoid"]}, "names a loss twice"),
        ({"loss_type": ["sft"]}, "holds no pair loss; SFT has SFTTrainer"),
        ({"loss_type": ["sigmoid", "sft"], "sft_weight": 1.0}, "are one term"),
        ({"loss_type": ["sigmoid", "simpo"]}, "cannot be added"),
        ({"loss_type": ["sigmoid", "bco_pair"]}, "loss_type must be one of"),
    ],
)
def test_a_list_that_makes_no_sense_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        DPOConfig(output_dir="o", **options)
    assert DPOConfig(output_dir="o", loss_type="hinge").loss_type == ["hinge"]
