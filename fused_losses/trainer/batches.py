"""A batch on its way to the loss: without repeated rows, and behind a learnt prompt."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor

from fused_losses.trainer.sequences import IGNORE

_FILLED_WITH = {"labels": IGNORE, "ref_logps": 0.0}


def behind_prompt(batch: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """Lengthen a padded batch on the left to the rows that the model made of it.

    PEFT's prompt tuning and P-tuning put virtual tokens before each row, which nothing scores.
    """
    more = length - batch["labels"].shape[1]
    if more <= 0:
        return batch
    return batch | {
        name: F.pad(batch[name], (more, 0), value=value)
        for name, value in _FILLED_WITH.items()
        if name in batch
    }


def without_repeats(
    inputs: dict[str, Tensor], accelerator: Any, *, drop_last: bool, copies: int = 1
) -> dict[str, Tensor]:
    """Mask the rows that only fill up a last batch, so that every process has as many.

    Args:
        inputs: The batch of a process.
        accelerator: Knows the processes, and the loader.
        drop_last: Whether the loader leaves such batches out.
        copies: Processes that have the same batch.
    """
    state, ranks = accelerator.gradient_state, accelerator.num_processes // copies
    if ranks == 1 or drop_last or not state.end_of_dataloader:
        return inputs
    row, labels = inputs["row"], inputs["labels"]
    # Which of this process's samples a sequence is of: a packed row holds several.
    sample = inputs.get("sample", torch.arange(len(row), device=row.device))
    n = int(sample[-1]) + 1
    # As accelerate's gather_for_metrics: of all processes' samples in order, so many are new.
    # (Its `remainder` is not known where a resumed run has skipped batches.)
    left = len(state.active_dataloader.dataset) % (n * ranks) or n * ranks
    new = sample < min(max(left - n * (accelerator.process_index // copies), 0), n)
    if "segment_ids" in inputs:
        # What follows the last sequence is padding.
        of = inputs["segment_ids"].clamp(max=len(row) - 1)
        labels = labels.masked_fill(~new[of], IGNORE)
    else:
        labels = labels.clone()
        labels.view(-1, n, labels.shape[-1])[:, ~new] = IGNORE
    return inputs | {"labels": labels, "row": row[new], "num_tokens": inputs["num_tokens"][new]}


def lengths_of(dataset: Dataset, sides: tuple[str, ...], end_to_end: bool) -> list[int]:
    """Return what each row of a prepared dataset takes in a batch, in tokens.

    Of a pair the longer side, to which the other is padded, or both where they lie end to end.
    """
    of_sides = [map(len, dataset[f"{side}input_ids"]) for side in sides]
    return list(map(sum if end_to_end else max, zip(*of_sides, strict=True)))
