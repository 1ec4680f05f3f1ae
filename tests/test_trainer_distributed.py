"""Two processes train as one does: losses, gradients, metrics, references and evaluation."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_training import dpo_config, history, llama, pair_rows, sft_config, sft_rows

from fused_losses.trainer import DPOTrainer, SFTTrainer

RANKS = 2
METRICS = ("loss", "grad_norm", "drift", "entropy", "rewards/implicit", "num_tokens")
CASES: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "sft": (SFTTrainer, sft_config, sft_rows, {"loss": "pearson", "beta": 0.5}),
    "sft, accumulated": (
        SFTTrainer,
        sft_config,
        sft_rows,
        {"gradient_accumulation_steps": 2, "precompute_ref_log_probs": True},
    ),
    "sft, packed": (
        SFTTrainer,
        sft_config,
        sft_rows,
        {"loss": "hellinger", "level": "sequence", "padding_free": True},
    ),
    # Eight rows to train on, and four to evaluate, of which each holds some sequences.
    "sft, packed rows": (
        SFTTrainer,
        sft_config,
        sft_rows,
        {"loss": "pearson", "level": "sequence", "packing": True, "max_length": 18},
    ),
    "dpo": (DPOTrainer, dpo_config, pair_rows, {}),
    "dpo, packed": (DPOTrainer, dpo_config, pair_rows, {"padding_free": True}),
}


def train(name: str, folder: Path, ranks: int) -> dict[str, Any]:
    """Three steps over the same rows, however many processes share them."""
    cls, config, rows, options = CASES[name]
    args = config(folder, max_steps=3, per_device_train_batch_size=4 // ranks, **options)
    # Last batches that processes of 3 rows each fill up with rows they have had: by one, by five.
    evaluated = rows(7 if "packed" in name else 5, seed=9)
    trainer = cls(llama(), args, rows(16), evaluated)
    trainer.train()
    metrics = trainer.evaluate()
    timed = ("runtime", "per_second", "epoch")
    return {
        "train": history(trainer, *METRICS),
        "eval": {k: v for k, v in metrics.items() if not k.endswith(timed)},
    }


def work(rank: int, folder: str, port: int) -> None:
    """What each process runs; rank 0 writes what it logged."""
    torch.set_num_threads(1)
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    found = {name: train(name, Path(folder) / name, RANKS) for name in CASES}
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, args=(str(folder), port), nprocs=RANKS)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_two_processes_log_what_one_does(of_two: dict[str, Any], name: str, tmp_path: Path) -> None:
    alone = train(name, tmp_path, 1)
    two = of_two[name]
    assert len(alone["train"]) == 3
    for ours, theirs in zip(two["train"], alone["train"], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-5)
    assert two["eval"] == pytest.approx(alone["eval"], rel=2e-4, abs=2e-5)
