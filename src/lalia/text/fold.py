"""Unicode to the plain characters that the English normaliser reads, with a report of what had to change."""

from __future__ import annotations

import string
import unicodedata
from dataclasses import dataclass, field

from lalia.text.base import REPLACED, OnUnknown, TextError

_PLAIN = frozenset(string.ascii_letters + string.digits + string.punctuation + " …€£¥¢°–")
_SAME = {
    **dict.fromkeys("‘’‚‛′ʼʹ＇´", "'"),
    **dict.fromkeys("“”„‟″«»‹›「」『』〝〞", '"'),
    **dict.fromkeys("‐‑−﹣－", "-"),
    **dict.fromkeys("—―‒⸺", "–"),  # one kind of dash is left; the rules tell a range from a pause
    **dict.fromkeys("™®©", ""),
    **dict.fromkeys("•·▪●", ","),
    "，": ",",
    "、": ",",
    "。": ".",
    "！": "!",
    "？": "?",
    "：": ":",
    "；": ";",
    "×": " times ",
    "÷": " divided by ",
    "±": " plus or minus ",
    "²": " squared",
    "³": " cubed",
    "½": " 1/2",
    "¼": " 1/4",
    "¾": " 3/4",
    "⅓": " 1/3",
    "⅔": " 2/3",
    "⁄": "/",
    "ʻ": "'",
    "⋯": "…",
    "≈": " about ",
    "≤": " at most ",
    "≥": " at least ",
    "→": ",",
    "№": "No. ",
}
_LETTERS = {
    "ß": "ss",
    "æ": "ae",
    "Æ": "Ae",
    "œ": "oe",
    "Œ": "Oe",
    "ø": "o",
    "Ø": "O",
    "ł": "l",
    "Ł": "L",
    "đ": "d",
    "Đ": "D",
    "ð": "th",
    "Ð": "Th",
    "þ": "th",
    "Þ": "Th",
    "ı": "i",
}


@dataclass
class Folded:
    """``text`` holds plain characters (and REPLACED); ``unknown`` the characters that had none, in order of
    appearance.
    """

    text: str
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def fold_character(character: str) -> str | None:
    """Plain characters for one character ("" when it is silent), or None when there are none."""
    if character in _PLAIN:
        return character
    if character.isspace():
        return " "
    if character in _SAME:
        return _SAME[character]
    if character in _LETTERS:
        return _LETTERS[character]
    if unicodedata.category(character) in ("Mn", "Cf"):  # lone accents, joiners, byte-order mark, soft hyphen
        return ""
    plain = "".join(c for c in unicodedata.normalize("NFKD", character) if not unicodedata.combining(c))
    return plain if plain and all(c in _PLAIN for c in plain) else None


def fold(text: str, on_unknown: OnUnknown) -> Folded:
    """Fold a text character by character. Under ``error`` a TextError names every unknown character with its
    position.
    """
    pieces: list[str] = []
    unknown: dict[str, list[int]] = {}
    accents: dict[str, str] = {}
    for position, character in enumerate(text):
        plain = fold_character(character)
        if plain is None:
            unknown.setdefault(character, []).append(position)
            pieces.append(f" {REPLACED} " if on_unknown is OnUnknown.replace else " ")
            continue
        if character.isalpha() and plain != character:
            accents[character] = plain
        pieces.append(plain)
    notes = [f"read as plain letters: {', '.join(f'{a} as {p}' for a, p in accents.items())}"] if accents else []
    if unknown:
        message = "; ".join(_describe(character, places) for character, places in unknown.items())
        if on_unknown is OnUnknown.error:
            raise TextError(f"characters without a pronunciation in en: {message}")
        notes.append(f"{'skipped' if on_unknown is OnUnknown.skip else 'replaced by UNK'}: {message}")
    return Folded("".join(pieces), list(unknown), notes)


def _describe(character: str, positions: list[int]) -> str:
    shown = ", ".join(str(position) for position in positions[:5]) + (" …" if len(positions) > 5 else "")
    return f"{character!r} (U+{ord(character):04X}) at position {shown}"
