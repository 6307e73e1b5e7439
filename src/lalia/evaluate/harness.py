"""One evaluation of one system on one corpus: recording, resynthesis and speech of the same sentences, side by side.

What is run follows the system's capabilities, not its name. Apart from the real-time factors everything is a function of the
weights, the rows and the seed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lalia import audio
from lalia.data import Row
from lalia.evaluate import figures, metrics, pictures
from lalia.evaluate.machine import machine
from lalia.evaluate.metrics import EVAL_MEL
from lalia.evaluate.pitch import track_pitch
from lalia.evaluate.recognise import SAMPLE_RATE, Recogniser
from lalia.evaluate.results import (
    CONDITIONS,
    RECORDING,
    RESYNTHESIS,
    SPEECH,
    ClipResult,
    ConditionResult,
    Evaluation,
    write_json,
)
from lalia.evaluate.warp import warp
from lalia.mel import mel
from lalia.system import Aligns, Resynthesizes, SpeakRequest, Speaks, System

log = logging.getLogger(__name__)

BLOCK = 32  # rows whose sound is in memory at once
ALIGNMENTS = 3  # clips whose alignment is drawn
#: A row that raises one of these is named and counted; anything else is a fault of the program and ends it.
ROW_ERRORS = (ValueError, OSError)


def evaluate(
    system: System,
    corpus: Sequence[Row],
    recogniser: Recogniser,
    *,
    limit: int = 0,
    seed: int = 0,
    out: str | Path,
    conditions: Sequence[str] = CONDITIONS,
    label: str = "",
    cache: str | Path | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measure ``system`` on the rows of ``corpus`` and write ``out/eval.json``, and wavs and pictures under ``out/eval/``.

    Args:
        limit: clips to use, chosen by a hash of (seed, id), so that a smaller limit is a subset of a larger one; 0 = all.
        conditions: out of ``recording``, ``resynthesis``, ``speech``. Those that the system cannot do are left out.
        label: which checkpoint this is, for the report.
        cache: file of transcripts by sound and recogniser, ``out/transcripts.json`` by default. Shared between evaluations it
            spares recognising the same recordings again.

    Raises:
        ValueError: no rows, or none of them usable; an unknown condition.
    """
    started = time.monotonic()
    job = _Job(system, recogniser, Path(out), seed, _possible(system, conditions))
    job.transcripts = _Transcripts(Path(cache) if cache else Path(out) / "transcripts.json", recogniser)
    rows = choose(corpus, limit, seed)
    (job.out / "eval").mkdir(parents=True, exist_ok=True)
    was_training = system.training
    system.eval()
    try:
        with _bar(progress) as bar:
            task = bar.add_task("evaluating", total=len(rows))
            for first in range(0, len(rows), BLOCK):
                job.block(rows[first : first + BLOCK], lambda: bar.advance(task))
    finally:
        system.train(was_training)
    if not job.clips:
        reasons = "; ".join(f"{row}: {reason}" for row, reason in list(job.skipped.items())[:3])
        raise ValueError(f"none of the {len(rows)} rows can be evaluated: {reasons}")
    evaluation = Evaluation(
        system=getattr(system.config, "system", "") or type(system).__name__,
        recogniser=recogniser.name,
        figures=figures.all_figures(job.clips, job.conditions, seed),
        clips=job.clips,
        skipped=job.skipped,
        label=label,
        machine=machine(),
        parameters=sum(p.numel() for p in system.parameters()),
        sample_rate=job.sample_rate,
        seed=seed,
        corpus_rows=len(corpus),
        seconds=round(time.monotonic() - started, 2),
    )
    evaluation.save(job.out / "eval.json")
    return evaluation


def choose(corpus: Sequence[Row], limit: int, seed: int) -> list[Row]:
    """``limit`` rows (0 = all), those of the smallest hash of (seed, id), in the order of the hash; ValueError without rows."""
    if len(corpus) == 0:
        raise ValueError("nothing to evaluate: the corpus has no rows")
    keys = [hashlib.blake2b(f"{seed}:{row.id}".encode(), digest_size=8).digest() for row in corpus]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return [corpus[i] for i in (order[:limit] if limit > 0 else order)]


def _possible(system: System, conditions: Sequence[str]) -> list[str]:
    unknown = [c for c in conditions if c not in CONDITIONS]
    if unknown:
        raise ValueError(f"unknown condition {unknown[0]!r}; known: {', '.join(CONDITIONS)}")
    able = {RECORDING: True, RESYNTHESIS: isinstance(system, Resynthesizes), SPEECH: isinstance(system, Speaks)}
    for name in conditions:
        if not able[name]:
            log.warning("%s cannot do %s: left out of the evaluation", type(system).__name__, name)
    return [c for c in CONDITIONS if able[c] and (c in conditions or c == RECORDING)]


@dataclass
class _Sound:
    """A wave of one clip on its way to the recogniser: ``wave`` float32 [S] at 16 kHz."""

    clip: ClipResult
    result: ConditionResult
    wave: np.ndarray


@dataclass
class _Reference:
    """What the other conditions are compared with: log-mel [M, T] and pitch [T] of the recording."""

    mel: np.ndarray
    pitch: np.ndarray
    scale: tuple[float, float]


@dataclass
class _Job:
    system: System
    recogniser: Recogniser
    out: Path
    seed: int
    conditions: list[str]
    clips: list[ClipResult] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    sample_rate: int = 0
    warmed: set[str] = field(default_factory=set)
    transcripts: Any = None

    def block(self, rows: Sequence[Row], advance: Callable[[], None]) -> None:
        """Sound of some rows, then their transcripts."""
        sounds: list[_Sound] = []
        for row in rows:
            try:
                sounds += self._row(row)
            except ROW_ERRORS as error:
                self.skipped[row.id] = reason_of(error)
                log.warning("%s is left out of the evaluation: %s", row.id, reason_of(error))
            advance()
        self._recognise(sounds)

    def _row(self, row: Row) -> list[_Sound]:
        form = spoken_form(row.text, row.language or "en")
        if not form:
            raise ValueError("no words in the text")
        wave, rate = audio.read(row.audio, start=row.start, duration=row.duration)
        clip = ClipResult(row.id, row.text, row.speaker, row.language, len(form.split()), len(letters(form)))
        stem = f"eval/{len(self.clips):04d}-{re.sub(r'[^A-Za-z0-9._-]+', '-', row.id)[-60:]}"
        sounds = [self._recording(clip, wave, rate, stem)]
        reference = _describe(sounds[0].wave)
        self._draw(sounds[0].result, reference.mel, reference.scale, stem, RECORDING)
        for condition in self.conditions:
            if condition != RECORDING:
                sounds += self._generated(clip, row, condition, reference, stem)
        self._align(clip, row, stem)
        self.clips.append(clip)
        return sounds

    def _recording(self, clip: ClipResult, wave: np.ndarray, rate: int, stem: str) -> _Sound:
        result = clip.conditions[RECORDING] = ConditionResult(seconds=len(wave) / rate, wave=f"{stem}.{RECORDING}.wav")
        narrow = audio.resample(wave, rate, SAMPLE_RATE)
        if len(narrow) < EVAL_MEL.win:
            raise ValueError(f"the recording is too short: {len(wave) / rate:.3f} s")
        audio.write(self.out / result.wave, wave, rate)
        return _Sound(clip, result, narrow)

    def _generated(self, clip: ClipResult, row: Row, condition: str, reference: _Reference, stem: str) -> list[_Sound]:
        result = clip.conditions[condition] = ConditionResult()
        try:
            wave, rate = self._run(row, condition, result)
        except ROW_ERRORS as error:
            result.failure = reason_of(error)
            log.warning("%s: no %s: %s", row.id, condition, result.failure)
            return [_Sound(clip, result, np.zeros(0, np.float32))]
        self.sample_rate, result.seconds, result.wave = rate, len(wave) / rate, f"{stem}.{condition}.wav"
        audio.write(self.out / result.wave, wave.clip(-1.0, 1.0), rate)
        narrow = audio.resample(wave, rate, SAMPLE_RATE)
        _compare(result, reference, described := _describe(narrow), straight=condition == RESYNTHESIS)
        self._draw(result, described.mel, reference.scale, stem, condition)
        return [_Sound(clip, result, narrow)]

    def _run(self, row: Row, condition: str, result: ConditionResult) -> tuple[np.ndarray, int]:
        """Sound of the system; the first call of each kind is repeated, because its time is that of warming up."""
        if condition not in self.warmed:
            self._sound(row, condition)
            self.warmed.add(condition)
        started = time.perf_counter()
        wave, rate = self._sound(row, condition)
        result.compute_seconds = time.perf_counter() - started
        if len(wave) < EVAL_MEL.win * rate / SAMPLE_RATE:
            raise ValueError(f"the system gave {len(wave) / rate:.3f} s of sound")
        if not np.isfinite(wave).all():
            raise ValueError("the system gave samples that are not finite")
        return wave, rate

    def _sound(self, row: Row, condition: str) -> tuple[np.ndarray, int]:
        if condition == RESYNTHESIS:
            assert isinstance(self.system, Resynthesizes)
            speech = self.system.resynthesize([row])[0]
        else:
            assert isinstance(self.system, Speaks)
            request = SpeakRequest(row.text, row.speaker, row.language or "en", seed=self.seed)
            speech = self.system.speak([request])[0]
        return np.asarray(speech.wave, dtype=np.float32), speech.sample_rate

    def _draw(self, result: ConditionResult, log_mel: np.ndarray, scale: tuple[float, float], stem: str, condition: str) -> None:
        result.picture = f"{stem}.{condition}.png"
        pictures.write_mel(self.out / result.picture, log_mel, scale)

    def _align(self, clip: ClipResult, row: Row, stem: str) -> None:
        if not isinstance(self.system, Aligns) or len(self.clips) >= ALIGNMENTS:
            return
        try:
            attention = self.system.alignment(row)
        except ROW_ERRORS as error:
            log.warning("%s: no alignment: %s", row.id, reason_of(error))
            return
        clip.alignment = f"{stem}.alignment.png"
        pictures.write_alignment(self.out / clip.alignment, attention)

    def _recognise(self, sounds: list[_Sound]) -> None:
        by_language: dict[str, list[_Sound]] = defaultdict(list)
        for sound in sounds:
            by_language[sound.clip.language or "en"].append(sound)
        for language, group in by_language.items():
            for sound, text in zip(group, self.transcripts.of([s.wave for s in group], language), strict=True):
                heard, said = spoken_form(text, language), spoken_form(sound.clip.text, language)
                sound.result.hypothesis = text
                sound.result.word_errors = metrics.edit_distance(said.split(), heard.split())
                sound.result.character_errors = metrics.edit_distance(letters(said), letters(heard))


class _Transcripts:
    """A recogniser that remembers what it heard in which sound, in a JSON file."""

    def __init__(self, path: Path, recogniser: Recogniser) -> None:
        self.path, self.recogniser = path, recogniser
        self.known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def of(self, waves: Sequence[np.ndarray], language: str) -> list[str]:
        """Transcripts of 16 kHz waves; '' for a wave without samples."""
        keys = [self._key(wave, language) for wave in waves]
        new = {key: wave for key, wave in zip(keys, waves, strict=True) if key not in self.known and len(wave)}
        if new:
            texts = self.recogniser.transcribe(list(new.values()), SAMPLE_RATE, language)
            self.known.update(zip(new, texts, strict=True))
            write_json(self.path, self.known)
        return [self.known.get(key, "") for key in keys]

    def _key(self, wave: np.ndarray, language: str) -> str:
        digest = hashlib.sha256((wave.clip(-1, 1) * 32767).astype("<i2").tobytes()).hexdigest()[:32]
        return f"{self.recogniser.name}|{language}|{digest}"


def _describe(wave: np.ndarray) -> _Reference:
    log_mel = mel(torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32)), EVAL_MEL).numpy()
    return _Reference(log_mel, track_pitch(wave, SAMPLE_RATE, EVAL_MEL.hop), pictures.mel_scale(log_mel))


def _compare(result: ConditionResult, reference: _Reference, other: _Reference, straight: bool) -> None:
    """Distances to the recording: frame by frame for a resynthesis, along a warping path for speech with its own timing."""
    path = metrics.straight_path(reference.mel.shape[1], other.mel.shape[1]) if straight else warp(reference.mel.T, other.mel.T)
    result.mel_distance = metrics.mel_distance(reference.mel, other.mel, path)
    result.cepstral_distortion = metrics.cepstral_distortion(reference.mel, other.mel, path)
    result.pitch_error, result.pitch_correlation = metrics.pitch_agreement(reference.pitch, other.pitch, path)


def spoken_form(text: str, language: str) -> str:
    """``comparison_form``, imported when it is first needed."""
    from lalia.text.compare import comparison_form

    return comparison_form(text, language)


def letters(form: str) -> str:
    """What a character error rate counts."""
    return form.replace(" ", "")


def reason_of(error: BaseException) -> str:
    """The message of an error, its class where there is none."""
    return str(error) or type(error).__name__


def _bar(visible: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, disable=not visible, transient=False)
