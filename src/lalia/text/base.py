"""What every language front end shares: the result of an analysis, the policy for unknown characters, the error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

#: the symbol of a character that has no pronunciation; in normalised text it stands as REPLACED
UNKNOWN = "UNK"
REPLACED = "\N{REPLACEMENT CHARACTER}"
#: punctuation that is spoken as a pause or a change of melody, and so is a symbol of every language
PUNCTUATION = (",", ".", "!", "?", "…", "-", "'")

#: word → phones of a user's own dictionary, e.g. ``{"lalia": "L AH0 L IY1 AH0"}``
Lexicon = Mapping[str, "str | Sequence[str]"]


class TextError(ValueError):
    """A text that cannot be spoken or encoded; the message is the reason."""


class OnUnknown(Enum):
    """What a character that the language cannot speak does."""

    error = "error"  # TextError naming the characters and their positions
    skip = "skip"  # left out; named in ``unknown`` and ``notes``
    replace = "replace"  # becomes the UNK symbol; named in ``unknown`` and ``notes``


@dataclass
class Analysis:
    """Text as phones. ``len(phones) == len(tones) == sum(word2ph)`` and ``len(words) == len(word2ph)``.

    ``phones`` are symbols of :class:`lalia.text.SymbolTable`; ``tones`` count from 0 within the language (the table
    adds the language's offset); punctuation is a word of one phone. ``unknown`` holds the characters that were skipped
    or replaced, ``guessed`` the words that no dictionary has, ``notes`` says in sentences what was changed.
    """

    normalized: str
    phones: list[str]
    tones: list[int]
    word2ph: list[int]
    words: list[str]
    language: str
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    guessed: list[str] = field(default_factory=list)


class Analyser(Protocol):
    """A language front end: text → :class:`Analysis`. Raises TextError with a reason when there is nothing to speak."""

    language: str

    def __call__(self, text: str, on_unknown: OnUnknown, lexicon: Lexicon | None) -> Analysis: ...
