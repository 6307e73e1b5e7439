"""What an evaluation leaves: figures with intervals, one entry per clip, and ``eval.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from lalia.runfolder import write_atomic

AnyRecord = TypeVar("AnyRecord", bound="Record")

SCHEMA = 1
RECORDING, RESYNTHESIS, SPEECH = "recording", "resynthesis", "speech"
CONDITIONS = (RECORDING, RESYNTHESIS, SPEECH)


class Better(Enum):
    lower = "lower"
    higher = "higher"
    one = "one"  # a ratio that is best at 1


@dataclass(frozen=True)
class Figure:
    """One number with its 95 % bootstrap interval over clips. ``low`` and ``high`` are nan where there is no interval."""

    name: str  # dotted: "wer.speech"
    value: float
    low: float
    high: float
    n: int  # clips behind it
    unit: str = ""
    better: Better = Better.lower
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        record = asdict(self)
        record["better"] = self.better.value
        return {key: _finite_or_none(value) for key, value in record.items()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Figure:
        values = dict(record)
        values["better"] = Better(values["better"])
        for key in ("value", "low", "high"):
            values[key] = math.nan if values[key] is None else float(values[key])
        return cls(**values)


class Record:
    """Base of what the evaluations write to ``eval.json``: dataclasses with these two fields, which each declares itself.

    ``schema``, whose default is the one that this version reads, is the last field and stands first in the file.
    """

    figures: list[Figure]
    schema: Any
    #: field that lists something → how one of them is made of its JSON
    entries: ClassVar[Mapping[str, Callable[[dict[str, Any]], Any]]] = {}

    def figure(self, name: str) -> Figure | None:
        return next((figure for figure in self.figures if figure.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        record = asdict(self)  # type: ignore[call-overload]
        record["figures"] = [figure.to_dict() for figure in self.figures]
        return {"schema": record.pop("schema"), **record}

    def save(self, path: str | Path) -> None:
        """Write ``eval.json`` whole or not at all."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls: type[AnyRecord], path: str | Path) -> AnyRecord:
        """Read ``eval.json``; ValueError when it is of another schema."""
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        if record.get("schema") != cls.schema:
            raise ValueError(f"{path}: schema {record.get('schema')!r}, this version reads schema {cls.schema!r}")
        for name, read in ({"figures": Figure.from_dict} | dict(cls.entries)).items():
            record[name] = [read(entry) for entry in record[name]]
        return cls(**record)


@dataclass
class ConditionResult:
    """One clip in one condition. Files are relative to the folder of ``eval.json``; '' when there is none."""

    hypothesis: str = ""
    word_errors: int = 0
    character_errors: int = 0
    seconds: float = 0.0  # of audio
    compute_seconds: float = 0.0  # 0 for the recording
    mel_distance: float | None = None
    cepstral_distortion: float | None = None
    pitch_error: float | None = None  # semitones, median over frames voiced in both
    pitch_correlation: float | None = None
    wave: str = ""
    picture: str = ""
    failure: str = ""  # why the system gave no audio; all words then count as missed


@dataclass
class ClipResult:
    """One row of the corpus in every condition that was measured."""

    id: str
    text: str
    speaker: str
    language: str
    words: int  # in the text, after comparison_form
    characters: int
    conditions: dict[str, ConditionResult] = field(default_factory=dict)
    alignment: str = ""  # picture file

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> ClipResult:
        values = dict(record)
        values["conditions"] = {name: ConditionResult(**value) for name, value in values["conditions"].items()}
        return cls(**values)


@dataclass
class Evaluation(Record):
    """Everything that was measured. ``skipped`` are rows whose recording or text could not be used: id → reason."""

    entries: ClassVar = {"clips": ClipResult.from_dict}

    system: str
    recogniser: str
    figures: list[Figure]
    clips: list[ClipResult]
    skipped: dict[str, str] = field(default_factory=dict)
    label: str = ""  # which checkpoint, e.g. "step 1200"
    machine: dict[str, str] = field(default_factory=dict)
    parameters: int = 0
    sample_rate: int = 0  # of the system's own sound
    seed: int = 0
    corpus_rows: int = 0  # rows there were to choose from
    seconds: float = 0.0  # the evaluation itself took
    schema: int = SCHEMA

    def failures(self, condition: str) -> list[ClipResult]:
        """Clips for which the system gave no audio in this condition."""
        return [c for c in self.clips if condition in c.conditions and c.conditions[condition].failure]


def write_json(path: Path, value: Any) -> None:
    """Strict JSON (no NaN), whole or not at all; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
