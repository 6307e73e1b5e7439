"""Splits for emotion corpora, audited for leaks: by session, by speaker, as the corpus prescribes, or as the seed had it.

Which part a row is in depends on the ids, sessions and speakers alone, never on the order of the rows or the machine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from lalia.corpora._common import CorpusError, share_position
from lalia.data import Row, write_json, write_manifest
from lalia.leaks import Leaks, audit

PARTS = ("train", "valid", "test")
RANDOM_FOLDS = 5
SPEAKER_FOLDS = 5
RANDOM_WARNING = (
    "random5 LEAKS: the same speakers, dialogues and sessions are in training and test, and validation is the test part. It "
    "reproduces an old split for comparison only; its figures are not comparable with speaker-independent ones"
)
SCRIPTED_ADVICE = "leave them out with --improvised-only, or report figures with and without them"


class Protocol(Enum):
    """How rows become train, valid and test."""

    loso = "loso"  # leave one session out; validation is the next session
    random5 = "random5"  # 80/20 over turns; speakers leak
    official = "official"  # as the corpus, or the process that made it, prescribes
    speakers = "speakers"  # groups of speakers; validation is the next group


@dataclass
class Fold:
    """Indices of rows. ``more``: further test parts of the corpus (``test2``), with the same training."""

    number: int
    train: list[int]
    valid: list[int]
    test: list[int]
    more: dict[str, list[int]] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, list[int]]:
        """Every part by name."""
        return {"train": self.train, "valid": self.valid, "test": self.test, **self.more}


@dataclass
class Folds:
    """Audited folds: ``audits[i]["train-test"]`` are the leaks between two parts of ``folds[i]``."""

    protocol: Protocol
    folds: list[Fold]
    audits: list[dict[str, Leaks]]
    allow_leaks: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def refused(self) -> bool:
        """Something crosses and nobody asked for that."""
        return self.leaking and not self.allow_leaks and self.protocol is not Protocol.random5

    @property
    def leaking(self) -> bool:
        """A speaker, session, dialogue or row crosses in any fold."""
        return any(leaks.fatal for audits in self.audits for leaks in audits.values())

    def describe(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The content of ``folds.json``."""
        described = []
        for fold, audits in zip(self.folds, self.audits, strict=True):
            parts = {name: _about([rows[i] for i in indices]) for name, indices in fold.parts.items()}
            record = {pair: leaks.to_dict() for pair, leaks in audits.items()}
            described.append({"fold": fold.number, "parts": parts, "audit": record, "text": _text(fold, audits)})
        return {"protocol": self.protocol.value, "leaking": self.leaking, "notes": self.verdict(), "folds": described}

    def verdict(self) -> list[str]:
        """What is to be said aloud about all folds together."""
        lines = list(self.notes)
        if self.protocol is Protocol.random5:
            lines.insert(0, RANDOM_WARNING)
        elif self.leaking:
            lines += [_text(fold, audits) for fold, audits in zip(self.folds, self.audits, strict=True)]
        else:
            lines.append(f"audit of {len(self.folds)} {self.protocol.value} fold(s): no speaker, session or dialogue crosses")
        unknown = max(leaks.unknown_speakers for audits in self.audits for leaks in audits.values())
        if unknown:
            lines.append(f"up to {unknown} rows of a part have no known speaker: nothing is proved about them")
        crossing = [leaks for audits in self.audits if (leaks := audits.get("train-test")) and leaks.sentences]
        if crossing:
            counts = ", ".join(f"{len(x.sentences)} (in {x.sentence_rows} of {x.test_rows} test rows)" for x in crossing)
            lines.append(f"scripted sentences that are in training and test: {counts}; {SCRIPTED_ADVICE}")
        return lines


def audited(rows: Sequence[Row], folds: Sequence[Fold], protocol: Protocol, allow_leaks: bool = False) -> Folds:
    """The folds with an audit of every pair of parts. A validation part that *is* the test part is compared once."""
    audits = []
    for fold in folds:
        held = {name: indices for name, indices in fold.parts.items() if name != "train"}
        pairs = [("train", name) for name in held] + [("valid", name) for name in held if name != "valid"]
        wanted = [(a, b) for a, b in pairs if not (a == "valid" and fold.parts[b] == fold.valid)]
        audits.append({f"{a}-{b}": audit(*([rows[i] for i in fold.parts[n]] for n in (a, b))) for a, b in wanted})
    return Folds(protocol, list(folds), audits, allow_leaks)


def make_folds(rows: Sequence[Row], protocol: Protocol, allow_leaks: bool = False) -> Folds:
    """Folds by ``protocol`` (loso, random5 or speakers) with their audit.

    Raises:
        CorpusError: fewer than three sessions or speakers, or a row that names none.
    """
    if protocol is Protocol.loso:
        return audited(rows, rotate(_grouped(rows, _session, "session")), protocol, allow_leaks)
    if protocol is Protocol.speakers:
        return audited(rows, rotate(_speaker_groups(rows)), protocol, allow_leaks)
    if protocol is Protocol.random5:
        labelled = [i for i, row in enumerate(rows) if row.labels]
        result = audited(rows, _random(rows, labelled), protocol, allow_leaks)
        if len(labelled) < len(rows):
            others = len(rows) - len(labelled)
            result.notes.append(f"random5 is over the {len(labelled)} labelled turns; {others} without labels are in no part")
        return result
    raise CorpusError(f"{protocol.value} folds come from the corpus itself; this one has none")


def official_fold(rows: Sequence[Row], part_of: Mapping[str, str], allow_leaks: bool = False) -> Folds:
    """The one split that a corpus prescribes: row id → train, valid, test or another name of a test part."""
    parts: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        parts[part_of[row.id]].append(index)
    train, valid, test = (parts.pop(name, []) for name in PARTS)
    fold = Fold(1, train, valid, test, dict(sorted(parts.items())))
    return audited(rows, [fold], Protocol.official, allow_leaks)


def rotate(groups: Mapping[str, Sequence[int]]) -> list[Fold]:
    """One fold a group: the group is the test part, the next one validates, the rest trains."""
    names = list(groups)
    if len(names) < 3:
        found = ", ".join(names) or "none"
        raise CorpusError(f"folds need three sessions or speakers (one each to train, validate and test), found {found}")
    folds = []
    for number, name in enumerate(names):
        following = names[(number + 1) % len(names)]
        rest = sorted(i for other in names if other not in (name, following) for i in groups[other])
        folds.append(Fold(number + 1, rest, sorted(groups[following]), sorted(groups[name])))
    return folds


def write_folds(out: Path, rows: Sequence[Row], folds: Folds) -> None:
    """``folds.json``, ``fold1/train.jsonl`` …, and fold 1 again at the top of ``out``.

    Raises:
        CorpusError: something crosses; ``folds.json`` names it, and no manifest is written.
    """
    write_json(out / "folds.json", folds.describe(rows))
    if folds.refused:
        worst = next(_text(f, a) for f, a in zip(folds.folds, folds.audits, strict=True) if any(x.fatal for x in a.values()))
        raise CorpusError(f"the folds leak, so nothing is written (`--set allow_leaks=true` writes them all the same)\n{worst}")
    for fold in folds.folds:
        folders = [out / f"fold{fold.number}", *([out] if fold.number == 1 else [])]
        for name, indices in fold.parts.items():
            for folder in folders:
                write_manifest(folder / f"{name}.jsonl", (rows[i] for i in indices))


def _random(rows: Sequence[Row], labelled: Sequence[int]) -> list[Fold]:
    """Fifths in the order of a hash of the ids; the first four fifths of n turns are ⌊.8 n⌋, as the seed cut them."""
    order = sorted(labelled, key=lambda i: (share_position(f"random5:{rows[i].id}"), rows[i].id))
    count = len(order)
    edges = [count - (RANDOM_FOLDS - i) * count // RANDOM_FOLDS for i in range(RANDOM_FOLDS + 1)]
    folds = []
    for number, (first, last) in enumerate(zip(edges[:-1], edges[1:], strict=True), start=1):
        held = sorted(order[first:last])
        folds.append(Fold(number, sorted(order[:first] + order[last:]), held, held))
    return folds


def _grouped(rows: Sequence[Row], name: Callable[[Row], str], kind: str) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        if not name(row):
            raise CorpusError(f"row {row.id!r} names no {kind}, so it cannot be put into a fold by {kind}")
        groups[name(row)].append(index)
    return dict(sorted(groups.items()))


def _session(row: Row) -> str:
    return str(row.extra.get("session") or "")


def _speaker_groups(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Five groups of speakers (fewer when there are fewer people), genders spread evenly."""
    people = _grouped(rows, lambda row: row.speaker, "speaker")
    gender = {row.speaker: str(row.extra.get("gender", "")) for row in rows}
    order = sorted(people, key=lambda name: (gender[name], share_position(f"speakers:{name}")))
    count = min(SPEAKER_FOLDS, len(order))
    return {f"group{i + 1}": [index for name in order[i::count] for index in people[name]] for i in range(count)}


def _about(rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "rows": len(rows),
        "labelled": sum(bool(row.labels) for row in rows),
        "hours": round(sum(row.duration for row in rows) / 3600, 4),
        "sessions": sorted({_session(row) for row in rows} - {""}),
        "speakers": sorted({row.speaker for row in rows} - {""}),
    }


def _text(fold: Fold, audits: Mapping[str, Leaks]) -> str:
    return "\n".join(f"fold {fold.number}, {pair}: {line}" for pair, x in audits.items() for line in x.text().splitlines())
