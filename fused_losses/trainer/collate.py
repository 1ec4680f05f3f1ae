"""Prepared rows become the tensors of a batch, padded or laid end to end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fused_losses.trainer.data import IGNORE, SIDES


@dataclass(frozen=True)
class Collator:
    """Turn rows into a batch; a preference batch is [chosen; rejected] along dimension 0.

    Padded: ``input_ids``, ``attention_mask``, ``labels``, ``ref_logps``, each (B, T). Padding-free:
    one row of all tokens with ``position_ids`` that start again at 0 with each sequence. The label
    of a sequence's first token is always masked, so a shift never crosses sequences.

    Padding-free pairs have ``labels`` and ``ref_logps`` of the scored tokens alone, (2B, C) padded
    to the longest response, and ``scored_by``: the position in the row that predicts each of them.

    Args:
        sides: ``("",)`` for SFT, the two sides of a pair for preference learning.
        pad_id: Token id of padding.
        padding_free: Lay sequences end to end.
    """

    sides: tuple[str, ...]
    pad_id: int
    padding_free: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate prepared rows."""
        ids = self._sequences(rows, "input_ids", torch.int64)
        labels = self._sequences(rows, "labels", torch.int64)
        for sequence in labels:
            sequence[:1] = IGNORE
        ref = None
        if f"{self.sides[0]}ref_logps" in rows[0]:
            ref = self._sequences(rows, "ref_logps", torch.float32)
        if self.padding_free:
            batch = _end_to_end(ids, labels, ref, by_sequence=self.sides == SIDES)
        else:
            batch = {
                "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_id),
                "attention_mask": _padded([torch.ones_like(x) for x in ids], 0),
                "labels": _padded(labels, IGNORE),
            }
            if ref is not None:
                batch["ref_logps"] = _padded(ref, 0)
        batch["row"] = torch.tensor([row["row"] for row in rows])
        return batch

    def _sequences(
        self, rows: Sequence[Mapping[str, Any]], column: str, dtype: torch.dtype
    ) -> list[Tensor]:
        return [
            torch.tensor(row[f"{side}{column}"], dtype=dtype) for side in self.sides for row in rows
        ]


def _padded(sequences: list[Tensor], value: float) -> Tensor:
    return pad_sequence(sequences, batch_first=True, padding_value=value)


def _end_to_end(
    ids: list[Tensor], labels: list[Tensor], ref: list[Tensor] | None, *, by_sequence: bool
) -> dict[str, Tensor]:
    batch = {
        "input_ids": torch.cat(ids)[None],
        "position_ids": torch.cat([torch.arange(len(x)) for x in ids])[None],
    }
    if not by_sequence:
        numbers = [torch.full_like(x, i) for i, x in enumerate(ids)]
        batch |= {"labels": torch.cat(labels)[None], "segment_ids": torch.cat(numbers)[None]}
        return batch if ref is None else batch | {"ref_logps": torch.cat(ref)[None]}
    scored = [(x != IGNORE).nonzero()[:, 0] for x in labels]
    starts = torch.tensor([0, *map(len, ids)]).cumsum(0).tolist()
    # The state before a token predicts it.
    batch["scored_by"] = _padded([t + s - 1 for t, s in zip(scored, starts, strict=False)], 0)
    batch["labels"] = _padded([x[t] for x, t in zip(labels, scored, strict=True)], IGNORE)
    if ref is not None:
        batch["ref_logps"] = _padded([x[t] for x, t in zip(ref, scored, strict=True)], 0)
    return batch
