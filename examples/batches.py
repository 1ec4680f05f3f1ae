"""Text to tensors: completion-only labels, padded batches, reference log-probs beside them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE = -100


class Row(NamedTuple):
    """One tokenised sequence: ids (T,), labels (T,), and ref_logps (T,) once they are known."""

    ids: Tensor
    labels: Tensor
    ref_logps: Tensor | None = None


class Batch(NamedTuple):
    """Rows padded on the right to one length, all (B, T). Padding is ignored by every loss."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    ref_logps: Tensor

    @property
    def counted(self) -> Tensor:
        """Mask of the labels that a loss with ``shift=True`` counts."""
        mask = self.labels != IGNORE
        mask[:, 0] = False
        return mask


def encode(tokenizer: Any, prompt: str, completion: str) -> Row:
    """Tokenise a prompt and its completion, ended by end-of-sequence; the prompt is not scored.

    The two parts are tokenised apart, so the boundary between ignored and scored labels is exact.
    """
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    after = tokenizer(completion, add_special_tokens=False).input_ids
    after = [*after, tokenizer.eos_token_id]
    if not before:
        # The first token of a sequence has no position that predicts it.
        before = [tokenizer.bos_token_id or tokenizer.eos_token_id]
    ids = torch.tensor(before + after)
    labels = torch.tensor([IGNORE] * len(before) + after)
    return Row(ids, labels)


def collate(rows: Sequence[Row], device: str = "cpu") -> Batch:
    """Pad rows to a batch on ``device``.

    Padding needs no token of its own: it is masked from attention and from the loss.
    """
    B, T = len(rows), max(len(row.ids) for row in rows)
    ids = torch.zeros(B, T, dtype=torch.long)
    mask = torch.zeros(B, T, dtype=torch.long)
    labels = torch.full((B, T), IGNORE)
    ref_logps = torch.zeros(B, T)
    for b, row in enumerate(rows):
        n = len(row.ids)
        ids[b, :n], mask[b, :n], labels[b, :n] = row.ids, 1, row.labels
        if row.ref_logps is not None:
            ref_logps[b, :n] = row.ref_logps
    return Batch(*(tensor.to(device) for tensor in (ids, mask, labels, ref_logps)))


def schedule(count: int, per_step: int, steps: int, seed: int) -> list[list[int]]:
    """Return the indices of each step: epochs in a new random order each, cut where they end."""
    if count < 1:
        raise ValueError("count: expected at least one item to train on, got 0")
    rng = random.Random(seed)
    order: list[int] = []
    while len(order) < steps * per_step:
        epoch = list(range(count))
        rng.shuffle(epoch)
        order += epoch
    return [order[i * per_step : (i + 1) * per_step] for i in range(steps)]
