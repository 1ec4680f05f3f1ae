"""Prepared rows become the tensors of a batch, padded or laid end to end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fused_losses.trainer.sequences import IGNORE, SIDES


@dataclass(frozen=True)
class Collator:
    """Turn rows into a batch; a preference batch is [chosen; rejected] along dimension 0.

    Padded: ``input_ids``, ``attention_mask``, ``labels``, ``ref_logps``, each (B, T). End to end:
    one row of all tokens with ``position_ids`` that start again at 0 with each sequence. The label
    of a sequence's first token is always masked, so a shift never crosses sequences.

    Pairs end to end have ``labels`` and ``ref_logps`` of the scored tokens alone, (2B, C) padded
    to the longest response, and ``scored_by``: the position in the row that predicts each of them.

    ``row`` holds the number of each sequence (of each pair), ``sample`` which of the rows given it
    is of, where they are packed, and ``num_tokens`` its tokens (a pair's of both sides), without
    padding.

    Args:
        sides: ``("",)`` for SFT, the two sides of a pair for preference learning.
        pad_id: Token id of padding.
        padding_free: Lay sequences end to end, those of packed rows too.
        pad_to_multiple_of: Pad rows further, to a multiple of this; end to end the padding is a
            sequence of its own that nothing scores.
    """

    sides: tuple[str, ...]
    pad_id: int
    padding_free: bool = False
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate prepared rows."""
        ids = self._sequences(rows, "input_ids", torch.int64)
        labels = self._sequences(rows, "labels", torch.int64)
        for sequence in labels:
            sequence[:1] = IGNORE
        lengths = torch.tensor(list(map(len, ids)))
        ref = None
        if f"{self.sides[0]}ref_logps" in rows[0]:
            ref = self._sequences(rows, "ref_logps", torch.float32)
        if self.padding_free:
            batch = self._end_to_end(ids, labels, ref)
        else:
            batch = {
                "input_ids": self._padded(ids, self.pad_id),
                "attention_mask": self._padded([torch.ones_like(x) for x in ids], 0),
                "labels": self._padded(labels, IGNORE),
            }
            if ref is not None:
                batch["ref_logps"] = self._padded(ref, 0)
        if "seq_lengths" in rows[0]:
            batch["row"] = torch.tensor([number for row in rows for number in row["row"]])
            counts = torch.tensor([len(row["seq_lengths"]) for row in rows])
            batch["sample"] = torch.arange(len(rows)).repeat_interleave(counts)
        else:
            batch["row"] = torch.tensor([row["row"] for row in rows])
        batch["num_tokens"] = lengths.view(len(self.sides), -1).sum(0)
        return batch

    def _sequences(
        self, rows: Sequence[Mapping[str, Any]], column: str, dtype: torch.dtype
    ) -> list[Tensor]:
        whole = [
            torch.tensor(row[f"{side}{column}"], dtype=dtype) for side in self.sides for row in rows
        ]
        if "seq_lengths" not in rows[0]:
            return whole
        split = (t.split(row["seq_lengths"]) for t, row in zip(whole, rows, strict=True))
        return [sequence for sequences in split for sequence in sequences]

    def _padded(self, sequences: list[Tensor], value: float) -> Tensor:
        padded = pad_sequence(sequences, batch_first=True, padding_value=value)
        return F.pad(padded, (0, self._missing(padded.shape[1])), value=value)

    def _missing(self, length: int) -> int:
        return -length % self.pad_to_multiple_of if self.pad_to_multiple_of else 0

    def _end_to_end(
        self, ids: list[Tensor], labels: list[Tensor], ref: list[Tensor] | None
    ) -> dict[str, Tensor]:
        more = self._missing(sum(map(len, ids)))
        if more:
            ids = [*ids, torch.full((more,), self.pad_id)]
        batch = {
            "input_ids": torch.cat(ids)[None],
            "position_ids": torch.cat([torch.arange(len(x)) for x in ids])[None],
        }
        if self.sides != SIDES:
            if more:
                labels = [*labels, torch.full((more,), IGNORE)]
                ref = None if ref is None else [*ref, torch.zeros(more)]
            numbers = [torch.full_like(x, i) for i, x in enumerate(ids)]
            batch |= {"labels": torch.cat(labels)[None], "segment_ids": torch.cat(numbers)[None]}
            return batch if ref is None else batch | {"ref_logps": torch.cat(ref)[None]}
        scored = [(x != IGNORE).nonzero()[:, 0] for x in labels]
        starts = torch.tensor([0, *map(len, ids)]).cumsum(0).tolist()
        # The state before a token predicts it.
        predicts = [t + s - 1 for t, s in zip(scored, starts, strict=False)]
        batch["scored_by"] = pad_sequence(predicts, batch_first=True)
        batch["labels"] = pad_sequence(
            [x[t] for x, t in zip(labels, scored, strict=True)], True, IGNORE
        )
        if ref is not None:
            kept = [x[t] for x, t in zip(ref, scored, strict=True)]
            batch["ref_logps"] = pad_sequence(kept, batch_first=True)
        return batch
