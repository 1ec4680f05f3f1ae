"""What the columns of a dataset mean: which are read, which are refused, which say nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from fused_losses.trainer.chat import is_conversation
from fused_losses.trainer.sequences import SIDES, Labelled

_NO_TEXT = "these trainers read text alone; remove the column to train without it"
_BESIDE_IDS = "it belongs to a column input_ids, one entry per token; remove it"
_TEMPLATE = "it goes to a chat template, which writes messages; remove it, or give messages"
_PER_TOKEN = (
    "references are per token here, chosen_ref_logps and rejected_ref_logps; remove it, and they "
    "are computed"
)
_NO_WEIGHTS = "tokens and rows are not weighted here; mask labels with -100, or remove it"
# Columns that change what is learnt: read, or else refused with the reason.
_MEANT: dict[str, str] = {
    **dict.fromkeys(("image", "images", "pixel_values", "video", "videos"), _NO_TEXT),
    **dict.fromkeys(("pixel_values_videos", "audio", "audios", "input_features"), _NO_TEXT),
    **dict.fromkeys(("attention_mask", "position_ids", "seq_lengths"), _BESIDE_IDS),
    **dict.fromkeys(("completion_mask", "assistant_masks"), _BESIDE_IDS),
    **dict.fromkeys((f"{x}attention_mask" for x in (*SIDES, "prompt_")), _BESIDE_IDS),
    **dict.fromkeys(("tools", "chat_template_kwargs"), _TEMPLATE),
    **dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps"), _PER_TOKEN),
    **dict.fromkeys(("reference_chosen_logps", "reference_rejected_logps"), _PER_TOKEN),
    **dict.fromkeys(("loss_mask", "loss_weight", "loss_weights", "token_weight"), _NO_WEIGHTS),
    "margin": "no pair loss here takes a margin per pair; remove it",
}
FOR_TEMPLATE = ("tools", "chat_template_kwargs")
OF_ROW = ("attention_mask", "seq_lengths", "position_ids")


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the config says of how rows are read and what of them is scored, in SFT.

    Attributes:
        completion_only_loss: Score only the completion; None: where a prompt is given.
        assistant_only_loss: Score only the assistant's turns; None: of messages.
        dataset_text_field: Column of plain text.
        formatting_func: Makes a text of a row, in place of all formats.
    """

    completion_only_loss: bool | None = None
    assistant_only_loss: bool | None = None
    dataset_text_field: str = "text"
    formatting_func: Callable[[dict[str, Any]], str] | None = None


@dataclass(frozen=True)
class Format:
    """How the rows of one dataset are read.

    Attributes:
        read: Takes a row and a side; returns token ids and labels.
        sources: The column of each side that errors name.
        used: The columns that are read.
        scored: What is scored, in words.
        by_default: Whether what is scored was neither asked for nor told by the data.
        tokenised: Whether rows hold token ids, and no text.
        warn: Takes a row; what looks wrong in how the template writes it, in words.
        notes: What was found out about the dataset as a whole, in words.
    """

    read: Callable[[dict[str, Any], str], Labelled]
    sources: Mapping[str, str]
    used: frozenset[str]
    scored: str
    by_default: bool = False
    tokenised: bool = False
    warn: Callable[[dict[str, Any]], tuple[str, ...]] = lambda row: ()
    notes: tuple[str, ...] = ()


def checked(made: Format, columns: set[str], tokenizer: Any, name: str) -> Format:
    """Refuse what is not read and would change what is learnt."""
    for column in sorted(columns - made.used):
        # Tokens are what a template made of tools, once they are there.
        if column in _MEANT and not (made.tokenised and column in FOR_TEMPLATE):
            raise ValueError(f"{name} has a column {column!r}, which is not read: {_MEANT[column]}")
    if tokenizer is None and not made.tokenised:
        source = ", ".join(made.sources.values())
        raise ValueError(
            f"processing_class is needed to tokenise the column {source!r} of {name}; pass the "
            "model's tokenizer"
        )
    return made


def templated(dataset: Dataset, column: str) -> tuple[str, ...]:
    """Return the columns that go to the chat template, if a column holds messages."""
    return FOR_TEMPLATE if is_conversation(dataset[0][column]) else ()


def not_text(columns: set[str]) -> set[str]:
    """Return the columns that hold what a text does not show."""
    return {column for column in columns if _MEANT.get(column) is _NO_TEXT}
