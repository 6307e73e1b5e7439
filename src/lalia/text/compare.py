"""One form for reference and hypothesis, so that a word error rate counts words and not spelling."""

from __future__ import annotations

import re

from lalia.text.base import OnUnknown
from lalia.text.fold import fold
from lalia.text.normalise_en import normalise

#: spellings of one spoken word
_SAME = {
    "ok": "okay",
    "o.k": "okay",
    "alright": "all right",
    "mister": "mr",
    "missus": "mrs",
    "doctor": "dr",
    "saint": "st",
    "e-mail": "email",
    "voice-mail": "voicemail",
    "colour": "color",
    "favourite": "favorite",
    "centre": "center",
    "grey": "gray",
    "cancelled": "canceled",
    "dialling": "dialing",
    "dialled": "dialed",
    "programme": "program",
    "metre": "meter",
    "metres": "meters",
    "kilometre": "kilometer",
    "kilometres": "kilometers",
    "honour": "honor",
    "recognise": "recognize",
    "organise": "organize",
    "til": "till",
    "'til": "till",
    "'cause": "because",
    "'em": "them",
}


def comparison_form(text: str, language: str) -> str:
    """Lower-case words between single spaces: figures as words, no punctuation, contractions as they are.

    In languages without spaces (zh, ja) the characters stand apart, so that the same rate counts characters.
    """
    if language in ("zh", "ja"):
        return " ".join(re.findall(r"[^\W_]", text.lower()))
    spoken = normalise(fold(text, OnUnknown.skip).text).lower()
    spoken = re.sub(r"(?<=\b[a-z])\.(?=[a-z]\b)", "", spoken)
    words = re.findall(r"'?[a-z]+(?:'[a-z]+)*", spoken)
    return " ".join(_SAME.get(word, _SAME.get(word.strip("'"), word.strip("'"))) for word in words)
