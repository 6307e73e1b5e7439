"""What every source shares: options, reasons of rejection, the examination of one clip, and progress.

A source yields a :class:`~lalia.data.Row` per clip that it found, with the path of the original audio, or a
:class:`Rejected` for what it could not even make a row of. :func:`select` examines each and keeps the usable ones.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from lalia import audio
from lalia.data import Row
from lalia.features import file_name

if TYPE_CHECKING:
    from lalia.corpora.folds import Folds

log = logging.getLogger(__name__)

AUDIO_SUFFIXES = (
    ".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".g722", ".webm", ".m4a", ".mp4", ".aac", ".aiff", ".aif", ".au",
)  # fmt: skip
SILENCE_PEAK = 1e-3  # -60 dBFS: a clip whose loudest sample is below holds no speech

# Units of text that take about the time of one Latin letter to say.
DIGIT_UNITS = 4  # "7" is said as "seven"
WIDE_UNITS = 3  # one Chinese character or kana is a syllable
NAME_UNITS = 4  # a lone letter is said as its name, and every clip has pauses: allowed for against the lower limit
WIDE = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af]")

Item = TypeVar("Item")


class CorpusError(ValueError):
    """A corpus that cannot be prepared: wrong options, nothing usable, or too much of it unusable."""


class CorpusUnavailable(CorpusError):
    """A source that this machine cannot reach (no apt, no network, no espeak). Another source may work."""


class Reason(Enum):
    """Why a clip is left out, in the words of ``rejected.jsonl``."""

    empty = "empty file"
    non_speech = "non-speech"
    too_short = "too short"
    too_long = "too long"
    rate = "implausible characters per second"
    silent = "silent"
    unreadable = "unreadable"
    no_transcript = "no transcript"
    missing_audio = "missing audio"
    duplicate = "duplicate id"
    broken = "broken line"


@dataclass
class Rejected:
    """One clip that was left out. ``path`` is its audio, or ``file:line`` where no audio is known."""

    id: str
    path: str
    reason: Reason
    details: str = ""

    def to_dict(self) -> dict[str, str]:
        """Plain record for ``rejected.jsonl``."""
        return {"id": self.id, "path": self.path, "reason": self.reason.value, "details": self.details}


class Unusable(ValueError):
    """Raised while one clip is examined; becomes a :class:`Rejected`."""

    def __init__(self, reason: Reason, details: str = "") -> None:
        super().__init__(details or reason.value)
        self.reason = reason
        self.details = details


@dataclass
class Options:
    """What every source understands.

    Audio is rewritten as flac under ``out/audio`` when ``sample_rate`` or ``trim`` ask for it, or the source makes its
    own audio; otherwise rows point at the files where they are.
    """

    needs_text: ClassVar[bool] = True  # a clip without a plausible text is rejected
    has_folds: ClassVar[bool] = False  # the source makes its own parts, and a share of clips for each means nothing
    keeps_silent: ClassVar[bool] = False  # a silent clip is kept, marked in ``extra`` and counted

    out: Path
    inputs: list[str] = field(default_factory=list)  # folders, manifests or lists, as the source needs
    sample_rate: int | None = None  # None keeps the rate of the source
    min_seconds: float = 0.5
    max_seconds: float = 20.0
    min_rate: float = 3.0  # letters per second, after an allowance of four letters
    max_rate: float = 25.0
    trim: bool | None = None  # cut silence at both ends, keeping 50 ms; None = as the source needs it
    speaker: str = ""  # for sources that do not name the speaker
    language: str = ""  # for sources that do not name the language
    limit: int = 0  # look at so many clips at most; 0 = all
    progress: bool = True

    def __post_init__(self) -> None:
        self.out = Path(self.out)
        if not 0 <= self.min_seconds < self.max_seconds:
            raise CorpusError(f"need 0 <= min_seconds < max_seconds, got {self.min_seconds} and {self.max_seconds}")
        if not 0 <= self.min_rate < self.max_rate:
            raise CorpusError(f"need 0 <= min_rate < max_rate, got {self.min_rate} and {self.max_rate}")
        if self.sample_rate is not None and self.sample_rate < 1000:
            raise CorpusError(f"sample_rate must be at least 1000 Hz, got {self.sample_rate}")

    def folders(self, source: str) -> list[Path]:
        """``inputs`` as existing folders; CorpusError otherwise."""
        return [p for p in self._given(source, "folder") if _require(p.is_dir(), f"{p}: no such folder")]

    def files(self, source: str) -> list[Path]:
        """``inputs`` as existing files; CorpusError otherwise."""
        return [p for p in self._given(source, "file") if _require(p.is_file(), f"{p}: no such file")]

    def _given(self, source: str, kind: str) -> list[Path]:
        _require(bool(self.inputs), f"`prepare {source}` needs at least one {kind}")
        return [Path(p).expanduser() for p in self.inputs]


@dataclass
class PrepareResult:
    """What a source found: rows that can be used, and everything else with its reason.

    ``official`` maps row ids to the split that the corpus itself prescribes; ``folds``, where there are some, are the splits of
    a cross-validation or of the corpus, already audited, and replace the split by hash. ``split_keys`` gives rows that belong
    together (pieces of a document) one text to be hashed instead of their ids. ``facts`` goes into the report as it is.
    """

    rows: list[Row]
    rejected: list[Rejected]
    official: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    folds: Folds | None = None
    split_keys: dict[str, str] = field(default_factory=dict)


def select(found: Iterable[Row | Rejected], options: Options, *, rewrite: bool = False, trim: bool = False) -> PrepareResult:
    """Examine every clip found; keep the usable ones. ``rewrite`` copies the audio even if nothing asks for a change.

    ``trim`` is the source's own wish, used where the options leave it open.
    """
    trim = trim if options.trim is None else options.trim
    rewrite = rewrite or trim or options.sample_rate is not None
    items = list(found)[: options.limit or None]
    rows: list[Row] = []
    rejected: list[Rejected] = []
    seen: set[str] = set()
    for item in progress(items, "examining clips", options):
        if isinstance(item, Rejected):
            rejected.append(item)
            continue
        try:
            rows.append(_examine(item, seen, options, trim, rewrite))
        except Unusable as unusable:
            rejected.append(Rejected(item.id, item.audio, unusable.reason, unusable.details))
    result = PrepareResult(rows, rejected)
    silent = [row.id for row in rows if row.extra.get("silent")]
    if silent:
        result.facts["silent"] = silent
        result.notes.append(f"{len(silent)} silent clips are kept, the first: {silent[0]} (extra.silent; listed in report.json)")
    return result


def _examine(row: Row, seen: set[str], options: Options, trim: bool, rewrite: bool) -> Row:
    """The row with its exact duration and final audio, or Unusable."""
    if row.id in seen:
        raise Unusable(Reason.duplicate)
    seen.add(row.id)
    text = " ".join(row.text.split())
    units = text_units(text)
    if not units and options.needs_text:
        raise Unusable(Reason.no_transcript, f"text is {row.text!r}" if row.text else "")
    wave, rate = _load(row)
    wave = audio.trim_silence(wave, rate) if trim else wave
    seconds = len(wave) / rate
    silent = _judge(wave, seconds, units, options)
    row = replace(row, text=text, duration=seconds, extra={**row.extra, "silent": True} if silent else row.extra)
    if not rewrite:
        return row
    rate_out = options.sample_rate or rate
    wave = audio.resample(wave, rate, rate_out)
    wave = wave / max(1.0, float(np.abs(wave).max()))  # a full-scale clip overshoots when it is resampled
    target = options.out / "audio" / f"{file_name(row.id)}.flac"
    audio.write(target, wave, rate_out)
    return replace(row, audio=str(target), start=0.0, duration=len(wave) / rate_out)


def _load(row: Row) -> tuple[np.ndarray, int]:
    path = Path(row.audio)
    if not row.audio or not path.is_file():
        raise Unusable(Reason.missing_audio, "" if row.audio else "the row names no audio")
    if path.stat().st_size == 0:
        raise Unusable(Reason.empty)
    try:
        return audio.read(path, start=row.start, duration=row.duration)
    except audio.AudioError as error:
        raise Unusable(Reason.unreadable, str(error)) from error


def _judge(wave: np.ndarray, seconds: float, units: int, options: Options) -> bool:
    """Whether the clip is silent and kept all the same; Unusable where it cannot be used."""
    if seconds < options.min_seconds:
        raise Unusable(Reason.too_short, f"{seconds:.3f} s < {options.min_seconds:g} s")
    if seconds > options.max_seconds:
        raise Unusable(Reason.too_long, f"{seconds:.3f} s > {options.max_seconds:g} s")
    silent = float(np.abs(wave).max()) < SILENCE_PEAK
    if silent and not options.keeps_silent:
        raise Unusable(Reason.silent)
    if not options.needs_text:
        return silent
    if units / seconds > options.max_rate or (units + NAME_UNITS) / seconds < options.min_rate:
        limits = f"{options.min_rate:g}…{options.max_rate:g}"
        raise Unusable(Reason.rate, f"{units} letters in {seconds:.2f} s are {units / seconds:.1f} a second ({limits})")
    return silent


def share_position(identifier: str) -> float:
    """A number in 0…1 from a hash of an id: the same on every machine and in every corpus."""
    digest = hashlib.blake2b(identifier.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def text_units(text: str) -> int:
    """The length of ``text`` in letters to be said: a digit counts as four, a CJK character as three, signs as none."""
    units = 0
    for character in text:
        if character.isdigit():
            units += DIGIT_UNITS
        elif WIDE.match(character):
            units += WIDE_UNITS
        elif character.isalpha():
            units += 1
    return units


def path_id(path: Path, root: Path) -> str:
    """An id from a path under ``root``: its parts without the suffix, joined by ``-``."""
    return "-".join(path.relative_to(root).with_suffix("").parts)


def audio_files(root: Path) -> list[Path]:
    """Every audio file under ``root`` by its suffix, sorted; hidden folders and files are left out."""
    files = (p for p in root.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES and p.is_file())
    return sorted(p for p in files if not any(part.startswith(".") for part in p.relative_to(root).parts))


def lines(path: Path) -> Iterator[tuple[int, str | None]]:
    """Numbered lines of a text file but the blank ones; None for one that is not UTF-8. A byte-order mark is cut."""
    for number, raw in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if not raw.strip():
            continue
        try:
            yield number, raw.decode("utf-8")
        except UnicodeDecodeError:
            yield number, None


def broken(path: Path, number: int, details: str) -> Rejected:
    """The rejection of one line of a list or manifest."""
    return Rejected("", f"{path}:{number}", Reason.broken, details)


def progress(items: Sequence[Item], description: str, options: Options) -> Iterable[Item]:
    """``items`` under a progress bar on stderr."""
    return track(items, description, console=Console(stderr=True), disable=not options.progress)


def _require(condition: bool, message: str) -> bool:
    if not condition:
        raise CorpusError(message)
    return True
