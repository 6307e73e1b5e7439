"""Synthetic speech, for machines that cannot reach real speech: of sentences written for Lalia, or of given texts.

Two engines: espeak-ng, which needs pip alone, on every system; and flite, a program. Both voices are synthetic, espeak-ng's a
formant synthesiser's: they serve to try the whole path, and a model trained on them sounds like them.
espeak-ng is GPL-3; it is called in a process of its own, because its C library is one global state.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lalia.config import nearest
from lalia.corpora import _flite, _sentences
from lalia.corpora._common import (
    CorpusError,
    CorpusUnavailable,
    Options,
    PrepareResult,
    Reason,
    Rejected,
    file_name,
    progress,
    select,
    share_position,
)
from lalia.corpora._flite import Flite
from lalia.corpora._questions import plain
from lalia.corpora._sentences import MOST_SENTENCES
from lalia.data import Row

CHUNK = 50  # sentences per process of espeak-ng: the progress bar moves, and a crash names its neighbourhood
CHUNK_SECONDS = 300
ESPEAK, FLITE = "espeak", "flite"
VOICES = {ESPEAK: ["en-us", "en-us+f3", "en-gb-x-rp", "en-gb-scotland+m3"], FLITE: list(_flite.VOICES)}
WORDS_PER_MINUTE = 165
BUILT_IN = "built-in sentences"
NOTES = {
    ESPEAK: "this is synthetic, robotic speech made by espeak-ng, not recordings of people",
    FLITE: "this is synthetic speech made by flite, not recordings of people",
}


@dataclass
class SynthOptions(Options):
    """``voices`` are the engine's, empty = some of each; they take turns from sentence to sentence.

    ``texts`` (and ``inputs``): manifests or .txt files whose sentences of ``least_words`` … ``most_words`` are spoken instead of
    the built-in ones; ``seed`` is that of the choice among them. ``exclude``: manifests whose texts are not spoken.
    ``words_per_minute`` is the pace of espeak-ng, ``stretch`` factors of duration of flite, of which each sentence takes one.
    """

    sentences: int = 400
    engine: str = ESPEAK
    voices: list[str] = field(default_factory=list)
    words_per_minute: int | None = None
    stretch: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)
    least_words: int = 3
    most_words: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine not in VOICES:
            raise CorpusError(f"no engine {self.engine!r}{nearest(self.engine, VOICES)}; engines are {', '.join(VOICES)}")
        self.texts = [*self.texts, *self.inputs]
        if self.sentences < 1 or (not self.texts and self.sentences > MOST_SENTENCES):
            most = f"at least 1, and with the {BUILT_IN} at most {MOST_SENTENCES} (--texts: your own)"
            raise CorpusError(f"sentences must be {most}; got {self.sentences}")
        if not 1 <= self.least_words <= self.most_words or self.seed < 0:
            given = f"{self.least_words}, {self.most_words} and {self.seed}"
            raise CorpusError(f"need 1 <= least_words <= most_words and seed >= 0, got {given}")
        self.voices = self.voices or list(VOICES[self.engine])
        self._check_pace()

    def _check_pace(self) -> None:
        if self.engine == ESPEAK:
            if self.stretch:
                raise CorpusError("stretch is an option of --engine flite; espeak has words_per_minute")
            self.words_per_minute = WORDS_PER_MINUTE if self.words_per_minute is None else self.words_per_minute
            if not 80 <= self.words_per_minute <= 450:
                raise CorpusError(f"words_per_minute must be in 80…450, got {self.words_per_minute}")
            return
        if self.words_per_minute is not None:
            raise CorpusError("words_per_minute is an option of --engine espeak; flite has stretch, factors such as 0.9,1,1.15")
        try:
            self.stretch = [float(factor) for factor in self.stretch] or list(_flite.STRETCHES)
        except ValueError as error:
            raise CorpusError(f"stretch must be factors such as 0.9,1,1.15, got {self.stretch}") from error
        if not all(0.3 <= factor <= 3 for factor in self.stretch):
            raise CorpusError(f"stretch must be in 0.3…3, got {self.stretch}")


class _Job(NamedTuple):
    """A clip to be made at ``row.audio``: ``pace`` is words a minute, or a factor of duration."""

    row: Row
    voice: str
    pace: float


def prepare_synth(options: SynthOptions) -> PrepareResult:
    """Make up to ``options.sentences`` clips. The same options give the same clips, sample by sample.

    What was spoken before a kill is kept under ``out/unfinished`` and not spoken again by a run with the same options.

    Raises:
        CorpusUnavailable: espeakng-loader or flite is not installed, or espeak-ng fails.
        CorpusError: an unknown voice; a file of texts that is missing or has none; no sentence left.
    """
    flite = _flite.find() if options.engine == FLITE else None
    version = flite.version if flite else _espeak_version()
    if flite:
        flite.check(options.voices)
    told = PrepareResult([], [])
    jobs = _plan(_sentences_of(options, told), options, version)
    failed = _speak_with_flite(jobs, flite, options) if flite else _speak_with_espeak(jobs, options)
    found = [failed.get(job.row.id, job.row) for job in jobs]
    result = select(found, options, rewrite=True, trim=True)
    shutil.rmtree(options.out / "unfinished", ignore_errors=True)
    result.rejected += told.rejected
    result.notes += [NOTES[options.engine], *told.notes]
    result.facts |= {"engine": options.engine, "version": version, "voices": options.voices, **told.facts}
    return result


def _espeak_version() -> str:
    if importlib.util.find_spec("espeakng_loader") is None:
        raise CorpusUnavailable("synthetic speech needs espeak-ng: `pip install espeakng-loader`")
    try:
        return f"espeakng-loader {importlib.metadata.version('espeakng-loader')}"
    except importlib.metadata.PackageNotFoundError:  # there, but not installed by pip
        return ""


# --- sentences --------------------------------------------------------------------------------------------------------
def _sentences_of(options: SynthOptions, told: PrepareResult) -> list[str]:
    """What is to be spoken; ``told`` gets what is to be said about it."""
    count = min(options.sentences, options.limit or options.sentences)
    excluded = _sentences.excluded_texts(Path(name).expanduser() for name in options.exclude)
    if options.texts:
        chosen, left = _given(options, count, excluded, told)
    else:
        pool = _sentences.sentences(MOST_SENTENCES if excluded else count)
        kept = [sentence for sentence in pool if plain(sentence) not in excluded]
        chosen, left = [(sentence, BUILT_IN) for sentence in kept[:count]], len(pool) - len(kept)
    if options.exclude:
        told.facts["excluded"] = left
        told.notes.append(f"{left} sentences are not spoken because they are in {', '.join(options.exclude)}")
    if not chosen:
        raise CorpusError(f"no sentence is left to be spoken; {'; '.join(told.notes)}")
    if len(chosen) < count:
        told.notes.append(f"only {len(chosen)} sentences of the {count} that were asked for")
    told.facts["sentences"] = dict(Counter(source for _, source in chosen))
    return [sentence for sentence, _ in chosen]


def _given(options: SynthOptions, count: int, excluded: set[str], told: PrepareResult) -> tuple[list[tuple[str, str]], int]:
    """Pairs (sentence, file), and how many sentences are left out because they are excluded."""
    limits = _sentences.Limits(options.least_words, options.most_words, ascii_only=options.engine == FLITE)
    found = _sentences.find([Path(name).expanduser() for name in options.texts], limits, excluded)
    told.rejected += found.rejected
    passed_over = dict(found.passed_over.most_common())
    told.facts |= {"texts": found.texts, "fit": len(found.sentences), "passed_over": passed_over}
    reasons = ", ".join(f"{number} {reason}" for reason, number in passed_over.items())
    told.notes.append(f"{len(found.sentences)} sentences of {found.texts} texts fit; passed over: {reasons or 'none'}")
    return found.chosen(count, options.seed), len(found.excluded)


def _plan(texts: Sequence[str], options: SynthOptions, version: str) -> list[_Job]:
    """A job for each sentence, in a folder that is named by all of them: another plan finds nothing of this one."""
    written = options.engine == ESPEAK and not options.texts  # the corpus that has always been; its ids decide its split
    prefix, digits = ("synth", 4) if written else (options.engine, 5)
    plan: list[tuple[str, str, str, float]] = []
    for index, text in enumerate(texts):
        voice = options.voices[index % len(options.voices)]
        pace = options.stretch[int(share_position(plain(text)) * len(options.stretch))] if options.stretch else None
        identifier = f"{prefix}-{voice.replace('+', '-')}-{index:0{digits}d}"
        plan.append((identifier, text, voice, pace or float(options.words_per_minute or 0)))
    digest = hashlib.blake2b(json.dumps([options.engine, version, plan]).encode(), digest_size=8).hexdigest()
    folder = options.out / "unfinished" / digest
    folder.mkdir(parents=True, exist_ok=True)
    return [_Job(_row(folder, options, *item[:3]), *item[2:]) for item in plan]


def _row(folder: Path, options: SynthOptions, identifier: str, text: str, voice: str) -> Row:
    audio = str(folder / f"{file_name(identifier)}.wav")
    return Row(identifier, audio, text=text, speaker=f"{options.engine}-{voice}", language=options.language or "en")


# --- engines ----------------------------------------------------------------------------------------------------------
def _speak_with_flite(jobs: Sequence[_Job], flite: Flite, options: SynthOptions) -> dict[str, Rejected]:
    """Make the clips that are not there, several at once; those that flite cannot make, by id."""

    def speak(job: _Job) -> str:
        there = os.path.exists(job.row.audio)
        return "" if there else flite.speak(job.row.text, job.voice, job.pace, Path(job.row.audio))

    pool = ThreadPoolExecutor(max(2, os.cpu_count() or 2))
    try:
        pairs = zip(progress(jobs, "speaking with flite", options), pool.map(speak, jobs), strict=True)
        rows = {job.row.id: Rejected(job.row.id, job.row.audio, Reason.missing_audio, why) for job, why in pairs if why}
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C nothing new is begun
    return rows


def _speak_with_espeak(jobs: Sequence[_Job], options: SynthOptions) -> dict[str, Rejected]:
    """Make the clips chunk by chunk; a chunk is made anew as a whole, because a process may sound otherwise in mid-list."""
    for start in progress(range(0, len(jobs), CHUNK), "speaking with espeak-ng", options):
        chunk = jobs[start : start + CHUNK]
        if not all(os.path.exists(job.row.audio) for job in chunk):
            _espeak(chunk)
    return {}


def _espeak(jobs: Sequence[_Job]) -> None:
    """Let a fresh process write the wavs of ``jobs``, which get their names when all are there."""
    parts = [f"{job.row.audio}.part" for job in jobs]
    orders: list[dict[str, Any]] = [
        {"voice": job.voice, "rate": int(job.pace), "text": job.row.text, "path": part}
        for job, part in zip(jobs, parts, strict=True)
    ]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("_espeak.py"))],
        input=json.dumps(orders),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=CHUNK_SECONDS,
        check=False,
    )
    if done.returncode == 2:
        raise CorpusError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        complaint = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise CorpusUnavailable(f"espeak-ng failed at {jobs[0].row.id} … {jobs[-1].row.id}: {complaint}")
    for job, part in zip(jobs, parts, strict=True):
        os.replace(part, job.row.audio)
