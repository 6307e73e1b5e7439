"""Fundamental frequency by YIN (de Cheveigné and Kawahara, "YIN, a fundamental frequency estimator", JASA 2002) in numpy."""

from __future__ import annotations

import numpy as np

#: A frame is voiced when its cumulative-mean-normalised difference falls below this (0.1–0.2 in the paper).
THRESHOLD = 0.15
#: Frames whose level lies more than this under the loudest frame are silence.
SILENCE_DB = 45.0


def track_pitch(
    wave: np.ndarray, sample_rate: int, hop: int, low: float = 60.0, high: float = 500.0, threshold: float = THRESHOLD
) -> np.ndarray:
    """Pitch of ``wave [S]`` in Hz, float64 ``[S // hop]``; 0 where unvoiced or silent.

    Frame t is centred on sample ``hop · t + hop / 2``, as in :mod:`lalia.mel`, so that the two can be laid side by side.

    Raises:
        ValueError: ``low`` and ``high`` are not 0 < low < high < sample_rate / 4.
    """
    if not 0 < low < high < sample_rate / 4:
        raise ValueError(f"need 0 < low < high < {sample_rate / 4:.0f} Hz, got {low} and {high}")
    longest = int(np.ceil(sample_rate / low)) + 1
    window = longest  # the difference function sums over one longest period
    frames = _frames(np.asarray(wave, dtype=np.float64), hop, window + longest)
    if len(frames) == 0:
        return np.zeros(0)
    normalised = _normalised_difference(frames, window, longest)
    lag, found = _first_dip(normalised, int(sample_rate / high), threshold)
    energy = (frames**2).mean(1)
    audible = energy > max(energy.max() * 10 ** (-SILENCE_DB / 10), 1e-10)
    return np.where(found & audible, sample_rate / _refine(normalised, lag), 0.0)


def _frames(wave: np.ndarray, hop: int, width: int) -> np.ndarray:
    """Frames ``[S // hop, width]`` centred on ``hop · t + hop / 2``, zeros beyond the ends."""
    count = len(wave) // hop
    if count == 0:
        return np.zeros((0, width))
    before = max(0, (width - hop) // 2)
    padded = np.pad(wave, (before, width))
    return np.lib.stride_tricks.sliding_window_view(padded, width)[: count * hop : hop]


def _normalised_difference(frames: np.ndarray, window: int, lags: int) -> np.ndarray:
    """Equations 6 and 8 of the paper for lags 0 … lags - 1: ``[T, lags]``. The products come from one FFT per frame."""
    width = frames.shape[1]
    size = 1 << (width + window - 1).bit_length()
    head = np.fft.rfft(frames[:, :window], size)
    products = np.fft.irfft(np.fft.rfft(frames, size) * head.conj(), size)[:, :lags]
    squares = np.pad(np.cumsum(frames**2, axis=1), ((0, 0), (1, 0)))
    energies = squares[:, window : window + lags] - squares[:, :lags]
    difference = np.maximum(energies[:, :1] + energies - 2 * products, 0.0)
    running = np.cumsum(difference[:, 1:], axis=1) / np.arange(1, lags)
    shaped = np.ones_like(difference)
    np.divide(difference[:, 1:], running, out=shaped[:, 1:], where=running > 1e-12)
    return shaped


def _first_dip(normalised: np.ndarray, shortest: int, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """The first local minimum under the threshold at a lag of ``shortest`` or more: lags ``[T]``, found ``[T]``."""
    inner = normalised[:, 1:-1]
    dips = (inner < threshold) & (inner <= normalised[:, :-2]) & (inner < normalised[:, 2:])
    dips[:, : max(0, shortest - 1)] = False
    return np.asarray(dips.argmax(1) + 1), np.asarray(dips.any(1))


def _refine(normalised: np.ndarray, lag: np.ndarray) -> np.ndarray:
    """The minimum of the parabola through the dip and its neighbours, in samples."""
    row = np.arange(len(lag))
    left, middle, right = normalised[row, lag - 1], normalised[row, lag], normalised[row, lag + 1]
    bend = left - 2 * middle + right
    shift = np.divide(left - right, 2 * bend, out=np.zeros_like(bend), where=bend > 1e-12)
    return lag + np.clip(shift, -1.0, 1.0)
