"""What TRL's options do on this engine: references, refusals, lengths, means."""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import llama, tokenizer

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

import datasets  # noqa: E402

from fused_losses.integrations import trl as ours  # noqa: E402
from fused_losses.integrations.trl import head  # noqa: E402
from fused_losses.integrations.trl.references import ReferenceCollator  # noqa: E402

SILENT: dict[str, Any] = {
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "max_steps": 1,
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 4,
}
FP32 = SILENT | {"bf16": False}
SEQUENCES = datasets.Dataset.from_dict(
    {"input_ids": [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16], [17, 18]]}
)
PAIRS = datasets.Dataset.from_dict(
    {
        "prompt": ["ac", "bd", "ca", "db"],
        "chosen": ["cdcd", "dc", "ddd", "cc"],
        "rejected": ["efe", "fefef", "ef", "fff"],
    }
)


def sft(folder: Path, options: dict[str, Any], data: Any = SEQUENCES, **more: Any) -> Any:
    """A trainer of this module."""
    config = trl.SFTConfig(str(folder), **options)
    more = {"processing_class": tokenizer()} | more
    return ours.SFTTrainer(llama(), config, train_dataset=data, **more)


def dpo(folder: Path, options: dict[str, Any], data: Any = PAIRS, **more: Any) -> Any:
    """A trainer of this module; its reference is a copy."""
    config = trl.DPOConfig(str(folder), **options)
    more = {"processing_class": tokenizer(), "ref_model": llama()} | more
    return ours.DPOTrainer(llama(), args=config, train_dataset=data, **more)


@pytest.mark.parametrize("options", [SILENT | {"bf16": True}, FP32], ids=["bf16", "fp32"])
def test_sft_compares_with_what_it_starts_from_in_the_precision_of_the_run(
    options: dict[str, Any], tmp_path: Path
) -> None:
    adapted = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)  # an adapter that was trained before
    config = trl.SFTConfig(str(tmp_path), **options)
    trainer = ours.SFTTrainer(
        adapted,
        config,
        train_dataset=SEQUENCES,
        processing_class=tokenizer(),
        loss="hellinger",
        beta=0.5,
    )
    trainer.train()
    assert trainer.state.log_history[0]["rewards/implicit"] == 0.0


def test_references_that_a_dataset_brings_to_trl_are_of_this_model_and_precision(
    tmp_path: Path,
) -> None:
    made = sft(tmp_path, FP32, loss="pearson").train_dataset
    again = sft(tmp_path, FP32, made, loss="pearson")
    assert list(again.train_dataset["ref_logps"]) == list(made["ref_logps"])
    with pytest.raises(ValueError, match="precision 'no', the policy here in 'bf16'"):
        sft(tmp_path, SILENT | {"bf16": True}, made, loss="pearson")
    config = trl.SFTConfig(str(tmp_path), **FP32)
    with pytest.raises(ValueError, match=r"the reference here is .*Drop the ref_logps"):
        ours.SFTTrainer(
            llama(1), config, train_dataset=made, processing_class=tokenizer(), loss="pearson"
        )


@pytest.mark.parametrize("options", [{}, {"pad_to_multiple_of": 8}, {"padding_free": True}])
def test_references_are_padded_where_the_tokens_are(options: dict[str, Any]) -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = [
        {"input_ids": ids, "ref_logps": [-float(i) for i in ids]} for ids in SEQUENCES["input_ids"]
    ]
    collator = ReferenceCollator(DataCollatorForLanguageModeling(0, **options))
    batch = collator([dict(row) for row in rows])
    assert batch["ref_logps"].shape == batch["input_ids"].shape
    # Each token's reference is its own number, and padding's is 0, as its token is.
    assert torch.equal(batch["ref_logps"], -batch["input_ids"].float())
    assert options == {"padding_free": True} or (batch["input_ids"] == 0).any()


def test_dropout_that_is_a_number_is_off_in_dpo(tmp_path: Path) -> None:
    trainer = ours.DPOTrainer(
        llama(attention_dropout=0.5),
        ref_model=llama(),
        args=trl.DPOConfig(str(tmp_path), **FP32),
        train_dataset=PAIRS,
        processing_class=tokenizer(),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2.0), abs=1e-6)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_that_change_the_base_start_at_log_two_or_are_refused(
    init: str, tmp_path: Path
) -> None:
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=init)
    with pytest.raises(NotImplementedError, match=f"init_lora_weights='{init}' of peft_config"):
        dpo(tmp_path, FP32, ref_model=None, peft_config=lora)
    adapted = peft.get_peft_model(llama(), lora)
    more: dict[str, Any] = {"train_dataset": PAIRS, "processing_class": tokenizer()}
    with pytest.raises(NotImplementedError, match=f"init_lora_weights='{init}' of default"):
        ours.DPOTrainer(adapted, args=trl.DPOConfig(str(tmp_path), **FP32), **more)
    trainer = sft(tmp_path, FP32, loss="pearson", peft_config=lora)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/implicit"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid"]},
        {"loss_type": ["bco_pair"]},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"f_divergence_type": "js_divergence"},
        {"ld_alpha": 0.5},
        {"loss_type": ["bco_pair"], "precompute_ref_log_probs": True},
    ],
    ids=str,
)
def test_rewards_start_at_zero_in_bf16_under_losses_of_either(
    options: dict[str, Any], tmp_path: Path
) -> None:
    trainer = dpo(tmp_path, SILENT | {"bf16": True} | options)
    # Batch by batch, as they are trained on: other padding rounds otherwise.
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["rewards/chosen"] == log["rewards/rejected"] == 0.0


@pytest.mark.parametrize(
    ("options", "more", "named"),
    [
        ({"loss_type": "dft"}, {"loss": "pearson"}, "loss_type='dft' would replace"),
        ({"label_smoothing_factor": 0.1}, {"loss": "hellinger"}, "label_smoothing_factor would"),
        ({}, {"loss": "pearson", "compute_loss_func": print}, "compute_loss_func would"),
        ({}, {"loss": "chi2"}, "loss must be one of"),
        ({}, {"loss": "pearson", "beta": -1.0}, "beta"),
        ({}, {"loss": "hellinger", "max_weight": 0.5}, "max_weight"),
    ],
    ids=str,
)
def test_sft_refuses_before_it_tokenises(
    options: dict[str, Any], more: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=named):
        sft(tmp_path, FP32 | options, processing_class=None, **more)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"use_weighting": True}, NotImplementedError, "use_weighting"),
        ({"loss_type": ["robust"], "label_smoothing": 0.7}, ValueError, "label_smoothing"),
        ({"beta": -0.1}, ValueError, "beta"),
    ],
    ids=str,
)
def test_dpo_refuses_before_it_tokenises(
    options: dict[str, Any], error: type[Exception], named: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=named):
        dpo(tmp_path, FP32 | options, processing_class=None)


def test_smoothing_that_would_be_ignored_is_told_of(tmp_path: Path) -> None:
    options = {"loss_type": ["sigmoid", "robust"], "label_smoothing": 0.1}
    with pytest.warns(UserWarning, match="does not reach loss_type='sigmoid'"):
        dpo(tmp_path, FP32 | options)


def test_images_and_streams_and_packed_references_are_refused_in_words(tmp_path: Path) -> None:
    text = [{"role": "user", "content": "hi"}]
    seen = datasets.Dataset.from_list([{"messages": text, "images": ["a.png"]}])
    with pytest.raises(NotImplementedError, match=r"train_dataset has images.*loss='mle'"):
        sft(tmp_path, FP32, seen, loss="hellinger")
    for data in ({"eval_dataset": seen}, {"eval_dataset": {"far": seen}}):
        with pytest.raises(NotImplementedError, match=r"eval_dataset.* has images"):
            sft(tmp_path, FP32, loss="pearson", **data)
    with pytest.raises(ValueError, match=r"a stream and must bring its own 'ref_logps'"):
        sft(tmp_path, FP32, SEQUENCES.to_iterable_dataset(), loss="pearson")
    known = SEQUENCES.add_column("ref_logps", [[0.0] * len(x) for x in SEQUENCES["input_ids"]])
    with pytest.raises(ValueError, match=r"'ref_logps', which packing would lose.*packing=False"):
        sft(tmp_path, FP32 | {"packing": True, "max_length": 16}, known, loss="pearson")
    sft(tmp_path, FP32, known, loss="pearson")


def test_liger_is_kept_from_the_head_as_trl_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        "transformers.trainer.apply_liger_kernel", lambda model, config: asked.append(config)
    )
    for trainer in (
        sft(tmp_path, FP32 | {"use_liger_kernel": True}),
        dpo(tmp_path, FP32 | {"use_liger_kernel": True}),
    ):
        trainer.train()
        assert "loss" in trainer.state.log_history[0]
    assert asked == [{"fused_linear_cross_entropy": False}] * 2
    kernels = {"liger_kernel_config": {"fused_linear_cross_entropy": True}}
    with pytest.raises(ValueError, match="fused_linear_cross_entropy"):
        sft(tmp_path, FP32 | {"use_liger_kernel": True} | kernels)


@pytest.mark.parametrize("version", [None, "1.2.0"])
def test_a_trl_that_is_not_there_or_older_is_told_of(
    version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name == "trl" or name.startswith("trl.")]:
        monkeypatch.delitem(sys.modules, name)
    older = types.ModuleType("trl")
    older.__version__ = version
    monkeypatch.setitem(sys.modules, "trl", older if version else None)
    spec = importlib.util.spec_from_file_location("trl_head_again", head.__file__)
    named = f"needs TRL 1.16 or newer, found {version}" if version else r"needs TRL: pip install"
    with pytest.raises(ImportError, match=named):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize("kind", ["prompt tuning", "P-tuning"])
def test_the_first_token_of_a_learnt_prompt_is_compared_with_nothing(
    kind: str, tmp_path: Path
) -> None:
    config = {"prompt tuning": peft.PromptTuningConfig, "P-tuning": peft.PromptEncoderConfig}[kind]
    learnt = config(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = sft(tmp_path, FP32, loss="hellinger", peft_config=learnt)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    masked = batch["labels"].clone()
    masked[:, 0] = -100
    losses = [
        float(trainer.compute_loss(trainer.model, batch | {"labels": labels}, num_items_in_batch=1))
        for labels in (batch["labels"], masked)
    ]
    assert losses[0] == losses[1]
    assert trainer._ratios["train"][1] == 2 * sum(len(x) - 1 for x in SEQUENCES["input_ids"])


def test_a_first_token_that_nothing_predicts_is_no_length(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"prompt": [""], "chosen": ["cdcd"], "rejected": ["ef"]})
    alone, mixed = (
        dpo(tmp_path, FP32 | options, rows, ref_model=llama(seed=1))
        for options in (
            {"loss_type": ["ipo"]},
            {"loss_type": ["ipo", "bco_pair"], "loss_weights": [1.0, 0.0]},
        )
    )
    for trainer in (alone, mixed):
        trainer.train()
    losses = [trainer.state.log_history[0]["loss"] for trainer in (alone, mixed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_implicit_reward_is_a_mean_over_tokens_whatever_the_micro_batches(
    tmp_path: Path,
) -> None:
    found = []
    for size in (1, 2, 4):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        options |= {"max_steps": 3, "logging_steps": 3}
        trainer = sft(tmp_path, FP32 | options, loss="hellinger", beta=0.5, value=0.1)
        trainer.train()
        found.append(trainer.state.log_history[0]["rewards/implicit"])
    assert found[0] > 0.1
    assert found == pytest.approx([found[0]] * 3, rel=1e-4)


def test_the_implicit_reward_is_that_of_the_tokens_that_count(tmp_path: Path) -> None:
    trainer = sft(tmp_path, FP32, loss="hellinger", beta=0.5)
    logps = torch.tensor([[0.0, 1.0, 20.0, 4.0], [0.0, 300.0, 7.0, 500.0]])
    labels = torch.tensor([[-100, 3, -100, 3], [3, -100, 3, -100]])
    trainer._add_ratios(logps, torch.zeros(2, 4), labels)
    logs: dict[str, float] = {}
    trainer.log(logs)
    assert logs["rewards/implicit"] == pytest.approx(0.5 * (1.0 + 4.0 + 7.0) / 3)


def test_every_process_asks_for_the_reward_at_a_log_with_or_without_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = sft(tmp_path, FP32, loss="hellinger")
    sums = torch.tensor([3.0, 4.0])  # of the others
    monkeypatch.setattr(trainer.accelerator, "reduce", lambda mine, how: mine + sums)
    logs: dict[str, float] = {}
    trainer.log(logs)
    assert logs["rewards/implicit"] == pytest.approx(0.75)


def test_references_that_were_made_in_another_way_are_not_found_in_the_cache(
    tmp_path: Path,
) -> None:
    data, made = None, []
    for options in (
        {"bf16": False},
        {"bf16": True},
        {"bf16": False, "ld_alpha": 0.5},
        {"bf16": False, "max_length": 4},
    ):
        options |= {"precompute_ref_log_probs": True}
        trainer = dpo(tmp_path, SILENT | options, ref_model=llama(seed=1))
        columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
        data = data or trainer.train_dataset.select_columns(columns)
        made.append(trainer._precompute_ref_logps(data, "train", 4)["ref_chosen_logps"][:])
    assert all(made[0] != other for other in made[1:])


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_training_under_torch_compile_takes_the_same_step(kind: str, tmp_path: Path) -> None:
    found = []
    for more in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        if kind == "sft":
            trainer = sft(tmp_path, FP32 | more, loss="hellinger")
        else:
            trainer = dpo(tmp_path, FP32 | more, ref_model=llama(seed=1))
        trainer.train()
        found.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])
    torch.compiler.reset()
    assert found[1] == pytest.approx(found[0], rel=1e-5)
