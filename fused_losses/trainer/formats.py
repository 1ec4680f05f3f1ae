"""Which format a dataset has, and how its rows become tokens of which some are scored."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from fused_losses.trainer.chat import Chat, is_conversation, without_prompt
from fused_losses.trainer.columns import (
    FOR_TEMPLATE,
    OF_ROW,
    Choices,
    Format,
    checked,
    not_text,
    templated,
)
from fused_losses.trainer.prompts import (
    after_common_prefix,
    all_repeat,
    asked_and_chosen,
    continued,
    repetition,
    warnings_of,
)
from fused_losses.trainer.sequences import (
    SIDES,
    Labelled,
    Scored,
    UnlearnableError,
    encode_text,
    scored_from,
)

_SFT_FORMATS = (
    "messages | text | prompt, completion | input_ids, labels | input_ids, completion_mask | "
    "input_ids, assistant_masks | input_ids"
)
_PAIR_FORMATS = (
    "prompt, chosen, rejected | chosen, rejected | prompt_ids, chosen_ids, rejected_ids | "
    "chosen_input_ids, chosen_labels, rejected_input_ids, rejected_labels"
)


def sft_format(dataset: Dataset, tokenizer: Any, choices: Choices, name: str) -> Format:
    """Find the format of a dataset for SFT.

    Raises:
        ValueError: Missing columns, columns that would change what is learnt and are not read, or
            choices that the format does not have; named.
    """
    columns = set(dataset.column_names)
    if choices.formatting_func is not None:
        made = _formatted(columns, tokenizer, choices, name)
    elif "input_ids" in columns:
        made = _tokens(columns, choices, name)
    elif {"prompt", "completion"} <= columns:
        made = _prompted(dataset, tokenizer, choices)
    elif "messages" in columns:
        made = _messages(tokenizer, choices)
    elif choices.dataset_text_field in columns:
        made = _text(tokenizer, choices, name)
    else:
        raise ValueError(
            f"{name} has the columns {', '.join(sorted(columns))}; SFT needs one of: {_SFT_FORMATS}"
            f" (text: dataset_text_field={choices.dataset_text_field!r})"
        )
    return checked(made, columns, tokenizer, name)


def pair_format(dataset: Dataset, tokenizer: Any, name: str) -> Format:
    """Find the format of a dataset for preference learning.

    Raises:
        ValueError: Missing columns, or columns that would change what is learnt and are not read;
            named.
    """
    columns = set(dataset.column_names)
    sources = {side: side[:-1] for side in SIDES}
    if {f"{side}{part}" for side in SIDES for part in ("input_ids", "labels")} <= columns:

        def prepared(row: dict[str, Any], side: str) -> Labelled:
            return _labelled(row[f"{side}input_ids"], row[f"{side}labels"])

        used = {f"{s}{part}" for s in SIDES for part in ("input_ids", "labels", "attention_mask")}
        sources = {side: f"{side}input_ids" for side in SIDES}
        made = Format(
            prepared, sources, frozenset(used), "the labels that are not -100", tokenised=True
        )
    elif {"prompt_ids", "chosen_ids", "rejected_ids"} <= columns:

        def tokens(row: dict[str, Any], side: str) -> Labelled:
            ids = [*row["prompt_ids"], *row[f"{side}ids"]]
            return scored_from(ids, len(row["prompt_ids"])).labelled()

        used = {"prompt_ids", "chosen_ids", "rejected_ids"}
        sources = {side: f"{side}ids" for side in SIDES}
        made = Format(tokens, sources, frozenset(used), "the responses", tokenised=True)
    elif {"chosen", "rejected"} <= columns:
        repeated = "prompt" in columns and all_repeat(dataset, ("chosen", "rejected"))

        def read(row: dict[str, Any], side: str) -> Labelled:
            if row.get("prompt") is None:
                return after_common_prefix(tokenizer, row, side).labelled()
            found = continued(tokenizer, row, row["prompt"], row[side[:-1]], repeated)
            return found.labelled()

        made = Format(
            read,
            sources,
            frozenset({"prompt", "chosen", "rejected", *templated(dataset, "chosen")}),
            "the responses",
            warn=lambda row: warnings_of(tokenizer, row, *asked_and_chosen(row)),
            notes=repetition("responses") if repeated else (),
        )
    else:
        raise ValueError(
            f"{name} has the columns {', '.join(sorted(columns))}; preference learning needs one "
            f"of: {_PAIR_FORMATS}"
        )
    return checked(made, columns, tokenizer, name)


def _formatted(columns: set[str], tokenizer: Any, choices: Choices, name: str) -> Format:
    function = choices.formatting_func
    if function is None:
        raise TypeError("formatting_func must be a function")
    if "input_ids" in columns:
        raise ValueError(f"formatting_func makes a text of a row, and {name} has input_ids already")
    _no_masks(choices, "formatting_func makes one text of a row")

    def read(row: dict[str, Any], side: str) -> Labelled:
        return _whole_text(tokenizer, function(row), "formatting_func must return a text")

    # The function sees all of the row, but makes no more than text of it.
    used = frozenset(columns - not_text(columns))
    return Format(read, {"": "formatting_func"}, used, "every token")


def _tokens(columns: set[str], choices: Choices, name: str) -> Format:
    only, assistant = choices.completion_only_loss, choices.assistant_only_loss
    masks = []
    if "completion_mask" in columns and only is not False:
        masks.append("completion_mask")
    if "assistant_masks" in columns and assistant is not False:
        masks.append("assistant_masks")
    if "labels" in columns and masks:
        raise ValueError(
            f"{name} has labels and {', '.join(masks)}; labels tell already which tokens are "
            "scored: remove one of them"
        )
    for wanted, option, mask in (
        (only, "completion_only_loss", "completion_mask"),
        (assistant, "assistant_only_loss", "assistant_masks"),
    ):
        if wanted and not columns & {"labels", mask}:
            raise ValueError(
                f"{option}=True: {name} has input_ids but neither labels nor {mask} to tell what "
                "is scored"
            )

    def read(row: dict[str, Any], side: str) -> Labelled:
        ids = row["input_ids"]
        if "labels" in row:
            return _labelled(ids, row["labels"])
        for name in masks:
            if len(row[name]) != len(ids):
                raise ValueError(f"has {len(ids)} tokens and {len(row[name])} entries of {name}")
        mask = [all(row[name][i] for name in masks) for i in range(len(ids))]
        return Scored(ids, mask).labelled()

    used = {"input_ids", "labels", "ref_logps", "ref_model", *OF_ROW}
    scored = "the labels that are not -100" if "labels" in columns else " and ".join(masks)
    masks_told = {"completion_mask", "assistant_masks"}
    return Format(
        read,
        {"": "input_ids"},
        frozenset(used | masks_told),
        scored or "every token",
        tokenised=True,
    )


def _prompted(dataset: Dataset, tokenizer: Any, choices: Choices) -> Format:
    only, assistant = choices.completion_only_loss is not False, bool(choices.assistant_only_loss)
    repeated = all_repeat(dataset, ("completion",))

    def read(row: dict[str, Any], side: str) -> Labelled:
        prompt, completion = row["prompt"], row["completion"]
        if assistant and not is_conversation(completion):
            raise ValueError("assistant_only_loss=True needs messages, got a text")
        found = continued(tokenizer, row, prompt, completion, repeated)
        if not only:
            found = Scored(found.ids, [True] * len(found.ids))
        if assistant:
            chat = Chat(tokenizer, row)
            asked = chat.read(prompt)
            turns = [*asked, *without_prompt(asked, chat.read(completion))]
            found = found.within(chat.assistant(turns))
        return found.labelled()

    words = ["the completion"] if only else []
    words += ["the assistant's turns"] if assistant else []
    return Format(
        read,
        {"": "completion"},
        frozenset({"prompt", "completion", *templated(dataset, "completion")}),
        "of these, ".join(words) or "every token",
        warn=lambda row: warnings_of(tokenizer, row, row["prompt"], row["completion"]),
        notes=repetition("completions") if repeated else (),
    )


def _messages(tokenizer: Any, choices: Choices) -> Format:
    only, assistant = choices.completion_only_loss, choices.assistant_only_loss
    by_default = assistant is None and only is None
    assistant = by_default or bool(assistant)

    def read(row: dict[str, Any], side: str) -> Labelled:
        turns = row["messages"]
        if not is_conversation(turns):
            raise ValueError("must be a list of messages, {'role': ..., 'content': ...}")
        chat = Chat(tokenizer, row)
        turns = chat.read(turns)
        if not only:
            return (chat.assistant(turns) if assistant else chat.whole(turns)).labelled()
        found = chat.completion(turns[:-1], turns[-1:])
        return (found.within(chat.assistant(turns)) if assistant else found).labelled()

    words = ["the last message"] if only else []
    words += ["the assistant's turns"] if assistant else []
    return Format(
        read,
        {"": "messages"},
        frozenset({"messages", *FOR_TEMPLATE}),
        "of these, ".join(words) or "every token",
        by_default,
        warn=lambda row: warnings_of(tokenizer, row, row["messages"][:-1], row["messages"][-1:]),
    )


def _text(tokenizer: Any, choices: Choices, name: str) -> Format:
    column = choices.dataset_text_field
    _no_masks(choices, f"{name} has a text column, which knows no prompt and no turns")

    def read(row: dict[str, Any], side: str) -> Labelled:
        return _whole_text(tokenizer, row[column], "must be a text")

    return Format(read, {"": column}, frozenset({column}), "every token")


def _whole_text(tokenizer: Any, text: Any, expected: str) -> Labelled:
    if not isinstance(text, str):
        raise ValueError(f"{expected}, got {type(text).__name__}")
    if not text:
        raise UnlearnableError("is empty; there is nothing to learn from: remove the row")
    ids = encode_text(tokenizer, text)
    return ids, list(ids)


def _no_masks(choices: Choices, why: str) -> None:
    for option, asked in (
        ("completion_only_loss", choices.completion_only_loss),
        ("assistant_only_loss", choices.assistant_only_loss),
    ):
        if asked:
            raise ValueError(
                f"{option}=True: {why}; give prompt and completion columns, or messages"
            )


def _labelled(ids: list[int], labels: list[int]) -> Labelled:
    if len(labels) != len(ids):
        raise ValueError(f"has {len(ids)} tokens and {len(labels)} labels; give one each")
    return ids, labels
