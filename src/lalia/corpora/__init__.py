"""Sources of speech. ``prepare(name, out, …)`` turns any of them into manifests with a fixed split and a report.

A source is one file here: an options class and ``prepare_<source>(options) -> PrepareResult``. A new one costs that
file and one line in :data:`SOURCES`.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lalia.config import nearest
from lalia.corpora._common import (
    CorpusError,
    CorpusUnavailable,
    Options,
    PrepareResult,
    Reason,
    Rejected,
    share_position,
    text_units,
)
from lalia.corpora.asterisk import AsteriskOptions, prepare_asterisk
from lalia.corpora.cremad import CremadOptions, prepare_cremad
from lalia.corpora.dialogues import DialoguesOptions, prepare_dialogues
from lalia.corpora.filelist import FilelistOptions, prepare_filelist
from lalia.corpora.folder import FolderOptions, prepare_folder
from lalia.corpora.folds import write_folds
from lalia.corpora.iemocap import IemocapOptions, prepare_iemocap
from lalia.corpora.instructions import InstructionsOptions, prepare_instructions
from lalia.corpora.jsonl import prepare_jsonl
from lalia.corpora.librispeech import prepare_librispeech
from lalia.corpora.ljspeech import prepare_ljspeech
from lalia.corpora.msp_podcast import MspPodcastOptions, prepare_msp_podcast
from lalia.corpora.ravdess import RavdessOptions, prepare_ravdess
from lalia.corpora.sines import SinesOptions, prepare_sines
from lalia.corpora.synth import SynthOptions, prepare_synth
from lalia.corpora.text import TextOptions, prepare_text
from lalia.data import Row, write_json, write_manifest

__all__ = [
    "SOURCES", "SPLITS", "CorpusError", "CorpusUnavailable", "Options", "PrepareResult", "Reason", "Rejected", "Report",
    "Source", "prepare", "split_of",
]  # fmt: skip

SPLITS = ("train", "valid", "test")
SHARES = (0.9, 0.05, 0.05)


class Source(NamedTuple):
    """One row of the table: the function, its options and a line for the help text."""

    prepare: Callable[[Any], PrepareResult]
    options: type[Options]
    about: str


SOURCES: dict[str, Source] = {
    "asterisk": Source(prepare_asterisk, AsteriskOptions, "studio prompts in en es fr it ru, from Debian packages"),
    "folder": Source(prepare_folder, FolderOptions, "audio with .txt or .lab files beside it, or a metadata table"),
    "jsonl": Source(prepare_jsonl, Options, "any JSONL manifest, examined and split again"),
    "list": Source(prepare_filelist, FilelistOptions, "wav|speaker|language|text lists of the VITS family"),
    "synth": Source(prepare_synth, SynthOptions, "speech made here by espeak-ng (pip) or flite, of any texts"),
    "ljspeech": Source(prepare_ljspeech, Options, "the LJSpeech folder: metadata.csv and wavs/"),
    "librispeech": Source(prepare_librispeech, Options, "LibriSpeech folders: speaker/chapter/*.trans.txt"),
    "text": Source(prepare_text, TextOptions, "plain text for language models: Debian packages of prose, or your files"),
    "sines": Source(prepare_sines, SinesOptions, "five 5 s sines with captions, for the smoke run; always the same bytes"),
    "instructions": Source(prepare_instructions, InstructionsOptions, "questions on labelled speech, and AudioBench-mini"),
    "dialogues": Source(prepare_dialogues, DialoguesOptions, "simulated dialogues with exact valence and arousal; no licence"),
    "iemocap": Source(prepare_iemocap, IemocapOptions, "IEMOCAP_full_release: Session1 … Session5"),
    "msp_podcast": Source(prepare_msp_podcast, MspPodcastOptions, "MSP-Podcast: Labels/, Audios/, Transcripts/"),
    "cremad": Source(prepare_cremad, CremadOptions, "CREMA-D: AudioWAV/1001_DFA_ANG_XX.wav"),
    "ravdess": Source(prepare_ravdess, RavdessOptions, "RAVDESS: Actor_01/03-01-06-01-02-01-12.wav, speech alone"),
}


@dataclass
class Report:
    """What ``prepare`` did; written as ``report.json``. Hours are of usable speech.

    ``shared_texts`` counts clips of the test split whose text is also said in training: the split goes by the id alone,
    so figures on such clips say less about unseen text.
    """

    source: str
    out: str
    found: int
    usable: int
    clips: dict[str, int] = field(default_factory=dict)
    hours: dict[str, float] = field(default_factory=dict)
    megabytes: dict[str, float] = field(default_factory=dict)  # of text, by split; only where there is no speech
    hours_by_speaker: dict[str, float] = field(default_factory=dict)
    hours_by_language: dict[str, float] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    letters_per_second: dict[str, float] = field(default_factory=dict)
    shared_texts: int = 0
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        """A few lines for the terminal."""
        unit = "rows" if self.megabytes else "clips"
        sizes = {name: f"{self.megabytes[name]:.2f} MB" if self.megabytes else f"{self.hours[name]:.2f} h" for name in SPLITS}
        splits = ", ".join(f"{name} {self.clips[name]} {unit} {sizes[name]}" for name in SPLITS)
        lines = [f"{self.source}: {self.usable} of {self.found} {unit} usable → {self.out} ({splits})"]
        if self.rejected:
            lines.append("left out: " + ", ".join(f"{count} {reason}" for reason, count in self.rejected.items()))
        if self.shared_texts:
            lines.append(f"{self.shared_texts} test clips say a text that is also said in training")
        return "\n".join([*lines, *self.notes])


def prepare(
    source: str,
    out: str | Path,
    *,
    split: Sequence[float] = SHARES,
    max_bad_fraction: float = 0.2,
    **options: Any,
) -> Report:
    """Prepare ``source`` into ``out/{train,valid,test}.jsonl``, ``rejected.jsonl`` and ``report.json``.

    Args:
        source: a name in :data:`SOURCES`.
        split: shares of train, valid and test. A clip's split depends on its id alone: added clips move no other.
        max_bad_fraction: share of unusable clips above which the call fails, after everything has been written.
        options: fields of the source's options class (:class:`Options`: inputs, sample_rate, min_seconds, …).

    Raises:
        CorpusError: unknown source or option, nothing usable, or too much unusable.
        CorpusUnavailable: the source cannot be had on this machine.
    """
    if source not in SOURCES:
        raise CorpusError(f"no source {source!r}{nearest(source, SOURCES)}; sources are {', '.join(SOURCES)}")
    entry = SOURCES[source]
    known = [f.name for f in fields(entry.options)]
    for name in options:
        if name not in known:
            raise CorpusError(f"`prepare {source}` has no option {name!r}{nearest(name, known)}")
    _check_shares(split)
    if entry.options.has_folds and tuple(split) != SHARES:
        raise CorpusError(f"`prepare {source}` makes folds of its own (folds.json), so --split does not apply")
    chosen = entry.options(out=Path(out), **options)
    chosen.out.mkdir(parents=True, exist_ok=True)
    result = entry.prepare(chosen)
    splits = _assign(result, split)
    _write_rejected(chosen.out / "rejected.jsonl", result.rejected)
    report = _report(source, result, splits, chosen)
    write_json(chosen.out / "report.json", asdict(report))
    if result.folds:
        write_folds(chosen.out, result.rows, result.folds)
    else:
        for name in SPLITS:
            write_manifest(chosen.out / f"{name}.jsonl", splits[name])
    _judge(report, result, max_bad_fraction)
    return report


def split_of(identifier: str, shares: Sequence[float] = SHARES) -> str:
    """``train``, ``valid`` or ``test`` by a hash of the id: the same on every machine and in every corpus."""
    position = share_position(identifier)
    _, valid, test = shares
    if position < test:
        return "test"
    return "valid" if position < test + valid else "train"


def _check_shares(shares: Sequence[float]) -> None:
    if len(shares) != 3 or min(shares) < 0 or shares[0] <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise CorpusError(f"split needs three shares (train, valid, test), sum 1, train above 0; got {list(shares)}")


def _assign(result: PrepareResult, shares: Sequence[float]) -> dict[str, list[Row]]:
    """Rows by split: those of fold 1 where there are folds.

    Else the corpus's own split counts; one that it lacks is taken from its training part by the hash.
    """
    if result.folds:
        return {name: [result.rows[i] for i in result.folds.folds[0].parts[name]] for name in SPLITS}
    splits: dict[str, list[Row]] = {name: [] for name in SPLITS}
    prescribed = set(result.official.values())
    for row in result.rows:
        own, hashed = result.official.get(row.id, "train"), split_of(result.split_keys.get(row.id, row.id), shares)
        splits[hashed if own == "train" and hashed not in prescribed else own].append(row)
    return splits


def _report(source: str, result: PrepareResult, splits: dict[str, list[Row]], options: Options) -> Report:
    rows = result.rows
    trained = {_plain(row.text) for row in splits["train"]} - {""}
    counts = Counter(item.reason.value for item in result.rejected)
    report = Report(
        source=source,
        out=str(options.out),
        found=len(rows) + len(result.rejected),
        usable=len(rows),
        clips={name: len(splits[name]) for name in SPLITS},
        hours={name: _hours(splits[name]) for name in SPLITS},
        megabytes={} if any(row.audio for row in rows) else {name: _megabytes(splits[name]) for name in SPLITS},
        hours_by_speaker=_hours_by(rows, "speaker"),
        hours_by_language=_hours_by(rows, "language"),
        rejected=dict(counts.most_common()),
        seconds=_quantiles([row.duration for row in rows]),
        letters_per_second=_quantiles([text_units(row.text) / row.duration for row in rows if row.text and row.duration]),
        shared_texts=sum(_plain(row.text) in trained for row in splits["test"]),
        notes=[*result.notes, *(result.folds.verdict() if result.folds else [])],
        facts=result.facts,
        options=json.loads(json.dumps(asdict(options), default=str)),
    )
    report.notes += [f"the {name} split is empty: {len(rows)} clips are few" for name in SPLITS if not splits[name]]
    return report


def _judge(report: Report, result: PrepareResult, max_bad_fraction: float) -> None:
    where = f"{report.out}{os.sep}rejected.jsonl"
    reasons = ", ".join(f"{count} {reason}" for reason, count in report.rejected.items())
    if not report.found:
        raise CorpusError(f"`prepare {report.source}` found no clip at all; {'; '.join(report.notes[:1])}")
    if not report.usable:
        first = result.rejected[0]
        first_words = f"{first.path}: {first.reason.value} {first.details}"
        raise CorpusError(f"no usable clip among {report.found} ({reasons}); the first: {first_words}; see {where}")
    bad = report.found - report.usable
    if bad > max_bad_fraction * report.found:
        limit = f"above max_bad_fraction {max_bad_fraction:g}"
        raise CorpusError(f"{bad} of {report.found} clips are unusable ({reasons}), {limit}; see {where}")
    if not report.clips["train"]:
        raise CorpusError(f"no clip of {report.usable} falls into the training split; more clips are needed")


def _write_rejected(path: Path, rejected: Iterable[Rejected]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(item.to_dict(), ensure_ascii=False) + "\n" for item in rejected)
    os.replace(temporary, path)


def _plain(text: str) -> str:
    return "".join(character for character in text.lower() if character.isalnum())


def _hours(rows: Iterable[Row]) -> float:
    return round(sum(row.duration for row in rows) / 3600, 4)


def _megabytes(rows: Iterable[Row]) -> float:
    return round(sum(len(row.text.encode("utf-8")) for row in rows) / 1e6, 3)


def _hours_by(rows: Iterable[Row], name: str) -> dict[str, float]:
    seconds: dict[str, float] = defaultdict(float)
    for row in rows:
        seconds[getattr(row, name)] += row.duration
    return {key: round(value / 3600, 4) for key, value in sorted(seconds.items())}


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    shares = {"min": 0, "p5": 5, "median": 50, "p95": 95, "max": 100}
    return {name: round(float(np.percentile(values, share)), 3) for name, share in shares.items()}
