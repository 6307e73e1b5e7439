"""Text front end: normalisation, phones, tones and phones per word; symbols; sentences. English in this release.

Importing is light: the dictionary, the letter-to-sound model and num2words load when the first text needs them.
"""

from __future__ import annotations

from lalia.text.analysis import ANALYSERS, Survey, analyse, survey
from lalia.text.base import PUNCTUATION, UNKNOWN, Analyser, Analysis, Lexicon, OnUnknown, TextError
from lalia.text.compare import comparison_form
from lalia.text.en import read_lexicon
from lalia.text.sentences import split_sentences
from lalia.text.symbols import LANGUAGES, PAD, SymbolTable, blank_word2ph, intersperse

__all__ = [
    "ANALYSERS",
    "LANGUAGES",
    "PAD",
    "PUNCTUATION",
    "UNKNOWN",
    "Analyser",
    "Analysis",
    "Lexicon",
    "OnUnknown",
    "Survey",
    "SymbolTable",
    "TextError",
    "analyse",
    "blank_word2ph",
    "comparison_form",
    "intersperse",
    "read_lexicon",
    "split_sentences",
    "survey",
]
