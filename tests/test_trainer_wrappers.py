"""What is wrapped around training works as without it, or is refused by its name."""

from __future__ import annotations

import subprocess
import sys
from types import MethodType

import pytest
import torch
from tiny_training import dpo_config, history, llama, pair_rows, sft_config, sft_rows

from fused_losses.trainer import DPOTrainer, SFTTrainer

peft = pytest.importorskip("peft")


@pytest.mark.parametrize(
    ("trainer", "config", "rows"),
    [(SFTTrainer, sft_config, sft_rows), (DPOTrainer, dpo_config, pair_rows)],
)
def test_a_compiled_model_trains_and_evaluates_as_one_that_is_not(tmp_path, trainer, config, rows):
    def run(model, **options):
        args = config(tmp_path, max_steps=2, **options)
        made = trainer(model, args, rows(4), rows(4))
        made.train()
        return [*history(made, "loss", "grad_norm", "nll"), (made.evaluate()["eval_loss"],)]

    plain = run(llama())
    if trainer is SFTTrainer:
        compiled = run(llama(), torch_compile=True, torch_compile_backend="eager")
    else:
        model = llama()
        model.compile(backend="eager")
        compiled = run(model)
    torch.compiler.reset()
    for got, expected in zip(compiled, plain, strict=True):
        assert got == pytest.approx(expected, rel=1e-4)


LEARNT = {
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "P-tuning": peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8
    ),
    "prefix tuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("name", LEARNT)
def test_a_learnt_prompt_trains_and_scores_each_token_as_the_model_does(tmp_path, name):
    torch.manual_seed(1)
    model = peft.get_peft_model(llama(), LEARNT[name])
    config = sft_config(tmp_path, max_steps=2, per_device_train_batch_size=8, loss="hellinger")
    trainer = SFTTrainer(model, config, sft_rows(8), sft_rows(8))
    batch = trainer.data_collator(list(trainer.train_dataset))
    model.eval()
    with torch.no_grad():
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        T = batch["labels"].shape[1]
        logp = model(**inputs).logits.double().log_softmax(-1)[:, -T:-1]
    labels = batch["labels"][:, 1:]
    nll = -logp.gather(2, labels.clamp(min=0)[..., None])[..., 0][labels != -100].mean().item()
    assert trainer.evaluate()["eval_nll"] == pytest.approx(nll, rel=1e-5)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    trainer.train()
    after = [p for p in model.parameters() if p.requires_grad]
    assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_learnt_prompt_trains_in_dpo_and_is_refused_end_to_end(tmp_path):
    model = peft.get_peft_model(llama(), LEARNT["prompt tuning"])
    trainer = DPOTrainer(model, dpo_config(tmp_path, max_steps=2), pair_rows(4), pair_rows(4))
    trainer.train()
    assert trainer.evaluate()["eval_logps/chosen"] < 0
    with pytest.raises(ValueError, match=r"PromptTuningConfig: .*padding_free=False"):
        DPOTrainer(model, dpo_config(tmp_path, padding_free=True), pair_rows(4))


@pytest.mark.parametrize(
    ("strategy", "padding_free"), [("group_by_length", False), ("batch_rebalance", True)]
)
def test_pairs_are_grouped_by_what_they_take_in_a_batch(tmp_path, strategy, padding_free):
    options = {"train_sampling_strategy": strategy, "padding_free": padding_free}
    config = dpo_config(tmp_path, max_steps=1, per_device_train_batch_size=2, **options)
    trainer = DPOTrainer(llama(), config, pair_rows(16), pair_rows(6))
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    rows = trainer.train_dataset
    of = sum if padding_free else max
    sides = zip(rows["chosen_input_ids"], rows["rejected_input_ids"], strict=True)
    lengths = [of(map(len, pair)) for pair in sides]
    sampler = trainer._get_train_sampler(rows)
    assert list(sampler.lengths) == lengths


def test_new_rows_are_prepared_or_refused_in_words(tmp_path):
    free = sft_config(tmp_path, precompute_ref_log_probs=False)
    trainer = SFTTrainer(llama(), free, sft_rows(4), sft_rows(5, seed=9))
    expected = trainer.evaluate()
    for found in (
        trainer.evaluate(sft_rows(5, seed=9)),
        trainer.evaluate({"new": sft_rows(5, seed=9)}),
        trainer.predict(sft_rows(5, seed=9)).metrics,
        trainer.evaluate(trainer.eval_dataset.select(range(5))),
    ):
        (loss,) = (v for k, v in found.items() if k.endswith("_loss"))
        assert loss == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert trainer.predict(trainer.eval_dataset).metrics["test_nll"] == expected["eval_nll"]
    with pytest.raises(TypeError, match=r"must be a datasets\.Dataset, got list"):
        trainer.evaluate([{"input_ids": [1, 2]}])

    compared = SFTTrainer(llama(), sft_config(tmp_path, loss="pearson"), sft_rows(4))
    for ask in (compared.evaluate, compared.predict):
        with pytest.raises(ValueError, match=r"was not prepared with references .*eval_dataset"):
            ask(sft_rows(5, seed=9))
    assert compared.evaluate(compared.train_dataset)["eval_drift"] < 1e-6


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"compute_metrics": print}, TypeError, r"compute_metrics needs logits.*eval_nll"),
        ({"preprocess_logits_for_metrics": print}, TypeError, "needs logits"),
        ({"compute_loss_func": print}, TypeError, "TokenLoss"),
        ({"data_collator": print}, TypeError, "data_collator would"),
        ({"model_init": llama}, TypeError, "give the model"),
        ({"tokenizer": 1}, TypeError, "processing_class"),
        ({"colour": 1}, TypeError, "unexpected keyword argument 'colour'"),
    ],
)
def test_arguments_of_other_trainers_are_refused_with_the_cure(tmp_path, given, error, said):
    for trainer, config in ((SFTTrainer, sft_config), (DPOTrainer, dpo_config)):
        with pytest.raises(error, match=f"{trainer.__name__}.*{said}"):
            trainer(llama(), config(tmp_path), **given)
        trainer(llama(), config(tmp_path), compute_metrics=None)


def test_liger_is_refused_by_name(tmp_path):
    config = sft_config(tmp_path)
    config.use_liger_kernel = True  # as where liger_kernel is installed
    with pytest.raises(ValueError, match=r"use_liger_kernel=True replaces model\.forward"):
        SFTTrainer(llama(), config, sft_rows(4))


def test_a_forward_that_was_replaced_is_told_of(tmp_path):
    trainer = SFTTrainer(llama(), sft_config(tmp_path), sft_rows(4))

    def forward(self, fused=None, **inputs):
        return type(self).forward(self, **inputs)

    trainer.model.forward = MethodType(forward, trainer.model)
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM\.forward has been replaced"):
        trainer.train()


@pytest.mark.parametrize("missing", ["transformers", "datasets", "accelerate"])
def test_importing_the_trainer_names_the_extra_that_is_missing(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; import fused_losses.trainer"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'fused-losses[train]'" in run.stderr
