"""Reference log-probs per token as a dataset column of TRL's SFTTrainer: made, and collated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from datasets.fingerprint import Hasher

from fused_losses.integrations.fingerprint import model_fingerprint, precision_of, software_of
from fused_losses.integrations.trl_head import AnsweredModel, ask_logps

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
    without dropout. Position t holds log p(token t | those before), 0
    where nothing is learnt. No gradients, no logits; the result is cached by ``datasets`` under a
    fingerprint of data, weights, adapters, precision and versions.

    Args:
        trainer: A trainer of this module, before training.
        dataset: A ``datasets.Dataset`` as the trainer prepared it (``input_ids`` and labels).
        batch_size: Rows per forward.

    Returns:
        The dataset with the column ``ref_logps``, float32; as it is if it has one.

    Raises:
        ValueError: A streaming dataset, whose column has to be made where it is made.
    """
    if COLUMN in (dataset.column_names or ()):
        return dataset
    if not hasattr(dataset, "_fingerprint"):
        raise ValueError(
            f"a streaming dataset must bring its own {COLUMN!r} column, one log-prob of the "
            "reference per token; or give a datasets.Dataset"
        )
    model = trainer.model
    collate = getattr(trainer.data_collator, "collate", trainer.data_collator)
    device = trainer.accelerator.device
    fingerprint = Hasher.hash(
        [
            dataset._fingerprint,
            model_fingerprint(trainer.accelerator.unwrap_model(model)),
            precision_of(trainer.accelerator.mixed_precision, device),
            software_of(device),
            batch_size,
            COLUMN,
        ]
    )

    def batch_of(columns: dict[str, list[Any]]) -> dict[str, Any]:
        examples = [
            dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
        ]
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
        return {COLUMN: [row.numpy() for row in rows]}

    training = model.training
    model.eval()
    try:
        with trainer.accelerator.main_process_first():
            return dataset.map(
                batch_of,
                batched=True,
                batch_size=batch_size,
                new_fingerprint=fingerprint,
                desc="Reference log-probs",
            )
    finally:
        model.train(training)
