"""Long text → pieces that a model can speak, cut where a reader would pause."""

from __future__ import annotations

import re

from lalia.text.base import TextError

#: words whose full stop does not end a sentence
_WRITTEN = (
    "mr mrs ms dr prof st jr sr gen col capt lt sgt rev hon gov sen rep vs approx dept fig vol no nos e.g i.e cf al "
    "jan feb mar apr jun jul aug sep sept oct nov dec mt ft"
)
_ABBREVIATIONS = frozenset(_WRITTEN.split())
_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s)|[。！？]+[”’」』）]*\s*|\n\s*\n")
_BREATH = re.compile(r"[,;:、，；：](?=\s)|\s[–—-](?=\s)|[、，；：]")


def split_sentences(text: str, language: str = "en", max_chars: int = 200) -> list[str]:
    """Pieces of at most ``max_chars`` characters; put together they are the text, but for white space at the cuts.

    Cuts at the ends of sentences (not after abbreviations, initials or inside decimals), then at commas, then at
    spaces, and inside a word only when it alone is longer. Blank text gives []. TextError when ``max_chars`` is below
    1.
    """
    if max_chars < 1:
        raise TextError(f"max_chars must be at least 1, got {max_chars}")
    pieces = []
    start = 0
    for match in _END.finditer(text):
        if match.end() > start and _ends(text, match, language):
            pieces.append(text[start : match.end()])
            start = match.end()
    pieces.append(text[start:])
    return [part for piece in pieces if piece.strip() for part in _shorten(piece.strip(), max_chars)]


def _ends(text: str, match: re.Match[str], language: str) -> bool:
    """Whether a full stop ends a sentence: not after an abbreviation or an initial, nor before a lower-case word."""
    if match[0][0] != "." or match[0].startswith("..") or language != "en":
        return True
    word = re.search(r"[\w.]*$", text[max(0, match.start() - 20) : match.start()])
    before = word[0].lower() if word else ""
    following = text[match.end() : match.end() + 3].lstrip()[:1]
    if following.islower() and (before in ("etc", "inc", "ltd", "co", "a.m", "p.m") or "." in before):
        return False
    return before not in _ABBREVIATIONS and not (len(before) == 1 and before.isalpha() and before != "i")


def _shorten(piece: str, max_chars: int) -> list[str]:
    parts = []
    while len(piece) > max_chars:
        cut = _cut(piece, max_chars)
        parts.append(piece[:cut].rstrip())
        piece = piece[cut:].lstrip()
    return [*parts, piece] if piece else parts


def _cut(piece: str, max_chars: int) -> int:
    """Where to cut: the last comma in the second half of the room, else the last space, else the limit."""
    window = piece[: max_chars + 1]
    breaths = [match.end() for match in _BREATH.finditer(window) if max_chars // 3 < match.end() <= max_chars]
    if breaths:
        return breaths[-1]
    spaces = [match.start() for match in re.finditer(r"\s", window) if match.start() > 0]
    return spaces[-1] if spaces else max_chars
