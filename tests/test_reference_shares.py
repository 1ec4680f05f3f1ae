"""Processes share the work of references: each a part, all the result, and an error reaches all."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from tiny_training import llama, sft_config, sft_rows, tokenizer
from torch.distributed.fsdp import fully_shard

from fused_losses.integrations import shares
from fused_losses.trainer import precompute_ref_logps
from fused_losses.trainer.reference import Reference

RANKS = 2
ROWS = 7  # in batches of 2: four, two for each process; of 3: three, which are no even shares


def made(folder: Path, size: int, seed: int = 0) -> list[list[float]]:
    """References of a few rows."""
    config = sft_config(folder, ref_cache_dir=str(folder), precompute_ref_batch_size=size)
    return list(precompute_ref_logps(llama(seed), sft_rows(ROWS), config)["ref_logps"])


def made_sharded(folder: Path) -> list[list[float]]:
    """The same of a model of which each process holds a part, in three batches."""
    model = llama()
    for layer in model.model.layers:
        fully_shard(layer)
    config = sft_config(folder, ref_cache_dir=str(folder), precompute_ref_batch_size=3)
    return list(precompute_ref_logps(fully_shard(model), sft_rows(ROWS), config)["ref_logps"])


def made_in_trl(folder: Path) -> list[list[float]]:
    """The same of TRL's trainer on this engine, in batches of 3."""
    import trl

    from fused_losses.integrations.trl import SFTTrainer

    quiet: dict[str, Any] = {"report_to": "none", "use_cpu": True, "bf16": False}
    config = trl.SFTConfig(str(folder), per_device_eval_batch_size=3, max_length=None, **quiet)
    rows, words = sft_rows(ROWS), tokenizer()
    trainer = SFTTrainer(
        llama(), config, train_dataset=rows, processing_class=words, loss="pearson"
    )
    return list(trainer.train_dataset["ref_logps"])


def refused(*args: Any) -> str:
    """What it says where it fails."""
    try:
        made(*args)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def scenarios(rank: int, folder: Path) -> dict[str, Any]:
    """What this process gets, case by case."""
    forward, gather = Reference._forward, shares.gather_object
    counts = {"forwards": 0, "meetings": 0}

    def counted(self: Any, batch: Any) -> Any:
        counts["forwards"] += 1
        return forward(self, batch)

    def met(found: Any) -> Any:
        counts["meetings"] += 1
        return gather(found)

    def broken(self: Any, batch: Any) -> Any:
        if rank == 1:
            raise RuntimeError("out of luck")
        return forward(self, batch)

    found: dict[str, Any] = {}
    Reference._forward, shares.gather_object = counted, met
    try:
        found["shared"] = made(folder / "shared", 3), dict(counts)
        counts |= {"forwards": 0}
        found["again"] = made(folder / "shared", 3), dict(counts)
        if importlib.util.find_spec("trl"):
            found["trl"] = made_in_trl(folder)
        found["other model"] = refused(folder / "other", 3, rank)
        Reference._forward = broken
        found["error"] = refused(folder / "error", 2)
        Reference._forward = counted
        found["sharded"] = [made_sharded(folder / "sharded")]
        found["names"] = [
            sorted(f.name for f in (folder / of).glob("ref-*.arrow"))
            for of in ("shared", "sharded")
        ]
        found["folders of one machine"] = refused(folder / f"here-{rank}", 3)
        # Two machines, without a folder that both see.
        os.environ["LOCAL_RANK"] = "0"
        PartialState._reset_state()
        found["machines"] = made(folder / f"machine-{rank}", 2), dict(counts)
        found["files"] = len(list((folder / f"machine-{rank}").glob("ref-*.arrow")))
    finally:
        Reference._forward, shares.gather_object = forward, gather
    return found


def work(rank: int, folder: str, port: int) -> None:
    """What each process runs and writes."""
    torch.set_num_threads(1)
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    found = scenarios(rank, Path(folder))
    (Path(folder) / f"found-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    folder = tmp_path_factory.mktemp("shares")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, args=(str(folder), port), nprocs=RANKS)
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize(
    ("case", "size"), [("shared", 3), ("again", 3), ("machines", 2), ("sharded", 3)]
)
def test_every_process_has_the_references_that_one_makes(
    found: list[dict[str, Any]], case: str, size: int, tmp_path: Path
) -> None:
    alone = made(tmp_path, size)
    assert [of[case][0] for of in found] == [alone, alone]


def test_a_sharded_model_has_the_name_of_the_whole(found: list[dict[str, Any]]) -> None:
    for of in found:
        whole, sharded = of["names"]
        assert whole == sharded
        assert len(whole) == 1


def test_every_process_has_them_in_trl_too(found: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("trl")
    alone = made_in_trl(tmp_path)
    assert [of["trl"] for of in found] == [alone, alone]


def test_each_process_computes_a_share_and_none_waits_longer_than_for_a_batch(
    found: list[dict[str, Any]],
) -> None:
    (first, again), (second, _) = ((of["shared"][1], of["again"][1]) for of in found)
    assert (first["forwards"], second["forwards"]) == (2, 1)
    # They meet after every round of batches, beside three times to name, look up and write.
    assert first["meetings"] == second["meetings"] >= 2 + 3
    assert again["forwards"] == 0


def test_an_error_on_one_process_reaches_the_others_by_its_words(
    found: list[dict[str, Any]],
) -> None:
    assert found[1]["error"] == "RuntimeError: out of luck"
    assert found[0]["error"] == (
        "RuntimeError: process 1 failed while computing the reference log-probs of dataset: "
        "RuntimeError: out of luck"
    )


def test_processes_with_different_models_are_told_of(found: list[dict[str, Any]]) -> None:
    for of in found:
        assert "process 1 has another model than process 0" in of["other model"]


def test_machines_may_have_a_cache_each_and_processes_of_one_may_not(
    found: list[dict[str, Any]],
) -> None:
    assert [of["files"] for of in found] == [1, 1]
    assert "give all processes of a machine one ref_cache_dir" in found[1]["folders of one machine"]
    assert "process 1 failed" in found[0]["folders of one machine"]
