"""Jitter and shimmer: period by period through the voiced parts, by the correlation of each period with the next."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from lalia.egemaps.frames import LONG_SECONDS, compiled, layout

SEARCH = 0.1  # how far a period may be from the frame's pitch, as a fraction
ALIKE = 0.5  # correlation above which two periods are taken to follow each other


def jitter_shimmer(wave: np.ndarray, sample_rate: int, frequency: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Local jitter (a fraction) and local shimmer (dB) of each 60 ms frame: wave [S], pitch in Hz [T] → [T] and [T].

    Jitter is the mean difference of neighbouring periods over the mean period, shimmer 20 log10(1 + the mean difference
    of neighbouring peak-to-peak amplitudes over the mean amplitude); both are 0 in unvoiced frames. A frame goes on where
    the last period of the frame before ended; one that completes no period of its own repeats the values before it.
    """
    shape = layout(sample_rate, LONG_SECONDS)
    match = compiled(match_periods)
    jitter, shimmer = np.zeros(len(frequency)), np.zeros(len(frequency))
    position, behind = 0, 0  # where to go on, and how many samples that is before the frame
    period, last_jitter, last_shimmer = 0.0, 0.0, 0.0
    for frame, hertz in enumerate(frequency.tolist()):
        due = shape.step + behind
        if hertz <= 0:
            position, behind = position + due, 0
            period, last_jitter, last_shimmer = 0.0, 0.0, 0.0
            continue
        expected = sample_rate / hertz
        low, high = math.floor((1 - SEARCH) * expected), math.ceil((1 + SEARCH) * expected)
        read = min(max(due, 2 * high + 2), behind + shape.length)
        found, done = match(wave[position : position + read].astype(np.float64), low, high, expected, due, ALIKE)
        position, behind = position + done, due - done
        periods = found.tolist()
        lengths = [period] * (period > 0) + [row[0] for row in periods]
        changes = [abs(after - before) for before, after in pairwise(lengths)]
        if periods:
            period = lengths[-1]
            heights = sum(row[1] + row[2] for row in periods)
            average = sum(row[0] for row in periods) / len(periods)
            last_jitter = min(1.0, sum(changes) / len(changes) / average) if changes else last_jitter
            last_shimmer = min(1.0, 2 * sum(abs(row[1] - row[2]) for row in periods) / heights) if heights > 0 else 0.0
        jitter[frame] = last_jitter if changes or not periods else 0.0
        shimmer[frame] = last_shimmer
    return jitter, 20 * np.log10(1 + shimmer)


def match_periods(
    part: np.ndarray, low: int, high: int, expected: float, due: int, alike: float
) -> tuple[np.ndarray, int]:
    """The periods of ``low`` to ``high`` samples that ``part`` float64 [S] begins with, each like the one after it.

    Returns [N, 3]: length in samples (from the parabola through the best correlations), peak-to-peak amplitude, and that
    of the following period; and where the last period ends that lies within ``due`` samples. Plain loops, compiled where
    numba is installed.
    """
    found, count, start, done = np.zeros((len(part) // max(low, 1) + 1, 3)), 0, 0, 0
    correlations = np.zeros(high - low + 1)
    while start < len(part) - 2 * high - 1:
        for lag in range(low, high + 1):
            first, second = part[start : start + lag], part[start + lag : start + 2 * lag]
            first, second = first - first.mean(), second - second.mean()
            scale = np.sqrt((first * first).sum() * (second * second).sum())
            correlations[lag - low] = (first * second).sum() / scale if scale > 0 else 0.0
        best = -1
        for i in range(1, high - low - 1):
            peak = correlations[i - 1] < correlations[i] and correlations[i] > correlations[i + 1]
            if peak and (best < 0 or correlations[i] > correlations[best]):
                best = i
        if best < 0:
            start += int(np.floor(expected + 0.5))
        else:
            left, middle, right = correlations[best - 1], correlations[best], correlations[best + 1]
            offset = 0.5 * (left - right) / (left - 2 * middle + right)
            lag = low + best
            if middle - 0.25 * (left - right) * offset > alike:
                inner, following = part[start + 1 : start + lag - 1], part[start + lag + 1 : start + 2 * lag - 1]
                found[count, 0] = lag + offset
                found[count, 1], found[count, 2] = inner.max() - inner.min(), following.max() - following.min()
                count += 1
            start += lag
        if start < due - 1:
            done = start
    return found[:count], done
