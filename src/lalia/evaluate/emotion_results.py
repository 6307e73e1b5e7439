"""What an evaluation of emotion leaves: figures with intervals, one entry per turn, and ``eval.json``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from lalia.evaluate.results import Figure, Record

SCHEMA = "emotion-1"
CALIBRATION = "eval/calibration.png"
NAMES = {"ccc": "CCC", "pearson": "Pearson r", "rmse": "RMSE", "ccc_gain": "CCC gained", "ccc_gap": "CCC gap"}
SUFFIXES = {
    "all": "all turns",
    "labels": "true labels fed back",
    **{f"k{k}": f"after {k} labelled turns" for k in range(1, 100)},
    "k0": "before any labelled turn",
    "k1": "after 1 labelled turn",
}


@dataclass
class TurnResult:
    """One turn. ``truth`` holds the dimensions that are labelled, in label units. ``clean``: its sentence was not trained on."""

    id: str
    dialogue: str
    turn: int
    speaker: str
    predicted: dict[str, float]
    truth: dict[str, float]
    clean: bool = True


@dataclass
class EmotionEvaluation(Record):
    """Everything that was measured. ``mark``, where there is one, belongs to every figure."""

    entries: ClassVar = {"turns": lambda turn: TurnResult(**turn)}

    system: str
    dimensions: list[str]
    figures: list[Figure]
    turns: list[TurnResult]
    mark: str = ""
    leaks: dict[str, Any] = field(default_factory=dict)  # train, valid → what is in both
    audit: dict[str, str] = field(default_factory=dict)  # the same in words
    notes: list[str] = field(default_factory=list)
    few_shot: dict[str, Any] = field(default_factory=dict)  # shots, after, turns, speakers, dialogues; {} when not measured
    skipped: dict[str, str] = field(default_factory=dict)  # row id → reason
    label: str = ""  # which checkpoint, e.g. "step 1200"
    machine: dict[str, str] = field(default_factory=dict)
    parameters: int = 0
    seed: int = 0
    corpus_rows: int = 0
    seconds: float = 0.0
    schema: str = SCHEMA


def figure_name(figure: Figure) -> str:
    """``CCC · valence · all turns`` of ``ccc.valence.all``."""
    kind, dimension, *suffix = figure.name.split(".")
    return " · ".join([NAMES.get(kind, kind), dimension, *(SUFFIXES.get(part, part) for part in suffix)])
