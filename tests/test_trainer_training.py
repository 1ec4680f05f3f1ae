"""Training equals its specification: eager loops, one batch, float64; and says when it breaks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_training import dpo_config, history, llama, pair_rows, sft_config, sft_rows

import fused_losses
from fused_losses.trainer import DPOTrainer, SFTTrainer
from fused_losses.trainer.collate import Collator
from fused_losses.trainer.finite import FiniteWatch, NonFiniteLossError
from fused_losses.trainer.packing import check_packing


def gap(a, b):
    """Largest difference of two logs, relative where they are above 1."""
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    return ((a - b).abs() / b.abs().clamp(min=1.0)).max().item()


@pytest.mark.parametrize(
    ("trainer", "config", "rows", "options"),
    [
        (SFTTrainer, sft_config, sft_rows, {"loss": "mle", "precompute_ref_log_probs": True}),
        (SFTTrainer, sft_config, sft_rows, {"loss": "pearson"}),
        (SFTTrainer, sft_config, sft_rows, {"loss": "hellinger", "level": "sequence"}),
        (DPOTrainer, dpo_config, pair_rows, {}),
    ],
)
def test_micro_batches_and_packed_rows_equal_one_padded_batch(
    tmp_path, trainer, config, rows, options
):
    def run(**how):
        made = trainer(llama(), config(tmp_path, max_steps=3, **options, **how), rows(8))
        made.train()
        return history(made, "loss", "grad_norm", "drift", "entropy")

    whole = run(per_device_train_batch_size=8)
    assert len(whole) == 3
    split = run(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert gap(split[:1], whole[:1]) < 1e-6
    assert gap(split, whole) < 1e-4
    packed = run(per_device_train_batch_size=8, padding_free=True)
    assert gap(packed[:1], whole[:1]) < 1e-6
    assert gap(packed, whole) < 1e-4


@pytest.mark.parametrize(
    ("trainer", "config", "rows", "options"),
    [
        (SFTTrainer, sft_config, sft_rows, {"loss": "pearson"}),
        (DPOTrainer, dpo_config, pair_rows, {}),
    ],
)
def test_bf16_is_near_fp32_and_starts_at_its_reference(tmp_path, trainer, config, rows, options):
    def run(**how):
        made = trainer(llama(), config(tmp_path / str(how), **options, **how), rows(8))
        made.train()
        return history(made, "loss", "grad_norm", "drift")

    fp32, bf16 = run(), run(bf16=True)
    assert bf16[0][2] == 0.0  # policy and reference take the same path, to the bit
    assert 0.0 < gap(bf16, fp32) < 0.1


def test_three_hundred_steps_equal_an_eager_loop(tmp_path):
    rows = sft_rows(24)
    config = sft_config(
        tmp_path,
        max_steps=300,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        precompute_ref_log_probs=False,
        weight_decay=0.0,
        max_grad_norm=0.0,
    )
    trainer = SFTTrainer(llama(initializer_range=0.02), config, rows)
    batches = []
    compute = trainer.compute_loss

    def recorded(model, inputs, *args, **kwargs):
        batches.append({k: v.clone() for k, v in inputs.items()})
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = recorded
    trainer.train()
    fused = history(trainer, "loss")

    model = llama(initializer_range=0.02)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0)
    eager = []
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        eager.append((loss.item(),))
    assert gap(fused[:32], eager[:32]) < 1e-5
    assert gap(fused, eager) < 1e-3
    assert eager[-1][0] < eager[0][0] - 0.5


def expected_stats(model, before, batch):
    """Statistics of policy and reference in float64, from the specification."""
    found = []
    for m in (model, before):
        m = m.double().eval()
        logits = m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        found.append(
            fused_losses.reference.token_stats(logits, batch["labels"], shift=True, entropy=True)
        )
    return found


def test_evaluation_of_sft_equals_the_specification_in_float64(tmp_path):
    rows = sft_rows(7)
    config = sft_config(tmp_path, loss="hellinger", max_weight=1.2, max_steps=3, learning_rate=0.1)
    trainer = SFTTrainer(llama(), config, rows, rows)
    trainer.train()
    metrics = trainer.evaluate()

    batch = Collator(("",), 0)(list(trainer.eval_dataset))
    with torch.no_grad():
        now, ref = expected_stats(trainer.model, llama(), batch)
    counted = batch["labels"] != -100
    r = (now.logps - ref.logps)[counted]
    member = fused_losses.TOKEN_LOSSES["hellinger"]
    phi, weight = member.phi_and_weight(r, 1.2)
    expected = {
        "loss": -phi.mean(),
        "rewards/implicit": r.mean(),
        "drift": r.abs().mean(),
        "values/mean": now.lse[counted].mean(),
        "entropy": now.entropy[counted].mean(),
        "mean_token_accuracy": now.is_top1[counted].double().mean(),
        "weights/capped": (r < member.left_end(1.2)).double().mean(),
        "weights/reversed": (weight < 0).double().mean(),
    }
    assert 0 < expected["weights/capped"] < 1
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value.item(), rel=2e-5, abs=1e-6), name


def test_evaluation_of_dpo_equals_the_specification_in_float64(tmp_path):
    rows = pair_rows(5)
    trainer = DPOTrainer(llama(), dpo_config(tmp_path, learning_rate=0.1), rows, rows)
    trainer.train()
    metrics = trainer.evaluate()

    batch = trainer.data_collator(list(trainer.eval_dataset))
    with torch.no_grad():
        now, ref = expected_stats(trainer.model, llama(), batch)
    chosen, rejected = now.logps.sum(1).chunk(2)
    losses, chosen_rewards, rejected_rewards = fused_losses.preference_loss(
        chosen, rejected, *ref.logps.sum(1).chunk(2)
    )
    counted = batch["labels"] != -100
    expected = {
        "loss": losses.mean(),
        "rewards/chosen": chosen_rewards.mean(),
        "rewards/rejected": rejected_rewards.mean(),
        "rewards/margins": (chosen_rewards - rejected_rewards).mean(),
        "rewards/accuracies": (chosen_rewards > rejected_rewards).double().mean(),
        "rewards/implicit": 0.1 * (now.logps - ref.logps)[counted].mean(),
        "logps/chosen": chosen.mean(),
        "logps/rejected": rejected.mean(),
        "entropy": now.entropy[counted].mean(),
        "mean_token_accuracy": now.is_top1[:5][counted[:5]].double().mean(),
        "values/mean": 0.1 * now.lse[counted].mean(),
    }
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name


def test_the_first_training_log_holds_the_telemetry_of_its_batch(tmp_path):
    config = sft_config(tmp_path, loss="pearson", max_steps=1, per_device_train_batch_size=8)
    trainer = SFTTrainer(llama(), config, sft_rows(8))
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["drift"] < 1e-5
    assert log["num_tokens"] == sum(map(len, trainer.train_dataset["input_ids"]))
    assert log["weights/reversed"] == 0.0


def test_a_loss_of_ones_own_trains(tmp_path):
    own = fused_losses.TokenLoss("own", None, lambda r: (r - r * r / 8, 1 - r / 4))
    trainer = SFTTrainer(llama(), sft_config(tmp_path), sft_rows(8), loss=own)
    trainer.train()
    losses = history(trainer, "loss")
    assert losses[-1] < losses[0]
    with pytest.raises(TypeError, match="goes by name into SFTConfig"):
        SFTTrainer(llama(), sft_config(tmp_path), sft_rows(8), loss="pearson")


def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(tmp_path):
    model = llama()
    trainer = SFTTrainer(
        model, sft_config(tmp_path, save_strategy="steps", save_steps=1), sft_rows(4)
    )
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(NonFiniteLossError, match=r"nan at step 1, on rows \[.*smaller learning"):
        trainer.train()
    assert list(tmp_path.glob("checkpoint-*")) == []


def test_where_looking_would_wait_the_first_bad_step_is_still_named():
    watch = FiniteWatch()
    for step, loss in [(7, 1.0), (8, float("inf")), (9, float("nan"))]:
        watch._seen.append((step, torch.tensor(loss), torch.tensor([step, 2])))
    with pytest.raises(NonFiniteLossError, match=r"inf at step 8, on rows \[8, 2\]"):
        watch.check()
    watch.check()


def test_no_checkpoint_is_written_of_a_loss_that_nobody_has_looked_at(tmp_path):
    trainer = SFTTrainer(llama(), sft_config(tmp_path), sft_rows(4))
    trainer._record.losses._seen.append((1, torch.tensor(float("inf")), torch.tensor([0])))
    with pytest.raises(NonFiniteLossError, match="inf at step 1"):
        trainer._save_checkpoint(trainer.model, None)
    assert list(tmp_path.glob("checkpoint-*")) == []


def test_a_model_that_looks_across_packed_sequences_is_refused(monkeypatch):
    model = fused_losses.integrations.fuse_lm_head(llama())
    check_packing(model, torch.device("cpu"))
    plain = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *a, position_ids=None, **k: plain(*a, **k))
    with pytest.raises(ValueError, match="looks from one sequence of a row into another"):
        check_packing(model, torch.device("cpu"))


def test_what_cannot_work_is_refused_by_name(tmp_path):
    rows = sft_rows(4)
    with pytest.raises(TypeError, match="args must be a SFTConfig, got DPOConfig"):
        SFTTrainer(llama(), dpo_config(tmp_path), rows)
    config = sft_config(tmp_path, loss="pearson", precompute_ref_log_probs=False)
    with pytest.raises(ValueError, match="loss='pearson' needs reference log-probs"):
        SFTTrainer(llama(), config, rows)
    model = llama()
    with pytest.raises(ValueError, match="ref_model is the model that is trained"):
        SFTTrainer(model, sft_config(tmp_path, loss="pearson"), rows, ref_model=model)
    trainer = SFTTrainer(model, sft_config(tmp_path, loss="pearson"), rows, rows)
    with pytest.raises(ValueError, match="give eval_dataset"):
        trainer.evaluate(sft_rows(3))


def test_a_loss_without_a_reference_computes_none_and_the_sft_term_is_added(tmp_path):
    free = DPOTrainer(
        llama(), dpo_config(tmp_path, loss_type="simpo", simpo_gamma=1.0), pair_rows()
    )
    assert "chosen_ref_logps" not in free.train_dataset.column_names
    free.train()
    losses = history(free, "loss", "rewards/margins")
    assert losses[-1] < losses[0]
    both = DPOTrainer(llama(), dpo_config(tmp_path, sft_weight=1.0, max_steps=1), pair_rows())
    both.train()
    ((loss,),) = history(both, "loss")
    assert loss > 1.0  # log 2 and the negative log-likelihood of a random model
