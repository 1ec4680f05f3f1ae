"""Every mean is over what it names: however batches, ranks, logs and restarts divide it."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from tiny_training import dpo_config, history, llama, pair_rows, sft_config, sft_rows

from fused_losses.trainer import DPOTrainer, SFTTrainer
from fused_losses.trainer.telemetry import Telemetry, means

TIMED = ("runtime", "per_second", "epoch", "preparation_time")


def test_an_sft_term_is_a_mean_over_the_tokens_of_all_micro_batches(tmp_path):
    def run(**how):
        config = dpo_config(tmp_path, max_steps=2, sft_weight=1.5, **how)
        trainer = DPOTrainer(llama(), config, pair_rows(8))
        trainer.train()
        return history(trainer, "loss", "grad_norm", "nll", "rewards/margins")

    whole = run(per_device_train_batch_size=8)
    split = run(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    packed = run(per_device_train_batch_size=4, gradient_accumulation_steps=2, padding_free=True)
    assert whole[0][0] == pytest.approx(math.log(2.0) + 1.5 * whole[0][2], rel=1e-5)
    for ours in (split, packed):
        for got, expected in zip(ours, whole, strict=True):
            assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("trainer", "config", "rows", "options"),
    [
        (DPOTrainer, dpo_config, pair_rows, {"sft_weight": 1.5}),
        (SFTTrainer, sft_config, sft_rows, {"loss": "hellinger", "level": "sequence"}),
    ],
)
def test_no_metric_of_an_evaluation_depends_on_the_batch_size(
    tmp_path, trainer, config, rows, options
):
    def run(size):
        args = config(tmp_path, per_device_eval_batch_size=size, learning_rate=0.1, **options)
        made = trainer(llama(), args, rows(8), rows(5, seed=9))
        made.train()
        found = made.evaluate()
        return {k: v for k, v in found.items() if not k.endswith(TIMED)}

    whole = run(5)
    assert {"eval_loss", "eval_nll", "eval_rewards/implicit", "eval_drift"} <= whole.keys()
    assert run(2) == pytest.approx(whole, rel=1e-5, abs=1e-6)
    if trainer is DPOTrainer:
        plain = DPOTrainer(llama(), dpo_config(tmp_path), rows(8), rows(5, seed=9)).evaluate()
        both = DPOTrainer(llama(), dpo_config(tmp_path, **options), rows(8), rows(5, seed=9))
        together = plain["eval_loss"] + 1.5 * plain["eval_nll"]
        assert both.evaluate()["eval_loss"] == pytest.approx(together, rel=1e-5)


@pytest.mark.parametrize(
    ("trainer", "config", "rows", "options"),
    [
        (SFTTrainer, sft_config, sft_rows, {"loss": "pearson"}),
        (SFTTrainer, sft_config, sft_rows, {"label_smoothing_factor": 0.2}),
        (DPOTrainer, dpo_config, pair_rows, {}),
    ],
)
def test_every_loss_logs_the_plain_negative_log_likelihood(
    tmp_path, trainer, config, rows, options
):
    args = config(tmp_path, max_steps=1, learning_rate=0.0, metric_for_best_model="nll", **options)
    made = trainer(llama(), args, rows(4), rows(4))
    made.train()
    batch = made.data_collator(list(made.train_dataset))
    with torch.no_grad():
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        logp = llama()(**inputs).logits.double().log_softmax(-1)[:, :-1]
    labels = batch["labels"][: 4 if trainer is DPOTrainer else None, 1:]
    picked = logp[: len(labels)].gather(2, labels.clamp(min=0)[..., None])[..., 0]
    nll = -picked[labels != -100].mean().item()
    assert made.evaluate()["eval_nll"] == pytest.approx(nll, rel=1e-5)
    assert made.state.log_history[0]["nll"] == pytest.approx(nll, rel=1e-5)


def test_no_log_holds_a_negative_zero(tmp_path):
    trainer = SFTTrainer(llama(), sft_config(tmp_path), sft_rows(4))
    # As where a divergence starts at 0 and the Trainer rounds what is a little below.
    trainer.log({"loss": -0.0, "grad_norm": 1.5})
    trainer.log({"eval_loss": -0.0, "eval_drift": 0.0})
    zeros = [v for logs in trainer.state.log_history for v in logs.values() if v == 0.0]
    assert len(zeros) >= 3
    assert all(math.copysign(1.0, zero) > 0 for zero in zeros)


@pytest.mark.parametrize("restore", [False, True])
def test_a_run_resumed_between_two_logs_has_counted_all_tokens(tmp_path, restore):
    def run(resume=None):
        config = sft_config(
            tmp_path,
            max_steps=6,
            logging_steps=3,
            save_strategy="steps",
            save_steps=2,
            restore_callback_states_from_checkpoint=restore,
        )
        trainer = SFTTrainer(llama(), config, sft_rows(16))
        trainer.train(resume_from_checkpoint=resume)
        return trainer, history(trainer, "num_tokens")

    trainer, whole = run()
    assert run(str(tmp_path / "checkpoint-4"))[1] == whole
    assert run(str(tmp_path / "checkpoint-2"))[1] == whole
    trainer.train()  # another run of the same trainer counts its own
    assert history(trainer, "num_tokens") == whole


def test_a_run_that_starts_over_on_smaller_batches_forgets_what_it_saw(tmp_path):
    def run(model, **options):
        config = sft_config(
            tmp_path, max_steps=2, gradient_accumulation_steps=2, loss="pearson",
            precompute_ref_batch_size=2, **options,
        )  # fmt: skip
        trainer = SFTTrainer(model, config, sft_rows(16))
        trainer.train()
        return history(trainer, "loss", "drift", "nll", "num_tokens")

    model, seen = llama(), []
    body = model.model.forward

    @functools.wraps(body)
    def too_large(input_ids=None, **inputs):
        if model.training and len(input_ids) > 2:
            seen.append(1)
            if len(seen) >= 2:
                raise RuntimeError("CUDA out of memory.")
        return body(input_ids=input_ids, **inputs)

    model.model.forward = too_large
    again = run(model, per_device_train_batch_size=4, auto_find_batch_size=True)
    assert len(seen) >= 2
    clean = run(llama(), per_device_train_batch_size=2)
    for got, expected in zip(again, clean, strict=True):
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_a_rank_without_a_batch_takes_part_in_every_collective(tmp_path):
    other = {"nll": (6.0, 3.0), "entropy": (1.0, 2.0)}
    calls = []

    def gather(own):
        calls.append(own)
        return [*own, other]

    idle, busy = Telemetry(), Telemetry()
    assert idle.take(gather) == other
    one = torch.tensor(1)
    busy.add({"nll": (torch.tensor(4.0), 2 * one), "entropy": (torch.tensor(2.0), one)})
    assert means(busy.take(gather)) == {"nll": 2.0, "entropy": 1.0}
    assert means(busy.take(gather)) == means(other)
    assert len(calls) == 3

    trainer = SFTTrainer(llama(), sft_config(tmp_path), sft_rows(4))
    assert trainer._get_num_items_in_batch([], trainer.args.device).item() == 0
