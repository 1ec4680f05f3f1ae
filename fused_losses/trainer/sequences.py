"""From text and messages to token ids, and to where the completion begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Scored(NamedTuple):
    """A tokenised sequence.

    Attributes:
        ids: Token ids.
        start: Position of the first token that is scored; those before it are the prompt.
    """

    ids: list[int]
    start: int


def is_conversation(value: Any) -> bool:
    """Whether a cell holds messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def encode_text(tokenizer: Any, text: str, *, end: bool = True) -> list[int]:
    """Tokenise text as it stands; ``end``: the end-of-sequence token comes last, once."""
    ids = list(tokenizer(text)["input_ids"])
    eos = tokenizer.eos_token_id
    if end and eos is not None and (not ids or ids[-1] != eos):
        ids.append(eos)
    return ids


def encode_messages(
    tokenizer: Any, messages: Sequence[dict[str, Any]], *, reply: bool = False
) -> list[int]:
    """Tokenise a conversation by the chat template; ``reply``: up to the start of the answer.

    Raises:
        ValueError: The tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "messages need a tokenizer with a chat template; set tokenizer.chat_template, or give "
            "text instead of messages"
        )
    # Arrow fills keys that only some messages have with None.
    turns = [{k: v for k, v in turn.items() if v is not None} for turn in messages]
    encoded = tokenizer.apply_chat_template(
        turns, tokenize=True, add_generation_prompt=reply, return_dict=True
    )
    return list(encoded["input_ids"])


def encode_completion(tokenizer: Any, prompt: Any, completion: Any) -> Scored:
    """Tokenise a prompt and what follows it, text or messages.

    The whole is tokenised in one piece, as a text that a model might read; the prompt is what its
    own tokens have in common with the beginning of the whole. A token in which prompt and
    completion meet belongs to the completion.

    Raises:
        ValueError: One is text and the other messages; an empty completion.
    """
    if is_conversation(completion) and is_conversation(prompt):
        whole = encode_messages(tokenizer, [*prompt, *completion])
        asked = encode_messages(tokenizer, prompt, reply=True)
    elif isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise ValueError("is empty; there is nothing to learn from: remove the row")
        whole = encode_text(tokenizer, prompt + completion)
        asked = encode_text(tokenizer, prompt, end=False)
    elif isinstance(completion, list) and not completion:
        raise ValueError("is empty; there is nothing to learn from: remove the row")
    else:
        raise ValueError(
            "must be of the prompt's kind, both text or both lists of messages, got "
            f"{type(completion).__name__} after a prompt of type {type(prompt).__name__}"
        )
    return Scored(whole, common_prefix(whole, asked))


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
