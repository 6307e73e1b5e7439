"""What the harmonics of a voiced frame give: HNR, H1-H2, H1-A3, and the amplitudes at the formants."""

from __future__ import annotations

import numpy as np

from lalia.egemaps.frames import LONG_SECONDS, Layout, layout, parabola
from lalia.egemaps.pitch import long_magnitudes

HARMONICS = 100
FAINTEST, MISSING = -200.0, -201.0  # dB of a harmonic without a peak, and of one that cannot be said
HNR_RANGE = (1e-9, 1e11)

HARMONIC_NAMES = (
    "HNRdBACF", "logRelF0-H1-H2", "logRelF0-H1-A3", "F1amplitudeLogRelF0", "F2amplitudeLogRelF0", "F3amplitudeLogRelF0",
)  # fmt: skip


def harmonic_features(
    wave: np.ndarray, sample_rate: int, frames: np.ndarray, pitch: np.ndarray, formants: np.ndarray
) -> np.ndarray:
    """Features of the voiced frames ``frames`` [N] with ``pitch`` Hz [N] and ``formants`` Hz [N, 3] → [N, 6].

    Columns as in ``HARMONIC_NAMES``, all in dB; amplitudes relative to the peak at the pitch itself. H1 and H2 are the
    first two overtones, which is how the reference counts.
    """
    shape = layout(sample_rate, LONG_SECONDS)
    values = np.zeros((len(frames), len(HARMONIC_NAMES)))
    for first, last in shape.blocks(len(frames)):
        block = slice(first, last)
        magnitude = long_magnitudes(shape.take(wave, frames[block]), shape)
        values[block, 0] = noise_ratio(magnitude, pitch[block], shape)
        values[block, 1:] = _relations(magnitude, pitch[block], formants[block], shape)
    return values


def local_peaks(values: np.ndarray) -> np.ndarray:
    """Where a value is above its neighbours, along the last axis; an end needs only one neighbour: [N, F] → bool [N, F]."""
    padded = np.pad(values, ((0, 0), (1, 1)), constant_values=-np.inf)
    return (values > padded[:, :-2]) & (values > padded[:, 2:])


def nearest_peaks(peak: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every bin the next peak at or below it (-1: none) and at or above it (F: none); bool [N, F] → int [N, F] twice."""
    count = peak.shape[1]
    index = np.arange(count)
    below = np.maximum.accumulate(np.where(peak, index, -1), axis=1)
    above = np.minimum.accumulate(np.where(peak, index, count)[:, ::-1], axis=1)[:, ::-1]
    return below, above


def noise_ratio(magnitude: np.ndarray, pitch: np.ndarray, shape: Layout) -> np.ndarray:
    """Harmonics to noise in dB (Boersma 1993) by the autocorrelation r of the frame: r(T) / (r(0) - r(T)); [N, bins] → [N].

    T is the peak of |r| that is nearest to the period of the pitch, the shorter one of two.
    """
    correlation = np.abs(np.fft.irfft(magnitude * magnitude, shape.size, axis=1))[:, : shape.bins]
    wanted = np.minimum(np.floor(shape.sample_rate / pitch).astype(int), shape.bins - 1)[:, None]
    peak = local_peaks(correlation)
    inner = peak.copy()
    inner[:, 0] = inner[:, -1] = False
    below, above = (np.take_along_axis(side, wanted, 1) for side in nearest_peaks(inner))
    left, right = np.where(below >= 0, wanted - below, shape.bins), np.where(above < shape.bins, above - wanted, shape.bins)
    found = np.where(left <= right, below, above)
    found = np.where((left >= shape.bins) & (right >= shape.bins), wanted, found)
    periodic, whole = np.take_along_axis(correlation, found, 1)[:, 0], correlation[:, 0]
    noise = whole - periodic
    ratio = np.where(noise != 0, periodic / np.where(noise != 0, noise, 1.0), HNR_RANGE[1])
    return 10 * np.log10(np.clip(ratio, *HNR_RANGE))


def _relations(magnitude: np.ndarray, pitch: np.ndarray, formants: np.ndarray, shape: Layout) -> np.ndarray:
    """H1-H2, H1-A3 and the amplitudes at three formants in dB: [N, 5]."""
    frequency, height, level = _harmonics(magnitude, pitch, shape)
    rows = np.arange(len(pitch))
    amplitudes = np.zeros((len(pitch), formants.shape[1]))
    for index in range(formants.shape[1]):
        centre = formants[:, index, None]
        inside = (frequency >= 0.8 * centre) & (frequency <= 1.2 * centre)
        candidates = np.where(inside, height, 0.0)
        best = candidates.argmax(1)
        found = candidates[rows, best] > 0
        amplitudes[:, index] = np.where(found, level[rows, best], 0.0)
        third = np.where(found, level[:, 1] - level[rows, best], level[:, 1] + MISSING)
    differences = np.stack([level[:, 1] - level[:, 2], third], 1)
    return np.concatenate([np.clip(differences, MISSING, -MISSING), amplitudes], 1)


def _harmonics(magnitude: np.ndarray, pitch: np.ndarray, shape: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The spectral peak next to each multiple of the pitch: Hz, magnitude and dB above the first, [N, 100] each.

    A peak is looked for up to half a pitch to each side. Where there is none, or two harmonics would share one, Hz and
    magnitude are 0.
    """
    count, width = magnitude.shape[1], shape.bin_width
    multiples = np.arange(1, HARMONICS + 1) * pitch[:, None]

    def nearest_bin(hertz: np.ndarray) -> np.ndarray:
        return np.where(hertz < (count - 1) * width, np.floor(hertz / width + 0.5).astype(int), 0)

    wanted, half = nearest_bin(multiples), 0.5 * pitch[:, None]
    lower, upper = nearest_bin(multiples - half), nearest_bin(multiples + half)
    below, above = (np.take_along_axis(side, wanted, 1) for side in nearest_peaks(local_peaks(magnitude)))
    left = np.where((below >= lower) & (below >= 0) | (below == wanted), wanted - below, count)
    right = np.where((above <= upper) | (above == wanted), above - wanted, count)
    bins = np.where(right <= left, above, below)
    valid = (np.minimum(left, right) < count) & (bins >= nearest_bin(half)) & (bins < count - 1) & (bins > 0)
    around = [np.take_along_axis(magnitude, np.where(valid, bins, 1) + side, 1).astype(np.float64) for side in (-1, 0, 1)]
    offset, top = parabola(*around)
    bins = np.where(valid, bins, wanted)
    for harmonic in range(1, HARMONICS):
        twin = bins[:, harmonic] == bins[:, harmonic - 1]
        bins[twin, harmonic], valid[twin, harmonic] = 0, False
    frequency, height = np.where(valid, (bins + offset) * width, 0.0), np.where(valid, around[1], 0.0)
    reference = height[:, :1]
    level = 20 * np.log10(np.where(valid & (top > 0), top, 1e-300) / np.where(reference > 0, reference, 1.0))
    level = np.where(reference > 0, np.maximum(level, FAINTEST), MISSING)
    level[:, 0] = 0.0
    return frequency, height, level
