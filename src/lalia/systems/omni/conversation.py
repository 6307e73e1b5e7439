"""Conversations as tokens: who says what, which tokens are learnt, and where recordings stand.

The language model takes all soft tokens of a conversation before its text. A recording therefore stands before the text of its
message as long as it belongs to the first one; where a conversation has several recordings, or one further down, the text of each
message begins with ``[audio 1]``, ``[audio 2]`` … in the order of the soft tokens. With ChatML the mark that opens the first user
message (and a system message) stands before the soft tokens: an instructed model then hears the recording as what the user says.

A tokenizer with ChatML's tokens uses them; one that has a token for each control character (bytes, BPE over bytes) marks roles by
one of these each; any other gets the roles as words. No text may hold what marks a role, nor another mark of the tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lalia.system import Message
from lalia.systems.omni.tokenizers import plain

ROLES = ("system", "user", "assistant")
CONTROL = {"system": "\x01", "user": "\x02", "assistant": "\x03"}
CONTROL_END = "\x04"
CHATML, CHATML_END = "<|im_start|>", "<|im_end|>"


class ConversationError(ValueError):
    """A conversation that cannot be put to the model: says what is wrong with it and what would do."""


@dataclass(frozen=True)
class Format:
    """How roles are written: ``open`` of a role, text, ``end``. ``reserved`` may not stand in a text. ``stop``: the first token of
    ``end`` ends a reply by itself."""

    open: dict[str, str]
    end: str
    reserved: tuple[str, ...]
    stop: bool = True

    @property
    def chatml(self) -> bool:
        return self.open["user"].startswith(CHATML)


def format_of(tokenizer: Any) -> Format:
    """The format that suits a tokenizer, see the module."""
    ends = tokenizer.encode(CHATML_END), tokenizer.encode(CHATML)
    if all(len(ids) == 1 for ids in ends):
        opening = {role: f"{CHATML}{role}\n" for role in ROLES}
        return Format(opening, f"{CHATML_END}\n", tokenizer.marks)
    characters = [*CONTROL.values(), CONTROL_END]
    if len({tuple(tokenizer.encode(c)) for c in characters}) == len(characters) and all(
        len(tokenizer.encode(c)) == 1 for c in characters
    ):
        return Format(dict(CONTROL), CONTROL_END, (*characters, *tokenizer.marks))
    return Format({role: f"{role.capitalize()}: " for role in ROLES}, "\n\n", tokenizer.marks, stop=False)


@dataclass
class Encoded:
    """``tokens`` and ``learnt``: whether each is the assistant's (its text, the end of it and nothing else). ``opening``: what
    stands before the recordings, if there are any; ``tokens`` then go on after them."""

    tokens: list[int]
    learnt: list[bool]
    opening: list[int] = field(default_factory=list)


def check(messages: Sequence[Message], max_audios: int) -> None:
    """ConversationError for roles out of order, an unknown role, an empty conversation or too many recordings."""
    if not messages:
        raise ConversationError("an empty conversation: give at least one user message")
    for number, message in enumerate(messages):
        if message.role not in ROLES:
            raise ConversationError(f"message {number + 1} has the role {message.role!r}; roles are {', '.join(ROLES)}")
        if message.role == "system" and number:
            raise ConversationError("a system message stands first or not at all")
        if message.audio and message.role != "user":
            raise ConversationError(f"message {number + 1}: recordings belong to user messages, this one is the {message.role}'s")
        if message.role == "user" and not (message.text.strip() or message.audio):
            raise ConversationError(f"message {number + 1} is empty: it has neither text nor a recording")
    clips = sum(len(message.audio) for message in messages)
    if clips > max_audios:
        raise ConversationError(f"{clips} recordings in one conversation; this model takes {max_audios} (model.max_audios)")


def encode(messages: Sequence[Message], tokenizer: Any, *, reply: bool = False) -> Encoded:
    """Messages → tokens. ``reply`` opens the assistant's turn for the model to go on; else every assistant turn is learnt.

    BOS stands first, once: where it opens a role too (SmolLM2's is ``<|im_start|>``), the first role brings it.
    """
    shape = format_of(tokenizer)
    texts = marked(messages)
    opened = tokenizer.encode(shape.open[messages[0].role])[:1] == [tokenizer.bos]
    encoded = Encoded([], []) if opened else Encoded([tokenizer.bos], [False])
    waiting = shape.chatml and any(message.audio for message in messages)
    for message, text in zip(messages, texts, strict=True):
        learnt = message.role == "assistant"
        _append(encoded, tokenizer.encode(shape.open[message.role]), False)
        if waiting and message.role == "user":
            encoded, waiting = Encoded([], [], encoded.tokens), False
        _append(encoded, tokenizer.encode(harmless(text, shape)), learnt)
        _append(encoded, tokenizer.encode(shape.end), learnt)
    if reply:
        _append(encoded, tokenizer.encode(shape.open["assistant"]), False)
    return encoded


def _append(encoded: Encoded, ids: Sequence[int], learnt: bool) -> None:
    encoded.tokens += ids
    encoded.learnt += [learnt] * len(ids)


def marked(messages: Sequence[Message]) -> list[str]:
    """The texts, with ``[audio n]`` where it is not plain which recording belongs to which message."""
    clips = sum(len(message.audio) for message in messages)
    first = next((message for message in messages if message.role != "system"), None)
    if clips == 0 or (clips == 1 and first is not None and first.audio):
        return [message.text for message in messages]
    texts, number = [], 0
    for message in messages:
        marks = [f"[audio {number + i + 1}]" for i in range(len(message.audio))]
        number += len(marks)
        texts.append(" ".join([*marks, *([message.text] if message.text else [])]))
    return texts


def harmless(text: str, shape: Format) -> str:
    """``text`` with nothing that would count as the mark of a role, see :func:`lalia.systems.omni.tokenizers.plain`."""
    return plain(text, shape.reserved)


def stops(tokenizer: Any) -> list[int]:
    """Tokens that end a reply: the first of the end mark where that is a token of its own, and the tokenizer's end."""
    shape = format_of(tokenizer)
    return sorted({tokenizer.eos, *([tokenizer.encode(shape.end)[0]] if shape.stop else [])})


def stop_text(tokenizer: Any) -> str:
    """Text that ends a reply where no single token does; '' otherwise."""
    shape = format_of(tokenizer)
    return "" if shape.stop else shape.end
