"""Two processes train as one does: losses, gradients, metrics, references and evaluation."""

from __future__ import annotations

import gc
import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.parallelism_config import ParallelismConfig
from tiny_training import dpo_config, history, llama, pair_rows, sft_config, sft_rows

from fused_losses.trainer import DPOTrainer, RewardStabilizationCallback, SFTTrainer

RANKS = 2
TIMED = ("runtime", "per_second", "epoch")
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
    # Of each batch of 4, and not of 4 batches.
    "sft, split": (
        SFTTrainer,
        sft_config,
        sft_rows,
        {
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "accelerator_config": {"split_batches": True},
            "precompute_ref_log_probs": True,
        },
    ),
    "sft, anchored": (SFTTrainer, sft_config, sft_rows, {"anchor_weight": 0.3, "loss": "pearson"}),
    "dpo": (DPOTrainer, dpo_config, pair_rows, {}),
    "dpo, accumulated": (
        DPOTrainer,
        dpo_config,
        pair_rows,
        {"gradient_accumulation_steps": 2, "sft_weight": 1.5},
    ),
    "dpo, packed": (DPOTrainer, dpo_config, pair_rows, {"padding_free": True}),
}


# What several processes would do wrongly in silence, or hang at.
REFUSED = {
    "dispatch_batches": ({"accelerator_config": {"dispatch_batches": True}}, "cut them by rows"),
    "even_batches": ({"accelerator_config": {"even_batches": False}}, "leave the others waiting"),
    "auto_find_batch_size": ({"auto_find_batch_size": True}, "would start over"),
}


def train(name: str, folder: Path, ranks: int) -> dict[str, Any]:
    """Four steps over the same rows, however many processes share them."""
    cls, config, rows, options = CASES[name]
    options = {"max_steps": 4, "per_device_train_batch_size": 4 // ranks} | options
    args = config(folder, **options)
    # Last batches that processes of 3 rows each fill up with rows they have had: by one, by five.
    evaluated = rows(7 if "packed" in name else 5, seed=9)
    # The third step, or the second, is an epoch's last: three rows, or two, fill it up.
    trainer = cls(llama(), args, rows(9 if "dpo" in name else 10), evaluated)
    trainer.train()
    metrics = trainer.evaluate()
    logs = [*(e for e in trainer.state.log_history if "loss" in e), metrics]
    *logs, metrics = ({k: v for k, v in e.items() if not k.endswith(TIMED)} for e in logs)
    return {"train": logs, "eval": metrics}


def settle(folder: Path, ranks: int) -> list[int]:
    """The steps of a run that ends by the rule of its reward, resumed in an epoch's midst."""

    def run(steps: int, resume: bool = False) -> Any:
        rule = RewardStabilizationCallback(window=2, tolerance=0.4)
        args = sft_config(
            folder, max_steps=steps, save_strategy="steps", save_steps=2, loss="hellinger",
            per_device_train_batch_size=4 // ranks,
        )  # fmt: skip
        trainer = SFTTrainer(llama(), args, sft_rows(10), callbacks=[rule])
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    run(2)
    ended = run(40, resume=True)
    return [ended.state.global_step, *history(ended, "loss", "num_tokens")]


def said(folder: Path, rank: int, **options: Any) -> str:
    """What a run says where it fails; the second process's third loss is NaN."""
    try:
        args = sft_config(folder, **{"gradient_accumulation_steps": 2} | options)
        trainer = SFTTrainer(llama(), args, sft_rows(64))
        seen = []

        def poison(module: Any, inputs: Any, output: Any) -> Any:
            seen.append(1)
            return output * (float("nan") if rank == 1 and len(seen) == 3 else 1.0)

        trainer.model.model.norm.register_forward_hook(poison)
        trainer.train()
    except (ValueError, ArithmeticError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def work(rank: int, folder: str, port: int) -> None:
    """What each process runs; rank 0 writes what it logged."""
    torch.set_num_threads(1)
    gc.freeze()  # a Trainer collects garbage again and again
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    found: dict[str, Any] = {name: train(name, Path(folder) / name, RANKS) for name in CASES}
    found["settled"] = settle(Path(folder) / "settled", RANKS)
    found["nan"] = said(Path(folder) / "nan", rank)
    for name, (options, _) in REFUSED.items():
        found[name] = said(Path(folder) / name, rank, **options)
    (Path(folder) / f"found-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, args=(str(folder), port), nprocs=RANKS)
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_log_what_one_does(
    of_both: list[dict[str, Any]], name: str, tmp_path: Path
) -> None:
    alone = train(name, tmp_path, 1)
    two = of_both[0][name]
    assert len(alone["train"]) == 4
    assert {"loss", "grad_norm", "drift", "entropy", "num_tokens"} < alone["train"][0].keys()
    for ours, theirs in zip(two["train"], alone["train"], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-5)
    assert two["eval"] == pytest.approx(alone["eval"], rel=2e-4, abs=2e-5)


def test_a_stop_rule_decides_alike_on_all_processes_and_as_on_one(
    of_both: list[dict[str, Any]], tmp_path: Path
) -> None:
    step, *alone = settle(tmp_path, 1)
    assert 4 < step < 40
    for of in of_both:
        assert of["settled"][0] == step
        for ours, theirs in zip(of["settled"][1:], alone, strict=True):
            assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-5)


def test_a_loss_of_one_process_that_is_not_finite_ends_all_by_its_name(
    of_both: list[dict[str, Any]],
) -> None:
    first, second = (of["nan"] for of in of_both)
    assert first == second
    assert re.match(r"NonFiniteLossError: the loss is nan at step 2 on process 1, on rows", first)


@pytest.mark.parametrize("name", REFUSED)
def test_what_processes_cannot_do_together_is_refused_by_name(
    of_both: list[dict[str, Any]], name: str
) -> None:
    for of in of_both:
        assert re.match(f"ValueError: .*{name}=.*{REFUSED[name][1]}", of[name])


@pytest.mark.parametrize("said_by", ["args", "environment"])
@pytest.mark.parametrize("trainer", ["SFT", "DPO", "trl.SFT", "trl.DPO", "trl.KTO"])
def test_sequences_that_accelerate_would_cut_are_refused(
    trainer: str, said_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {}
    if said_by == "args":
        options["parallelism_config"] = ParallelismConfig(cp_size=2)
    else:
        monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
        monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    if trainer.startswith("trl."):
        trl = pytest.importorskip("trl")
        from fused_losses.integrations import trl as ours

        name = trainer.removeprefix("trl.")
        config = getattr(trl, f"{name}Config")(str(tmp_path), use_cpu=True, bf16=False, **options)
        make = getattr(ours, f"{name}Trainer")
        rows = pair_rows()
    elif trainer == "SFT":
        make, config, rows = SFTTrainer, sft_config(tmp_path, **options), sft_rows()
    else:
        make, config, rows = DPOTrainer, dpo_config(tmp_path, **options), pair_rows()
    with pytest.raises(ValueError, match="cp_size=2, sp_size=1: sequences would be cut"):
        make(llama(), args=config, train_dataset=rows)
