"""One process of two fails: the job ends in seconds, and its error names the process and why."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib.util
import multiprocessing
import os
import re
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_training import V, llama, sft_config, sft_rows
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.fsdp import fully_shard
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

import fused_losses
from fused_losses.integrations import fail_together, fuse_lm_head
from fused_losses.integrations.fail_together import FailTogether
from fused_losses.trainer import DPOTrainer, SFTTrainer

LIMIT = 100  # seconds that a process may take in all; of a job that ends by itself, a fraction
WAITS = 1000  # seconds until collectives time out: whoever waits for that has hung
TOO_MUCH = 1 << 50  # bytes


def failing(case: str, step: int, labels: Tensor) -> Any:
    """A loss that fails as the case says."""
    if "label" in case:
        labels[1, 3] = V + 2

    def loss_of(hidden: Tensor, weight: Tensor, **o: Any) -> Tensor:
        if "memory" in case:
            torch.empty(TOO_MUCH, dtype=torch.uint8)
        if "NaN" in case:
            hidden = hidden * torch.nan
        if "killed" in case:
            hidden.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
        loss = fused_losses.linear_mle_loss(hidden, weight, labels, shift=True, **o)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}")
        return loss

    return loss_of


def loop(case: str, folder: str) -> None:
    """Six steps of a plain loop, the third of which fails on process 1."""
    rank = int(os.environ["RANK"])
    timed, on_all = "time-out" in case, "on all" in case
    dist.init_process_group("gloo", timeout=timedelta(seconds=4 if timed else WAITS))
    model: Any = fuse_lm_head(llama())
    if "fsdp" in case:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    ids = torch.arange(24).view(2, 12) * 7 % V
    for step in range(6):
        loss_of = failing(case if step == 2 and (rank or on_all) else "", step, ids.clone())
        try:
            with contextlib.nullcontext() if timed else fail_together(2.0):
                model(input_ids=ids, fused=loss_of).loss.backward()
        except (IndexError, RuntimeError):
            if "caught" not in case or not (rank or on_all):
                raise
    (Path(folder) / f"{case}-{rank}").write_text("done")
    dist.barrier()
    del model, loss_of
    gc.collect()  # a model may not outlive the group
    dist.destroy_process_group()


def shared_head(case: str, folder: str) -> None:
    """A call whose chunks the processes exchange; one runs out of memory between two of them."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=WAITS))
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    x, y = torch.randn(24, 8, requires_grad=True), torch.arange(24)
    w = distribute_tensor(torch.randn(61, 8), mesh, [Shard(0)]).requires_grad_()
    gather, seen = dist.all_gather, []

    def fails(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        if len(seen) == 3 and dist.get_rank() == 1:
            torch.empty(TOO_MUCH, dtype=torch.uint8)
        return gather(*args, **kwargs)

    dist.all_gather = fails
    for _ in range(2):
        try:
            with fail_together(2.0):
                fused_losses.linear_mle_loss(x, w, y, workspace_bytes=4800).backward()
        except RuntimeError:
            if dist.get_rank() == 0:
                raise


def trainer(case: str, folder: str) -> None:
    """A run of the trainer, of which one process meets a bad label, and a script that goes on."""
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    rank = int(os.environ["RANK"])
    made = SFTTrainer(llama(), sft_config(Path(folder) / case, ddp_timeout=WAITS), sft_rows(64))
    given = made.loss_call

    def spoilt(inputs: dict[str, Tensor]) -> Any:
        if rank == 1 and made.state.global_step == 1:
            inputs["labels"][0, -1] = V + 2
        return given(inputs)

    made.loss_call = spoilt  # type: ignore[method-assign]
    fail_together.__wrapped__.__defaults__ = (2.0,)  # type: ignore[attr-defined]  # the trainer's
    with contextlib.suppress(IndexError):
        made.train()
    made.accelerator.wait_for_everyone()


# case -> what process 1 says
CASES = {
    "shared head, caught": "process 1 failed: RuntimeError: .*(?:alloc|memory)",
    "a bad label": "IndexError: label 98 at position",
    "NaN": "FloatingPointError: the loss is nan at step 2",
    "fsdp, killed": r"Signal 9 \(SIGKILL\)",
    "a bad label, caught": "process 1 failed: IndexError: label 98 at position",
    "fsdp, out of memory, caught": "process 1 failed: RuntimeError: .*(?:alloc|memory)",
    "trainer, caught": "process 1 failed: IndexError: label 98 at position",
}


def work(case: str, folder: str) -> None:
    """What a process runs; it is ended by force, which no case expects, if it hangs."""
    faulthandler.dump_traceback_later(LIMIT, exit=True, file=sys.__stderr__)
    torch.set_num_threads(1)
    of = {"shared": shared_head, "traine": trainer}
    of.get(case[:6], loop)(case, folder)
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def launch() -> Any:
    """What torchrun does, with processes that are forked of one that has imported all."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    # One process imports, and the ranks are its copies.
    multiprocessing.set_forkserver_preload(
        [
            "torch.distributed.fsdp",
            "transformers.models.llama.modeling_llama",
            "transformers.trainer",
        ]
    )

    def run(case: str, folder: Path) -> Any:
        config = LaunchConfig(
            1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
            run_id=case, start_method="forkserver",
        )  # fmt: skip
        return elastic_launch(config, work)(case, str(folder))

    return run


@pytest.mark.parametrize("case", CASES)
def test_the_job_ends_in_seconds_and_says_who_failed_and_why(
    launch: Any, case: str, tmp_path: Path
) -> None:
    with pytest.raises(ChildFailedError) as caught:
        launch(case, tmp_path)
    rank, failure = caught.value.get_first_failure()
    assert rank == 1
    assert re.search(CASES[case], str(failure.message)), failure.message


def test_an_error_that_all_have_may_be_caught(launch: Any, tmp_path: Path) -> None:
    case = "a bad label on all, caught"
    launch(case, tmp_path)
    assert len(list(tmp_path.glob(f"{case}-*"))) == 2


def test_without_the_block_the_time_out_of_the_group_ends_the_job(
    launch: Any, tmp_path: Path
) -> None:
    with pytest.raises(ChildFailedError, match=r"imed out|onnection closed"):
        launch("a bad label, caught, time-out", tmp_path)


def test_every_trainer_trains_in_the_block() -> None:
    trainers: list[type] = [SFTTrainer, DPOTrainer]
    if importlib.util.find_spec("trl"):
        from fused_losses.integrations import trl as ours
        from fused_losses.integrations.trl.gkd import GKDTrainer

        trainers += [
            ours.SFTTrainer,
            ours.DPOTrainer,
            ours.KTOTrainer,
            ours.GRPOTrainer,
            GKDTrainer,
        ]
    for trainer in trainers:
        order = trainer.__mro__
        assert order.index(FailTogether) < order.index(Trainer)
