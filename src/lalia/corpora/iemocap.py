"""IEMOCAP (Busso et al. 2008) from its own tree, or from a label table: ten actors, five sessions, dyadic dialogues.

The turns of both speakers are put into true time order by their start; the speaker is that of the *turn*, because the letter in a
dialogue's name says only who wore the markers. Labels are [valence, arousal, dominance] in 1…5, means over the annotators.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lalia.corpora._common import CorpusError, PrepareResult, Reason, Rejected, broken, lines, select
from lalia.corpora._emotion import DIMENSIONS, EmotionOptions, Scale, note_text, number_turns
from lalia.corpora._labels import read_table
from lalia.corpora.folds import Protocol, make_folds
from lalia.data import Row

TURN = re.compile(r"^(Ses\d+[FM])_((?:impro|script)\w*?)_([FM])(\w*)$")
EVALUATED = re.compile(r"^\[\s*(\d*\.?\d+)\s*-\s*\d*\.?\d+\s*\]\s+(\S+)\s+(\S+)\s+\[([^\]]*)\]")
SPOKEN = re.compile(r"^(Ses\S+)\s+\[\s*(\d*\.?\d+)\s*-\s*\d*\.?\d+\s*\]:?\s*(.*)$")
SESSION_FOLDER = re.compile(r"^Session\d+$")
COLUMNS = {  # field → titles in a label table
    "file": ("file", "filename", "file_name", "name", "utterance", "utterance_id", "utt", "turn_name", "id", "wav", "path"),
    "valence": ("valence", "v", "val"),
    "arousal": ("arousal", "a", "aro", "act", "activation"),
    "dominance": ("dominance", "d", "dom"),
    "time": ("start", "start_time", "time", "begin"),
    "emotion": ("emotion", "emo", "label", "category"),
}


@dataclass
class IemocapOptions(EmotionOptions):
    """``inputs``: IEMOCAP_full_release. ``labels``: a label table instead of the tree's own ratings."""

    protocol: str = Protocol.loso.value
    improvised_only: bool = False
    labels: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = (Protocol.loso.value, Protocol.random5.value)
        if self.protocol not in allowed:
            raise CorpusError(f"protocols of iemocap are {' and '.join(allowed)}, got {self.protocol!r}")


@dataclass
class Heard:
    """What the tree or a table says about one turn. ``values``: dimension → what was written there."""

    id: str
    dialogue: str
    time: float | None  # seconds from the start of the dialogue
    speaker: str
    session: str
    text: str = ""
    emotion: str = ""
    values: dict[str, str] = field(default_factory=dict)
    path: str = ""


def prepare_iemocap(options: IemocapOptions) -> PrepareResult:
    """Turns in time order with labels, folds by session (or the seed's random fifths), and their audit.

    A turn without ratings stays as context without labels. Turns whose wav is missing are rejected, the rest of the dialogue stays.
    """
    scale = Scale(1.0, 5.0)
    rejected: list[Rejected] = []
    heard: list[Heard] = []
    for root in options.folders("iemocap"):
        sessions = _sessions(root)
        if not sessions and not options.labels:
            raise CorpusError(f"{root} holds no folder Session1 … Session5 of IEMOCAP_full_release{_hint(root)}")
        tree = _tree(sessions, rejected)
        heard.extend(_relabelled(tree, root, options.labels, rejected) if options.labels else tree)
    scripted = [turn.id for turn in heard if "_script" in turn.dialogue]
    kept = [turn for turn in heard if not (options.improvised_only and "_script" in turn.dialogue)]
    result = select([*rejected, *(_row(turn, scale) for turn in kept)], options)
    result.rows = number_turns(result.rows)
    scale.report(result)
    unordered = [row.id for row in result.rows if "time" not in row.extra]
    note_text(result, "turns have no start time, so that their place in the dialogue is guessed from their names", unordered)
    context = [row.id for row in result.rows if not row.labels]
    note_text(result, "turns have no labels and serve as context", context)
    if options.improvised_only:
        note_text(result, "turns of scripted dialogues are left out as asked", scripted)
    if result.rows:
        result.folds = make_folds(result.rows, Protocol(options.protocol), options.allow_leaks)
    return result


def _row(turn: Heard, scale: Scale) -> Row:
    extra: dict[str, Any] = {"session": turn.session, "scripted": "_script" in turn.dialogue, "gender": turn.speaker[-1]}
    if turn.time is not None:
        extra["time"] = turn.time
    if turn.emotion:
        extra["emotion"] = turn.emotion
    labels = scale.labels(turn.id, turn.values)
    return Row(
        turn.id, turn.path, text=turn.text, speaker=turn.speaker, language="en", labels=labels, dialogue=turn.dialogue, extra=extra
    )


# --- the tree ---
def _sessions(root: Path) -> list[Path]:
    return [path for path in sorted(root.iterdir()) if path.is_dir() and SESSION_FOLDER.match(path.name)]


def _hint(root: Path) -> str:
    inner = sorted(root.glob("*/Session1"))
    return f"; did you mean {inner[0].parent}?" if inner else ""


def _tree(sessions: list[Path], rejected: list[Rejected]) -> list[Heard]:
    """Every turn that EmoEvaluation rates, and those of the transcriptions that have a wav."""
    turns: dict[str, Heard] = {}
    for session in sessions:
        found: dict[str, Heard] = {}
        for path in _texts(session / "dialog" / "EmoEvaluation"):
            _add(found, _evaluated(path, rejected))
        for path in _texts(session / "dialog" / "transcriptions"):
            for turn in _transcribed(path, rejected):
                known = found.get(turn.id)
                if known:
                    known.text = turn.text
                elif _wav(session, turn).is_file():
                    found[turn.id] = turn  # said, never rated: context of the turns after it
        for turn in found.values():
            turn.path = str(_wav(session, turn))
        rejected.extend(_strangers(session, found))
        _add(turns, found.values())
    return list(turns.values())


def _texts(folder: Path) -> list[Path]:
    """Text files but the ``._`` twins that macOS leaves behind."""
    return sorted(path for path in folder.glob("*.txt") if not path.name.startswith("."))


def _add(turns: dict[str, Heard], found: Iterable[Heard]) -> None:
    for turn in found:
        turns.setdefault(turn.id, turn)


def _wav(session: Path, turn: Heard) -> Path:
    return session / "sentences" / "wav" / turn.dialogue / f"{turn.id}.wav"


def _strangers(session: Path, turns: dict[str, Heard]) -> Iterator[Rejected]:
    """Wavs that nothing lists: their place in the dialogue is not known."""
    for path in sorted((session / "sentences" / "wav").glob("*/*.wav")):
        if not path.name.startswith(".") and path.stem not in turns:
            yield Rejected(path.stem, str(path), Reason.no_transcript, "in neither EmoEvaluation nor transcriptions: no time")


def _evaluated(path: Path, rejected: list[Rejected]) -> Iterator[Heard]:
    """The turns of one EmoEvaluation file; lines of single annotators (C-E1, A-M2 …) begin otherwise."""
    for number, line in lines(path):
        if line is None or (line.startswith("[") and not EVALUATED.match(line)):
            rejected.append(broken(path, number, "not UTF-8" if line is None else f"no rated turn: {line[:80]}"))
            continue
        match = EVALUATED.match(line)
        turn = _named(match[2], match[1]) if match else None
        if match and turn is None:
            rejected.append(broken(path, number, f"{match[2]!r} is no turn such as Ses01F_impro01_F000"))
        if match and turn:
            turn.emotion = match[3]
            values = [value.strip() for value in match[4].split(",")]
            turn.values = dict(zip(DIMENSIONS, values + ["nan"] * (len(DIMENSIONS) - len(values)), strict=False))
            yield turn


def _transcribed(path: Path, rejected: list[Rejected]) -> Iterator[Heard]:
    """``Ses01F_impro01_F000 [006.2901-008.2357]: Excuse me.``; other lines (directions, marks of noise) are no turns."""
    for number, line in lines(path):
        if line is None:
            rejected.append(broken(path, number, "not UTF-8"))
            continue
        match = SPOKEN.match(line)
        turn = _named(match[1], match[2]) if match else None
        if match and turn:
            turn.text = match[3].strip()
            yield turn


def _named(identifier: str, start: str = "") -> Heard | None:
    """What the name of a turn tells: Ses01F_impro01_M003 is said by Ses01M in the dialogue Ses01F_impro01."""
    match = TURN.match(identifier)
    if not match:
        return None
    session, time = match[1][:-1], round(float(start), 4) if start else None
    return Heard(identifier, f"{match[1]}_{match[2]}", time, session + match[3], session)


# --- a label table ---
def _relabelled(tree: list[Heard], root: Path, name: str, rejected: list[Rejected]) -> list[Heard]:
    """The turns of a label table, with times and texts of the tree where it has them. Turns that the table lacks are context."""
    path = next((p for p in (Path(name).expanduser(), root / name) if p.is_file()), None)
    if path is None:
        raise CorpusError(f"no label table {name}, here or in {root}")
    turns = {turn.id: replace(turn, values={}, emotion="") for turn in tree}
    wavs = {p.stem: p for p in root.rglob("*.wav") if not p.name.startswith(".")}
    seen: set[str] = set()
    for number, cells in read_table(path, COLUMNS, ("file", "valence", "arousal"), rejected):
        identifier = Path(cells["file"].replace("\\", "/")).name.removesuffix(".wav")
        turn = turns.get(identifier) or _named(identifier)
        if turn is None or identifier in seen:
            why = "is in the table twice" if turn else "is no turn of IEMOCAP such as Ses01F_impro01_F000"
            rejected.append(broken(path, number, f"{identifier!r} {why}"))
            continue
        seen.add(identifier)
        turn.path = turn.path or str(wavs.get(identifier, root / f"{identifier}.wav"))
        turn.time = _seconds(cells.get("time", "")) if turn.time is None else turn.time
        turn.values = {name: cells[name] for name in DIMENSIONS if name in cells}
        turn.emotion = cells.get("emotion", "")
        turns[identifier] = turn
    return list(turns.values())


def _seconds(text: str) -> float | None:
    """A start in seconds; speakers, sessions and dialogues are told by the turn's name, which no table can get wrong."""
    try:
        return float(text)
    except ValueError:
        return None
