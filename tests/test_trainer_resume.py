"""A run killed at any moment and resumed goes on as if nothing had happened."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import dpo_config, history, llama, pair_rows, sft_config, sft_rows
from transformers import TrainerCallback, TrainerState

from fused_losses.trainer import DPOTrainer, SFTTrainer

ROOT = Path(__file__).parents[1]
SAVED_AT = 2, 4
NAMES = ("loss", "grad_norm", "rewards/implicit", "drift", "num_tokens")


class At(TrainerCallback):
    """Does something at the end of a step, before its checkpoint, or behind it."""

    def __init__(self, step: int, act: Any, *, behind: bool = False) -> None:
        self.step, self.act, self.behind = step, act, behind

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step and not self.behind:
            self.act()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step and self.behind:
            self.act()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_the_step(step: int) -> Any:
    """Between two micro-batches of a step."""

    def arm(trainer: Any) -> None:
        inner, calls = trainer.training_step, []

        def one(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 2 * step:
                die()
            return inner(*args, **kwargs)

        trainer.training_step = one

    return arm


def behind_the_step(step: int) -> Any:
    return lambda trainer: trainer.add_callback(At(step, die))


def behind_the_checkpoint(step: int) -> Any:
    return lambda trainer: trainer.add_callback(At(step, die, behind=True))


def in_a_file_larger_than(size: int) -> Any:
    """While the second checkpoint is written, by the kernel: in the middle of a file."""

    def forbid() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return lambda trainer: trainer.add_callback(At(SAVED_AT[1], forbid))


def in_its_last_file() -> Any:
    def arm(trainer: Any) -> None:
        inner = TrainerState.save_to_json

        def half(self: Any, path: str) -> None:
            inner(self, path)
            if self.global_step == SAVED_AT[1]:
                os.truncate(path, os.path.getsize(path) // 2)
                die()

        TrainerState.save_to_json = half

    return arm


# Which trainer, when, and from which checkpoint it goes on.
KILLS: dict[str, tuple[str, Any, int]] = {
    **{f"behind step {n}": ("sft", behind_the_step(n), 2 * ((n - 1) // 2)) for n in range(1, 6)},
    "in step 4": ("sft", in_the_step(4), 2),
    "behind the checkpoint": ("sft", behind_the_checkpoint(4), 4),
    "in the model's config": ("sft", in_a_file_larger_than(100), 2),
    "in the weights": ("sft", in_a_file_larger_than(20_000), 2),
    "in the optimizer": ("sft", in_a_file_larger_than(150_000), 2),
    "in the state": ("sft", in_its_last_file(), 2),
    "dpo, in step 5": ("dpo", in_the_step(5), 4),
    "dpo, in the weights": ("dpo", in_a_file_larger_than(20_000), 2),
}


def trainer(kind: str, folder: Path) -> Any:
    # One cache for all runs: a resumed run reads what the first one wrote.
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": SAVED_AT[0]}
    options |= {"ref_cache_dir": str(folder.parent / "cache")}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    if kind == "sft":
        return SFTTrainer(llama(), sft_config(folder, loss="pearson", **options), sft_rows())
    return DPOTrainer(llama(), dpo_config(folder, **options), pair_rows())


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs were killed."""
    folder = tmp_path_factory.mktemp("killed")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    # Sums of other numbers of threads have other bits.
    command = [sys.executable, __file__, str(folder), str(torch.get_num_threads())]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    return folder


@pytest.fixture(scope="module")
def whole(killed: Path) -> dict[str, Any]:
    """What runs say that nobody killed."""
    logs = {}
    for kind in ("sft", "dpo"):
        run = trainer(kind, killed / f"whole {kind}")
        run.train()
        logs[kind] = history(run, *NAMES)
    return logs


@pytest.mark.parametrize("name", KILLS)
def test_a_kill_costs_no_more_than_the_steps_since_the_last_checkpoint(
    killed: Path, whole: dict[str, Any], name: str
) -> None:
    kind, _, last = KILLS[name]
    resumed = trainer(kind, killed / name)
    begun: list[int] = []
    resumed.add_callback(At(last + 1, lambda: begun.append(last)))
    resumed.train(resume_from_checkpoint=True if last else None)
    assert begun == [last]
    assert history(resumed, *NAMES) == whole[kind]


def test_two_runs_may_begin_at_once_on_one_cold_cache(killed: Path, whole: dict[str, Any]) -> None:
    for which in "ab":
        assert json.loads((killed / "shared" / which / "log.json").read_text()) == [
            list(values) for values in whole["sft"]
        ]
    assert len(list((killed / "shared" / "cache").iterdir())) == 1


if __name__ == "__main__":
    folder = Path(sys.argv[1])

    def forked(act: Any, *args: Any) -> int:
        """A copy of this process, which has imported all that a run needs, and run nothing."""
        child = os.fork()
        if not child:
            try:
                torch.set_num_threads(int(sys.argv[2]))
                act(*args)
            finally:
                sys.stderr.flush()
                os._exit(1)
        return child

    def beside(which: str) -> None:
        made = trainer("sft", folder / "shared" / which)
        made.train()
        (folder / "shared" / which / "log.json").write_text(json.dumps(history(made, *NAMES)))
        (folder / "modules").write_text("\n".join(sys.modules))
        os._exit(0)

    def run(name: str) -> None:
        kind, arm, _ = KILLS[name]
        made = trainer(kind, folder / name)
        arm(made)
        made.train()

    for child in [forked(beside, which) for which in "ab"]:
        assert os.waitpid(child, 0)[1] == 0
    # What these have imported on their way the others need not, each for itself.
    for module in (folder / "modules").read_text().split():
        with contextlib.suppress(Exception):
            importlib.import_module(module)
    for name in KILLS:
        ended = os.waitstatus_to_exitcode(os.waitpid(forked(run, name), 0)[1])
        assert -ended in (signal.SIGKILL, signal.SIGXFSZ), f"{name}: {ended}"
