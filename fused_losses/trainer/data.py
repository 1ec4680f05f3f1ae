"""Datasets in the usual formats become token ids, labels and, where given, references.

A prepared SFT dataset has ``input_ids`` and ``labels`` (-100 where nothing is scored); a prepared
preference dataset has both for each side, ``chosen_input_ids`` ... Prepared datasets pass through
unchanged but for truncation. ``row`` is the row's number in the dataset that was given.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from datasets import Dataset, Features, List, Value

from fused_losses.trainer.columns import Choices, Format
from fused_losses.trainer.formats import pair_format, sft_format
from fused_losses.trainer.sequences import IGNORE as IGNORE
from fused_losses.trainer.sequences import SIDES as SIDES
from fused_losses.trainer.sequences import UnlearnableError, keep, parts, text_tokenizer

logger = logging.getLogger(__name__)

_FIT = (
    "use the model's own tokenizer; if tokens were added to it, call "
    "model.resize_token_embeddings(len(tokenizer)) first"
)


@dataclass(frozen=True)
class Preparation(Choices):
    """How rows become tokens.

    Attributes, beside those of :class:`Choices`:
        tokenizer: Needed by text and messages, None for tokenised data. A processor's tokenizer
            is taken.
        vocabulary: Token ids must lie in [0, vocabulary).
        max_length: Longest sequence, None for no limit.
        truncation_mode: ``keep_start`` or ``keep_end``.
        drop_unlearnable_rows: Leave out rows that nothing can be learnt from.
        num_proc: Processes to use.
    """

    tokenizer: Any
    vocabulary: int
    max_length: int | None
    truncation_mode: str
    drop_unlearnable_rows: bool = False
    num_proc: int | None = None

    def sft(self, dataset: Any, name: str) -> Dataset:
        """Prepare a dataset for SFT, and log what of it is scored.

        Raises:
            TypeError: ``dataset`` is not a ``datasets.Dataset``, or no tokenizer was given.
            ValueError: Missing columns, columns that are not read and would change what is learnt,
                or a row that nothing can be learnt from; named.
        """
        dataset = _plain(dataset, name)
        form = sft_format(dataset, text_tokenizer(self.tokenizer), self, name)
        return self._map(dataset, name, form, ("",))

    def pairs(self, dataset: Any, name: str) -> Dataset:
        """Prepare a dataset for preference learning; as :meth:`sft`."""
        dataset = _plain(dataset, name)
        form = pair_format(dataset, text_tokenizer(self.tokenizer), name)
        return self._map(dataset, name, form, SIDES)

    def _map(self, dataset: Dataset, name: str, form: Format, sides: tuple[str, ...]) -> Dataset:
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
        if self.drop_unlearnable_rows:
            features["unlearnable"] = Value("string")

        def convert(batch: Any, numbers: list[int]) -> dict[str, list[Any]]:
            out: dict[str, list[Any]] = {column: [] for column in features}
            for i, number in enumerate(numbers):
                row = {column: batch[column][i] for column in batch}
                for found in self._sequences(row, form, sides, f"{name}, row {number}"):
                    found["row"] = number
                    for column, values in out.items():
                        values.append(found.get(column))
            return out

        read = [c for c in dataset.column_names if c in form.used or c in features]
        made = dataset.select_columns(read).map(
            convert,
            batched=True,
            with_indices=True,
            remove_columns=read,
            features=Features(features),
            num_proc=self.num_proc,
            desc=f"Preparing {name}",
        )
        made = _without_unlearnable(made, name)
        _report(dataset, made, form, sides, name, unread=set(dataset.column_names) - set(read))
        return made

    def _sequences(
        self, row: dict[str, Any], form: Format, sides: tuple[str, ...], where: str
    ) -> list[dict[str, Any]]:
        """Return what a row becomes: the columns of each of its sequences, or of its pair."""
        found: list[dict[str, Any]] = []
        for side in sides:
            place = f"{where}, column {form.sources[side]!r}"
            try:
                made = self._side(row, form, side)
            except UnlearnableError as error:
                made = [str(error)]
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
            found = found or [{"ref_model": row.get("ref_model")} for _ in made]
            for columns, one in zip(found, made, strict=True):
                if isinstance(one, str):
                    if not self.drop_unlearnable_rows:
                        raise ValueError(
                            f"{place}: {one} (drop_unlearnable_rows=True leaves out such rows)"
                        )
                    columns.setdefault("unlearnable", f"{place}: {one}")
                else:
                    columns |= one
        return found

    def _side(self, row: dict[str, Any], form: Format, side: str) -> list[dict[str, Any] | str]:
        """Return the columns of each sequence of a side, or why nothing can be learnt from it."""
        ids, labels = form.read(row, side)
        name = f"{side}ref_logps"
        if name in row:
            _check_length(row[name], ids)
        found: list[dict[str, Any] | str] = []
        for part in parts(row, side, len(ids)):
            mine, scored = ids[part], labels[part]
            try:
                cut = self._checked(mine, scored)
            except UnlearnableError as error:
                found.append(str(error))
                continue
            columns: dict[str, Any] = {f"{side}input_ids": mine[cut], f"{side}labels": scored[cut]}
            if name in row:
                columns[name] = _reference(row[name][part], cut)
            found.append(columns)
        return found

    def _checked(self, ids: list[int], labels: list[int]) -> slice:
        """Return what truncation leaves of a sequence, if something can be learnt from it."""
        if not ids:
            raise UnlearnableError("has no tokens: remove the row")
        least, most = min(ids), max(ids)
        if least < 0 or most >= self.vocabulary:
            raise ValueError(
                f"holds token id {least if least < 0 else most}, outside the model's vocabulary "
                f"[0, {self.vocabulary}); {_FIT}"
            )
        bad = next((x for x in labels if x != IGNORE and not 0 <= x < self.vocabulary), None)
        if bad is not None:
            raise ValueError(
                f"has label {bad}, which is neither {IGNORE} nor a token id in the model's "
                f"vocabulary [0, {self.vocabulary}); {_FIT}"
            )
        cut = keep(len(ids), self.max_length, self.truncation_mode)
        if all(label == IGNORE for label in labels[1:]):
            raise UnlearnableError("has no token to score: all labels are masked; remove the row")
        if all(label == IGNORE for label in labels[cut][1:]):
            raise UnlearnableError(
                f"has no token to score within max_length={self.max_length} of its {len(ids)} "
                "tokens; raise max_length, use truncation_mode='keep_end', or remove the row"
            )
        return cut


def _plain(dataset: Any, name: str) -> Dataset:
    """Return a dataset whose rows are read as lists and numbers, whatever its format is."""
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{name} must be a datasets.Dataset, got {type(dataset).__name__}; for a list of dicts "
            "use Dataset.from_list, for a stream Dataset.from_generator: references are stored "
            "row by row"
        )
    if not len(dataset):
        raise ValueError(f"{name} has no rows")
    form = dataset.format
    if form["type"] == "custom":
        raise ValueError(
            f"{name} has a transform (with_transform), which would run once, and not as often as "
            "a row is read; apply it with map, or take it off with with_format(None)"
        )
    return dataset.with_format(None).select_columns(form["columns"])


def _without_unlearnable(dataset: Dataset, name: str) -> Dataset:
    if "unlearnable" not in dataset.column_names:
        return dataset
    why = dataset["unlearnable"][:]
    bad = [reason for reason in why if reason is not None]
    dataset = dataset.remove_columns("unlearnable")
    if not bad:
        return dataset
    if len(bad) == len(why):
        raise ValueError(f"{name} has no row that can be learnt from; the first: {bad[0]}")
    if _speaks():
        logger.warning(
            "%s: %d of %d rows left out, the first: %s", name, len(bad), len(why), bad[0]
        )
    return dataset.select([i for i, reason in enumerate(why) if reason is None]).flatten_indices()


def _report(
    dataset: Dataset,
    made: Dataset,
    form: Format,
    sides: tuple[str, ...],
    name: str,
    unread: set[str],
) -> None:
    """Log what is scored, what is not read, and what looks wrong."""
    if not _speaks():
        return
    scored, tokens = _count(made, sides)
    line = (
        f"{name}: {len(made)} rows, {scored / tokens:.1%} of {tokens} tokens scored: {form.scored}"
    )
    if form.by_default:
        line += " (assistant_only_loss=False scores every token)"
    if unread:
        line += f"; columns not read: {', '.join(sorted(unread))}"
    # What was chosen for the user, or left out, is said where informations are not shown.
    logger.log(logging.WARNING if form.by_default or unread else logging.INFO, line)
    for note in (*form.notes, *form.warn(dataset[0])):
        logger.warning("%s: %s", name, note)


def _count(dataset: Dataset, sides: tuple[str, ...]) -> tuple[int, int]:
    """Count the tokens that are scored, and all; nothing predicts the first of a sequence."""
    scored = tokens = 0
    for batch in dataset.with_format("arrow").iter(1000):
        for side in sides:
            lists = batch[f"{side}labels"].combine_chunks()
            labels = lists.flatten().to_numpy() != IGNORE
            lengths = lists.value_lengths().to_numpy()
            scored += int(labels.sum()) - int(labels[np.cumsum(lengths) - lengths].sum())
            tokens += len(labels)
    return scored, tokens


def _speaks() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _check_length(ref: list[float] | None, ids: list[int]) -> None:
    if ref is None or len(ref) != len(ids):
        got = "none" if ref is None else len(ref)
        raise ValueError(
            f"ref_logps do not fit: {len(ids)} tokens, {got} references; they come from another "
            "tokenizer or other options: drop the ref_logps columns and let the trainer compute "
            "them"
        )


def _reference(ref: list[float], cut: slice) -> list[float]:
    """Cut given references as the tokens are cut."""
    if cut.start > 0:
        raise ValueError(
            "given ref_logps do not survive truncation_mode='keep_end', which takes away what "
            "they were conditioned on; drop the ref_logps columns or raise max_length"
        )
    return ref[cut]


def each(datasets: Any, change: Callable[[Any, str], Dataset]) -> Any:
    """Change an evaluation dataset, if there is one, or each of a dict of them, told its name."""
    if datasets is None:
        return None
    if isinstance(datasets, dict):
        return {k: change(d, f"eval_dataset[{k!r}]") for k, d in datasets.items()}
    return change(datasets, "eval_dataset")


def values(datasets: Any) -> list[Any]:
    """Return an evaluation dataset, or those of a dict of them, as a list."""
    return list(datasets.values()) if isinstance(datasets, dict) else [datasets]
