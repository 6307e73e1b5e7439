"""What emotion corpora share: options, labels on a scale, true time order, and categories placed on the circumplex."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from lalia.corpora._common import Options, PrepareResult
from lalia.data import Row

DIMENSIONS = ("valence", "arousal", "dominance")
#: Approximate places of categories on the valence-arousal plane in 1…5: our own round numbers after the figure in Russell (1980),
#: "A circumplex model of affect". No listener gave them.
CIRCUMPLEX = {
    "neutral": (3.0, 3.0), "calm": (3.5, 2.0), "happy": (4.5, 4.0), "sad": (1.5, 2.0), "angry": (1.5, 4.5), "fearful": (1.5, 4.0),
    "disgust": (1.5, 3.5), "surprised": (3.5, 4.5),
}  # fmt: skip
CIRCUMPLEX_NOTE = (
    "valence and arousal are NOT ratings: categories were mapped to approximate points of Russell's circumplex "
    "(extra.derived_labels); figures on them are not comparable with rated corpora"
)
NO_LABELS_NOTE = "this corpus has categories only (extra.emotion); --circumplex gives rows approximate, derived valence and arousal"


@dataclass
class EmotionOptions(Options):
    """Rows need no text, may be silent and may be long. ``allow_leaks`` writes folds in which a speaker crosses."""

    needs_text: ClassVar[bool] = False
    has_folds: ClassVar[bool] = True
    keeps_silent: ClassVar[bool] = True

    min_seconds: float = 0.1
    max_seconds: float = 3600.0
    allow_leaks: bool = False


@dataclass
class CategoricalOptions(EmotionOptions):
    """``circumplex``: give rows valence and arousal by :data:`CIRCUMPLEX`."""

    circumplex: bool = False


class Scale:
    """Labels of one corpus: outside ``low … high`` clipped, what is no number left out; both counted and listed."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high
        self.clipped: list[str] = []
        self.missing: list[str] = []

    def labels(self, row: str, values: Mapping[str, Any]) -> dict[str, float]:
        """The usable labels of ``row``; a key whose value is None was never there and is not counted."""
        found = {}
        for name, value in values.items():
            if value is None:
                continue
            number = _finite(value)
            if number is None:
                self.missing.append(f"{row}: {name} is {value!r}")
                continue
            found[name] = min(max(number, self.low), self.high)
            if found[name] != number:
                self.clipped.append(f"{row}: {name} {number:g} → {found[name]:g}")
        return found

    def report(self, result: PrepareResult) -> None:
        """Notes with the counts, facts with every case."""
        if self.clipped:
            limits = f"{self.low:g}…{self.high:g}"
            result.notes.append(f"{len(self.clipped)} labels lay outside {limits} and were clipped, the first: {self.clipped[0]}")
        if self.missing:
            first = self.missing[0]
            result.notes.append(f"{len(self.missing)} labels are no numbers; the turns stay without them, the first: {first}")
        result.facts.update({"clipped_labels": self.clipped, "unusable_labels": self.missing})


def number_turns(rows: Sequence[Row]) -> list[Row]:
    """``turn`` 0, 1, 2 … in each dialogue by ``extra.time`` over all speakers; rows come back in that order.

    Rows without a time follow those that have one, by the last number in their ids.
    """
    dialogues: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        dialogues[row.dialogue].append(row)
    ordered = (sorted(turns, key=_place_in_time) for _, turns in sorted(dialogues.items()))
    return [replace(row, turn=turn) for turns in ordered for turn, row in enumerate(turns)]


def place(rows: Sequence[Row], result: PrepareResult, circumplex: bool) -> list[Row]:
    """Rows with derived labels where they are asked for; notes say which."""
    if not circumplex:
        result.notes.append(NO_LABELS_NOTE)
        return list(rows)
    result.notes.append(CIRCUMPLEX_NOTE)
    result.facts["circumplex"] = CIRCUMPLEX
    return [_placed(row) for row in rows]


def note_text(result: PrepareResult, what: str, names: Sequence[str]) -> None:
    """A counted note, with the names in the facts. Nothing where there are none."""
    if names:
        result.notes.append(f"{len(names)} {what}, the first: {names[0]}")
        result.facts[what] = list(names)


def counted(rows: Sequence[Row], key: str) -> dict[str, int]:
    """How often each value of ``extra[key]`` occurs."""
    return dict(Counter(str(row.extra[key]) for row in rows if key in row.extra).most_common())


def _place_in_time(row: Row) -> tuple[bool, float, str]:
    numbers = re.findall(r"\d+", row.id)
    return "time" not in row.extra, row.extra.get("time", float(numbers[-1]) if numbers else 0.0), row.id


def _placed(row: Row) -> Row:
    valence, arousal = CIRCUMPLEX[row.extra["emotion"]]
    return replace(row, labels={"valence": valence, "arousal": arousal}, extra={**row.extra, "derived_labels": True})


def _finite(value: Any) -> float | None:
    try:
        number = float(str(value).strip().replace(",", "."))
    except ValueError:
        return None
    return number if math.isfinite(number) else None
