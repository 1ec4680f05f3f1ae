"""A prompt and what follows it, text or messages: told apart, and not put together twice."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from fused_losses.trainer.chat import Chat, is_conversation, without_prompt
from fused_losses.trainer.sequences import (
    SIDES,
    Scored,
    UnlearnableError,
    common_prefix,
    encode_continuation,
    encode_text,
    scored_from,
)


def continued(
    tokenizer: Any, row: dict[str, Any], prompt: Any, answer: Any, repeated: bool
) -> Scored:
    """Tokenise a prompt and what follows it, text or messages, and score what follows.

    Raises:
        UnlearnableError: Nothing follows.
        ValueError: One is text and the other messages, or the template tells them not apart.
    """
    if is_conversation(prompt) and is_conversation(answer):
        chat = Chat(tokenizer, row)
        asked = chat.read(prompt)
        return chat.completion(asked, without_prompt(asked, chat.read(answer)))
    if isinstance(prompt, str) and isinstance(answer, str):
        return encode_continuation(tokenizer, prompt, answer[len(prompt) if repeated else 0 :])
    if isinstance(answer, list) and not answer:
        raise UnlearnableError("is empty; there is nothing to learn from: remove the row")
    cure = "give both in one kind"
    if isinstance(prompt, str) and is_conversation(answer):
        cure = "write the prompt as [{'role': 'user', 'content': prompt}]"
        if answer[0].get("content") == prompt:
            cure = "remove the column prompt, which the messages begin with"
    elif is_conversation(prompt) and isinstance(answer, str):
        cure = "write it as [{'role': 'assistant', 'content': text}]"
    raise ValueError(
        "must be of the prompt's kind, both text or both lists of messages, got "
        f"{type(answer).__name__} after a prompt of type {type(prompt).__name__}: {cure}"
    )


def after_common_prefix(tokenizer: Any, row: dict[str, Any], side: str) -> Scored:
    """Take what both sides begin with as their prompt: whole messages, or tokens of a text."""
    pair = [row[s[:-1]] for s in SIDES]
    this = SIDES.index(side)
    if all(map(is_conversation, pair)):
        chat = Chat(tokenizer, row)
        turns = [chat.read(messages) for messages in pair]
        shared = common_prefix(*turns)
        if shared == 0:
            raise UnlearnableError("chosen and rejected share no message; add a prompt column")
        return chat.completion(turns[this][:shared], turns[this][shared:])
    if not all(isinstance(text, str) for text in pair):
        raise ValueError("chosen and rejected must both be text or both lists of messages")
    ids = [encode_text(tokenizer, text) for text in pair]
    if ids[0] == ids[1]:
        raise UnlearnableError("equals the other side; a pair needs a difference: remove the row")
    return scored_from(ids[this], common_prefix(*ids))


def all_repeat(dataset: Dataset, columns: tuple[str, ...]) -> bool:
    """Whether every text of the columns begins with its whole prompt."""
    return all(
        isinstance(row["prompt"], str)
        and row["prompt"]
        and all(isinstance(row[c], str) and row[c].startswith(row["prompt"]) for c in columns)
        for row in dataset.select_columns(["prompt", *columns])
    )


def repetition(what: str) -> tuple[str, ...]:
    """Return what is said where all texts repeat their prompt."""
    return (f"all {what} begin with the text of their prompt, which is not put before them again",)


def asked_and_chosen(row: dict[str, Any]) -> tuple[Any, Any]:
    """Return the prompt of a pair and its chosen response."""
    chosen, rejected = row["chosen"], row["rejected"]
    if row.get("prompt") is None and is_conversation(chosen) and is_conversation(rejected):
        shared = common_prefix(chosen, rejected)
        return chosen[:shared], chosen[shared:]
    return row.get("prompt"), chosen


def warnings_of(tokenizer: Any, row: dict[str, Any], prompt: Any, answer: Any) -> tuple[str, ...]:
    """Return what looks wrong in how the template writes a prompt and its answer, in words."""
    if not (is_conversation(prompt) and is_conversation(answer)):
        return ()
    chat = Chat(tokenizer, row)
    asked = chat.read(prompt)
    return chat.warnings(asked, without_prompt(asked, chat.read(answer)))
