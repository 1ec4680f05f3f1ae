"""SFT anchored to its start: the reference runs beside the model, and the log tells the KL."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_training import history, llama, sft_config, sft_rows

from fused_losses.trainer import SFTTrainer
from fused_losses.trainer.anchor import check_anchor

QUICK = {"max_steps": 3, "per_device_train_batch_size": 4, "max_grad_norm": 0.0}


def recorded(trainer):
    """The batches that a trainer is given, and the weights that each of them meets."""
    seen, compute = [], trainer.compute_loss

    def record(model, inputs, *args, **kwargs):
        batch = {k: v.clone() for k, v in inputs.items()}
        seen.append((batch, copy.deepcopy(trainer.model)))
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = record
    return seen


def eager(model, reference, batch, anchor, weight):
    """Loss and KL of whole logits, in float64."""
    passed = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logp, logq = (
            m(**passed).logits[:, :-1].double().log_softmax(-1) for m in (model, reference)
        )
    labels = batch["labels"][:, 1:]
    nll = F.nll_loss(logp.transpose(1, 2), labels, reduction="none")
    a, b = (logq, logp) if anchor == "forward_kl" else (logp, logq)
    kl = (a.exp() * (a - b)).sum(-1)
    counted = labels != -100
    return (nll + weight * kl)[counted].mean().item(), kl[counted].mean().item()


@pytest.mark.parametrize("anchor", ["forward_kl", "reverse_kl"])
def test_the_loss_is_that_of_whole_logits_and_the_reference_is_the_start(tmp_path, anchor):
    start = llama()
    config = sft_config(tmp_path, anchor_weight=0.5, anchor=anchor, **QUICK)
    trainer = SFTTrainer(copy.deepcopy(start), config, sft_rows())
    seen = recorded(trainer)
    trainer.train()
    logs = history(trainer, "loss", "anchor/kl", "nll")
    for (batch, model), (loss, kl, nll) in zip(seen, logs, strict=True):
        want = eager(model, start, batch, anchor, 0.5)
        assert (loss, kl) == pytest.approx(want, rel=1e-4, abs=1e-6)
        assert loss == pytest.approx(nll + 0.5 * kl, rel=1e-5)
    assert abs(logs[0][1]) < 1e-6
    assert logs[-1][1] > 1e-3
    trainer.eval_dataset = trainer.train_dataset
    assert trainer.evaluate()["eval_anchor/kl"] > 1e-3


def test_an_anchor_keeps_the_model_near_its_start(tmp_path):
    found = {}
    for weight in (1e-6, 20.0):
        config = sft_config(tmp_path, anchor_weight=weight, max_steps=12, learning_rate=3e-3)
        trainer = SFTTrainer(llama(), config, sft_rows())
        trainer.train()
        found[weight] = history(trainer, "anchor/kl")[-1][0]
    assert found[20.0] < 0.5 * found[1e-6], found


@pytest.mark.parametrize(
    "how",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"padding_free": True},
        {"packing": True, "max_length": 24},
    ],
    ids=["micro-batches", "padding-free", "packed"],
)
def test_micro_batches_and_packed_rows_equal_one_padded_batch(tmp_path, how):
    def run(**options):
        options = {"anchor_weight": 0.3, "loss": "hellinger", "max_steps": 2, **options}
        config = sft_config(tmp_path, **{"per_device_train_batch_size": 8, **options})
        trainer = SFTTrainer(llama(), config, sft_rows(8))
        trainer.train()
        return torch.tensor(history(trainer, "loss", "grad_norm", "anchor/kl", "drift"))

    torch.testing.assert_close(run(**how), run(), rtol=1e-4, atol=1e-5)


def test_of_fresh_adapters_the_base_model_is_the_reference_and_no_second_one_is_held(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    start = llama()
    config = sft_config(tmp_path, anchor_weight=0.5, anchor="reverse_kl", **QUICK)
    trainer = SFTTrainer(copy.deepcopy(start), config, sft_rows(), peft_config=lora)
    assert trainer._anchor.model is trainer.model
    seen = recorded(trainer)
    trainer.train()
    for (batch, model), found in zip(seen, history(trainer, "loss", "anchor/kl"), strict=True):
        want = eager(model, start, batch, "reverse_kl", 0.5)
        assert found == pytest.approx(want, rel=1e-4, abs=1e-6)
    assert history(trainer, "anchor/kl")[-1][0] > 1e-4
    assert trainer.model.training

    # Adapters that have learnt something: the start has them, the base model has not.
    again = SFTTrainer(trainer.model, config, sft_rows())
    assert again._anchor.model is not again.model
    again.train()
    assert abs(history(again, "anchor/kl")[0][0]) < 1e-6


def test_a_learnt_prompt_lies_before_the_reference_too(tmp_path):
    peft = pytest.importorskip("peft")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    config = sft_config(tmp_path, anchor_weight=0.5, padding_free=False, **QUICK)
    trainer = SFTTrainer(llama(), config, sft_rows(), peft_config=prompt)
    trainer.train()
    first, *_, last = history(trainer, "anchor/kl")
    assert abs(first[0]) < 1e-6
    assert last[0] > 0.0


def test_a_reference_that_is_given_is_the_one(tmp_path):
    other = llama(seed=5)
    config = sft_config(tmp_path, anchor_weight=0.5, **QUICK)
    trainer = SFTTrainer(llama(), config, sft_rows(), ref_model=other)
    assert trainer._anchor.model is other
    seen = recorded(trainer)
    trainer.train()
    (batch, model), *_ = seen
    want = eager(model, other, batch, "forward_kl", 0.5)
    assert history(trainer, "loss", "anchor/kl")[0] == pytest.approx(want, rel=1e-4)
    assert want[1] > 0.1


def test_dropout_is_off_and_bf16_starts_at_its_reference(tmp_path):
    config = sft_config(tmp_path, anchor_weight=0.5, bf16=True, **QUICK)
    trainer = SFTTrainer(llama(attention_dropout=0.5), config, sft_rows())
    trainer.train()
    assert history(trainer, "anchor/kl")[0][0] == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchor_weight": -0.1}, "anchor_weight must be a finite number >= 0, got -0.1"),
        ({"anchor": "kl", "anchor_weight": 0.1}, "anchor must be one of 'forward_kl'"),
        ({"anchor": "reverse_kl"}, "anchor='reverse_kl' would not be read: anchor_weight is 0"),
        ({"anchor_weight": 0.1, "level": "sequence"}, "not taken at level='sequence'"),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        sft_config(tmp_path, **options)


def test_a_sharded_model_is_refused_with_the_cure(tmp_path):
    config = sft_config(tmp_path, anchor_weight=0.1)
    with pytest.raises(ValueError, match=r"FSDP or DeepSpeed shards.*loss='pearson'"):
        check_anchor(config, sharded=True)
    check_anchor(sft_config(tmp_path), sharded=True)
