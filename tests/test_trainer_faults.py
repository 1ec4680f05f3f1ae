"""What a run meets: a full disk, a kill while it writes, a batch that is NaN."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import dpo_config, history, llama, pair_rows, sft_config, sft_rows
from transformers import TrainerState

from fused_losses.trainer import DPOTrainer, SFTTrainer
from fused_losses.trainer.checkpoints import last_whole
from fused_losses.trainer.finite import NonFiniteLossError

NAMES = ("loss", "grad_norm", "rewards/implicit", "num_tokens")


def trainer(kind: str, folder: Path, **options: Any) -> Any:
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2} | options
    options |= {"ref_cache_dir": str(folder.parent / "cache"), "per_device_train_batch_size": 2}
    if kind == "dpo":
        return DPOTrainer(llama(), dpo_config(folder, **options), pair_rows())
    return SFTTrainer(llama(), sft_config(folder, loss="hellinger", **options), sft_rows())


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("kind", "writer"),
    [("sft", (torch, "save")), ("dpo", (TrainerState, "save_to_json"))],
    ids=["optimizer", "state"],
)
def test_a_full_disk_costs_no_more_than_the_steps_since_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, writer: tuple[Any, str]
) -> None:
    whole = trainer(kind, tmp_path / "whole")
    whole.train()
    folder = tmp_path / "stopped"
    stopped = trainer(kind, folder)
    keep = getattr(*writer)

    def fills_up(*args: Any, **kwargs: Any) -> Any:
        return (full if stopped.state.global_step == 4 else keep)(*args, **kwargs)

    monkeypatch.setattr(*writer, fills_up)
    with pytest.raises(OSError, match="No space left on device"):
        stopped.train()
    monkeypatch.undo()
    # A part of the second checkpoint is there, and not its end.
    assert (folder / "checkpoint-4").is_dir()
    assert last_whole(folder) == str(folder / "checkpoint-2")
    resumed = trainer(kind, folder)
    resumed.train(resume_from_checkpoint=True)
    assert history(resumed, *NAMES) == history(whole, *NAMES)


def test_a_checkpoint_is_whole_if_its_state_is(tmp_path: Path) -> None:
    assert last_whole(tmp_path / "nowhere") is None
    assert last_whole(tmp_path) is None
    for step, state in ((2, "{}"), (9, "{}"), (10, '{"a": [1, 2'), (11, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole(tmp_path) == str(tmp_path / "checkpoint-9")
    for step in (2, 9):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    with pytest.raises(ValueError, match=r"no checkpoint of .* \(.*checkpoint-11, .*start anew"):
        last_whole(tmp_path)


def test_a_nan_in_one_batch_ends_the_run_before_its_step(tmp_path: Path) -> None:
    run = trainer("sft", tmp_path / "run")
    before: list[torch.Tensor] = []

    def poison(module: Any, inputs: Any, output: Any) -> Any:
        if run.state.global_step < 3:
            return output
        before.extend(p.detach().clone() for p in run.model.parameters())
        return torch.full_like(output, torch.nan)

    run.model.model.norm.register_forward_hook(poison)
    with pytest.raises(
        NonFiniteLossError, match=r"the loss is nan at step 4, on rows \[\d+, \d+\]"
    ):
        run.train()
    # Weights and optimizer are those of step 3, and of the checkpoint nothing is NaN.
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
    assert last_whole(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-2")
