"""A system that recognises emotion without hearing: known arithmetic on the labels, so that every figure has an exact answer."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from lalia.data import BadRow, Row
from lalia.sections import DataConfig, RunConfig
from lalia.system import Emotion, System

DIMENSIONS = ["valence", "arousal"]
MIDDLE = 3.0


class FakeConfig(RunConfig):
    """A run configuration with a ``data`` section."""

    data: DataConfig = DataConfig()


class Fake(System):
    """Says ``gain · (label − 3) + 3 + bias(speaker) + noise(id)``; k labelled turns take away the bias of a speaker, and true
    labels as feedback take away the noise."""

    Config = FakeConfig
    dimensions = DIMENSIONS

    def __init__(self, config: Any = None, tables: Mapping[str, Any] | None = None, **options: float) -> None:
        super().__init__(config or RunConfig(system="fake"), tables or {})
        self.gain, self.bias, self.noise = options.get("gain", 0.8), options.get("bias", 0.0), options.get("noise", 0.0)
        self.autoregressive = bool(options.get("autoregressive", 0))
        self.layer = torch.nn.Linear(3, 2)
        self.calls: list[dict[str, Any]] = []

    def recognize_emotion(
        self, dialogues: Sequence[Sequence[Row]], *, calibrate: int = 0, feedback: str = "own"
    ) -> list[list[Emotion]]:
        self.calls.append({"calibrate": calibrate, "feedback": feedback, "ids": [[row.id for row in rows] for rows in dialogues]})
        return [self._dialogue(rows, calibrate, feedback) for rows in dialogues]

    def _dialogue(self, rows: Sequence[Row], calibrate: int, feedback: str) -> list[Emotion]:
        seen: dict[str, int] = defaultdict(int)
        said = []
        for row in rows:
            if row.extra.get("broken"):
                raise BadRow(f"row {row.id!r}: cannot be heard")
            used = bool(row.labels) and seen[row.speaker] < calibrate
            left = self.bias / (1 + seen[row.speaker]) * (1 if person(row.speaker) else -1)
            noise = 0.0 if feedback == "labels" else self.noise
            values = {
                name: MIDDLE + self.gain * (row.labels.get(name, MIDDLE) - MIDDLE) + left + noise * chance(row.id + name)
                for name in DIMENSIONS
            }
            seen[row.speaker] += used
            said.append(Emotion(row.id, row.speaker, values, used))
        return said

    def listen(self) -> FakeSession:
        return FakeSession()


class FakeSession:
    """Counts its turns: the state is carried. Valence is the number of turns so far, arousal the sum of the labels heard before."""

    def __init__(self) -> None:
        self.turns, self.heard = 0, 0.0

    def turn(
        self, wave: np.ndarray, sample_rate: int, speaker: str = "", id: str = "", labels: Mapping[str, float] | None = None
    ) -> Emotion:
        self.turns += 1
        said = Emotion(id, speaker, {"valence": float(self.turns), "arousal": self.heard}, bool(labels))
        self.heard += sum((labels or {}).values())
        return said


def chance(text: str) -> float:
    """A number in [-1, 1] that is a function of ``text``."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") / 2**31 - 1


def person(name: str) -> int:
    return hashlib.blake2b(name.encode(), digest_size=1).digest()[0] % 2


def make_rows(folder: Path, part: str, dialogues: int = 4, turns: int = 8, session: str = "", **extra: Any) -> list[Row]:
    """Dialogues of two speakers each with random labels in 1 … 5. One short file a part is the recording of every turn."""
    path = folder / f"{part}.wav"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * np.sin(np.arange(1600) / 5), 16000)
    rows = []
    for number in range(dialogues):
        for turn in range(turns):
            name = f"{part}-d{number}"
            labels = {d: MIDDLE + 2 * chance(f"label {name} {turn} {d}") for d in DIMENSIONS}
            about = {"session": session or part, "scripted": False, **extra}
            rows.append(
                Row(f"{name}-{turn:02d}", str(path), duration=0.1, text=f"Words {name} {turn}.", speaker=f"{part}-{'ab'[turn % 2]}",
                    labels=labels, dialogue=name, turn=turn, extra=about)
            )  # fmt: skip
    return rows
