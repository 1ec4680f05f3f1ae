"""TRL's trainers on this engine: TRL's own numbers per loss, and the losses that TRL lacks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_losses

pytest.importorskip("trl")
pytest.importorskip("peft")

import datasets
import peft
import trl
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from fused_losses.integrations import trl as ours

V = 47
SILENT = dict(
    report_to=[],
    disable_tqdm=True,
    logging_steps=1,
    max_steps=1,
    save_strategy="no",
    use_cpu=True,
    max_grad_norm=1e9,
    gradient_checkpointing=False,
    bf16=False,
    learning_rate=0.01,
    lr_scheduler_type="constant",
    optim="sgd",
    per_device_train_batch_size=4,
    per_device_eval_batch_size=3,
)


@pytest.fixture(scope="module")
def tokenizer():
    names = ["<pad>", "<eos>", *(f"w{i}" for i in range(V - 2))]
    words = {name: i for i, name in enumerate(names)}
    inner = Tokenizer(WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="w0"
    )


def words(seed: int, lengths: range) -> list[str]:
    """Sentences of the given lengths, of words drawn with a seed."""
    g = torch.Generator().manual_seed(seed)
    draws = [torch.randint(0, V - 2, (n,), generator=g).tolist() for n in lengths]
    return ["".join(f" w{i}" for i in ids) for ids in draws]


PROMPTS, CHOSEN, REJECTED = (
    words(1, range(2, 10)),
    words(2, range(9, 1, -1)),
    words(3, range(3, 11)),
)
COMPLETIONS = datasets.Dataset.from_dict({"prompt": PROMPTS, "completion": CHOSEN})
PAIRS = datasets.Dataset.from_dict({"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED})


def make(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=V,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20.0)
    return model


class Gradients(TrainerCallback):
    """Keep the gradients of the last step."""

    found: dict[str, Tensor]

    def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self.found = {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }


def run(cls: Any, model: Any, args: Any, data: Any, tokenizer: Any, **kwargs: Any) -> Any:
    """Evaluate, take a step, evaluate: logs, gradients and the trainer."""
    gradients = Gradients()
    torch.manual_seed(4)
    trainer = cls(
        model=copy.deepcopy(model),
        args=args,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        callbacks=[gradients],
        **kwargs,
    )
    before = trainer.evaluate()
    trainer.train()
    logs = [before, *trainer.state.log_history]
    return logs, gradients.found, trainer


TIMES = ("_time", "runtime", "per_second", "total_flos", "epoch")


def assert_same_run(got: Any, want: Any) -> None:
    """Losses, grad_norm, metrics and every parameter's gradient."""
    for ours_, theirs in zip(got[0], want[0], strict=True):
        assert ours_.keys() == theirs.keys()
        for name, value in theirs.items():
            if not name.endswith(TIMES):
                assert ours_[name] == pytest.approx(value, rel=2e-5, abs=2e-6), name
    assert got[1].keys() == want[1].keys()
    for name, g in want[1].items():
        # discopop alone takes twenty times a margin's rounding.
        assert float((got[1][name] - g).norm()) <= 5e-5 * float(g.norm()), name


SFT_CASES: dict[str, dict[str, Any]] = {
    "completions": {},
    "accumulation": dict(per_device_train_batch_size=2, gradient_accumulation_steps=2),
    "packed": dict(packing=True, max_length=16, padding_free=True),
    "whole texts": dict(completion_only_loss=False),
}


@pytest.mark.parametrize("case", SFT_CASES)
def test_sft_is_trls_own(case, tokenizer, tmp_path):
    args = trl.SFTConfig(str(tmp_path), **SILENT | SFT_CASES[case])
    model = make()
    want = run(trl.SFTTrainer, model, copy.deepcopy(args), COMPLETIONS, tokenizer)
    got = run(ours.SFTTrainer, model, args, COMPLETIONS, tokenizer)
    assert_same_run(got, want)
    assert got[1]


def reference_loss(trainer: Any, model: Any, reference: Any, name: str, **options: Any) -> Tensor:
    """The specification's loss of the whole training set, from logits."""
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(PROMPTS))])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    labels = batch["labels"]
    with torch.no_grad():
        stats = fused_losses.reference.token_stats(reference(**inputs).logits, labels, shift=True)
    return fused_losses.reference.token_loss(
        model(**inputs).logits, labels, stats.logps, loss=name, shift=True, **options
    )


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", ["pearson", "hellinger"])
def test_sft_with_a_divergence_is_the_specifications(name, accumulate, tokenizer, tmp_path):
    args = trl.SFTConfig(
        str(tmp_path),
        **SILENT
        | dict(per_device_train_batch_size=8 // accumulate, max_steps=2)
        | dict(gradient_accumulation_steps=accumulate),
    )
    model = make()
    options = dict(loss=name, beta=0.4)
    logs, found, trainer = run(ours.SFTTrainer, model, args, COMPLETIONS, tokenizer, **options)
    # At the reference every reward is 0; the second step starts where the first one led.
    assert logs[0]["eval_rewards/implicit"] == pytest.approx(0.0, abs=1e-6)
    first = copy.deepcopy(model)
    loss = reference_loss(trainer, first, model, name, beta=0.4)
    assert logs[1]["loss"] == pytest.approx(loss.item(), abs=1e-6)
    loss.backward()
    with torch.no_grad():
        for p in first.parameters():
            p.sub_(0.01 * p.grad)
            p.grad = None
    loss = reference_loss(trainer, first, model, name, beta=0.4)
    loss.backward()
    assert logs[2]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert logs[2]["rewards/implicit"] > 1e-3
    for key, p in first.named_parameters():
        assert float((found[key] - p.grad).norm()) <= 1e-4 * float(p.grad.norm()), key


def test_packed_references_are_those_of_rows(tokenizer, tmp_path):
    rows, packed = (
        ours.SFTTrainer(
            model=make(),
            args=trl.SFTConfig(str(tmp_path), **SILENT, padding_free=free, max_length=None),
            train_dataset=COMPLETIONS,
            processing_class=tokenizer,
            loss="pearson",
        )
        for free in (False, True)
    )
    for a, b in zip(rows.train_dataset, packed.train_dataset, strict=True):
        assert len(a["ref_logps"]) == len(a["input_ids"])
        counted = torch.tensor(a["labels"]) != -100
        given = torch.tensor(a["ref_logps"])
        assert bool((given[~counted] == 0).all())
        assert bool((given[counted] < 0).all())
        assert b["ref_logps"] == pytest.approx(a["ref_logps"], abs=1e-4)


def test_under_peft_the_reference_is_the_model_without_its_adapter(tokenizer, tmp_path):
    args = trl.SFTConfig(str(tmp_path), **SILENT | dict(max_steps=3))
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    logs, found, trainer = run(
        ours.SFTTrainer, make(), args, COMPLETIONS, tokenizer, loss="hellinger", peft_config=config
    )
    assert logs[0]["eval_rewards/implicit"] == pytest.approx(0.0, abs=1e-6)
    assert all("lora_" in name for name in found)
    assert trainer.evaluate()["eval_rewards/implicit"] > 1e-4


TRL_ONLY: dict[str, dict[str, Any]] = {
    "bco_pair": dict(loss_type=["bco_pair"]),
    "a mixture": dict(loss_type=["sigmoid", "sft"], loss_weights=[0.7, 0.2]),
    "another divergence": dict(f_divergence_type="js_divergence"),
    "length desensitised": dict(ld_alpha=0.5),
}
PAIR_LOSSES = [
    name
    for name, loss in fused_losses.preference.PAIR_LOSSES.items()
    if not getattr(loss, "reference_free", False)
]


def dpo_config(name: str, folder: Any) -> trl.DPOConfig:
    more = TRL_ONLY[name] if name in TRL_ONLY else dict(loss_type=[name])
    if name in ("robust", "exo_pair", "aot"):
        more = more | dict(label_smoothing=0.1)
    return trl.DPOConfig(str(folder), **SILENT | more, beta=0.3)


@pytest.mark.parametrize("name", [*PAIR_LOSSES, *TRL_ONLY])
def test_dpo_is_trls_own(name, tokenizer, tmp_path):
    model = make()
    runs = [
        run(
            cls,
            model,
            dpo_config(name, tmp_path),
            PAIRS,
            tokenizer,
            ref_model=make(seed=1),
        )
        for cls in (ours.DPOTrainer, trl.DPOTrainer)
    ]
    assert_same_run(*runs)
    assert "rewards/chosen" in runs[0][0][1]


def test_dpo_with_an_adapter_and_with_precomputed_references_is_trls_own(tokenizer, tmp_path):
    # A random adapter: where policy and reference agree, TRL's accuracies are those of roundings.
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    for more in ({}, dict(precompute_ref_log_probs=True)):
        runs = []
        for cls in (ours.DPOTrainer, trl.DPOTrainer):
            args = trl.DPOConfig(str(tmp_path), **SILENT | more)
            runs.append(run(cls, make(), args, PAIRS, tokenizer, peft_config=config))
        assert_same_run(*runs)


def test_what_is_not_served_is_refused_by_name(tokenizer, tmp_path):
    def sft(more: dict[str, Any], **kwargs: Any) -> Any:
        return ours.SFTTrainer(
            model=make(),
            args=trl.SFTConfig(str(tmp_path), **SILENT | more),
            train_dataset=COMPLETIONS,
            processing_class=tokenizer,
            **kwargs,
        )

    with pytest.raises(ValueError, match=r"loss must be one of 'mle'.* got 'chi2'"):
        sft({}, loss="chi2")
    with pytest.raises(ValueError, match="loss_type='dft' would replace loss='pearson'"):
        sft(dict(loss_type="dft"), loss="pearson")
    with pytest.raises(ValueError, match="label_smoothing_factor would replace loss='pearson'"):
        sft(dict(label_smoothing_factor=0.1), loss="pearson")
    trainer = sft({}, loss="pearson")
    trainer.data_collator([trainer.train_dataset[0]])
    with pytest.raises(ValueError, match=r"no column 'ref_logps'.*add_ref_logps"):
        trainer.evaluate(COMPLETIONS)
    row = dict(trainer.train_dataset[0])
    row["ref_logps"] = row["ref_logps"][:-1]
    with pytest.raises(ValueError, match="ref_logps must have one entry per token"):
        trainer.data_collator([row])
    args = trl.DPOConfig(str(tmp_path), **SILENT, use_weighting=True)
    with pytest.raises(NotImplementedError, match="use_weighting"):
        ours.DPOTrainer(
            model=make(),
            ref_model=make(),
            args=args,
            train_dataset=PAIRS,
            processing_class=tokenizer,
        )
