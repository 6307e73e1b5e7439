"""The hidden process behind simulated dialogues, and what it does to a recording.

Two speakers take turns. Every turn brings a fresh *drive* u [V, A] ~ N(0, 1), clipped to ±2.5, and moves the speaker's *state*::

    s ← ρ·s + (1 − ρ)·k·u + c·(last state of the other speaker)        s = 0 at the start of a dialogue

Sound follows the present drive alone (:class:`Acoustics`); the labels valence and arousal are the state. So a model that hears
one turn knows u and cannot know what earlier turns left behind: its best possible correlation is :func:`stateless_ceiling`,
while a model that keeps state can reach 1. The controls valence_now and arousal_now are the drive and need no history.

Legend: T turns, S samples, E dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
import soxr

SAMPLE_RATE = 16000
MEMORY = 0.75  # ρ
INPUT = 2.4  # k: brings the standard deviation of the state near 1, like that of the drive
COUPLING = 0.12  # c; ρ + c < 1 keeps the pair of speakers stable
MOST_DRIVE = 2.5
KEEPS_THE_FLOOR = 0.2  # probability that the same speaker goes on
LABEL_STEP = 0.8  # label = 3 + LABEL_STEP · value: a drive of ±2.5 is exactly 1 and 5
SEMITONES = (2.2, 1.0)  # by unit of (V, A)
LOG2_TEMPO = (-0.08, 0.22)
GAIN_DB = (-1.5, 3.5)
LEVEL_DB = -30.0  # of the active parts of a neutral clip: leaves room for the loudest drive
WARP = 0.12  # a speaker's constant pitch and formant factor lies in 1 ± WARP
NEUTRAL_TEMPO = 0.08
NEUTRAL_DB = 1.5
HIGHEST_PEAK = 0.98
TEMPO_LIMITS = (0.55, 1.9)  # FFmpeg's atempo skips samples above 2 and refuses below .5: beyond, it is applied twice
FORMULAS = {
    "state": "s = rho*s + (1-rho)*k*u + c*(other speaker's last state); 0 at the start of a dialogue",
    "labels": f"valence, arousal = 3 + {LABEL_STEP}*s clipped to 1..5; valence_now, arousal_now = 3 + {LABEL_STEP}*u",
    "semitones": f"{SEMITONES[0]}*u_V + {SEMITONES[1]}*u_A",
    "log2_tempo": f"{LOG2_TEMPO[0]}*u_V + {LOG2_TEMPO[1]}*u_A",
    "gain_db": f"{GAIN_DB[0]}*u_V + {GAIN_DB[1]}*u_A",
    "rho, k, c": f"{MEMORY}, {INPUT}, {COUPLING}",
}


@dataclass(frozen=True)
class Acoustics:
    """Changes to a clip: ``pitch`` and ``tempo`` factors (formants move with pitch), ``gain_db``."""

    pitch: float
    tempo: float
    gain_db: float


@dataclass(frozen=True)
class Voice:
    """What a virtual speaker always does to the clips of the base voice: factors and dB, constant over a session."""

    warp: float
    tempo: float
    gain_db: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Voice:
        warp, tempo, gain = rng.uniform(-1, 1, 3)
        return cls(1 + WARP * warp, 1 + NEUTRAL_TEMPO * tempo, NEUTRAL_DB * gain)

    def acoustics(self, drive: np.ndarray) -> Acoustics:
        """``drive`` [V, A] on top of the speaker's own constants."""
        semitones, log2_tempo, gain_db = (float(np.dot(drive, slope)) for slope in (SEMITONES, LOG2_TEMPO, GAIN_DB))
        return Acoustics(self.warp * 2 ** (semitones / 12), self.tempo * 2**log2_tempo, self.gain_db + gain_db)


def draw_order(rng: np.random.Generator, turns: int) -> np.ndarray:
    """Who speaks, 0 or 1 [T]: mostly by turns."""
    changes = rng.random(turns) >= KEEPS_THE_FLOOR
    return (rng.integers(2) + np.cumsum(changes)) % 2


def draw_drive(rng: np.random.Generator, turns: int) -> np.ndarray:
    """Drives [T, 2] for valence and arousal."""
    return np.clip(rng.standard_normal((turns, 2)), -MOST_DRIVE, MOST_DRIVE)


def states(order: np.ndarray, drive: np.ndarray) -> np.ndarray:
    """The state of the turn's speaker after each turn, [T, E], for ``order`` [T] and ``drive`` [T, E]."""
    last = np.zeros((2, drive.shape[1]))
    found = np.empty_like(drive, dtype=np.float64)
    for turn, speaker in enumerate(order):
        last[speaker] = MEMORY * last[speaker] + (1 - MEMORY) * INPUT * drive[turn] + COUPLING * last[1 - speaker]
        found[turn] = last[speaker]
    return found


def stateless_ceiling(orders: Sequence[np.ndarray]) -> float:
    """The highest correlation, hence CCC, that knowing u of the turn alone allows with the unclipped state.

    The state is linear in the drives, so its answer to unit drives gives all variances: r = Σ cov(s, u) / √(T · Σ var s).
    """
    covariance = variance = 0.0
    for order in orders:
        weights = states(order, np.eye(len(order)))
        covariance += float(np.trace(weights))
        variance += float(np.square(weights).sum())
    return covariance / math.sqrt(sum(len(order) for order in orders) * variance)


def scaled(values: np.ndarray) -> np.ndarray:
    """State or drive → label units 1…5."""
    return np.clip(3 + LABEL_STEP * values, 1.0, 5.0)


# --- sound ---
def render(wave: np.ndarray, sample_rate: int, acoustics: Acoustics) -> tuple[np.ndarray, bool]:
    """A clip [S] with other pitch, tempo and level, 16 kHz; and whether its peak had to be lowered to stay below 1.

    Resampling moves pitch and formants and shortens; FFmpeg's ``atempo`` (WSOLA) then sets the length. The clip's own level is
    normalised first, so that loudness tells the drive.
    """
    moved = soxr.resample(wave.astype(np.float32), sample_rate * acoustics.pitch, SAMPLE_RATE)
    changed = change_tempo(moved, acoustics.tempo / acoustics.pitch)
    gain = 10 ** ((LEVEL_DB + acoustics.gain_db - active_level(changed)) / 20)
    peak = float(np.abs(changed).max()) * gain
    gain *= min(1.0, HIGHEST_PEAK / peak) if peak else 1.0
    return (changed * gain).astype(np.float32), bool(peak > HIGHEST_PEAK)


def active_level(wave: np.ndarray) -> float:
    """RMS in dB of the 20 ms frames that are within 30 dB of the loudest one; -120 at the lowest."""
    frame = SAMPLE_RATE // 50
    padded = np.pad(wave.astype(np.float64), (0, -len(wave) % frame))
    energy = np.square(padded).reshape(-1, frame).mean(axis=1)
    active = energy[energy >= energy.max() * 1e-3]
    return float(10 * np.log10(max(active.mean(), 1e-12)))


def change_tempo(wave: np.ndarray, factor: float) -> np.ndarray:
    """``wave`` [S] at 16 kHz, faster by ``factor`` at the same pitch: FFmpeg's atempo → [about S / factor]."""
    stages = 1
    while not TEMPO_LIMITS[0] <= factor ** (1 / stages) <= TEMPO_LIMITS[1]:
        stages += 1
    graph = av.filter.Graph()
    last = graph.add_abuffer(sample_rate=SAMPLE_RATE, format="flt", layout="mono", time_base=Fraction(1, SAMPLE_RATE))
    source = last
    for _ in range(stages):
        following = graph.add("atempo", f"{factor ** (1 / stages):.9f}")
        last.link_to(following)
        last = following
    sink = graph.add("abuffersink")
    last.link_to(sink)
    graph.configure()
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave, dtype=np.float32)[None], format="flt", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
    source.push(frame)
    source.push(None)
    return np.concatenate(_pulled(sink))


def _pulled(sink: Any) -> list[np.ndarray]:
    pieces: list[np.ndarray] = []
    while True:
        try:
            frame = sink.pull()
        except av.error.EOFError:
            return pieces
        pieces.append(frame.to_ndarray()[0])
