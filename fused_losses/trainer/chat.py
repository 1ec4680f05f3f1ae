"""From messages to token ids by a chat template, and to which of them are scored."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError

from fused_losses.trainer.sequences import Scored, UnlearnableError, common_prefix, scored_from

Messages = list[dict[str, Any]]
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def is_conversation(value: Any) -> bool:
    """Whether a cell holds messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def without_none(value: Any) -> Any:
    """Leave out the entries that are None in every mapping, at any depth.

    Arrow gives the records of a column the same keys, and fills with None those that a record does
    not have.
    """
    if isinstance(value, Mapping):
        return {k: without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_none(v) for v in value]
    return value


def without_prompt(prompt: Messages, answer: Messages) -> Messages:
    """Return an answer without the prompt, where it begins with all its messages."""
    return answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer


class Chat:
    """A tokenizer's chat template, as one row of a dataset asks for it.

    Args:
        tokenizer: Its chat template writes the messages.
        row: Its columns ``tools`` and ``chat_template_kwargs`` go to the template, if they are
            there. Tools may be given as JSON.

    Raises:
        ValueError: The tokenizer has no chat template, or one of the columns cannot be read.
    """

    def __init__(self, tokenizer: Any, row: Mapping[str, Any]) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "messages need a tokenizer with a chat template; set tokenizer.chat_template, or "
                "give text instead of messages"
            )
        self.tokenizer = tokenizer
        tools = _plain(row, "tools", list)
        # Some templates write that there are tools where the list is empty.
        self.options = {"tools": tools or None, **(_plain(row, "chat_template_kwargs", dict) or {})}
        if tools and "tools" not in self._template:
            raise ValueError(
                "there are tools, and the chat template does not write any; use a template that "
                "does, or remove the column tools"
            )

    @property
    def marks_generation(self) -> bool:
        """Whether the template says what the assistant writes: ``{% generation %}``."""
        return _GENERATION.search(self._template) is not None

    @property
    def _template(self) -> str:
        template, tools = self.options.get("chat_template"), self.options["tools"]
        return self.tokenizer.get_chat_template(template, tools)

    def read(self, messages: Any) -> Messages:
        """Return messages as the template gets them.

        Raises:
            ValueError: They hold what a text does not show.
        """
        turns = without_none(messages)
        for number, turn in enumerate(turns):
            content = turn.get("content")
            kinds = {p.get("type") for p in content} if is_conversation(content) else {"text"}
            if kinds - {"text"}:
                raise ValueError(
                    f"message {number} holds content of type {', '.join(map(str, sorted(kinds)))}; "
                    "these trainers read text alone"
                )
        return turns

    def text(self, messages: Messages, *, reply: bool = False) -> str:
        """Write a conversation; ``reply``: up to where the assistant's answer begins."""
        return self._apply(messages, tokenize=False, add_generation_prompt=reply)

    def _apply(self, messages: Messages, **how: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, **how, **self.options)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error

    def whole(self, messages: Messages) -> Scored:
        """Tokenise a conversation and score all of it."""
        _all_count(messages)
        ids = self._encode(self.text(messages))["input_ids"]
        return Scored(ids, [True] * len(ids))

    def completion(self, prompt: Messages, answer: Messages) -> Scored:
        """Tokenise a conversation and score what follows the prompt.

        A token in which prompt and answer meet belongs to the answer.

        Raises:
            UnlearnableError: The answer has no messages.
            ValueError: The template writes the prompt otherwise where an answer follows.
        """
        if not answer:
            raise UnlearnableError("is empty; there is nothing to learn from: remove the row")
        _all_count(answer)
        text = self.text([*prompt, *answer])
        encoded = self._encode(text)
        return scored_from(
            list(encoded["input_ids"]), self._token(encoded, text, self._start(text, prompt))
        )

    def assistant(self, messages: Messages) -> Scored:
        """Tokenise a conversation and score what the assistant says in it, each turn to its end.

        By the template's generation marks, or else by comparing the conversation up to each of the
        assistant's turns with the whole.

        Raises:
            UnlearnableError: No message is the assistant's.
            ValueError: It cannot be told what the assistant says.
        """
        said = [i for i, turn in enumerate(messages) if turn.get("role") == "assistant"]
        if not said:
            roles = ", ".join(sorted({str(turn.get("role")) for turn in messages}))
            raise UnlearnableError(
                f"has no message of the role 'assistant' (roles: {roles}), whose turns are "
                "scored: remove the row, or score every token with assistant_only_loss=False"
            )
        _all_count([messages[i] for i in said])
        if self.marks_generation:
            encoded = self._apply(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            mask = [bool(m) for m in encoded["assistant_masks"]]
            return Scored(list(encoded["input_ids"]), mask)
        text = self.text(messages)
        encoded = self._encode(text)
        mask = [False] * len(encoded["input_ids"])
        for i in said:
            first, last = self._turn(encoded, text, messages, i)
            mask[first:last] = [True] * (last - first)
        return Scored(list(encoded["input_ids"]), mask)

    def _turn(self, encoded: Any, text: str, messages: Messages, i: int) -> tuple[int, int]:
        """Return the first token of a turn in the whole, and the one after its last."""
        # A template cannot write a conversation of no messages.
        start = self._start(text, messages[:i]) if i else 0
        first = self._token(encoded, text, start)
        upto = self.text(messages[: i + 1])
        if text.startswith(upto):
            return first, self._token(encoded, text, len(upto))
        # Some templates write the last turn otherwise than those before it: they put reasoning
        # before it, or end the text after it. What is said and how it is closed are the same.
        content = messages[i].get("content")
        said = content.strip() if isinstance(content, str) else ""
        after = self._encode(upto)
        at = upto.find(said, start)
        while said and at >= 0 and upto[:start] == text[:start]:
            rest = text[start:].removeprefix(upto[start:at]).lstrip()
            if rest.startswith(said):
                ends = len(text) - len(rest) + len(said), at + len(said)
                here, there = self._token(encoded, text, ends[0]), self._token(after, upto, ends[1])
                closing = after["input_ids"][there:]
                shared = common_prefix(encoded["input_ids"][here:], closing)
                if shared or not closing:
                    return first, here + shared
            at = upto.find(said, at + 1)
        raise ValueError(
            f"the chat template does not let message {i} be told from the others: it writes the "
            "conversation up to there otherwise where more follows; mark what the assistant says "
            "with {% generation %} in the template, give prompt and completion columns, or score "
            "every token with assistant_only_loss=False"
        )

    def _start(self, text: str, before: Messages) -> int:
        """Return where the answer to the messages before it begins in the text of the whole."""
        if not before:
            return 0
        asked = self.text(before, reply=True)
        if text.startswith(asked):
            return len(asked)
        # What only the request for an answer writes does not move the boundary.
        if not text.startswith(self.text(before)):
            raise ValueError(
                "the chat template does not write the prompt as the beginning of the whole "
                "conversation, so what follows the prompt cannot be told; use a template that "
                "does, mark what the assistant says with {% generation %} and set "
                "assistant_only_loss=True, or score every token with completion_only_loss=False"
            )
        return common_prefix(asked, text)

    def warnings(self, prompt: Messages, answer: Messages) -> tuple[str, ...]:
        """Return what will differ between training and use, in words."""
        found = []
        try:
            asked, text = self.text(prompt, reply=True), self.text([*prompt, *answer])
            marked = self.assistant([*prompt, *answer]) if self.marks_generation else None
        except ValueError:  # A template may refuse a conversation that ends with this role.
            return ()
        for number, turn in enumerate([*prompt, *answer]):
            content = turn.get("content")
            if isinstance(content, str) and content.strip() not in text:
                found.append(
                    f"the chat template does not write the content of message {number} as it is; "
                    "if it leaves it out, it may take content=[{'type': 'text', 'text': ...}] only"
                )
                break
        if not text.startswith(asked):
            found.append(
                "the chat template ends the request for an answer with "
                f"{asked[common_prefix(asked, text) :]!r}, which is not there before the answers "
                "that are learnt: the model will be asked in another way than it was trained"
            )
        if marked is not None and any(marked.mask):
            special = set(self.tokenizer.get_added_vocab().values())
            after = len(marked.mask) - marked.mask[::-1].index(True)
            ids = marked.ids
            if ids[after - 1] not in special and after < len(ids) and ids[after] in special:
                found.append(
                    "the chat template leaves the token that ends a turn "
                    f"({self.tokenizer.convert_ids_to_tokens(ids[after])!r}) outside of its "
                    "{% generation %} marks: the model is not taught to stop there"
                )
        return tuple(found)

    def _encode(self, text: str) -> Any:
        # The template writes what begins and ends the sequence.
        return self.tokenizer(text, add_special_tokens=False)

    def _token(self, encoded: Any, text: str, at: int) -> int:
        """Return the number of the token that holds a character, or the first one after it."""
        ids = encoded["input_ids"]
        if not self.tokenizer.is_fast:
            return common_prefix(self._encode(text[:at])["input_ids"], ids)
        found = (encoded.char_to_token(i) for i in range(at, len(text)))
        return next((token for token in found if token is not None), len(ids))


def _all_count(turns: Messages) -> None:
    """Refuse a message that is scored and asks not to be."""
    for turn in turns:
        for key in ("weight", "train"):
            if turn.get(key, 1) != 1:
                raise ValueError(
                    f"a message of the role {turn.get('role')!r} has {key}={turn[key]!r}, which is "
                    "not read, and would be scored: mark what is scored with {% generation %} in "
                    "the template, or give prompt and completion columns"
                )


def _plain(row: Mapping[str, Any], column: str, kind: type) -> Any:
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{column} holds a text that is no JSON ({error})") from None
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{column} must be a {kind.__name__}, got {type(value).__name__}")
    return without_none(value)
