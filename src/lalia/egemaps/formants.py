"""Formants 1-3: linear prediction (autocorrelation, order 11) of 20 ms frames at 11 kHz, and the poles of the filter."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from lalia.egemaps.frames import SHORT_SECONDS, Layout, hamming, layout

RATE, ORDER, COUNT = 11000, 11, 3
LOWEST_FORMANT, HIGHEST_FORMANT = 50.0, 5450.0


@lru_cache(maxsize=8)
def resampler(shape: Layout) -> np.ndarray:
    """Window and resample a 20 ms frame to 11 kHz: float32 [length, samples], samples = 220.

    The spectrum of the frame, with zeros on both sides, is evaluated at the new times. The reference keeps as many
    bins as half the number of new samples, so everything above about 3.4 kHz is left out; it counts the mean twice; and it
    stops after 20 ms, which are the zeros in front and the first 70 % of the frame at 16 kHz. All three shape its formants.
    """
    samples = round(RATE * shape.length / shape.sample_rate)
    kept = (min(shape.size, samples) // 2 * 2) // 2
    before = (shape.size - shape.length) // 2
    times = np.arange(samples) / samples * shape.length / shape.size
    turns = times[None, :] - (np.arange(shape.length)[:, None] + before) / shape.size
    matrix = np.zeros((shape.length, samples))
    for harmonic in range(kept):
        matrix += np.cos(2 * np.pi * harmonic * turns)
    return (matrix * (2 / shape.size) * hamming(shape.length)[:, None]).astype(np.float32)


def find_formants(wave: np.ndarray, sample_rate: int, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Formant frequencies and bandwidths in Hz of some 20 ms frames: wave [S], indices [N] → float64 [N, 3] twice.

    Ascending; 0 where a frame has fewer. As in the reference the predictor's sign is turned before its poles are taken,
    so these are the values that eGeMAPS is known by, not the resonances of the vocal tract (``resonances`` of the
    predictor itself would be those).
    """
    shape = layout(sample_rate, SHORT_SECONDS)
    frequency, bandwidth = np.zeros((len(frames), COUNT)), np.zeros((len(frames), COUNT))
    for first, last in shape.blocks(len(frames)):
        resampled = shape.take(wave, frames[first:last]) @ resampler(shape)
        frequency[first:last], bandwidth[first:last] = resonances(-predictor(resampled))
    return frequency, bandwidth


def predictor(frames: np.ndarray) -> np.ndarray:
    """Levinson-Durbin: frames [N, S] → a [N, 11] of the filter 1 + Σ a_k z^-k; zeros for a silent frame."""
    frames = frames.astype(np.float64)
    samples = frames.shape[1]
    lags = [np.einsum("ns,ns->n", frames[:, lag:], frames[:, : samples - lag]) for lag in range(ORDER + 1)]
    energy = lags[0].copy()
    coefficients = np.zeros((len(frames), ORDER))
    for order in range(ORDER):
        total = lags[order + 1].copy()
        for k in range(order):
            total += coefficients[:, k] * lags[order - k]
        reflection = np.where(energy > 0, -total / np.where(energy > 0, energy, 1.0), 0.0)
        coefficients[:, :order] += reflection[:, None] * coefficients[:, :order][:, ::-1]
        coefficients[:, order] = reflection
        energy = energy * (1 - reflection**2)
    return coefficients


def resonances(coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies and bandwidths of the three lowest pole pairs of 1 / (1 + Σ a_k z^-k) at 11 kHz: [N, 11] → [N, 3] twice.

    Hz, ascending, 0 where there are fewer between 50 and 5450 Hz. A pole outside the unit circle is reflected into it.
    """
    companion = np.zeros((len(coefficients), ORDER, ORDER))
    companion[:, np.arange(1, ORDER), np.arange(ORDER - 1)] = 1.0
    companion[:, 0] = -coefficients
    roots = np.linalg.eigvals(companion)
    frequency = np.arctan2(roots.imag, roots.real) * RATE / (2 * np.pi)
    bandwidth = np.abs(np.log(np.maximum(np.abs(roots), 1e-12))) * RATE / np.pi
    valid = (roots.imag >= 0) & (frequency >= LOWEST_FORMANT) & (frequency <= HIGHEST_FORMANT)
    order = np.argsort(np.where(valid, frequency, np.inf), axis=1, kind="stable")[:, :COUNT]
    frequency, bandwidth = (np.take_along_axis(np.where(valid, part, 0.0), order, 1) for part in (frequency, bandwidth))
    return frequency, bandwidth
