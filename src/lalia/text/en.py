"""English words → ARPAbet phones with stress as tones: user lexicon, CMU dictionary, endings, compounds, letters."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from lalia.text import letters, lexicon
from lalia.text.base import PUNCTUATION, REPLACED, UNKNOWN, Analysis, Lexicon, OnUnknown, TextError
from lalia.text.fold import fold
from lalia.text.normalise_en import normalise
from lalia.text.symbols import ENGLISH

_TOKEN = re.compile(rf"(?:[A-Z]\.){{2,}}|'?[A-Za-z]+(?:'[A-Za-z]+)*'?|[{re.escape(''.join(PUNCTUATION))}]|{REPLACED}")
_VOICELESS, _SIBILANT = ("P", "T", "K", "F", "TH"), ("S", "Z", "SH", "ZH", "CH", "JH")
_PREFIXES = {"un": "AH0 N", "re": "R IY0", "non": "N AA2 N", "pre": "P R IY0", "mis": "M IH0 S", "over": "OW2 V ER0"}
_COMPOUND = 4  # shortest part of a compound
_SPELLED = 5  # longest all-capital word without an entry that is spelled out
_PHONES = frozenset(ENGLISH)
#: words that the dictionary lacks, and the everyday forms of the articles
_OWN = {
    "a": "AH0",
    "the": "DH AH0",
    "an": "AH0 N",
    "miz": "M IH1 Z",
    "covid": "K OW1 V IH0 D",
    "emoji": "IH0 M OW1 JH IY0",
    "vlog": "V L AO1 G",
    "webcam": "W EH1 B K AE2 M",
    "lalia": "L AH0 L IY1 AH0",
    "kilohertz": "K IH1 L AH0 HH ER2 T S",
    "gigahertz": "G IH1 G AH0 HH ER2 T S",
    "milliamp": "M IH1 L IY0 AE2 M P",
    "milliamps": "M IH1 L IY0 AE2 M P S",
}
#: written in capitals these are letters, though the dictionary has a word of the same spelling
_NOT_WORDS = frozenset({"US", "AM", "PM", "ID", "TV", "AI", "AC", "UN", "EU", "UK", "IP", "PC", "CD", "DVD"})


def spell(word: str) -> list[str]:
    """Letter names: "FBI" → EH1 F B IY1 AY1. Only the letters count."""
    names = {"a": "EY1", "w": "D AH1 B AH0 L Y UW0"}
    table = lexicon.pronunciations()
    return [phone for letter in word.lower() if letter.isalpha() for phone in names.get(letter, table[letter]).split()]


def _ending_s(stem: list[str]) -> list[str]:
    if stem[-1] in _SIBILANT:
        return [*stem, "IH0", "Z"]
    return [*stem, "S" if stem[-1] in _VOICELESS else "Z"]


def _ending_ed(stem: list[str]) -> list[str]:
    if stem[-1] in ("T", "D"):
        return [*stem, "IH0", "D"]
    return [*stem, "T" if stem[-1] in (*_VOICELESS, "S", "SH", "CH") else "D"]


def _stems(word: str, ending: str) -> list[str]:
    """Dictionary forms that ``word`` may be an inflection of: as it stands, with e, without the doubled consonant, y
    for i.
    """
    stem = word[: -len(ending)]
    if ending == "s":
        return [] if stem.endswith("s") else [stem]
    forms = [stem, stem + "e"]
    if len(stem) > 3 and stem[-1] == stem[-2] and stem[-1] not in "aeiou":
        forms.append(stem[:-1])
    if ending in ("ed", "es") and stem.endswith("i"):
        forms.insert(0, stem[:-1] + "y")
    return [form for form in forms if len(form) > 2]


_ENDINGS: list[tuple[str, Callable[[list[str]], list[str]]]] = [
    ("s", _ending_s),
    ("es", _ending_s),
    ("ed", _ending_ed),
    ("ing", lambda stem: [*stem, "IH0", "NG"]),
    ("ly", lambda stem: [*stem, "L", "IY0"]),
    ("ness", lambda stem: [*stem, "N", "AH0", "S"]),
    ("less", lambda stem: [*stem, "L", "AH0", "S"]),
]


def inflected(word: str) -> list[str] | None:
    """Phones of a regular inflection of a dictionary word, or None."""
    for ending, join in _ENDINGS:
        if word.endswith(ending) and len(word) > len(ending) + 2:
            for form in _stems(word, ending):
                stem = lexicon.lookup(form)
                if stem:
                    return join(stem)
    return None


def prefixed(word: str) -> list[str] | None:
    """Phones of a prefix with a dictionary word or its inflection ("unmuted"), or None."""
    for prefix, phones in _PREFIXES.items():
        rest = word[len(prefix) :]
        stem = (lexicon.lookup(rest) or inflected(rest)) if word.startswith(prefix) and len(rest) >= _COMPOUND else None
        if stem:
            return phones.split() + stem
    return None


def compound(word: str) -> list[str] | None:
    """Phones of two dictionary words written as one ("voicemailbox"), the second with its stress made secondary, or
    None.
    """
    places = range(_COMPOUND, len(word) - _COMPOUND + 1)
    for place in sorted(places, key=lambda at: abs(2 * at - len(word))):
        first, second = lexicon.lookup(word[:place]), lexicon.lookup(word[place:])
        if first and second:
            return first + [phone.replace("1", "2") for phone in second]
    return None


@lru_cache(maxsize=16384)
def _pronounce(word: str, name: bool) -> tuple[tuple[str, ...], bool]:
    """Phones of a lower-case word and whether they had to be guessed from its letters.

    A ``name`` (written with a capital) is not taken apart: on the held-out names of the dictionary the letters alone
    do better.
    """
    if word in _OWN:
        return tuple(_OWN[word].split()), False
    known = lexicon.lookup(word) or inflected(word) or (None if name else prefixed(word) or compound(word))
    if known:
        return tuple(known), False
    if "'" in word:
        stem, _, tail = word.rpartition("'")
        if tail in ("s", ""):
            phones, guessed = _pronounce(stem, name)
            return (tuple(_ending_s(list(phones))) if tail else phones), guessed
        return _pronounce(word.replace("'", ""), name)
    sounded = letters.sound_out(word) if re.search("[aeiouy]", word) else []
    return tuple(sounded or spell(word)), True


def pronounce(word: str) -> tuple[list[str], bool]:
    """Phones with stress digits of a word of letters and apostrophes, and whether no dictionary knows it. Never
    empty.
    """
    phones, guessed = _pronounce(word.lower(), word[:1].isupper())
    return list(phones), guessed


def _spelled_out(word: str, shouting: bool) -> list[str] | None:
    """Phones of an acronym, or None when the word is to be read as a word. ``shouting``: the whole text is in
    capitals.
    """
    if "." in word:
        return spell(word)
    plural = len(word) > 2 and word[-1] == "s" and word[:-1].isupper()
    bare = word[:-1] if plural else word
    if not bare.isupper() or len(bare) < 2 or "'" in bare or shouting:
        return None
    voiceless = not re.search("[AEIOUY]", bare)
    absent = lexicon.lookup(bare.lower()) is None and bare.lower() not in _OWN and len(bare) <= _SPELLED
    if bare in _NOT_WORDS or voiceless or absent:
        return _ending_s(spell(bare)) if plural else spell(bare)
    return None


class _Speller:
    """Phones of the tokens of one text; keeps the words that had to be guessed."""

    def __init__(self, text: str, user: Lexicon | None) -> None:
        self.shouting = not re.search("[a-z]", text)
        self.user = {word.lower(): parse_phones(word, phones) for word, phones in (user or {}).items()}
        self.guessed: dict[str, None] = {}

    def word(self, token: str, starts: bool) -> list[str]:
        own = self.user.get(token.lower())
        if own:
            return own
        if token.lower().endswith("'s") and token[:-2].lower() in self.user:
            return _ending_s(self.user[token[:-2].lower()])
        if token == "A" and not starts and not self.shouting:
            return ["EY1"]
        stem = token[:-2] if token.endswith("'s") else token
        spelled = _spelled_out(stem, self.shouting)
        if spelled:
            return _ending_s(spelled) if stem != token else spelled
        phones, guessed = pronounce(token)
        if guessed:
            self.guessed[token] = None
        return phones


def parse_phones(word: str, phones: str | object) -> list[str]:
    """A lexicon entry as a list of ARPAbet phones with stress digits; TextError names what is not ARPAbet."""
    parts = phones.split() if isinstance(phones, str) else [str(phone) for phone in phones]  # type: ignore[attr-defined]
    wrong = [phone for phone in parts if phone.rstrip("012") not in _PHONES or phone[-1].isdigit() != _is_vowel(phone)]
    if wrong or not parts:
        detail = f"{', '.join(wrong)} is not ARPAbet with stress digits on the vowels" if wrong else "it has no phones"
        raise TextError(f"lexicon entry {word!r}: {detail}")
    if not re.fullmatch("[A-Za-z']+", word):
        raise TextError(f"lexicon entry {word!r}: a word is letters and apostrophes only")
    return parts


def _is_vowel(phone: str) -> bool:
    return phone[0] in "AEIOU"


def read_lexicon(path: str | Path) -> dict[str, list[str]]:
    """A user lexicon: one ``word PH O1 N Z`` a line (any white space), ``#`` begins a comment. TextError names a bad
    line.
    """
    entries = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        word, *phones = line.partition("#")[0].split() or [""]
        if word:
            try:
                entries[word] = parse_phones(word, phones)
            except TextError as error:
                raise TextError(f"{path}:{number}: {error}") from error
    return entries


def _split(normalized: str) -> list[str]:
    """Words and punctuation. A quote that no word owns becomes its own token; a final ``U.S.`` also ends the
    sentence.
    """
    tokens: list[str] = []
    for token in _TOKEN.findall(normalized):
        opened = len(token) > 1 and token[0] == "'" and lexicon.lookup(token.lower()) is None
        core = token[1:] if opened else token
        closed = len(core) > 1 and core[-1] == "'" and lexicon.lookup(core.lower()) is None
        closed = closed and (opened or core[-2] not in "sS")
        tokens += ["'"] * opened + [core[:-1] if closed else core] + ["'"] * closed
    if tokens and "." in tokens[-1][:-1]:
        tokens.append(".")
    return tokens


def analyse_english(text: str, on_unknown: OnUnknown, user: Lexicon | None) -> Analysis:
    """English text → :class:`Analysis`. Phones are ARPAbet without digits; tone 0 = consonant or punctuation, 1 +
    stress = vowel.
    """
    folded = fold(text, on_unknown)
    normalized = normalise(folded.text)
    tokens = _split(normalized)
    speller = _Speller(normalized, user)
    found = Analysis(normalized, [], [], [], tokens, "en", folded.unknown, folded.notes)
    starts = True
    for token in tokens:
        if token == REPLACED:
            stressed = [UNKNOWN]
        elif token in PUNCTUATION:
            stressed = [token]
        else:
            stressed = speller.word(token, starts)
        starts = token in PUNCTUATION or (starts and token == REPLACED)
        found.word2ph.append(len(stressed))
        found.phones += [phone.rstrip("012") for phone in stressed]
        found.tones += [int(phone[-1]) + 1 if phone[-1].isdigit() else 0 for phone in stressed]
    if all(token in PUNCTUATION or token == REPLACED for token in tokens):
        raise TextError(f"nothing speakable in {text[:60]!r}: it has no letter or figure that en can read")
    found.guessed = list(speller.guessed)
    if found.guessed:
        found.notes.append(f"not in the dictionary, pronounced from their letters: {', '.join(found.guessed)}")
    return found
