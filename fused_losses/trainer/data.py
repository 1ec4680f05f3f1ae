"""Datasets in the usual formats become token ids, labels and, where given, references.

A prepared SFT dataset has ``input_ids`` and ``labels`` (-100 where nothing is scored); a prepared
preference dataset has both for each side, ``chosen_input_ids`` ... Prepared datasets pass through
unchanged but for truncation. ``row`` is the row's number in the dataset that was given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, List, Value

from fused_losses.trainer.sequences import (
    Scored,
    common_prefix,
    encode_completion,
    encode_messages,
    encode_text,
    is_conversation,
    keep,
)

IGNORE = -100
SIDES = ("chosen_", "rejected_")
_SFT_FORMATS = (
    "messages | text | prompt, completion | input_ids, labels | input_ids, completion_mask | "
    "input_ids"
)
_PAIR_FORMATS = (
    "prompt, chosen, rejected | chosen, rejected | prompt_ids, chosen_ids, rejected_ids | "
    "chosen_input_ids, chosen_labels, rejected_input_ids, rejected_labels"
)


@dataclass(frozen=True)
class Preparation:
    """How rows become tokens.

    Attributes:
        tokenizer: Needed by text and messages, None for tokenised data.
        vocabulary: Token ids must lie in [0, vocabulary).
        max_length: Longest sequence, None for no limit.
        truncation_mode: ``keep_start`` or ``keep_end``.
        completion_only_loss: Score only the completion; None: where a prompt is given.
        num_proc: Processes to use.
    """

    tokenizer: Any
    vocabulary: int
    max_length: int | None
    truncation_mode: str
    completion_only_loss: bool | None = None
    num_proc: int | None = None

    def sft(self, dataset: Any, name: str) -> Dataset:
        """Prepare a dataset for SFT.

        Raises:
            TypeError: ``dataset`` is not a ``datasets.Dataset``.
            ValueError: Missing columns, or a row that nothing can be learnt from; named.
        """
        columns = _columns(dataset, name)
        read, sources = _sft_reader(columns, self, name)
        return self._map(dataset, name, read, sources, ("",))

    def pairs(self, dataset: Any, name: str) -> Dataset:
        """Prepare a dataset for preference learning.

        Raises:
            TypeError: ``dataset`` is not a ``datasets.Dataset``.
            ValueError: Missing columns, or a row that nothing can be learnt from; named.
        """
        columns = _columns(dataset, name)
        read, sources = _pair_reader(columns, self, name)
        return self._map(dataset, name, read, sources, SIDES)

    def _map(
        self,
        dataset: Dataset,
        name: str,
        read: _Reader,
        sources: Mapping[str, str],
        sides: tuple[str, ...],
    ) -> Dataset:
        given = [f"{side}ref_logps" in dataset.column_names for side in sides]
        if any(given) and not all(given):
            raise ValueError(
                f"{name} has the references of one side only; give chosen_ref_logps and "
                "rejected_ref_logps, or neither"
            )
        with_ref = all(given)
        features = {"row": Value("int64")}
        for side in sides:
            features |= {
                f"{side}input_ids": List(Value("int32")),
                f"{side}labels": List(Value("int32")),
            }
            if with_ref:
                features[f"{side}ref_logps"] = List(Value("float32"))
        if with_ref and "ref_model" in dataset.column_names:
            features["ref_model"] = Value("string")
        unused = [column for column in dataset.column_names if column not in features]

        def convert(row: dict[str, Any], number: int) -> dict[str, Any]:
            out: dict[str, Any] = {"row": number}
            for side in sides:
                where = f"{name}, row {number}, column {sources[side]!r}"
                try:
                    ids, labels = read(row, side)
                    cut = self._checked(ids, labels)
                    if with_ref:
                        ref = _reference(row[f"{side}ref_logps"], ids, cut)
                        out[f"{side}ref_logps"] = ref
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from None
                out[f"{side}input_ids"], out[f"{side}labels"] = ids[cut], labels[cut]
            return out

        return dataset.map(
            convert,
            with_indices=True,
            remove_columns=unused,
            features=Features(features),
            num_proc=self.num_proc,
            desc=f"Preparing {name}",
        )

    def _checked(self, ids: list[int], labels: list[int]) -> slice:
        """Return what truncation leaves of a sequence, if something can be learnt from it."""
        if not ids:
            raise ValueError("has no tokens: remove the row")
        if len(labels) != len(ids):
            raise ValueError(f"has {len(ids)} tokens and {len(labels)} labels; give one each")
        least, most = min(ids), max(ids)
        if least < 0 or most >= self.vocabulary:
            raise ValueError(
                f"holds token id {least if least < 0 else most}, outside the model's vocabulary "
                f"[0, {self.vocabulary}); use the model's own tokenizer"
            )
        cut = keep(len(ids), self.max_length, self.truncation_mode)
        if all(label == IGNORE for label in labels[1:]):
            raise ValueError("has no token to score: all labels are masked; remove the row")
        if all(label == IGNORE for label in labels[cut][1:]):
            raise ValueError(
                f"has no token to score within max_length={self.max_length} of its {len(ids)} "
                "tokens; raise max_length, use truncation_mode='keep_end', or remove the row"
            )
        bad = next((x for x in labels if x != IGNORE and not 0 <= x < self.vocabulary), None)
        if bad is not None:
            raise ValueError(f"has label {bad}, which is neither {IGNORE} nor a token id")
        return cut


_Reader = Callable[[dict[str, Any], str], tuple[list[int], list[int]]]


def _columns(dataset: Any, name: str) -> set[str]:
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{name} must be a datasets.Dataset, got {type(dataset).__name__}; for a list of dicts "
            "use Dataset.from_list, for a stream Dataset.from_generator: references are stored "
            "row by row"
        )
    if not len(dataset):
        raise ValueError(f"{name} has no rows")
    return set(dataset.column_names)


def _sft_reader(columns: set[str], p: Preparation, name: str) -> tuple[_Reader, dict[str, str]]:
    only = p.completion_only_loss
    if "input_ids" in columns:
        if only and not columns & {"labels", "completion_mask"}:
            raise ValueError(
                f"completion_only_loss=True: {name} has input_ids but neither labels nor "
                "completion_mask to tell what the completion is"
            )

        def tokens(row: dict[str, Any], side: str) -> tuple[list[int], list[int]]:
            ids = row["input_ids"]
            if "labels" in row:
                return ids, row["labels"]
            if only is False or "completion_mask" not in row:
                return ids, list(ids)
            mask = row["completion_mask"]
            if len(mask) != len(ids):
                raise ValueError(f"has {len(ids)} tokens and a completion_mask of {len(mask)}")
            return ids, [i if m else IGNORE for i, m in zip(ids, mask, strict=True)]

        return tokens, {"": "input_ids"}

    if {"prompt", "completion"} <= columns:
        source = "completion"

        def encode(row: dict[str, Any]) -> Scored:
            return encode_completion(p.tokenizer, row["prompt"], row["completion"])

        only = only is not False
    elif "messages" in columns:
        source = "messages"

        def encode(row: dict[str, Any]) -> Scored:
            turns = row["messages"]
            if not is_conversation(turns):
                raise ValueError("must be a list of messages, {'role': ..., 'content': ...}")
            if only:
                return encode_completion(p.tokenizer, turns[:-1], turns[-1:])
            return Scored(encode_messages(p.tokenizer, turns), 0)

    elif "text" in columns:
        source = "text"
        if only:
            raise ValueError(
                f"completion_only_loss=True: {name} has a text column, which knows no prompt; "
                "give prompt and completion columns"
            )

        def encode(row: dict[str, Any]) -> Scored:
            if not isinstance(row["text"], str) or not row["text"]:
                raise ValueError("must be a text that is not empty")
            return Scored(encode_text(p.tokenizer, row["text"]), 0)

    else:
        raise ValueError(
            f"{name} has the columns {', '.join(sorted(columns))}; SFT needs one of: {_SFT_FORMATS}"
        )
    _need_tokenizer(p, name, source)

    def read(row: dict[str, Any], side: str) -> tuple[list[int], list[int]]:
        ids, start = encode(row)
        return ids, _mask(ids, start if only else 0)

    return read, {"": source}


def _pair_reader(columns: set[str], p: Preparation, name: str) -> tuple[_Reader, dict[str, str]]:
    if {f"{side}{part}" for side in SIDES for part in ("input_ids", "labels")} <= columns:

        def prepared(row: dict[str, Any], side: str) -> tuple[list[int], list[int]]:
            return row[f"{side}input_ids"], row[f"{side}labels"]

        return prepared, {side: f"{side}input_ids" for side in SIDES}
    if {"prompt_ids", "chosen_ids", "rejected_ids"} <= columns:

        def tokens(row: dict[str, Any], side: str) -> tuple[list[int], list[int]]:
            ids = [*row["prompt_ids"], *row[f"{side}ids"]]
            return ids, _mask(ids, len(row["prompt_ids"]))

        return tokens, {side: f"{side}ids" for side in SIDES}
    if not {"chosen", "rejected"} <= columns:
        raise ValueError(
            f"{name} has the columns {', '.join(sorted(columns))}; preference learning needs one "
            f"of: {_PAIR_FORMATS}"
        )
    _need_tokenizer(p, name, "chosen")

    def read(row: dict[str, Any], side: str) -> tuple[list[int], list[int]]:
        answer = row[side[:-1]]
        if row.get("prompt") is not None:
            ids, start = encode_completion(p.tokenizer, row["prompt"], answer)
        else:
            ids, start = _after_common_prefix(p.tokenizer, row["chosen"], row["rejected"], side)
        return ids, _mask(ids, start)

    return read, {side: side[:-1] for side in SIDES}


def _after_common_prefix(tokenizer: Any, chosen: Any, rejected: Any, side: str) -> Scored:
    """Take what both sides begin with as their prompt: whole messages, or tokens of a text."""
    answer = chosen if side == SIDES[0] else rejected
    if is_conversation(chosen) and is_conversation(rejected):
        shared = common_prefix(chosen, rejected)
        if shared == 0:
            raise ValueError("chosen and rejected share no message; add a prompt column")
        return encode_completion(tokenizer, chosen[:shared], answer[shared:])
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        raise ValueError("chosen and rejected must both be text or both lists of messages")
    ids = [encode_text(tokenizer, text) for text in (chosen, rejected)]
    if ids[0] == ids[1]:
        raise ValueError("equals the other side; a pair needs a difference: remove the row")
    return Scored(ids[SIDES.index(side)], common_prefix(*ids))


def _need_tokenizer(p: Preparation, name: str, column: str) -> None:
    if p.tokenizer is None:
        raise ValueError(
            f"processing_class is needed to tokenise the column {column!r} of {name}; pass the "
            "model's tokenizer"
        )


def _mask(ids: list[int], start: int) -> list[int]:
    return [IGNORE] * start + list(ids[start:])


def _reference(ref: list[float], ids: list[int], cut: slice) -> list[float]:
    """Cut given references as the tokens are cut."""
    if ref is None or len(ref) != len(ids):
        got = "none" if ref is None else len(ref)
        raise ValueError(
            f"ref_logps do not fit: {len(ids)} tokens, {got} references; they come from another "
            "tokenizer or other options: drop the ref_logps columns and let the trainer compute "
            "them"
        )
    if cut.start > 0:
        raise ValueError(
            "given ref_logps do not survive truncation_mode='keep_end', which takes away what "
            "they were conditioned on; drop the ref_logps columns or raise max_length"
        )
    return ref[cut]
