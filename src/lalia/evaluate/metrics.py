"""Distances between what was asked for and what was heard. Everything is numpy and deterministic.

Spectra are log-mels ``[M, T]`` (natural log of magnitudes) at one fixed resolution, :data:`EVAL_MEL`, whatever the system's own
is, so that systems of different sample rates can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lalia.evaluate import bootstrap
from lalia.evaluate.results import Better, Figure
from lalia.mel import MelSpec

#: 12.5 ms hop, 50 ms window, 80 mels up to 8 kHz (the resolution of Tacotron 2)
EVAL_MEL = MelSpec(sample_rate=16000, n_fft=1024, hop=200, win=800, mels=80)
CEPSTRA = 13
#: fewer frames voiced in both say nothing about pitch
MIN_VOICED = 10
FEW_CLIPS = 10


def edit_distance(reference: Sequence[object], hypothesis: Sequence[object]) -> int:
    """Least number of substitutions, deletions and insertions that turn one into the other (Levenshtein 1966).

    >>> edit_distance("the cat sat".split(), "a cat sat down".split())
    2
    """
    numbers: dict[object, int] = {}
    first = [numbers.setdefault(item, len(numbers)) for item in reference]
    second = np.array([numbers.setdefault(item, len(numbers)) for item in hypothesis], dtype=np.int64)
    steps = np.arange(len(second) + 1)
    row = steps.copy()
    for item in first:
        best = row + 1  # delete
        best[1:] = np.minimum(best[1:], row[:-1] + (second != item))  # keep or substitute
        row = np.minimum.accumulate(best - steps) + steps  # insert
    return int(row[-1])


def mel_distance(first: np.ndarray, second: np.ndarray, path: np.ndarray) -> float:
    """Mean absolute difference of log-mels ``[M, T]`` along ``path [P, 2]``, in nepers (1 = a factor e, 8.7 dB)."""
    return float(np.abs(first[:, path[:, 0]] - second[:, path[:, 1]]).mean())


def cepstral_distortion(first: np.ndarray, second: np.ndarray, path: np.ndarray) -> float:
    """Mel-cepstral distortion in dB along ``path [P, 2]``: 10√2 / ln 10 · ‖c − c'‖ over coefficients 1 … 13 (Kubichek 1993).

    The cepstra are the cosine transform of log-mels ``[M, T]``, not SPTK's generalised cepstra; values from other
    toolkits differ by a constant or so.
    """
    difference = cepstra(first)[:, path[:, 0]] - cepstra(second)[:, path[:, 1]]
    return float((10 * math.sqrt(2) / math.log(10) * np.sqrt((difference**2).sum(0))).mean())


def cepstra(log_mel: np.ndarray, count: int = CEPSTRA) -> np.ndarray:
    """Coefficients 1 … count of ``log_mel [M, T]``, scaled so that log-mel = c0 + Σ c_n cos(π n (m + ½) / M): ``[count, T]``."""
    mels = log_mel.shape[0]
    angles = np.pi / mels * np.outer(np.arange(1, count + 1), np.arange(mels) + 0.5)
    return 2.0 / mels * np.cos(angles) @ log_mel.astype(np.float64)


def straight_path(first: int, second: int) -> np.ndarray:
    """Frame t with frame t, as far as both go: ``[min, 2]``. For a resynthesis, which keeps the recording's timing."""
    return np.repeat(np.arange(min(first, second))[:, None], 2, axis=1)


def pitch_agreement(first: np.ndarray, second: np.ndarray, path: np.ndarray) -> tuple[float | None, float | None]:
    """Median absolute error in semitones, and Pearson's correlation of log pitch, over pairs voiced in both.

    Args:
        first, second: pitch in Hz by frame, 0 = unvoiced; path: ``[P, 2]`` pairs of frames.

    Returns:
        (None, None) with fewer than ``MIN_VOICED`` such pairs; the correlation is None where one of the two is flat.
    """
    path = path[(path[:, 0] < len(first)) & (path[:, 1] < len(second))]
    a, b = first[path[:, 0]], second[path[:, 1]]
    both = (a > 0) & (b > 0)
    if both.sum() < MIN_VOICED:
        return None, None
    a, b = 12 * np.log2(a[both]), 12 * np.log2(b[both])
    return float(np.median(np.abs(a - b))), correlation(a, b)


def correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Pearson's r of two sequences ``[N]``; None below 3 values or where one does not vary."""
    if len(first) < 3 or np.ptp(first) < 1e-9 or np.ptp(second) < 1e-9:
        return None
    return float(np.corrcoef(first, second)[0, 1])


# --- figures over clips ---------------------------------------------------------------------------------------------------
def ratio_figure(
    name: str,
    parts: Sequence[float],
    wholes: Sequence[float],
    seed: int,
    *,
    scale: float = 1.0,
    unit: str = "",
    better: Better = Better.lower,
    note: str = "",
) -> Figure | None:
    """Corpus-level Σ parts / Σ wholes (times ``scale``) by clip; None without anything to divide by."""
    top, bottom = np.asarray(parts, dtype=np.float64), np.asarray(wholes, dtype=np.float64)
    if bottom.sum() <= 0:
        return None
    low, high = bootstrap.ratio_interval(top, bottom, seed)
    value = float(top.sum() / bottom.sum())
    return Figure(name, scale * value, scale * low, scale * high, len(top), unit, better, _with_caution(note, len(top)))


def mean_figure(
    name: str, values: Sequence[float | None], seed: int, unit: str = "", better: Better = Better.lower, note: str = ""
) -> Figure | None:
    """Mean over the clips that have a value; None when none has."""
    return _centre_figure((np.mean, bootstrap.mean_interval), name, values, seed, unit, better, note)


def median_figure(
    name: str, values: Sequence[float | None], seed: int, unit: str = "", better: Better = Better.lower, note: str = ""
) -> Figure | None:
    """Median over the clips that have a value; None when none has."""
    return _centre_figure((np.median, bootstrap.median_interval), name, values, seed, unit, better, note)


def _centre_figure(
    measures: tuple[Any, Any], name: str, values: Sequence[float | None], seed: int, unit: str, better: Better, note: str
) -> Figure | None:
    """``measures``: the centre of the known values, and its bootstrap interval."""
    centre, interval = measures
    known = np.array([v for v in values if v is not None], dtype=np.float64)
    if not len(known):
        return None
    low, high = interval(known, seed)
    return Figure(name, float(centre(known)), low, high, len(known), unit, better, _with_caution(note, len(known)))


def correlation_figure(name: str, first: Sequence[float], second: Sequence[float], seed: int, note: str = "") -> Figure | None:
    """Pearson's r over clips; None where it is not defined."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    value = correlation(a, b)
    if value is None:
        return None
    low, high = bootstrap.correlation_interval(a, b, seed)
    return Figure(name, value, low, high, len(a), "r", Better.higher, _with_caution(note, len(a)))


def _with_caution(note: str, clips: int) -> str:
    if clips >= FEW_CLIPS:
        return note
    caution = "one clip: no interval" if clips < 2 else f"only {clips} clips: the interval is too narrow"
    return f"{note}; {caution}" if note else caution
