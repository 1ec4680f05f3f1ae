"""From text to token ids, and what a tokenised row says of its sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

IGNORE = -100
SIDES = ("chosen_", "rejected_")
# Token ids and labels.
Labelled = tuple[list[int], list[int]]


class Scored(NamedTuple):
    """A tokenised sequence.

    Attributes:
        ids: Token ids.
        mask: Whether each of them is scored.
    """

    ids: list[int]
    mask: list[bool]

    def labelled(self) -> Labelled:
        """Return ids and labels: the ids themselves, -100 where nothing is scored."""
        labels = [i if m else IGNORE for i, m in zip(self.ids, self.mask, strict=True)]
        return self.ids, labels

    def within(self, other: Scored) -> Scored:
        """Score only what the other reading of the same sequence scores too."""
        mask = [a and b for a, b in zip(self.mask, other.mask, strict=True)]
        return Scored(self.ids, mask)


class UnlearnableError(ValueError):
    """Nothing can be learnt from a row, though nothing is wrong with it."""


def text_tokenizer(processing_class: Any) -> Any:
    """Return what tokenises text: a tokenizer itself, or the one that a processor holds.

    Raises:
        TypeError: It is neither.
    """
    if processing_class is None or isinstance(processing_class, PreTrainedTokenizerBase):
        return processing_class
    found = getattr(processing_class, "tokenizer", None)
    if not isinstance(found, PreTrainedTokenizerBase):
        raise TypeError(
            "processing_class must be a tokenizer, or a processor that holds one, got "
            f"{type(processing_class).__name__}"
        )
    return found


def encode_text(tokenizer: Any, text: str, *, end: bool = True) -> list[int]:
    """Tokenise text as it stands; ``end``: the end-of-sequence token comes last, once.

    A beginning or an end that the text brings is not put there again by the tokenizer.
    """
    ids = list(tokenizer(text)["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and text.startswith(tokenizer.bos_token) and ids[:2] == [bos, bos]:
        del ids[0]
    if eos is not None and text.endswith(tokenizer.eos_token) and ids[-2:] == [eos, eos]:
        del ids[-1]
    if end and eos is not None and (not ids or ids[-1] != eos):
        ids.append(eos)
    return ids


def encode_continuation(tokenizer: Any, prompt: str, completion: str) -> Scored:
    """Tokenise a prompt and what follows it in one piece, as a text that a model might read.

    The prompt is what its own tokens have in common with the beginning of the whole. A token in
    which prompt and completion meet belongs to the completion.

    Raises:
        UnlearnableError: The completion is empty.
    """
    if not completion:
        raise UnlearnableError("is empty; there is nothing to learn from: remove the row")
    whole = encode_text(tokenizer, prompt + completion)
    return scored_from(whole, common_prefix(whole, encode_text(tokenizer, prompt, end=False)))


def scored_from(ids: list[int], start: int) -> Scored:
    """Score a sequence from a position on."""
    return Scored(ids, [False] * start + [True] * (len(ids) - start))


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return how many leading entries two sequences share."""
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length


def keep(length: int, max_length: int | None, mode: str) -> slice:
    """Return the part of a sequence that truncation leaves."""
    if max_length is None or length <= max_length:
        return slice(0, length)
    return slice(0, max_length) if mode == "keep_start" else slice(length - max_length, length)


def parts(row: Mapping[str, Any], side: str, length: int) -> list[slice]:
    """Return where the sequences of a tokenised row lie.

    ``attention_mask`` tells padding, ``seq_lengths`` or ``position_ids`` the sequences of a packed
    row; without them the whole row is one sequence.

    Raises:
        ValueError: One of them does not fit the tokens, or says what is not read here.
    """
    first, last = 0, length
    mask = row.get(f"{side}attention_mask")
    if mask is not None:
        if len(mask) != length:
            raise ValueError(f"has {length} tokens and an attention_mask of {len(mask)}")
        seen = [i for i, m in enumerate(mask) if m]
        first, last = (seen[0], seen[-1] + 1) if seen else (0, 0)
        if any(m != 1 for m in mask[first:last]):
            raise ValueError(
                "has an attention_mask that hides tokens between others, or tells more than "
                "padding; it must be 1 on one stretch of tokens and 0 elsewhere"
            )
    lengths = row.get(f"{side}seq_lengths")
    if lengths is not None and sum(lengths) != last - first:
        raise ValueError(f"has {last - first} tokens and seq_lengths that sum to {sum(lengths)}")
    positions = row.get(f"{side}position_ids")
    if positions is not None:
        found = _lengths_of(positions, first, last)
        if lengths is not None and found != list(lengths):
            raise ValueError("has seq_lengths and position_ids that tell different sequences")
        lengths = found
    ends = [first]
    for n in lengths or [last - first]:
        ends.append(ends[-1] + n)
    return [slice(a, b) for a, b in pairwise(ends)]


def _lengths_of(positions: Sequence[int], first: int, last: int) -> list[int]:
    found = list(positions[first:last])
    starts = [i for i, position in enumerate(found) if position == 0]
    lengths = [b - a for a, b in pairwise([*starts, len(found)])]
    if len(found) < last - first or found != [i for n in lengths for i in range(n)]:
        raise ValueError(
            "has position_ids that do not count up by one from 0 in each sequence, one per token; "
            "other positions are not read: remove the column"
        )
    return lengths
