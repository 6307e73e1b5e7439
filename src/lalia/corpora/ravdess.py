"""RAVDESS (Livingstone and Russo 2018): 24 actors say 2 fixed statements in eight emotions. Speech alone; songs are left out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lalia.corpora._common import PrepareResult, Reason, Rejected, audio_files, select
from lalia.corpora._emotion import CategoricalOptions, counted, note_text, place
from lalia.corpora.folds import Protocol, make_folds
from lalia.data import Row

NAME = re.compile(r"^(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)$")
SPEECH, SONG = "01", "02"
EMOTIONS = {
    "01": "neutral", "02": "calm", "03": "happy", "04": "sad", "05": "angry", "06": "fearful", "07": "disgust", "08": "surprised",
}  # fmt: skip
INTENSITIES = {"01": "normal", "02": "strong"}
STATEMENTS = {"01": "Kids are talking by the door.", "02": "Dogs are sitting by the door."}


@dataclass
class RavdessOptions(CategoricalOptions):
    """``inputs``: the folder with Actor_01 … Actor_24, of the speech archive or of both."""


def prepare_ravdess(options: RavdessOptions) -> PrepareResult:
    """Spoken clips with ``extra.emotion`` and ``extra.intensity``, in five folds by actor; both statements cross in every fold."""
    songs: list[str] = []
    found = [item for root in options.folders("ravdess") for item in _rows(root, songs)]
    result = select(found, options)
    note_text(result, "songs are left out", songs)
    result.facts["emotions"] = counted(result.rows, "emotion")
    result.rows = place(result.rows, result, options.circumplex)
    if result.rows:
        result.folds = make_folds(result.rows, Protocol.speakers, options.allow_leaks)
    return result


def _rows(root: Path, songs: list[str]) -> Iterator[Row | Rejected]:
    """The name of a file is modality-channel-emotion-intensity-statement-repetition-actor; odd actors are men."""
    for path in audio_files(root):
        match = NAME.match(path.stem)
        known = match and match[3] in EMOTIONS and match[4] in INTENSITIES and match[5] in STATEMENTS
        if not match or not known or match[2] not in (SPEECH, SONG):
            yield Rejected(path.stem, str(path), Reason.broken, "no name such as 03-01-06-01-02-01-12.wav")
        elif match[2] == SONG:
            songs.append(path.stem)
        else:
            extra: dict[str, Any] = {
                "scripted": True,
                "emotion": EMOTIONS[match[3]],
                "intensity": INTENSITIES[match[4]],
                "repetition": int(match[6]),
                "gender": "M" if int(match[7]) % 2 else "F",
            }
            speaker = f"ravdess-{match[7]}"
            yield Row(path.stem, str(path), text=STATEMENTS[match[5]], speaker=speaker, language="en", extra=extra)
