"""What the studies of training share: SmolLM2 on HumanEval, one SFT stage, one DPO stage."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import smollm
import torch
import training_sets
from batches import collate, encode
from datasets import disable_progress_bars
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback, set_seed

from fused_losses import linear_divergence_loss, linear_mle_loss, linear_token_stats
from fused_losses.integrations import fuse_lm_head
from fused_losses.trainer import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

# What every run is told unless a study says otherwise.
_BOTH = {
    "per_device_eval_batch_size": 4,
    "logging_steps": 1,
    "lr_scheduler_type": "constant",
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": torch.cuda.is_available(),
}


class Bench(NamedTuple):
    """Model, tokenizer and data of one seed. ``model`` is the start, never trained."""

    model: Any
    tokenizer: Any
    data: training_sets.Sets
    config: dict[str, Any]
    seed: int


def bench(config: dict[str, Any], seed: int) -> Bench:
    """Load what a seed trains with, once in a row; the seed draws tasks, split, pairs and order."""
    return _bench(json.dumps(config), seed)


@functools.lru_cache(maxsize=1)
def _bench(text: str, seed: int) -> Bench:
    config = json.loads(text)
    disable_progress_bars()  # of datasets: a study tells its own parts
    model, tokenizer = smollm.load(config["model"])
    data = training_sets.load(
        tokenizer,
        config["dataset"],
        examples=config["examples"],
        heldout=config["heldout"],
        max_tokens=config["max_tokens"],
        seed=seed,
    )
    fuse_lm_head(model).eval().requires_grad_(False)
    return Bench(model, tokenizer, data, config, seed)


def copy_of(model: Any) -> Any:
    """A trainable copy of a model, its head not fused."""
    twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict())
    return twin


def sft(
    at: Bench,
    setting: dict[str, Any],
    steps: int,
    *,
    start: Any = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[Any, list[dict[str, float]]]:
    """Train a copy of ``start`` (the bench's model) on the demonstrations.

    Args:
        at: Model and data.
        setting: Fields of ``SFTConfig`` that make the setting (loss, learning_rate, beta ...).
        steps: Update steps.
        start: Model to start from.
        callbacks: Of the trainer.

    Returns:
        The trained model, and the logs of its steps.
    """
    with _trainer_of(
        SFTTrainer,
        SFTConfig,
        at,
        {**setting, "max_steps": steps, "precompute_ref_log_probs": True},
        start,
        callbacks,
    ) as trainer:
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        return trainer.model, logs


def dpo(
    at: Bench,
    setting: dict[str, Any],
    steps: int,
    *,
    start: Any,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[Any, dict[str, float]]:
    """Train a copy of ``start`` on the pairs, tied to ``start``; also its held-out metrics."""
    with _trainer_of(
        DPOTrainer, DPOConfig, at, {**setting, "max_steps": steps}, start, callbacks
    ) as trainer:
        trainer.train()
        return trainer.model, trainer.evaluate()


@contextmanager
def _trainer_of(
    trainer: type,
    config: type,
    at: Bench,
    fields: dict[str, Any],
    start: Any,
    callbacks: Sequence[TrainerCallback],
) -> Iterator[Any]:
    model = copy_of(at.model if start is None else start)
    of_pairs = trainer is DPOTrainer
    with tempfile.TemporaryDirectory() as folder:
        args = config(
            output_dir=folder,
            per_device_train_batch_size=at.config["batch"],
            max_length=at.config["max_tokens"],
            seed=at.seed,
            **{**_BOTH, **fields},
        )
        set_seed(at.seed)
        made = trainer(
            model,
            args,
            at.data.train_pairs if of_pairs else at.data.train,
            at.data.heldout_pairs if of_pairs else at.data.heldout,
            at.tokenizer,
            callbacks=list(callbacks),
        )
        made.remove_callback(PrinterCallback)  # the logs are returned
        yield made


@torch.no_grad()
def heldout(at: Bench, model: Any) -> dict[str, float]:
    """A model on the held-out demonstrations, and its exact distance from the start, per token.

    Returns:
        ``nll``: mean -log p, nats; ``kl``: mean KL(pi || pi_ref) over the whole vocabulary;
        ``kl_ref``: mean KL(pi_ref || pi); both from hidden states, no logits made.
    """
    names = {"kl": "reverse_kl", "kl_ref": "forward_kl"}  # of student pi, teacher pi_ref
    sums = dict.fromkeys(("nll", *names), 0.0)
    count = 0
    rows = [encode(at.tokenizer, r["prompt"], r["completion"]) for r in at.data.heldout]
    training = model.training
    fuse_lm_head(model).eval()
    for first in range(0, len(rows), 4):
        batch = collate(rows[first : first + 4])
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        inputs["use_cache"] = False
        taught = {
            "teacher_input": at.model(**inputs, fused=lambda hidden, weight, **head: hidden).fused,
            "teacher_weight": at.model.get_output_embeddings().weight,
        }
        common = {"target": batch.labels, "shift": True, "reduction": "sum"}

        def losses(
            hidden: Tensor,
            weight: Tensor,
            *,
            taught: dict[str, Tensor] = taught,
            common: dict[str, Any] = common,
            **head: Any,
        ) -> Tensor:
            # Start and policy are one architecture: what one does to its logits, the other does.
            both = {f"teacher_{key.removeprefix('linear_')}": value for key, value in head.items()}
            found = [linear_mle_loss(hidden, weight, **common, **head)]
            found += [
                linear_divergence_loss(
                    hidden, weight, divergence=divergence, **taught, **both, **common, **head
                )
                for divergence in names.values()
            ]
            return torch.stack(found)

        for name, total in zip(sums, model(**inputs, fused=losses).fused.tolist(), strict=True):
            sums[name] += total
        count += int(batch.counted.sum())
    model.train(training)
    return {name: total / count for name, total in sums.items()}


@torch.no_grad()
def pairs(at: Bench, model: Any) -> dict[str, float]:
    """A model on the held-out pairs, whatever it was trained with: rewards against the start.

    Returns:
        ``pairs right``: share whose chosen side gained more than the rejected one;
        ``margin``: mean difference of the summed log-ratios (9), nats.
    """
    training = model.training
    fuse_lm_head(model).eval()
    deltas = []
    for row in at.data.heldout_pairs:
        sides = [encode(at.tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected")]
        batch = collate(sides)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}

        def logps(
            hidden: Tensor, weight: Tensor, *, target: Tensor = batch.labels, **head: Any
        ) -> Tensor:
            return linear_token_stats(hidden, weight, target, shift=True, **head).logps

        ours, start = (m(**inputs, use_cache=False, fused=logps).fused for m in (model, at.model))
        # Differences per token first, then their sums (9); what is not counted is 0 in both.
        chosen, rejected = (ours - start).sum(1).tolist()
        deltas.append(chosen - rejected)
    model.train(training)
    right = sum(delta > 0.0 for delta in deltas)
    return {"pairs right": right / len(deltas), "margin": sum(deltas) / len(deltas)}


class Measure(TrainerCallback):
    """Calls a function of the model before training and after every so many steps."""

    def __init__(self, every: int, function: Callable[[Any], dict[str, float]]) -> None:
        self.every, self.function = every, function
        self.found: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the start."""
        self._measure(state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure where a multiple of ``every`` is reached."""
        if state.global_step % self.every == 0:
            self._measure(state, kwargs["model"])

    def _measure(self, state: Any, model: Any) -> None:
        self.found.append({"step": state.global_step, **self.function(model)})
