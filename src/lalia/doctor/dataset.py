"""``doctor data``: the fate of every clip, as training would decide it, and what the corpus looks like."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from lalia import audio
from lalia.batching import bucket_counts, excluded, padding_waste, plan_epoch
from lalia.data import BadRow, Corpus, Row, write_json
from lalia.doctor.report import Report
from lalia.loader import dataset_report, limits, measure, seconds_per_unit
from lalia.sections import DataConfig, RunConfig
from lalia.system import Clock, System, system_class

log = logging.getLogger(__name__)

CLIPPED = 0.999  # amplitude from which a sample counts as clipped
CLIPPED_SHARE = 1e-3
SILENT_DB = -50.0  # RMS of a 20 ms frame, against full scale
SILENT_SHARE = 0.5
OUTLIER = 3.5  # robust z-score of log characters per second
FEWEST = 20  # clips below which no outlier can be told


@dataclass
class Bucket:
    above: float
    up_to: float
    clips: int


@dataclass
class DataReport(Report):
    """``rejected`` and ``noticed`` name rows; every other row is used and nothing about it stood out.

    ``lengths_in``: unit of the buckets. ``unseen_phones``: phones of the validation texts that no training text has.
    """

    rows: int = 0
    usable: int = 0
    decoded: bool = True
    hours: float = 0.0
    batches: int = 0
    padding_waste: float = 0.0
    lengths_in: str = "seconds"
    max_bad_fraction: float = 0.0
    hours_by_speaker: dict[str, float] = field(default_factory=dict)
    hours_by_language: dict[str, float] = field(default_factory=dict)
    buckets: list[Bucket] = field(default_factory=list)
    text_characters: dict[str, float] = field(default_factory=dict)
    characters_per_second: dict[str, float] = field(default_factory=dict)
    unseen_phones: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    rejected: list[dict[str, str]] = field(default_factory=list)
    noticed: list[dict[str, str]] = field(default_factory=list)


@dataclass
class _Findings:
    """What one pass over the rows gathers; ``reasons`` by row position."""

    seconds: np.ndarray
    lengths: np.ndarray
    reasons: dict[int, str] = field(default_factory=dict)
    noticed: list[tuple[str, str]] = field(default_factory=list)


def doctor_data(
    paths: Sequence[str | Path],
    config: RunConfig | None = None,
    decode: bool = True,
    valid: Sequence[str | Path] = (),
    output: str | Path | None = None,
) -> DataReport:
    """Examine training manifests (and ``valid`` ones for their phones); ``output`` receives the report as JSON.

    With ``config`` the system it names decides, by the ``reject`` and ``prepare`` of training. ``decode`` False trusts
    the headers. The exit status is 1 above ``max_bad_fraction``. ManifestError when no line of a manifest is usable.
    """
    settings: DataConfig = config["data"] if config is not None else DataConfig()
    corpus = Corpus.read(paths, max_bad_fraction=1.0)
    system = build(config, corpus) if config is not None else None
    found = _examine(corpus, settings, system, decode)
    for index, reason in excluded(found.lengths, settings).items():
        found.reasons.setdefault(index, reason)
    keep = np.array([i for i in range(len(corpus)) if i not in found.reasons], dtype=np.int64)
    kept = corpus.with_durations(found.seconds).subset(keep)
    rejected = [*corpus.rejected, *((corpus[i].id, found.reasons[i]) for i in sorted(found.reasons))]
    unit = "units of the system" if system is not None else "seconds"
    report = DataReport(decoded=decode, lengths_in=unit, max_bad_fraction=settings.max_bad_fraction)
    for name, value in dataset_report(kept, rejected).items():
        setattr(report, name, value)
    _judge(report)
    _texts(report, kept, found)
    _batches(report, kept, found.lengths[keep], settings)
    _phones(report, kept, Corpus.read(valid, 1.0) if valid else None, config)
    report.noticed = [{"row": row, "notice": notice} for row, notice in found.noticed]
    if output is not None:
        write_json(output, report.to_dict())
    return report


def build(config: RunConfig, corpus: Corpus) -> System:
    """The system of a configuration with tables from ``corpus``, as a new run would build it."""
    cls = system_class(config.system)
    return cls(config, cls.make_tables(config, corpus))


def _examine(corpus: Corpus, settings: DataConfig, system: System | None, decode: bool) -> _Findings:
    found = _Findings(corpus.durations().copy(), np.zeros(len(corpus)))
    for index, row in enumerate(track(corpus, "examining", total=len(corpus), transient=True)):
        reason = measure(row) or limits(row, settings) or (system.reject(row) if system is not None else "")
        found.seconds[index] = row.duration
        if not reason:
            found.lengths[index] = system.length(row) if system is not None else row.duration
            if decode:
                reason = _decode(row, system, found.noticed)
        if reason:
            found.reasons[index] = reason
    return found


def _decode(row: Row, system: System | None, noticed: list[tuple[str, str]]) -> str:
    """Why the row cannot be prepared, or ''; what is odd about its sound goes to ``noticed``."""
    try:
        if system is not None:
            system.prepare(row, Clock(training=False))
        if row.audio:
            wave, rate = audio.read(row.audio, None, row.start, row.duration)
            noticed += [(row.id, notice) for notice in sound_notices(wave, rate, row.duration)]
    except BadRow as error:
        return str(error)
    except audio.AudioError as error:
        return f"unreadable audio: {error}"
    return ""


def sound_notices(wave: np.ndarray, rate: int, seconds: float) -> list[str]:
    """What stands out in a clip: clipping, silence, a length other than ``seconds``. ``wave`` float32 [S]."""
    notices = []
    clipped = float(np.mean(np.abs(wave) >= CLIPPED))
    if clipped > CLIPPED_SHARE:
        notices.append(f"clipped: {100 * clipped:.1f} % of the samples")
    frame = max(1, rate // 50)
    frames = wave[: len(wave) // frame * frame].reshape(-1, frame).astype(np.float64)
    silent = float(np.mean(np.mean(frames**2, axis=1) < 10 ** (SILENT_DB / 10))) if len(frames) else 0.0
    if silent > SILENT_SHARE:
        notices.append(f"silent: {100 * silent:.0f} % of the time")
    if abs(len(wave) / rate - seconds) > 0.05:
        notices.append(f"other length: {len(wave) / rate:.2f} s decoded, {seconds:.2f} s expected")
    return notices


def _judge(report: DataReport) -> None:
    if report.usable == 0:
        report.problems.append(f"no usable row of {report.rows}")
    elif len(report.rejected) > report.max_bad_fraction * report.rows:
        share = f"{len(report.rejected)} of {report.rows} rows cannot be used"
        report.problems.append(f"{share}, above data.max_bad_fraction {report.max_bad_fraction:g}")


def _texts(report: DataReport, kept: Corpus, found: _Findings) -> None:
    """Lengths of the texts, and clips spoken far faster or slower than the rest: text and audio may not match."""
    characters = np.array([len("".join(text.split())) for text in kept.column("text")], dtype=np.float64)
    seconds = kept.durations()
    spoken = np.flatnonzero((characters > 0) & (seconds > 0))
    if not len(spoken):
        return
    rate = characters[spoken] / seconds[spoken]
    report.text_characters = _spread(characters[spoken])
    report.characters_per_second = _spread(rate)
    logs = np.log(rate)
    deviation = np.abs(logs - np.median(logs))
    scale = max(1.4826 * float(np.median(deviation)), 0.05)
    if len(spoken) >= FEWEST:
        ids = kept.table["id"]
        for i in np.flatnonzero(deviation > OUTLIER * scale):
            found.noticed.append((ids[int(spoken[i])].as_py(), f"odd pace: {rate[i]:.1f} characters a second"))


def _spread(values: np.ndarray) -> dict[str, float]:
    names = ("least", "median", "most")
    return {name: round(float(v), 2) for name, v in zip(names, np.percentile(values, [0, 50, 100]), strict=True)}


def _batches(report: DataReport, kept: Corpus, lengths: np.ndarray, settings: DataConfig) -> None:
    if not len(kept):
        return
    unit = seconds_per_unit(kept.durations(), lengths)
    report.buckets = [Bucket(*bucket) for bucket in bucket_counts(lengths, settings)]
    plan = plan_epoch(lengths, settings, seconds_per_unit=unit, seed=0, epoch=0)
    report.batches, report.padding_waste = len(plan), round(padding_waste(lengths, plan), 4)


def _phones(report: DataReport, kept: Corpus, valid: Corpus | None, config: RunConfig | None) -> None:
    """Phones of the validation texts that training never hears; texts of a language without front end are named."""
    if valid is None:
        return
    trained, _ = _survey(kept, config)
    heard, notes = _survey(valid, config)
    report.unseen_phones = {phone: count for phone, count in heard.most_common() if phone not in trained}
    report.warnings += notes
    if report.unseen_phones:
        report.warnings.append(f"phones of the validation texts unseen in training: {', '.join(report.unseen_phones)}")


def _survey(corpus: Corpus, config: RunConfig | None) -> tuple[Counter[str], list[str]]:
    from lalia.text import ANALYSERS, OnUnknown, survey

    settings: Any = config["data"] if config is not None else None
    policy = OnUnknown[settings.on_unknown.name] if hasattr(settings, "on_unknown") else OnUnknown.replace
    fallback = settings.languages[0] if getattr(settings, "languages", None) else "en"
    texts: dict[str, list[str]] = defaultdict(list)
    for text, language in zip(corpus.column("text"), corpus.column("language"), strict=True):
        if text.strip():
            texts[language or fallback].append(text)
    phones: Counter[str] = Counter()
    notes = []
    for language, lines in texts.items():
        if language not in ANALYSERS:
            notes.append(f"{len(lines)} texts in {language!r} were not examined: no front end for it")
            continue
        result = survey(lines, language, policy)
        phones.update(result.phones)
        notes += [f"text {lines[place][:40]!r}: {reason}" for place, reason in result.failures]
    return phones, notes
