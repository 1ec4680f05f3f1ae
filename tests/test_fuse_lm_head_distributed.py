"""Two processes: DDP around a fused model, and FSDP2 on one, give the gradients of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import fused_losses

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from fused_losses.integrations import fuse_lm_head

V, B, T, RANKS = 61, 4, 6, 2


def make(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=V,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def batch() -> Tensor:
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(7))


def train_step(model: nn.Module, ids: Tensor, kind: str) -> Tensor:
    """A loss of the given kind: gradients made in forward, or in backward by recomputation."""

    def loss_of(hidden: Tensor, weight: Tensor, **options: Any) -> Tensor:
        if kind == "loss":
            return fused_losses.linear_mle_loss(hidden, weight, ids, shift=True, **options)
        stats = fused_losses.linear_token_stats(hidden, weight, ids, shift=True, **options)
        return -stats.logps[:, 1:].mean()

    loss = model(input_ids=ids, fused=loss_of).loss
    loss.backward()
    return loss.detach()


def shard(model: LlamaForCausalLM, *, head_apart: bool) -> None:
    for layer in model.model.layers:
        fully_shard(layer)
    if head_apart:
        fully_shard(model.lm_head)
    fully_shard(model)


def wrap(name: str) -> nn.Module:
    model = make(tied="tied" in name)
    if name.startswith("ddp"):
        return nn.parallel.DistributedDataParallel(fuse_lm_head(model))
    if name.startswith("fuse, shard"):
        fuse_lm_head(model)
    shard(model, head_apart="apart" in name)
    return fuse_lm_head(model)


CASES = [
    ("ddp, tied", "loss"),
    ("fuse, shard, tied", "loss"),
    ("fuse, shard", "stats"),
    ("shard, fuse", "loss"),
    ("shard, fuse, tied", "stats"),
    ("fuse, shard, head apart", "loss"),
    ("fuse, shard, head apart", "stats"),
]


def work(rank: int, folder: str) -> None:
    """What each process runs; rank 0 writes the gradients of each case."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    results = {}
    for name, kind in CASES:
        model = wrap(name)
        train_step(model, batch().chunk(RANKS)[rank], kind)
        results[name, kind] = {
            key.removeprefix("module."): p.grad.full_tensor()
            if hasattr(p.grad, "full_tensor")
            else p.grad
            for key, p in model.named_parameters()
        }
    if rank == 0:
        torch.save(results, Path(folder) / "gradients.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=RANKS)
    return torch.load(folder / "gradients.pt")


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_two_processes_give_the_gradients_of_one(results, name, kind):
    model = make(tied="tied" in name)
    model(input_ids=batch(), labels=batch()).loss.backward()
    got = results[name, kind]
    for key, p in model.named_parameters():
        torch.testing.assert_close(got[key], p.grad, rtol=1e-4, atol=1e-5 * float(p.grad.norm()))
