"""The same on GPUs that NCCL joins: a shared head, DDP and FSDP2 beside one process on one of them.

On a CPU the same code runs over gloo, with a few of the cases: whoever has GPUs starts a test that
works.
"""

from __future__ import annotations

import contextlib
import copy
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import test_sharded_head as shared
import torch
import torch.distributed as dist
from conftest import _OnGPU
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

LOSSES = ["mle", "hellinger", "dpo", "own"]
LAYOUTS = ["ddp", "fsdp2"]
BOUND = 2e-6  # of other GPUs' products, in fp32


class Tiny(nn.Module):
    """A body of one layer and a head, which the loss meets inside forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(shared.D, shared.D)
        self.head = nn.Linear(shared.D, shared.EVEN, bias=False)

    def forward(self, batch: shared.Batch, name: str, backend: str) -> torch.Tensor:
        options = {"ignore_index": 7, "backend": backend}
        return shared.LINEAR[name](batch, self.body(batch.x), self.head.weight, options)


def gradients(layout: str, name: str, place: torch.device) -> dict[str, float]:
    """How far loss and gradients are from those of one process with the same batch."""
    torch.manual_seed(3)
    batch, alone = shared.Batch(shared.EVEN), Tiny()
    together: Any = copy.deepcopy(alone)
    backend = "triton" if place.type == "cuda" else "torch"
    if layout == "ddp":
        together = DistributedDataParallel(together)
    else:
        fully_shard(together)
    for model in (alone, together):
        model(batch, name, backend).backward()
    found = {}
    theirs = together.module if layout == "ddp" else together
    for (key, p), (_, q) in zip(alone.named_parameters(), theirs.named_parameters(), strict=True):
        g = q.grad.full_tensor() if isinstance(q.grad, DTensor) else q.grad
        found[key] = shared.relative(g, p.grad)
    return found


def work(rank: int, ranks: int, folder: str, place: str) -> None:
    """What each process runs; what it found lies in the folder."""
    os.environ |= {"LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    device = torch.device(place, rank) if place == "cuda" else torch.device(place)
    if place == "cuda":
        torch.cuda.set_device(device)
    store = f"file://{folder}/store"
    joins = {"cuda": "nccl", "cpu": "gloo"}[place]
    dist.init_process_group(
        joins, store, rank=rank, world_size=ranks, timeout=timedelta(seconds=100)
    )
    mesh = dist.device_mesh.init_device_mesh(place, (ranks,))
    found: dict[Any, Any] = {}
    with _OnGPU(device) if place == "cuda" else contextlib.nullcontext():
        for case in [*shared.CASES, *shared.ON_TRITON] if place == "cuda" else shared.CASES[:6]:
            alone, together = shared.run(case, None), shared.run(case, mesh)
            found[case] = {k: shared.relative(together[k], t) for k, t in alone.items()}
        for layout in LAYOUTS:
            for name in LOSSES:
                found[layout, name] = gradients(layout, name, device)
        torch.testing.assert_close(shared.ties(mesh), shared.ties(None))
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("place", [pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def test_processes_on_gpus_agree_with_one(place: str, tmp_path: Path) -> None:
    ranks = min(torch.cuda.device_count(), 4) if place == "cuda" else 2
    if ranks < 2:
        pytest.skip("needs two GPUs")
    torch.multiprocessing.spawn(work, args=(ranks, str(tmp_path), place), nprocs=ranks)
    for rank in range(ranks):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert len(found) >= 6 + len(LAYOUTS) * len(LOSSES)
        for case, errors in found.items():
            assert errors, case
            assert all(error < BOUND for error in errors.values()), (case, errors)
