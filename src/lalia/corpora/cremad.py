"""CREMA-D (Cao et al. 2014): 91 actors say 12 fixed sentences in six emotions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lalia.corpora._common import PrepareResult, Reason, Rejected, audio_files, select
from lalia.corpora._emotion import CategoricalOptions, counted, place
from lalia.corpora.folds import Protocol, make_folds
from lalia.data import Row

NAME = re.compile(r"^(\d{4})_([A-Z]{3})_([A-Z]{3})_([A-Z]{1,2})$")
SENTENCES = {
    "IEO": "It's eleven o'clock.", "TIE": "That is exactly what happened.", "IOM": "I'm on my way to the meeting.",
    "IWW": "I wonder what this is about.", "TAI": "The airplane is almost full.", "MTI": "Maybe tomorrow it will be cold.",
    "IWL": "I would like a new alarm clock.", "ITH": "I think I have a doctor's appointment.", "DFA": "Don't forget a jacket.",
    "ITS": "I think I've seen this before.", "TSI": "The surface is slick.", "WSI": "We'll stop in a couple of minutes.",
}  # fmt: skip
EMOTIONS = {"ANG": "angry", "DIS": "disgust", "FEA": "fearful", "HAP": "happy", "NEU": "neutral", "SAD": "sad"}
INTENSITIES = {"LO": "low", "MD": "medium", "HI": "high", "XX": "unspecified", "X": "unspecified"}  # one file ends in _X


@dataclass
class CremadOptions(CategoricalOptions):
    """``inputs``: the folder with AudioWAV."""


def prepare_cremad(options: CremadOptions) -> PrepareResult:
    """Clips with ``extra.emotion`` and ``extra.intensity``, in five folds by actor.

    Every sentence is said by every actor, so scripted sentences cross in every fold; the audit counts them.
    """
    found = [item for root in options.folders("cremad") for item in _rows(root)]
    result = select(found, options)
    result.facts["emotions"] = counted(result.rows, "emotion")
    result.rows = place(result.rows, result, options.circumplex)
    if result.rows:
        result.folds = make_folds(result.rows, Protocol.speakers, options.allow_leaks)
    return result


def _rows(root: Path) -> Iterator[Row | Rejected]:
    folder = root / "AudioWAV" if (root / "AudioWAV").is_dir() else root
    for path in audio_files(folder):
        match = NAME.match(path.stem)
        if not match or match[2] not in SENTENCES or match[3] not in EMOTIONS or match[4] not in INTENSITIES:
            yield Rejected(path.stem, str(path), Reason.broken, "no name such as 1001_DFA_ANG_XX.wav")
            continue
        intensity = INTENSITIES[match[4]]
        extra: dict[str, Any] = {"scripted": True, "emotion": EMOTIONS[match[3]], "intensity": intensity}
        yield Row(path.stem, str(path), text=SENTENCES[match[2]], speaker=f"cremad-{match[1]}", language="en", extra=extra)
