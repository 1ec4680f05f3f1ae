"""TRL's GKDTrainer on this engine: TRL's own numbers, and no logits of either model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import V, llama, tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

trl = pytest.importorskip("trl")

import datasets  # noqa: E402
from trl.experimental.gkd import GKDConfig  # noqa: E402
from trl.experimental.gkd import GKDTrainer as Theirs  # noqa: E402

from fused_losses.integrations.trl.gkd import GKDTrainer  # noqa: E402

SAID = datasets.Dataset.from_list(
    [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in [("ac", "cdcd"), ("b d", "dc"), ("ca", "ddd"), ("dbdb", "cabcab")]
    ]
)


def made(kind: Any, folder: Path, **options: Any) -> Any:
    given: dict[str, Any] = {
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 5,
        "learning_rate": 0.1,
        "optim": "sgd",
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 2,
        "max_new_tokens": 6,
        "max_length": 32,
        "lmbda": 0.0,
    }
    more = {name: options.pop(name) for name in ("compute_metrics",) if name in options}
    random.seed(0)  # whether a step samples
    return kind(
        llama(),
        llama(seed=1),
        GKDConfig(str(folder), **given | options),
        train_dataset=SAID,
        eval_dataset=SAID,
        processing_class=tokenizer(),
        **more,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.0},
        {"beta": 0.3, "gradient_accumulation_steps": 2},
        {"beta": 0.5, "lmbda": 1.0},
        {"beta": 1.0, "lmbda": 0.5, "seq_kd": True, "temperature": 0.7},
    ],
    ids=str,
)
def test_gkd_takes_trls_steps(options: dict[str, Any], tmp_path: Path) -> None:
    logs = []
    for kind in (GKDTrainer, Theirs):
        trainer = made(kind, tmp_path, **options)
        trainer.train()
        logs.append([*trainer.state.log_history, trainer.evaluate()])
    names = ("loss", "grad_norm", "eval_loss")
    for mine, theirs in zip(*logs, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() & set(names):
            assert mine[name] == pytest.approx(theirs[name], rel=5e-5, abs=1e-6)
    assert logs[0][0]["grad_norm"] > 0.0


class Largest(TorchDispatchMode):
    """The most elements that a tensor with a dimension of the vocabulary's size has had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and V in t.shape and {*t.shape} != {V, 32}:
                self.elements = max(self.elements, t.numel())
        return out


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_gkd_makes_no_logits(beta: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_LOSSES_WORKSPACE_BYTES", str(16 * V * 4))
    trainer = made(GKDTrainer, tmp_path, beta=beta)
    inputs = trainer.data_collator([SAID[i] for i in range(4)])
    with Largest() as largest:
        trainer.compute_loss(trainer.model, inputs).backward()
    assert 0 < largest.elements <= 16 * V < int((inputs["labels"] != -100).sum()) * V


def test_gkd_refuses_what_needs_logits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"compute_metrics needs logits.*leave it out"):
        made(GKDTrainer, tmp_path, compute_metrics=print)
