"""What the trainers are told of their data, and checks of fields."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

_TRUNCATION_MODES = ("keep_start", "keep_end")


@dataclass
class DataConfig(TrainingArguments):
    """``TrainingArguments`` and how rows become batches; names are TRL's where it has them."""

    max_length: int | None = field(
        default=1024,
        metadata={"help": "Longest sequence, in tokens; longer ones are cut. None: no cut."},
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata={
            "help": "Which end of a long sequence to keep.",
            "choices": list(_TRUNCATION_MODES),
        },
    )
    padding_free: bool = field(
        default=False,
        metadata={
            "help": "Lay the sequences of a batch one after another in one row, without padding. "
            "The model's attention must keep sequences apart by position_ids; this is tried out."
        },
    )
    pad_to_multiple_of: int | None = field(
        default=None,
        metadata={"help": "Pad the rows of a batch to a multiple of so many tokens."},
    )
    drop_unlearnable_rows: bool = field(
        default=False,
        metadata={
            "help": "Leave out rows that nothing can be learnt from (an empty response, none left "
            "within max_length, ...) and say in the log how many. False: they are an error."
        },
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenise the datasets."}
    )

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: A field out of range; named, with what was expected.
        """
        super().__post_init__()
        check_least("max_length", self.max_length, 2)
        check_least("pad_to_multiple_of", self.pad_to_multiple_of, 1)
        check_least("dataset_num_proc", self.dataset_num_proc, 1)
        check_choice("truncation_mode", self.truncation_mode, _TRUNCATION_MODES)

    @property
    def packs_training(self) -> bool:
        """Whether training rows hold several sequences."""
        return False

    @property
    def packs_evaluation(self) -> bool:
        """Whether evaluation rows hold several sequences."""
        return False

    @property
    def lays_end_to_end(self) -> bool:
        """Whether a batch is one row of sequences without padding between them."""
        return self.padding_free or self.packs_training or self.packs_evaluation


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless a field has one of its values."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_least(name: str, value: int | None, least: int) -> None:
    """Raise unless a field is None or large enough."""
    if value is not None and value < least:
        raise ValueError(f"{name} must be None or at least {least}, got {value}")


def check_range(name: str, value: float, inside: bool, expected: str) -> None:
    """Raise unless a number is finite and where it was expected."""
    if not inside or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number {expected}, got {value}")
