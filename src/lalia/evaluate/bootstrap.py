"""Percentile bootstrap intervals over clips (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).

A clip is the unit that is drawn with replacement, because words of one clip succeed or fail together. The interval says how
far the figure would move with other clips of the same kind; it says nothing about other voices or another training run.
Below about ten clips it is too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
#: drawn indices held in memory at once
CHUNK = 4_000_000

Interval = tuple[float, float]
NO_INTERVAL: Interval = (math.nan, math.nan)


def interval(
    statistic: Callable[[np.ndarray], np.ndarray],
    count: int,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Low and high end of the ``level`` interval.

    Args:
        statistic: maps drawn clip indices ``[R, N]`` to R values; values that are not finite (a draw of equal clips has no
            correlation) are left out.
        count: N, the number of clips. Below 2 there is no interval: (nan, nan).
    """
    if count < 2:
        return NO_INTERVAL
    rng = np.random.default_rng(seed)
    rows = max(1, min(resamples, CHUNK // count))
    values = []
    for first in range(0, resamples, rows):
        drawn = rng.integers(0, count, (min(rows, resamples - first), count))
        values.append(np.asarray(statistic(drawn), dtype=np.float64))
    finite = np.concatenate(values)
    finite = finite[np.isfinite(finite)]
    if finite.size == 0:
        return NO_INTERVAL
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def ratio_interval(parts: np.ndarray, wholes: np.ndarray, seed: int = 0, level: float = LEVEL) -> Interval:
    """Interval of Σ parts / Σ wholes, both ``[N]`` by clip: the corpus-level word error rate, the real-time factor."""
    parts, wholes = np.asarray(parts, dtype=np.float64), np.asarray(wholes, dtype=np.float64)

    def statistic(drawn: np.ndarray) -> np.ndarray:
        whole = wholes[drawn].sum(1)
        return np.divide(parts[drawn].sum(1), whole, out=np.full(len(drawn), np.nan), where=whole > 0)

    return interval(statistic, len(parts), seed=seed, level=level)


def mean_interval(values: np.ndarray, seed: int = 0, level: float = LEVEL) -> Interval:
    """Interval of the mean of ``values [N]``."""
    return ratio_interval(values, np.ones(len(values)), seed, level)


def median_interval(values: np.ndarray, seed: int = 0, level: float = LEVEL) -> Interval:
    """Interval of the median of ``values [N]``."""
    values = np.asarray(values, dtype=np.float64)
    return interval(lambda drawn: np.median(values[drawn], axis=1), len(values), seed=seed, level=level)


def correlation_interval(first: np.ndarray, second: np.ndarray, seed: int = 0, level: float = LEVEL) -> Interval:
    """Interval of Pearson's correlation of two values by clip, ``[N]`` each."""
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)

    def statistic(drawn: np.ndarray) -> np.ndarray:
        a = first[drawn] - first[drawn].mean(1, keepdims=True)
        b = second[drawn] - second[drawn].mean(1, keepdims=True)
        scale = np.sqrt((a * a).sum(1) * (b * b).sum(1))
        return np.divide((a * b).sum(1), scale, out=np.full(len(drawn), np.nan), where=scale > 1e-12)

    return interval(statistic, len(first), seed=seed, level=level)
