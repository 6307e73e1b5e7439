"""Does anything of the test part occur in training? Speakers, sessions, dialogues, rows and scripted sentences.

A model that has heard a speaker, or the other half of a conversation, scores higher than it would with people it has never met;
so a figure from such a split cannot be compared with others (Pepino et al., "Fusion approaches for emotion recognition from speech
using acoustic and text-based features", ICASSP 2020, for scripted sentences in IEMOCAP).
"""

from __future__ import annotations

import math
import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lalia.data import Row

SHOWN = 8  # names in a line of the text
TOLERANCE = 0.05  # seconds by which neighbouring turns of one file may overlap


@dataclass
class Leaks:
    """What is in both parts, sorted. ``sentences`` are normalised texts of rows with ``extra.scripted``; ``recordings`` are ids of
    test rows that hear the same stretch of a file as a training row with another id.

    ``unknown_speakers`` and ``unknown_in_training`` count rows whose speaker is not known: about them nothing can be proved.
    ``sentence_rows`` counts the test rows that say one of ``sentences``.
    """

    speakers: list[str] = field(default_factory=list)
    sessions: list[str] = field(default_factory=list)
    dialogues: list[str] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    recordings: list[str] = field(default_factory=list)
    unknown_speakers: int = 0
    unknown_in_training: int = 0
    sentence_rows: int = 0
    test_rows: int = 0

    @property
    def fatal(self) -> bool:
        """A speaker, session, dialogue, row or recording is in both parts: figures on this test part say too much."""
        return bool(self.speakers or self.sessions or self.dialogues or self.ids or self.recordings)

    def text(self) -> str:
        """Several lines that name what crosses, or say that nothing does."""
        kinds = {"speakers": self.speakers, "sessions": self.sessions, "dialogues": self.dialogues, "rows": self.ids}
        kinds["rows whose recording has another id in training"] = self.recordings
        lines = [f"{len(names)} {kind} are in both parts: {_shown(names)}" for kind, names in kinds.items() if names]
        if self.speakers:
            lines.append("equal names count as one person: give two people of one name different ones, such as corpus-session-name")
        if not self.fatal:
            lines.append("no known speaker, session, dialogue or row is in both parts")
        if self.unknown_speakers:
            unknown = f"{self.unknown_speakers} of {self.test_rows} test rows"
            lines.append(f"{unknown} have no known speaker: nothing is proved about them")
        if self.unknown_in_training:
            lines.append(f"{self.unknown_in_training} training rows have no known speaker: test speakers may be among them")
        if self.sentences:
            heard = f"{len(self.sentences)} scripted sentences, said in {self.sentence_rows} of {self.test_rows} test rows"
            lines.append(f"{heard}, are in training too: {_shown(self.sentences)}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain record with every name, ``fatal`` and ``text``."""
        return {**asdict(self), "fatal": self.fatal, "text": self.text()}


def audit(train: Iterable[Row], test: Iterable[Row]) -> Leaks:
    """What ``train`` and ``test`` (corpora, or rows) have in common.

    Sessions are ``extra.session``; empty names are compared with nothing. Names that are equal but for capitals and spaces are
    taken for one person. Files are the same by their real path, so that links and other manifests hide nothing; a copy is not seen.
    """
    trained, tested = list(train), list(test)
    sentences = _crossing(trained, tested, sentence)
    crossing = set(sentences)
    return Leaks(
        speakers=_alike(trained, tested, lambda row: row.speaker),
        sessions=_alike(trained, tested, lambda row: str(row.extra.get("session") or "")),
        dialogues=_alike(trained, tested, lambda row: row.dialogue),
        sentences=sentences,
        ids=_crossing(trained, tested, lambda row: row.id),
        recordings=_heard_twice(trained, tested),
        unknown_speakers=sum(not row.speaker.strip() for row in tested),
        unknown_in_training=sum(not row.speaker.strip() for row in trained),
        sentence_rows=sum(sentence(row) in crossing for row in tested),
        test_rows=len(tested),
    )


def clean_rows(train: Iterable[Row], test: Iterable[Row]) -> list[int]:
    """Indices of the ``test`` rows whose scripted sentence is not in ``train``."""
    heard = {sentence(row) for row in train} - {""}
    return [index for index, row in enumerate(test) if sentence(row) not in heard]


def sentence(row: Row) -> str:
    """The text of a scripted row in small letters and digits alone; '' for other rows."""
    if not row.extra.get("scripted"):
        return ""
    return " ".join("".join(c if c.isalnum() else " " for c in row.text.lower().replace("'", "")).split())


def _crossing(train: Sequence[Row], test: Sequence[Row], name: Callable[[Row], str]) -> list[str]:
    return sorted({name(row) for row in train} & {name(row) for row in test} - {""})


def _alike(train: Sequence[Row], test: Sequence[Row], name: Callable[[Row], str]) -> list[str]:
    """Names of ``test`` that are in ``train`` too, whatever their capitals, spaces around them and Unicode form."""
    trained = {_plain(name(row)) for row in train} - {""}
    return sorted({name(row) for row in test if _plain(name(row)) in trained})


def _plain(name: str) -> str:
    return unicodedata.normalize("NFKC", name).strip().casefold()


def _heard_twice(train: Sequence[Row], test: Sequence[Row]) -> list[str]:
    """Ids of test rows that overlap in time with a training row of another id and the same file."""
    folders: dict[str, str] = {}
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
    ids = {row.id for row in train}
    for row in train:
        if row.audio:
            spans[_file(row.audio, folders)].append(_span(row))
    found = []
    for row in test:
        if row.audio and row.id not in ids:
            start, end = _span(row)
            others = spans.get(_file(row.audio, folders), ())
            if any(start < last - TOLERANCE and first < end - TOLERANCE for first, last in others):
                found.append(row.id)
    return sorted(found)


def _span(row: Row) -> tuple[float, float]:
    return row.start, row.start + row.duration if row.duration else math.inf


def _file(path: str, folders: dict[str, str]) -> str:
    """The real path of a file. ``folders`` keeps those of folders: there are few, and each costs several system calls."""
    if os.path.islink(path):
        return os.path.realpath(path)
    folder, name = os.path.split(path)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    return os.path.join(folders[folder], name)


def _shown(names: Sequence[str]) -> str:
    quoted = ", ".join(repr(name) for name in names[:SHOWN])
    return f"{quoted} and {len(names) - SHOWN} more" if len(names) > SHOWN else quoted
