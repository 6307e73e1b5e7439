"""Pitch: subharmonic summation (Hermes 1988) on 60 ms Gaussian frames, then one smooth path through the candidates.

The spectrum is put on an octave scale by a cubic spline, its valleys are cleared, it is weighted like hearing at low
frequencies, and 15 compressed copies, each moved by a harmonic, are summed. The six highest peaks of the sum are the
candidates of the frame; a Viterbi search over the utterance takes one of them, or none (unvoiced).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lalia.egemaps.frames import LONG_SECONDS, Layout, compiled, gaussian, layout, parabola

LOWEST_PITCH, HIGHEST_PITCH = 55.0, 1000.0
LOWEST_OCTAVE = 25.0  # Hz at which the octave scale begins
HARMONICS, HARMONIC_WEIGHT = 15, 0.85
CANDIDATES = 6
VOICING = 0.7
SEMITONE_BASE = 27.5
#: frames of less RMS than this, after the window, are unvoiced whatever their peaks
SILENCE = 0.001
#: the search decides about a frame at the latest when this many frames wait
LOOKAHEAD = 40


@dataclass(frozen=True)
class OctaveScale:
    """A spectrum [bins] on the octave scale [points]: ``resample`` float32 [bins, points], ``hearing`` [points].

    Point i lies at ``first`` + i · ``step`` octaves above 1 Hz; harmonic h lies ``shifts[h - 2]`` points higher.
    """

    resample: np.ndarray
    hearing: np.ndarray
    first: float
    step: float
    shifts: tuple[int, ...]


@lru_cache(maxsize=4)
def octave_scale(shape: Layout) -> OctaveScale:
    """The scale from 25 Hz to Nyquist with as many points as the spectrum has bins."""
    points = shape.bins
    source = np.log2(np.maximum(shape.frequencies, shape.bin_width / 2))
    first, last = np.log2(LOWEST_OCTAVE), np.log2(shape.sample_rate / 2)
    target = np.linspace(first, last, points)
    per_octave = points / (last - first)
    knee = per_octave * np.log2(65.0 / 50.0) - 1.0
    hearing = 0.5 + np.arctan(3.0 * (np.arange(points) + 1 - knee) / per_octave) / np.pi
    shifts = tuple(int(per_octave * np.log2(harmonic)) for harmonic in range(2, HARMONICS + 1))
    step = (last - first) / (points - 1)
    return OctaveScale(_spline(source, target).T.astype(np.float32), hearing.astype(np.float32), first, step, shifts)


def _spline(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The matrix [M, N] that evaluates the natural cubic spline through values at ``source`` [N] at ``target`` [M].

    The second derivatives solve a tridiagonal system, which is eliminated here for all unit vectors at one time.
    """
    gaps, count = np.diff(source), len(source)
    second, upper = np.zeros((count, count)), np.zeros(count)
    for k in range(1, count - 1):
        pivot = 2 * (gaps[k - 1] + gaps[k]) - gaps[k - 1] * upper[k - 1]
        upper[k] = gaps[k] / pivot
        right = -gaps[k - 1] * second[k - 1]
        right[k - 1 : k + 2] += 6 * np.array([1 / gaps[k - 1], -1 / gaps[k - 1] - 1 / gaps[k], 1 / gaps[k]])
        second[k] = right / pivot
    for k in range(count - 2, 0, -1):
        second[k] -= upper[k] * second[k + 1]
    cell = np.clip(np.searchsorted(source, target) - 1, 0, count - 2)
    width = gaps[cell]
    left = (source[cell + 1] - target) / width
    right = 1 - left
    matrix = ((left**3 - left) * width**2 / 6)[:, None] * second[cell]
    matrix += ((right**3 - right) * width**2 / 6)[:, None] * second[cell + 1]
    rows = np.arange(len(target))
    matrix[rows, cell] += left
    matrix[rows, cell + 1] += right
    return matrix


@dataclass
class Candidates:
    """Up to six pitches of each of T frames, best first, 0 where there are fewer: ``frequency`` Hz and ``voicing`` [T, 6].

    ``loud`` [T]: the frame has enough energy to be voiced.
    """

    frequency: np.ndarray
    voicing: np.ndarray
    loud: np.ndarray


def long_magnitudes(cut: np.ndarray, shape: Layout) -> np.ndarray:
    """Magnitude spectra of 60 ms frames: [T, length] → float32 [T, bins]."""
    return np.abs(np.fft.rfft(cut * gaussian(shape.length), shape.size)).astype(np.float32)


def candidates(wave: np.ndarray, sample_rate: int) -> Candidates:
    """Candidates of all 60 ms frames of ``wave`` float32 [S], which must hold at least one."""
    shape = layout(sample_rate, LONG_SECONDS)
    frames = shape.count(len(wave))
    frequency, voicing = np.zeros((frames, CANDIDATES)), np.zeros((frames, CANDIDATES))
    loud = np.zeros(frames, bool)
    for first, last in shape.blocks(frames):
        windowed = shape.cut(wave, first, last) * gaussian(shape.length)
        power = np.einsum("ts,ts->t", windowed, windowed, dtype=np.float64) / shape.length
        loud[first:last] = np.sqrt(power) > SILENCE
        magnitude = np.abs(np.fft.rfft(windowed, shape.size)).astype(np.float32)
        scale = octave_scale(shape)
        total = subharmonic_sum(magnitude, scale)
        frequency[first:last], voicing[first:last] = _peaks(total, scale)
    return Candidates(frequency, voicing, loud)


def subharmonic_sum(magnitude: np.ndarray, scale: OctaveScale) -> np.ndarray:
    """float32 [T, bins] → the sum over harmonics on the octave scale, [T, points]."""
    octaves = np.maximum(_smoothed(_enhanced(magnitude)) @ scale.resample, 0) * scale.hearing
    total, weight = octaves.copy(), np.float32(1.0)
    for shift in scale.shifts:
        weight *= np.float32(HARMONIC_WEIGHT)
        total[:, : octaves.shape[1] - shift] += octaves[:, shift:] * weight
    return total / np.float32(HARMONICS)


def _enhanced(magnitude: np.ndarray) -> np.ndarray:
    """Clear all bins between the first and the last peak that lie more than two bins from every peak."""
    padded = np.pad(magnitude, ((0, 0), (1, 1)), constant_values=-1.0)
    middle, left, right = padded[:, 1:-1], padded[:, :-2], padded[:, 2:]
    peak = (middle > left) & (middle >= right)
    peak[:, 0] = magnitude[:, 0] > magnitude[:, 1]
    near = peak.copy()
    for distance in (1, 2):
        near[:, distance:] |= peak[:, :-distance]
        near[:, :-distance] |= peak[:, distance:]
    before = np.logical_or.accumulate(peak, axis=1)
    after = np.logical_or.accumulate(peak[:, ::-1], axis=1)[:, ::-1]
    return np.where(~near & before & after, np.float32(0), magnitude)


def _smoothed(magnitude: np.ndarray) -> np.ndarray:
    """Weights ¼ ½ ¼ along the bins; the last bin stays."""
    smooth = 0.5 * magnitude
    smooth[:, 1:] += 0.25 * magnitude[:, :-1]
    smooth[:, :-1] += 0.25 * magnitude[:, 1:]
    smooth[:, -1] = magnitude[:, -1]
    return smooth


def _peaks(total: np.ndarray, scale: OctaveScale) -> tuple[np.ndarray, np.ndarray]:
    """The candidates of each frame: [T, points] → frequency and voicing, both [T, 6]."""
    frames = len(total)
    peak = np.zeros(total.shape, bool)
    peak[:, 1:-1] = (total[:, 1:-1] > total[:, :-2]) & (total[:, 1:-1] > total[:, 2:])
    height = np.where(peak, total, 0)
    index = np.argpartition(-height, CANDIDATES, axis=1)[:, :CANDIDATES]
    order = np.argsort(-np.take_along_axis(height, index, 1), axis=1, kind="stable")
    index = np.clip(np.take_along_axis(index, order, 1), 1, total.shape[1] - 2)
    around = [np.take_along_axis(total, index + side, 1).astype(np.float64) for side in (-1, 0, 1)]
    offset, score = parabola(*around)
    frequency = 2.0 ** (scale.first + scale.step * (index + offset))
    mean = total.mean(1, dtype=np.float64)[:, None]
    voicing = np.where(score > mean, 1 - mean / np.where(score > mean, score, 1.0), 0.0)
    valid = np.take_along_axis(peak, index, 1) & (frequency >= LOWEST_PITCH) & (frequency <= HIGHEST_PITCH)
    front = np.argsort(~valid, axis=1, kind="stable")
    frequency, voicing, score = (
        np.take_along_axis(np.where(valid, part, 0.0), front, 1) for part in (frequency, voicing, score)
    )
    best, rows = score.argmax(1), np.arange(frames)  # the top of the parabola may change the order
    for part in (frequency, voicing):
        part[rows, best], part[:, 0] = part[:, 0].copy(), part[rows, best]
    return frequency, voicing


def choose_pitch(found: Candidates) -> tuple[np.ndarray, int]:
    """The pitch of every frame in Hz, float64 [T], 0 where it is unvoiced; and how many frames were settled at the end."""
    costs = local_costs(found.frequency, found.voicing)
    with np.errstate(divide="ignore"):
        octaves = np.where(found.frequency > 0, np.log(found.frequency), 0.0)
    states, settled = compiled(best_path)(costs, octaves, found.frequency > 0, LOOKAHEAD)
    chosen = np.concatenate([found.frequency, np.zeros((len(states), 1))], 1)[np.arange(len(states)), states]
    return np.where(found.loud, chosen, 0.0), settled


def semitones(frequency: np.ndarray) -> np.ndarray:
    """Hz to semitones above 27.5 Hz; 0 stays 0 (unvoiced)."""
    return np.where(frequency > 0, 12 * np.log2(np.maximum(frequency, 1e-9) / SEMITONE_BASE), 0.0)


def local_costs(frequency: np.ndarray, voicing: np.ndarray) -> np.ndarray:
    """What each candidate, and silence (last), costs by itself: [T, 6] twice → [T, 7].

    A weak candidate is dear, and more so below the voicing threshold; so are pitches outside 100-350 Hz. Silence
    costs only where some candidate is above the threshold.
    """
    strength = np.clip(voicing, 0.01, 1.0)
    threshold = np.float64(np.float32(VOICING))
    knots = ((0.0, 100.0, 350.0, 600.0), (1.0, 0.0, 0.0, 1.0))
    unusual = np.where(frequency >= 600.0, 1.2, np.interp(frequency, *knots))
    unusual = np.where(frequency <= 0, 2.0, unusual)
    voiced = 2.0 * (-np.log(strength) + 4.0 * (strength < threshold)) + unusual
    silent = 8.0 * (voicing >= threshold).any(1)
    return np.concatenate([voiced, silent[:, None]], 1)


def best_path(costs: np.ndarray, octaves: np.ndarray, present: np.ndarray, lookahead: int) -> tuple[np.ndarray, int]:
    """The cheapest state of every frame: costs [T, 7], ln Hz [T, 6], present [T, 6] → int64 [T]; 6 is unvoiced.

    A change of pitch costs by its size and by its difference from the change that was looked at before; starting and
    ending voice cost 10; staying unvoiced costs 1. The search runs forward with all its paths and settles a frame when
    they agree on it, or when ``lookahead`` frames wait. Also returns the number of frames that were settled before the end.
    """
    frames, states = costs.shape
    silent = states - 1
    result = np.zeros(frames, np.int64)
    total = costs[0].copy()
    fresh = np.empty_like(total)
    paths, moved = np.zeros((states, lookahead), np.int64), np.zeros((states, lookahead), np.int64)
    paths[:, 0] = np.arange(states)
    settled, last_change = 0, 1.0
    for frame in range(1, frames):
        for state in range(states):
            best, source = np.inf, 0
            for other in range(states):
                if state < silent and other < silent:
                    if present[frame, state] and present[frame - 1, other]:
                        change = octaves[frame, state] - octaves[frame - 1, other]
                        cost = 10.0 * abs(change) + 10.0 * abs(change - last_change)
                        last_change = change
                    else:
                        cost = 999.0
                elif state == silent and other == silent:
                    cost = 1.0
                else:
                    cost, last_change = 10.0, 0.0
                if total[other] + cost < best:
                    best, source = total[other] + cost, other
            fresh[state] = best + costs[frame, state]
            moved[state] = paths[source]
            moved[state, frame % lookahead] = state
        total[:] = fresh
        paths[:] = moved
        if frame + 1 - settled >= lookahead:
            result[settled] = paths[np.argmin(total), settled % lookahead]
            settled += 1
            continue
        while settled <= frame and np.all(paths[:, settled % lookahead] == paths[0, settled % lookahead]):
            result[settled] = paths[0, settled % lookahead]
            settled += 1
    best_state = np.argmin(total)
    for frame in range(settled, frames):
        result[frame] = paths[best_state, frame % lookahead]
    return result, settled
