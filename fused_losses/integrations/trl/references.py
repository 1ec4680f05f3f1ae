"""Reference log-probs per token as a dataset column of TRL's SFTTrainer: made, and collated."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import is_caching_enabled
from datasets.fingerprint import Hasher

from fused_losses.integrations.ref_names import REF_MODEL, NamedModel
from fused_losses.integrations.shares import in_shares, on_all
from fused_losses.integrations.trl.head import AnsweredModel, ask_logps

COLUMN = "ref_logps"


class ReferenceCollator:
    """Add ``ref_logps`` to what another collator makes, padded or joined as it did the tokens.

    Args:
        collate: The collator; its ``input_ids`` decide the shape.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate, with the references in the shape of the tokens."""
        rows = []
        for example in examples:
            if COLUMN not in example:
                raise ValueError(
                    f"the dataset has no column {COLUMN!r}, which this loss compares with: add it "
                    "with trainer.add_ref_logps(dataset)"
                )
            row = torch.as_tensor(example[COLUMN], dtype=torch.float32)
            if len(row) != len(example["input_ids"]):
                raise ValueError(
                    f"{COLUMN} must have one entry per token, {len(example['input_ids'])}, got "
                    f"{len(row)}: it was made for other tokens or another truncation; drop the "
                    "column to have it made anew"
                )
            rows.append(row)
        output = self.collate(examples)
        count, T = output["input_ids"].shape
        if count != len(rows):  # padding-free: one long row
            rows = [torch.cat(rows)]
        output[COLUMN] = torch.stack([F.pad(row, (0, T - len(row))) for row in rows])
        return output


def add_ref_logps(trainer: Any, dataset: Any, batch_size: int) -> Any:
    """Return a prepared dataset with the log-probs of its labels under the trainer's model.

    The model is taken as it stands, a PeftModel with its adapters, in the precision of the run and
    without dropout. Position t holds log p(token t | those before), 0 where nothing is learnt. No
    gradients, no logits. Every process computes a share of the batches; the result is cached by
    ``datasets`` under a fingerprint of data, weights, adapters, precision and versions.

    Args:
        trainer: A trainer of this module, before training.
        dataset: A ``datasets.Dataset`` as the trainer prepared it (``input_ids`` and labels).
        batch_size: Rows per forward.

    Returns:
        The dataset with the columns ``ref_logps``, float32, and ``ref_model``, the name of model
        and precision; as it is if it has the first.

    Raises:
        ValueError: A streaming dataset, whose column has to be made where it is made; references
            that it brings, of another model or precision; processes with different models.
        RuntimeError: Another process failed; named.
    """
    accelerator = trainer.accelerator
    unwrapped = accelerator.unwrap_model(trainer.model)
    named = NamedModel(unwrapped, accelerator.mixed_precision, accelerator.device)
    if COLUMN in (dataset.column_names or ()):
        named.check(dataset, "the dataset")
        return dataset
    if not hasattr(dataset, "_fingerprint"):
        raise ValueError(
            f"a streaming dataset must bring its own {COLUMN!r} column, one log-prob of the "
            "reference per token; or give a datasets.Dataset"
        )
    what = "computing reference log-probs"
    # A dataset's fingerprint may be drawn by each process on its own.
    data = on_all(lambda: dataset._fingerprint, what)[0]
    key = named.key(data, len(dataset), "the dataset")
    fingerprint = Hasher.hash([key, batch_size, COLUMN])
    made: list[np.ndarray] = []
    if not all(on_all(lambda: _is_cached(dataset, fingerprint), what)):
        made = _computed(trainer, dataset, batch_size, what)

    def columns_of(_: dict[str, list[Any]], at: list[int]) -> dict[str, Any]:
        return {COLUMN: [made[i] for i in at], REF_MODEL: [named.name] * len(at)}

    with accelerator.main_process_first():
        return dataset.map(
            columns_of,
            with_indices=True,
            batched=True,
            new_fingerprint=fingerprint,
            desc="Reference log-probs",
        )


def _is_cached(dataset: Any, fingerprint: str) -> bool:
    # What lies in memory is cached in a folder of this process alone: nowhere yet.
    path = dataset._get_cache_file_path(fingerprint) if dataset.cache_files else ""
    return is_caching_enabled() and os.path.exists(path)


def _computed(trainer: Any, dataset: Any, batch_size: int, what: str) -> list[np.ndarray]:
    """Return each row's log-probs, on every process."""
    model = trainer.model
    collate = getattr(trainer.data_collator, "collate", trainer.data_collator)

    def compute(at: range) -> list[np.ndarray]:
        examples = [dataset[i] for i in at]
        inputs = trainer._prepare_inputs(collate(examples))
        inputs["use_cache"] = False
        # The Trainer's own context holds no autocast: accelerate puts that into the forward.
        with torch.no_grad(), trainer.accelerator.autocast():
            head = AnsweredModel(model, ask_logps)
            head(**inputs, fused_lm_head=True)
        logps = head.kept[:, -inputs["input_ids"].shape[1] :].cpu()
        lengths = [len(example["input_ids"]) for example in examples]
        if logps.shape[0] != len(lengths):
            rows = list(logps[0, : sum(lengths)].split(lengths))
        else:
            rows = [row[:length] for row, length in zip(logps, lengths, strict=True)]
        return [row.numpy() for row in rows]

    n = len(dataset)
    batches = [range(first, min(first + batch_size, n)) for first in range(0, n, batch_size)]
    training = model.training
    model.eval()
    try:
        made = in_shares(batches, compute, what, trainer.args)
        return [row for _, rows in made for row in rows]
    finally:
        model.train(training)
