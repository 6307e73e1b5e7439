"""The symbols, tones and languages that a text encoder embeds, and their fixed numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lalia.text.base import PUNCTUATION, UNKNOWN, TextError

PAD = "_"

#: ARPAbet without stress digits
_ENGLISH = "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"
#: pinyin initials (y and w included), then finals; "i" after z c s is "ii", after zh ch sh r "iii"; ü is "v"
_CHINESE = (
    "b p m f d t n l g k h j q x zh ch sh r z c s y w "
    "a o e ai ei ao ou an en ang eng er ong i ia ie iao iu ian in iang ing iong u ua uo uai ui uan un uang ueng "
    "v ve van vn ii iii io ê"
)
#: kana as phonemes; cl = sokuon, N = moraic nasal, capital vowels = voiceless
_JAPANESE = "a i u e o I U k ky kw s sh t ts ch ty n ny h hy f fy m my y r ry w g gy gw z j d dy b by p py v N cl"

ENGLISH = _ENGLISH.split()
CHINESE = _CHINESE.split()
#: marked "ja:" because pinyin and ARPAbet use the same letters
JAPANESE = ["ja:" + phone for phone in _JAPANESE.split()]

#: language → (id, tones, symbols). Ids, and the order of the tones in the shared tone table, never change.
LANGUAGES: dict[str, tuple[int, int, list[str]]] = {
    "zh": (0, 6, CHINESE),
    "ja": (1, 2, JAPANESE),
    "en": (2, 4, ENGLISH),
}
#: symbols are laid out in this order, so that a table with more languages begins with the table that has fewer
_LAYOUT = ("en", "zh", "ja")


class SymbolTable:
    """Symbols ↔ ids. Id 0 is padding, 1 is UNK, then punctuation, then the phones of each language (en, zh, ja)."""

    def __init__(self, symbols: Sequence[str], languages: Sequence[str]) -> None:
        self.symbols = list(symbols)
        self.languages = list(languages)
        self._ids = {symbol: index for index, symbol in enumerate(self.symbols)}
        if len(self._ids) != len(self.symbols):
            raise TextError("a symbol table holds each symbol once")
        if self.symbols[:2] != [PAD, UNKNOWN]:
            raise TextError(f"a symbol table begins with {PAD!r} and {UNKNOWN!r}, this one with {self.symbols[:2]}")

    @classmethod
    def from_languages(cls, languages: Iterable[str]) -> SymbolTable:
        """The table of these languages, whatever their order; TextError names a language that is not known."""
        chosen = set(languages)
        for name in sorted(chosen):
            _language(name)
        ordered = [name for name in _LAYOUT if name in chosen]
        phones = [symbol for name in ordered for symbol in LANGUAGES[name][2]]
        return cls([PAD, UNKNOWN, *PUNCTUATION, *phones], ordered)

    def __len__(self) -> int:
        return len(self.symbols)

    def __contains__(self, symbol: object) -> bool:
        return symbol in self._ids

    def encode(self, phones: Sequence[str]) -> list[int]:
        """Ids of the phones; TextError names every symbol that this table lacks."""
        missing = sorted({phone for phone in phones if phone not in self._ids})
        if missing:
            known = ", ".join(self.languages)
            raise TextError(f"symbols that this table ({known}) lacks: {', '.join(map(repr, missing))}")
        return [self._ids[phone] for phone in phones]

    def decode(self, ids: Sequence[int]) -> list[str]:
        """Symbols of the ids."""
        return [self.symbols[index] for index in ids]

    def encode_tones(self, tones: Sequence[int], language: str) -> list[int]:
        """Tones that count from 0 within the language → ids of the shared tone table."""
        offset, count = self.tone_offset(language), _language(language)[1]
        wrong = [tone for tone in tones if not 0 <= tone < count]
        if wrong:
            raise TextError(f"{language} has tones 0 to {count - 1}, got {wrong[0]}")
        return [tone + offset for tone in tones]

    @property
    def language_ids(self) -> dict[str, int]:
        """Language → id, of all languages there will be; the ids do not depend on the languages of this table."""
        return {name: entry[0] for name, entry in LANGUAGES.items()}

    @property
    def language_count(self) -> int:
        return len(LANGUAGES)

    @property
    def tone_count(self) -> int:
        """Size of the shared tone table."""
        return sum(entry[1] for entry in LANGUAGES.values())

    def tone_offset(self, language: str) -> int:
        """Where the tones of the language begin in the shared tone table."""
        own = _language(language)[0]
        return sum(tones for index, tones, _ in LANGUAGES.values() if index < own)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form for the run folder's ``tables.json``."""
        return {"symbols": list(self.symbols), "languages": list(self.languages)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> SymbolTable:
        for key in ("symbols", "languages"):
            if key not in stored:
                raise TextError(f"a stored symbol table needs {key!r}; it has {', '.join(stored) or 'nothing'}")
        return cls(stored["symbols"], stored["languages"])


def _language(name: str) -> tuple[int, int, list[str]]:
    if name not in LANGUAGES:
        raise TextError(f"unknown language {name!r}; known: {', '.join(LANGUAGES)}")
    return LANGUAGES[name]


def intersperse(ids: Sequence[int], item: int = 0) -> list[int]:
    """A blank between and around the ids: n → 2n + 1 (VITS, arXiv 2106.06103, §3.2)."""
    spread = [item] * (2 * len(ids) + 1)
    spread[1::2] = ids
    return spread


def blank_word2ph(word2ph: Sequence[int]) -> list[int]:
    """Phones per word after :func:`intersperse`: each doubled, one more in the first. A new list; the argument stays
    as it is.
    """
    doubled = [2 * count for count in word2ph]
    if doubled:
        doubled[0] += 1
    return doubled
