"""How well a system transcribes, with two controls that show whether it listens.

Every text is compared with what the system says of three recordings: ``real``, its own; ``other``, one of another text; and
``silent``, silence of the median length. A model that only knows what people tend to say is as good with the others as with its
own. Neither control costs decoding: ``other`` takes what was said of the next clip, in the order of a hash of the ids, whose text
differs, and silence is transcribed once for all.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from lalia import audio
from lalia.data import Corpus, Row
from lalia.evaluate import metrics
from lalia.evaluate.audiobench import is_benchmark, is_question
from lalia.evaluate.harness import ROW_ERRORS, choose, letters, reason_of, spoken_form
from lalia.evaluate.machine import machine
from lalia.evaluate.results import Better, Figure, Record
from lalia.system import Clock, MeasuresAlignment, System, Transcribes

log = logging.getLogger(__name__)

Value = TypeVar("Value")

SCHEMA = "transcription-1"
RATE = 16000
TOGETHER = 8  # clips transcribed in one call
REAL, OTHER, SILENT = CONDITIONS = ("real", "other", "silent")
#: what rows are for: see :func:`kind_of_rows`
QUESTIONS, SPEECH = "questions", "speech"


@dataclass
class Transcript:
    """One clip. ``errors`` and ``character_errors`` are by condition; a failed clip has said nothing."""

    id: str
    text: str
    hypothesis: str
    errors: dict[str, int]
    character_errors: dict[str, int]
    words: int  # in the text, after comparison_form
    characters: int
    said: int  # words of the hypothesis
    seconds: float
    other: str = ""  # the clip whose hypothesis is the control; '' where all texts are the same
    failure: str = ""  # why the system could not take it


@dataclass
class TranscriptionEvaluation(Record):
    """Everything that was measured. ``skipped`` are rows that are no speech with text or cannot be read: id → reason."""

    entries: ClassVar = {"clips": lambda clip: Transcript(**clip)}

    system: str
    figures: list[Figure]
    clips: list[Transcript]  # in the order of the corpus
    silence: str = ""  # what the system says of silence
    silence_seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    label: str = ""  # which checkpoint, e.g. "step 1200"
    machine: dict[str, str] = field(default_factory=dict)
    parameters: int = 0
    seed: int = 0
    corpus_rows: int = 0  # rows there were to choose from
    seconds: float = 0.0  # the evaluation itself took
    schema: str = SCHEMA

    def failures(self) -> list[Transcript]:
        return [clip for clip in self.clips if clip.failure]


def kind_of_rows(corpus: Corpus) -> str:
    """``questions`` when all rows are four-way questions, ``speech`` when there are recordings with their text and neither
    questions nor conversations; ValueError, with the numbers of each, otherwise."""
    if is_benchmark(corpus):
        return QUESTIONS
    extras = corpus.column("extra")
    questions = sum(map(is_question, extras))
    talks = sum("messages" in extra for extra in extras)
    there = zip(corpus.column("audio"), corpus.column("text"), extras, strict=True)
    speech = sum(bool(path and text.strip()) and not is_question(e) and "messages" not in e for path, text, e in there)
    if speech and not questions and not talks:
        return SPEECH
    rest = len(extras) - questions - talks - speech
    raise ValueError(
        f"{questions} of {len(extras)} rows are four-way questions, {speech} recordings with their text, {talks} conversations and"
        f" {rest} none of these; give either questions alone (audiobench-mini.jsonl of `lalia prepare instructions`) or recordings"
        " with their text alone (such as test.jsonl of `lalia prepare asterisk`)"
    )


def evaluate_transcription(
    system: System,
    corpus: Sequence[Row],
    *,
    out: str | Path,
    limit: int = 0,
    seed: int = 0,
    label: str = "",
    progress: bool = True,
) -> TranscriptionEvaluation:
    """Transcribe the rows of ``corpus`` and write ``out/eval.json``, and what :class:`MeasuresAlignment` writes.

    Args:
        system: one that :class:`Transcribes`.
        limit: clips to use, chosen by a hash of (seed, id), so that a smaller limit is a subset of a larger one; 0 = all.

    Raises:
        ValueError: no rows, or none of them usable.
    """
    started = time.monotonic()
    rows = choose(corpus, limit, seed)
    job = _Job(system, dict(getattr(corpus, "rejected", [])))
    job.run(rows, progress)
    if not job.heard:
        reasons = "; ".join(f"{row}: {reason}" for row, reason in list(job.skipped.items())[:3])
        raise ValueError(f"none of the {len(rows)} rows can be evaluated: {reasons}")
    used = [row for row in rows if row.id in job.heard]
    silence, length = job.silence()
    clips = judged([job.heard[row.id] for row in used], silence)
    figures = [*_figures(clips, seed), *_speed(job)]
    if isinstance(system, MeasuresAlignment):
        figures += _alignment(system, used, Path(out), job.notes)
    place = {row.id: number for number, row in enumerate(corpus)}
    evaluation = TranscriptionEvaluation(
        system=getattr(system.config, "system", "") or type(system).__name__,
        figures=figures,
        clips=sorted(clips, key=lambda clip: place[clip.id]),
        silence=silence or "",
        silence_seconds=length,
        notes=job.notes,
        skipped=job.skipped,
        label=label,
        machine=machine(),
        parameters=sum(p.numel() for p in system.parameters()),
        seed=seed,
        corpus_rows=len(corpus),
        seconds=round(time.monotonic() - started, 2),
    )
    evaluation.save(Path(out) / "eval.json")
    return evaluation


# --- hearing --------------------------------------------------------------------------------------------------------
@dataclass
class Heard:
    """A row and what the system said of its recording; ``text`` '' with a ``failure`` when it could not take it."""

    row: Row
    seconds: float
    text: str
    failure: str = ""


class _Job:
    """Transcripts of many rows; ``compute`` and ``audio`` are the seconds of the calls that succeeded and of their recordings."""

    def __init__(self, system: System, skipped: dict[str, str]) -> None:
        assert isinstance(system, Transcribes)
        self.system, self.skipped = system, skipped
        self.heard: dict[str, Heard] = {}
        self.notes: list[str] = []
        self.compute, self.audio = 0.0, 0.0

    def run(self, rows: Sequence[Row], progress: bool = False) -> None:
        """Clips of like length together, which saves padding; the shortest is heard once before, to warm up."""
        lengths = {row.id: seconds for row in rows if (seconds := self._try(row, _seconds)) is not None}
        order = sorted((row for row in rows if row.id in lengths), key=lambda row: lengths[row.id])
        blocks = [order[first : first + TOGETHER] for first in range(0, len(order), TOGETHER)]
        for number, block in enumerate(track(blocks, "transcribing", console=Console(stderr=True), disable=not progress)):
            read = [(row, wave) for row in block if (wave := self._try(row, _read)) is not None]
            if number == 0:
                with contextlib.suppress(*ROW_ERRORS):
                    self.system.transcribe([wave for _, wave in read[:1]])
            for (row, wave), (text, failure) in zip(read, self._transcribe([wave for _, wave in read]), strict=True):
                self.heard[row.id] = Heard(row, len(wave) / RATE, text, failure)
                if failure:
                    log.warning("%s could not be transcribed: %s", row.id, failure)

    def _try(self, row: Row, read: Callable[[Row], Value]) -> Value | None:
        try:
            return read(row)
        except ROW_ERRORS as error:
            self.skipped[row.id] = reason_of(error)
            log.warning("%s is left out of the evaluation: %s", row.id, reason_of(error))
            return None

    def _transcribe(self, waves: Sequence[np.ndarray]) -> list[tuple[str, str]]:
        """(text, failure) of each wave. When the system refuses them together, each is tried alone."""
        if not waves:
            return []
        started = time.perf_counter()
        try:
            texts = self.system.transcribe(waves)
        except ROW_ERRORS as error:
            return [("", reason_of(error))] if len(waves) == 1 else [found for wave in waves for found in self._transcribe([wave])]
        self.compute += time.perf_counter() - started
        self.audio += sum(map(len, waves)) / RATE
        return [(text, "") for text in texts]

    def silence(self) -> tuple[str | None, float]:
        """What the system says of silence of the clips' median length, and that length in seconds; None when it refuses it."""
        seconds = float(np.median([one.seconds for one in self.heard.values()]))
        try:
            return self.system.transcribe([np.zeros(round(seconds * RATE), dtype=np.float32)])[0], seconds
        except ROW_ERRORS as error:
            self.notes.append(f"silence of {seconds:.1f} s could not be transcribed: {reason_of(error)}")
            return None, seconds


def _seconds(row: Row) -> float:
    """Length of a row; ValueError when it is no speech with text, or cannot be read."""
    if not row.audio:
        raise ValueError("no audio")
    if not _form(row, row.text):
        raise ValueError("no words in the text")
    return row.duration or audio.info(row.audio).seconds - row.start


def _form(row: Row, text: str) -> str:
    return spoken_form(text, row.language or "en")


def _read(row: Row) -> np.ndarray:
    return audio.read(row.audio, RATE, row.start, row.duration)[0]


# --- judging --------------------------------------------------------------------------------------------------------
def judged(heard: Sequence[Heard], silence: str | None = None) -> list[Transcript]:
    """What was heard → clips with their errors under each condition, in the same order.

    ``other`` is the nearest later clip, round the end, of another text. ``silence`` None: that condition is left out.
    """
    forms = [_form(one.row, one.row.text) for one in heard]
    clips = []
    for number, (one, form) in enumerate(zip(heard, forms, strict=True)):
        said = {REAL: one.text}
        later = chain(range(number + 1, len(heard)), range(number))
        other = next((heard[place] for place in later if forms[place] != form), None)
        said |= {OTHER: other.text} if other else {}
        said |= {SILENT: silence} if silence is not None else {}
        clips.append(_clip(one, form, said, other.row.id if other else ""))
    return clips


def _clip(one: Heard, form: str, said: dict[str, str], other: str) -> Transcript:
    heard = {condition: _form(one.row, text) for condition, text in said.items()}
    return Transcript(
        id=one.row.id,
        text=one.row.text,
        hypothesis=one.text,
        errors={c: metrics.edit_distance(form.split(), text.split()) for c, text in heard.items()},
        character_errors={c: metrics.edit_distance(letters(form), letters(text)) for c, text in heard.items()},
        words=len(form.split()),
        characters=len(letters(form)),
        said=len(heard[REAL].split()),
        seconds=round(one.seconds, 3),
        other=other,
        failure=one.failure,
    )


# --- figures --------------------------------------------------------------------------------------------------------
def _figures(clips: Sequence[Transcript], seed: int) -> list[Figure]:
    """Error rates by condition, then how much is said."""
    failed = sum(bool(clip.failure) for clip in clips)
    note = f"{failed} clips that the system could not take count as wholly missed" if failed else ""
    found: list[Figure | None] = []
    conditions = [condition for condition in CONDITIONS if condition in clips[0].errors]
    for name in conditions:
        errors, words = [clip.errors[name] for clip in clips], [clip.words for clip in clips]
        found.append(metrics.ratio_figure(f"wer.{name}", errors, words, seed, scale=100, unit="%", note=note))
    for name in conditions:
        errors, letters = [clip.character_errors[name] for clip in clips], [clip.characters for clip in clips]
        found.append(metrics.ratio_figure(f"cer.{name}", errors, letters, seed, scale=100, unit="%", note=note))
    taken = [clip for clip in clips if not clip.failure]
    said, words = [clip.said for clip in taken], [clip.words for clip in taken]
    note = "words said per word of the text; far above 1, the model does not stop"
    found.append(metrics.ratio_figure("length.real", said, words, seed, better=Better.one, note=note))
    return [figure for figure in found if figure is not None]


def _speed(job: _Job) -> list[Figure]:
    """The real-time factor. Clips of a call share its time, so a draw of clips would say nothing about its spread."""
    if not job.audio:
        return []
    note = f"seconds of computing per second of sound, up to {TOGETHER} clips at a time, which share their time: no interval"
    taken = sum(not one.failure for one in job.heard.values())
    return [Figure("rtf.real", job.compute / job.audio, math.nan, math.nan, taken, note=note)]


def _alignment(system: System, rows: Iterable[Row], out: Path, notes: list[str]) -> list[Figure]:
    """Figures of the system's own; rows that it cannot prepare are left out and counted in ``notes``."""
    assert isinstance(system, MeasuresAlignment)
    usable, reasons = [], []
    for row in rows:
        try:
            system.prepare(row, Clock(training=False))
            usable.append(row)
        except ROW_ERRORS as error:
            reasons.append(f"{row.id}: {reason_of(error)}")
    if reasons:
        notes.append(f"{len(reasons)} clips are left out of the comparison of audio and text; the first: {reasons[0]}")
    try:
        found = system.measure(usable, out)
    except ROW_ERRORS as error:
        notes.append(f"audio and text were not compared: {reason_of(error)}")
        return []
    count = round(found.pop("pairs", len(usable)))
    named = {name: value for name, value in found.items() if not name.endswith(("_chance", "_shuffled"))}
    by_chance = {name: found.get(f"{name}_chance", found.get(f"{name}_shuffled")) for name in named}
    return [
        Figure(f"align.{name}", value, math.nan, math.nan, count, "", Better.higher, _chance(by_chance[name]))
        for name, value in named.items()
    ]


def _chance(value: float | None) -> str:
    return "" if value is None else f"{value:.3f} by chance"
