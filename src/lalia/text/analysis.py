"""The one entry to the language front ends, and a survey of many texts at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from lalia.text.base import Analyser, Analysis, Lexicon, OnUnknown, TextError
from lalia.text.en import analyse_english
from lalia.text.symbols import LANGUAGES


class _English:
    language = "en"

    def __call__(self, text: str, on_unknown: OnUnknown, lexicon: Lexicon | None) -> Analysis:
        return analyse_english(text, on_unknown, lexicon)


#: language → front end. A new language costs one entry; its symbols and tones are already in the symbol table.
ANALYSERS: dict[str, Analyser] = {"en": _English()}


def analyse(
    text: str, language: str, on_unknown: OnUnknown = OnUnknown.error, lexicon: Lexicon | None = None
) -> Analysis:
    """Text → phones, tones and phones per word.

    ``lexicon`` (word → phones) goes before the dictionary. Raises TextError with the reason: empty text, nothing
    speakable, characters without a pronunciation (under ``OnUnknown.error``), a language that is not installed, a bad
    lexicon entry.
    """
    analyser = ANALYSERS.get(language)
    if analyser is None:
        kind = "is not in this release" if language in LANGUAGES else "is unknown"
        raise TextError(f"language {language!r} {kind}; installed languages: {', '.join(ANALYSERS)}")
    if not text.strip():
        raise TextError("the text is empty")
    return analyser(text, on_unknown, lexicon)


@dataclass
class Survey:
    """What a corpus of texts asks of a front end: how many words, which texts fail and why, what is unknown or
    guessed.
    """

    texts: int = 0
    words: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)
    guessed: Counter[str] = field(default_factory=Counter)
    phones: Counter[str] = field(default_factory=Counter)


def survey(
    texts: Iterable[str], language: str, on_unknown: OnUnknown = OnUnknown.error, lexicon: Lexicon | None = None
) -> Survey:
    """Analyse every text; one that fails is named by its place in ``failures`` and does not stop the others."""
    result = Survey()
    for index, text in enumerate(texts):
        result.texts += 1
        try:
            found = analyse(text, language, on_unknown, lexicon)
        except TextError as error:
            result.failures.append((index, str(error)))
            continue
        result.words += sum(any(c.isalpha() for c in word) for word in found.words)
        result.unknown.update(found.unknown)
        result.guessed.update(found.guessed)
        result.phones.update(found.phones)
    return result
