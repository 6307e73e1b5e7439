"""A system that says known texts of known recordings, told apart by their lengths, and a small corpus for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from factories import write_wav

from lalia.data import BadRow, Row
from lalia.sections import RunConfig
from lalia.system import Clock, System

RATE = 16000


class Scribe(System):
    """``said``: clip length in samples → what it says; an exception is raised instead. Silence is what has no sound in it."""

    def __init__(self, said: Mapping[int, str | Exception], silence: str | Exception = "") -> None:
        super().__init__(RunConfig(system="scribe"), {})
        self.layer = torch.nn.Linear(3, 2)
        self.said, self.silence = dict(said), silence
        self.calls: list[list[int]] = []  # lengths of each call
        self.silences: list[int] = []

    def transcribe(self, waves: Sequence[np.ndarray], language: str = "") -> list[str]:
        self.calls.append([len(wave) for wave in waves])
        self.silences += [len(wave) for wave in waves if not wave.any()]
        answers = [self.said[len(wave)] if wave.any() else self.silence for wave in waves]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return [str(answer) for answer in answers]


class Aligner(Scribe):
    """One that compares audio and text too; it cannot prepare a row of the speaker ``nobody``."""

    measured: list[str]
    failure = ""

    def prepare(self, row: Row, clock: Clock) -> Any:
        if row.speaker == "nobody":
            raise BadRow("too long: 99 soft tokens")
        return row

    def measure(self, rows: Sequence[Row], folder: str | Path) -> dict[str, float]:
        if self.failure:
            raise ValueError(self.failure)
        self.measured = [row.id for row in rows]
        Path(folder, "alignment.png").write_bytes(b"\x89PNG")
        return {"cka": 0.75, "cka_shuffled": 0.25, "retrieval@1": 0.5, "retrieval@1_chance": 0.1, "pairs": float(len(rows))}


def length(number: int) -> int:
    """Samples of clip ``number``: all different, and not in the order of the corpus."""
    return 3200 + 160 * ((number * 7) % 23)


def make_rows(folder: Path, texts: Sequence[str]) -> list[Row]:
    """A clip for each text; ids ``c00``, ``c01`` …"""
    rows = []
    for number, text in enumerate(texts):
        path = folder / f"c{number:02d}.wav"
        write_wav(path, length(number) / RATE, RATE, seed=number)
        rows.append(Row(path.stem, str(path), text=text, language="en"))
    return rows
