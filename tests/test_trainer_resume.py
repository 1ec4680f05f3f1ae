"""A run killed after a checkpoint and resumed goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_training import dpo_config, history, llama, pair_rows, sft_config, sft_rows
from transformers import TrainerCallback

from fused_losses.trainer import DPOTrainer, SFTTrainer

ROOT = Path(__file__).parents[1]


class Kill(TrainerCallback):
    """SIGKILL at the end of a step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), 9)


def trainer(kind, folder, callbacks=None):
    # One cache for all runs: a resumed run reads what the first one wrote.
    options = {"max_steps": 7, "save_strategy": "steps", "save_steps": 3}
    options |= {"ref_cache_dir": str(folder.parent / "cache")}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    if kind == "sft":
        config = sft_config(folder, loss="pearson", **options)
        return SFTTrainer(llama(), config, sft_rows(), callbacks=callbacks)
    return DPOTrainer(llama(), dpo_config(folder, **options), pair_rows(), callbacks=callbacks)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_kill_and_resume_continue_the_log(tmp_path, kind):
    whole = trainer(kind, tmp_path / "whole")
    whole.train()
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    # Sums of other numbers of threads have other bits.
    threads = str(torch.get_num_threads())
    command = [sys.executable, __file__, kind, str(tmp_path / "killed"), threads]
    died = subprocess.run(command, env=environment, check=False, capture_output=True)
    assert died.returncode == -9, died.stderr.decode()[-2000:]
    (checkpoint,) = (tmp_path / "killed").glob("checkpoint-*")
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 3
    resumed = trainer(kind, tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    names = ("loss", "grad_norm", "rewards/implicit", "drift", "num_tokens")
    assert history(resumed, *names) == history(whole, *names)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    trainer(sys.argv[1], Path(sys.argv[2]), [Kill()]).train()
