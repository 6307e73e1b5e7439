"""Simulated dialogues for tests, demos and ablations: real recorded clips, exact labels, no licence to sign.

Nobody in them feels anything. Clips of a base corpus are given other pitch, tempo and level by a known process
(:mod:`lalia.corpora._simulate`), so that a score on them says what a model can learn in principle, in particular whether it uses
the history of a dialogue, and nothing about emotion in people.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lalia import audio
from lalia.corpora import _simulate as process
from lalia.corpora._common import (
    CorpusError,
    CorpusUnavailable,
    Options,
    PrepareResult,
    Reason,
    progress,
    select,
    share_position,
)
from lalia.corpora.asterisk import SPEAKERS, AsteriskOptions, prepare_asterisk
from lalia.corpora.folds import official_fold
from lalia.corpora.synth import SynthOptions, prepare_synth
from lalia.data import Row, read_manifest, write_json, write_manifest

SHARES = {"train": 0.625, "valid": 0.125, "test": 0.25}
MOST_PER_SESSION = 4  # dialogues that two virtual speakers hold together
LABELS = ("valence", "arousal", "valence_now", "arousal_now")
GAP_SECONDS = (0.2, 0.8)
BASES = ("asterisk", "synth")
NOTE = "simulated dialogues for tests, demos and ablations: real clips, changed by a known process; scores say nothing about people"
ABOUT = """# Simulated dialogues

{note}.

Every turn is a recorded clip whose pitch, tempo and level were changed by the *present* drive of its speaker. The labels
`valence` and `arousal` are a state that remembers earlier drives of both speakers: knowing the drive of the present turn exactly
allows a CCC of at most {ceiling:.3f} (`stateless_ceiling`); the rest can only be known from the turns before. The control labels
`valence_now` and `arousal_now` are the present drive and need no history.

{formulas}

The two speakers of a session are base voices with a constant warp (pitch and formants), tempo and level; speakers and
sentences differ between train, valid and test, base voices ({voices}) are shared. The licence of the base clips applies.
"""


@dataclass
class DialoguesOptions(Options):
    """``base``: asterisk, synth, or manifests of any corpus; the seconds limit its clips. ``languages``: of asterisk."""

    needs_text: ClassVar[bool] = False
    has_folds: ClassVar[bool] = True

    min_seconds: float = 0.8
    max_seconds: float = 6.0
    base: list[str] = field(default_factory=lambda: ["asterisk"])
    dialogues: int = 96
    turns: int = 24
    seed: int = 0
    workers: int = 1
    languages: list[str] = field(default_factory=lambda: list(SPEAKERS))
    download: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inputs:
            raise CorpusError(f"`prepare dialogues` takes its clips by --base, not {', '.join(self.inputs)}")
        if self.sample_rate not in (None, process.SAMPLE_RATE):
            raise CorpusError(f"simulated dialogues are made at {process.SAMPLE_RATE} Hz, not {self.sample_rate}")
        if self.dialogues < 3 or self.turns < 1 or self.workers < 1 or self.seed < 0 or not self.base:
            raise CorpusError("need dialogues >= 3 (train, validate, test), turns >= 1, workers >= 1, seed >= 0, a base")


@dataclass(frozen=True)
class Turn:
    """One turn before it is rendered."""

    id: str
    clip: Row
    speaker: str
    drive: np.ndarray
    state: np.ndarray
    acoustics: process.Acoustics
    gap: float
    target: str


@dataclass(frozen=True)
class Dialogue:
    """The plan of one dialogue: everything but the exact length of its turns."""

    id: str
    session: str
    part: str
    order: np.ndarray
    turns: list[Turn]


def prepare_dialogues(options: DialoguesOptions) -> PrepareResult:
    """Simulate ``options.dialogues`` dialogues of ``options.turns`` turns into ``out/audio``.

    The same options and base give the same bytes, in one process or several. A call that was stopped goes on where it was.

    Raises:
        CorpusUnavailable: the base cannot be had here.
        CorpusError: too few base clips for three splits.
    """
    base, facts = _base(options)
    voices = _voices(base.rows)
    plans = [_plan(number, voices, options) for number in range(options.dialogues)]
    _claim(options, plans)
    rendered = _rendered(plans, options)
    rows = [row for plan, lengths in zip(plans, rendered, strict=True) for row in _rows(plan, [x for x, _ in lengths])]
    ceiling = process.stateless_ceiling([plan.order for plan in plans])
    outside = (Reason.too_short, Reason.too_long)  # a choice of material, not a fault of it
    result = PrepareResult(rows, [item for item in base.rejected if item.reason not in outside], notes=[NOTE])
    result.facts = {
        **facts,
        "simulated": True,
        "formulas": process.FORMULAS,
        "stateless_ceiling": round(ceiling, 4),
        "base_clips": {part: sum(len(clips[part]) for clips in voices.values()) for part in SHARES},
        "base_voices": sorted("/".join(voice) for voice in voices),
        "peaks_lowered": sum(lowered for lengths in rendered for _, lowered in lengths),
    }
    part_of = [plan.part for plan in plans for _ in plan.turns]
    result.folds = official_fold(rows, {row.id: part for row, part in zip(rows, part_of, strict=True)})
    result.notes.append(f"a model without memory can reach a CCC of {ceiling:.3f} on valence and arousal, one with memory 1")
    _describe(options.out, ceiling, result.facts["base_voices"])
    return result


def _describe(out: Path, ceiling: float, voices: Sequence[str]) -> None:
    formulas = "\n".join(f"- {name}: `{formula}`" for name, formula in process.FORMULAS.items())
    text = ABOUT.format(note=NOTE, ceiling=ceiling, formulas=formulas, voices=", ".join(voices))
    (out / "README.md").write_text(text, "utf-8", newline="\n")


# --- base clips ---
def _base(options: DialoguesOptions) -> tuple[PrepareResult, dict[str, Any]]:
    """Examined clips of every base, and what is to be said about them."""
    rows: list[Row] = []
    fetched: dict[str, Any] = {}
    for name in options.base:
        if name in BASES:
            found, fetched[name] = _fetched(name, options)
            rows.extend(found)
        else:
            rows.extend(_listed(Path(name).expanduser()))
    result = select(rows, replace(options, sample_rate=None, out=options.out / "base"))
    counts = Counter(item.reason.value for item in result.rejected)
    return result, {"base": options.base, "base_rejected": dict(counts), **({"base_sources": fetched} if fetched else {})}


def _fetched(name: str, options: DialoguesOptions) -> tuple[list[Row], dict[str, Any]]:
    """The clips of a source, prepared once under ``out/base``."""
    folder = options.out / "base" / "-".join([name, *(sorted(options.languages) if name == "asterisk" else [])])
    manifest, stored = folder / "clips.jsonl", folder / "facts.json"
    if not manifest.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        result = _make_base(name, folder, options)
        write_json(stored, result.facts)
        write_manifest(manifest, result.rows)
    return list(read_manifest(manifest)), json.loads(stored.read_text("utf-8"))


def _make_base(name: str, folder: Path, options: DialoguesOptions) -> PrepareResult:
    common: dict[str, Any] = {"out": folder, "sample_rate": process.SAMPLE_RATE, "progress": options.progress}
    if name == "synth":
        return prepare_synth(SynthOptions(**common))
    try:
        return prepare_asterisk(AsteriskOptions(**common, languages=options.languages, download=options.download))
    except CorpusUnavailable as error:
        raise CorpusUnavailable(f"{error}; for dialogues: `--base synth`, or `--base MANIFEST` of any corpus") from error


def _listed(path: Path) -> Iterable[Row]:
    """The rows of a manifest, or of all manifests that ``prepare`` wrote into a folder."""
    paths = [p for p in (path / f"{part}.jsonl" for part in SHARES) if p.is_file()] if path.is_dir() else [path]
    if not paths:
        raise CorpusError(f"--base {path}: a folder without train.jsonl; name a manifest, or {' or '.join(BASES)}")
    return [row for p in paths if p.stat().st_size for row in read_manifest(p)]


def _voices(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, list[Row]]]:
    """(speaker, language) → part → clips. A sentence belongs to one part, by the hash of its words, whoever says it."""
    voices: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        words = "".join(c for c in row.text.lower() if c.isalnum()) or row.id
        clips = voices.setdefault((row.speaker or "speaker", row.language or "und"), {part: [] for part in SHARES})
        clips[_part(share_position(words))].append(row)
    complete = {name: clips for name, clips in sorted(voices.items()) if all(clips.values())}
    if not complete:
        there = f"{len(rows)} usable clips of {len(voices)} voices"
        raise CorpusError(f"no voice of the base has a clip in each of train, valid and test ({there}): give it more clips")
    return complete


def _part(position: float) -> str:
    """Train, valid or test by a number in 0…1."""
    edge = 0.0
    for part, share in SHARES.items():
        edge += share
        if position < edge:
            return part
    return "test"


# --- the plan ---
def _session(number: int, dialogues: int) -> tuple[int, str]:
    """Session and part of a dialogue: sessions of up to four, at least three of them, one of each part."""
    size = max(1, min(MOST_PER_SESSION, dialogues // 3))
    sessions = -(-dialogues // size)
    held = {part: max(1, round(SHARES[part] * sessions)) for part in ("valid", "test")}
    session = number // size
    if session < sessions - held["valid"] - held["test"]:
        return session, "train"
    return session, "valid" if session < sessions - held["test"] else "test"


def _plan(number: int, voices: dict[tuple[str, str], dict[str, list[Row]]], options: DialoguesOptions) -> Dialogue:
    """A pure function of the seed and the number: no dialogue depends on another, so several processes make the same ones."""
    session, part = _session(number, options.dialogues)
    name = f"s{session + 1:02d}"
    casting = np.random.default_rng([options.seed, 1, session])
    chosen = casting.permutation(len(voices))[:2]
    base = [list(voices)[i] for i in (chosen[0], chosen[-1])]
    manner = [process.Voice.draw(casting) for _ in base]
    rng = np.random.default_rng([options.seed, 2, number])
    order, drive = process.draw_order(rng, options.turns), process.draw_drive(rng, options.turns)
    state = process.states(order, drive)
    clips = [_shuffled(voices[voice][part], rng, options.turns) for voice in base]
    identifier = f"{name}-d{number + 1:03d}"
    turns = []
    for turn, who in enumerate(int(x) for x in order):
        key = f"{identifier}-t{turn:03d}"
        target = str(options.out / "audio" / identifier / f"{key}.flac")
        gap = round(float(rng.uniform(*GAP_SECONDS)), 3)
        sound = manner[who].acoustics(drive[turn])
        speaker = f"{name}-{'ab'[who]}"
        turns.append(Turn(key, clips[who][turn], speaker, drive[turn], state[turn], sound, gap, target))
    return Dialogue(identifier, name, part, order, turns)


def _shuffled(clips: Sequence[Row], rng: np.random.Generator, count: int) -> list[Row]:
    """``count`` clips, none again before all were said."""
    rounds = -(-count // len(clips))
    return [clips[i] for i in np.concatenate([rng.permutation(len(clips)) for _ in range(rounds)])[:count]]


def _claim(options: DialoguesOptions, plans: Sequence[Dialogue]) -> None:
    """Keep rendered turns only if they are those of this plan: another plan begins anew."""
    turns = [
        [turn.id, turn.clip.id, Path(turn.clip.audio).stat().st_size, turn.clip.start, turn.clip.duration, asdict(turn.acoustics)]
        for plan in plans
        for turn in plan.turns
    ]
    fixed = [process.LEVEL_DB, process.HIGHEST_PEAK, process.SAMPLE_RATE]
    digest = hashlib.blake2b(json.dumps([fixed, turns]).encode("utf-8"), digest_size=16).hexdigest()
    mark = options.out / "simulation.json"
    if mark.is_file() and json.loads(mark.read_text("utf-8")).get("plan") == digest:
        return
    for plan in plans:
        for turn in plan.turns:
            Path(turn.target).unlink(missing_ok=True)
    write_json(mark, {"plan": digest, "formulas": process.FORMULAS, "turns": len(turns)})


# --- sound and rows ---
def _rendered(plans: Sequence[Dialogue], options: DialoguesOptions) -> list[list[tuple[float, bool]]]:
    """(seconds, whether the peak had to be lowered) of every turn."""
    jobs = [plan.turns for plan in plans]
    if options.workers == 1:
        return [render_turns(turns) for turns in progress(jobs, "simulating dialogues", options)]
    context = multiprocessing.get_context("spawn")  # a forked process would inherit locks that other threads hold
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        done: Iterator[list[tuple[float, bool]]] = pool.map(render_turns, jobs)
        return [lengths for _, lengths in zip(progress(jobs, "simulating dialogues", options), done, strict=True)]


def render_turns(turns: Sequence[Turn]) -> list[tuple[float, bool]]:
    """Write the turns that are not there yet, and give the length of each in seconds."""
    return [_kept(turn) or _render(turn) for turn in turns]


def _render(turn: Turn) -> tuple[float, bool]:
    wave, rate = audio.read(turn.clip.audio, start=turn.clip.start, duration=turn.clip.duration)
    changed, lowered = process.render(wave, rate, turn.acoustics)
    audio.write(turn.target, changed, process.SAMPLE_RATE)
    return len(changed) / process.SAMPLE_RATE, lowered


def _kept(turn: Turn) -> tuple[float, bool] | None:
    """A turn that an earlier call wrote; None if there is none, or it is damaged."""
    if not Path(turn.target).is_file():
        return None
    try:
        wave, rate = audio.read(turn.target)
    except audio.AudioError:
        return None
    return len(wave) / rate, bool(np.abs(wave).max() > process.HIGHEST_PEAK - 1e-4)


def _rows(plan: Dialogue, seconds: Sequence[float]) -> Iterator[Row]:
    clock = 0.0
    for number, (turn, length) in enumerate(zip(plan.turns, seconds, strict=True)):
        values = [float(value) for pair in (turn.state, turn.drive) for value in process.scaled(pair)]
        labels = {name: round(value, 6) for name, value in zip(LABELS, values, strict=True)}
        extra = {"time": round(clock, 3), "session": plan.session, "scripted": True, "base": turn.clip.id}
        yield Row(
            turn.id, turn.target, duration=length, text=turn.clip.text, speaker=turn.speaker, language=turn.clip.language,
            labels=labels, dialogue=plan.id, turn=number, extra=extra,
        )  # fmt: skip
        clock += length + turn.gap
