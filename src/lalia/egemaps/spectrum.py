"""What the 20 ms frames give: loudness, MFCC 1-4, alpha ratio, Hammarberg index, spectral slopes, flux, energy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lalia.egemaps.frames import SHORT_SECONDS, Layout, hamming, layout

BANDS = 26
LOWEST, HIGHEST = 20.0, 8000.0
CEPSTRA, LIFTER = 4, 22.0
COMPRESSION = 0.33  # Zwicker's power law of loudness
BAND_FLOOR = 9.3e-10
POWER_FLOOR = 1e-14
FLUX_HIGHEST = 5000.0

SHORT_NAMES = (
    "loudness", "alphaRatio", "hammarbergIndex", "slope0-500", "slope500-1500", "spectralFlux",
    "mfcc1", "mfcc2", "mfcc3", "mfcc4",
)  # fmt: skip


def mel(frequency: float | np.ndarray) -> np.ndarray:
    """Hz to mel, 1127 ln(1 + f / 700)."""
    return 1127.0 * np.log1p(np.asarray(frequency) / 700.0)


@lru_cache(maxsize=16)
def mel_filters(shape: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Triangles of height 1, equally wide in mel between 20 Hz and 8 kHz (or Nyquist).

    Returns float32 [bins, 26] and the centre frequencies in Hz, float64 [26]. The first and the last bin of the range
    belong to no band.
    """
    highest = min(HIGHEST, shape.sample_rate / 2)
    edges = np.linspace(mel(LOWEST), mel(highest), BANDS + 2)
    position = (mel(shape.frequencies) - edges[0]) / (edges[1] - edges[0])  # in half bandwidths
    weights = np.maximum(0.0, 1.0 - np.abs(position[:, None] - np.arange(1, BANDS + 1)))
    first, last = (int(np.floor(edge / shape.bin_width + 0.5)) for edge in (LOWEST, highest))
    weights[: first + 1] = 0
    weights[last:] = 0
    return weights.astype(np.float32), 700.0 * np.expm1(edges[1:-1] / 1127.0)


def equal_loudness(frequency: np.ndarray) -> np.ndarray:
    """Sensitivity of hearing at about 40 dB (Hermansky 1990, with the fall-off above 5 kHz); Hz → weight of power."""
    omega = 2 * np.pi * frequency
    squared = omega * omega
    low = (squared + 56.8e6) * squared**2 / ((squared + 6.3e6) ** 2 * (squared + 0.38e9))
    return 1e32 * low / (squared**3 * omega + 1.7e31)


@lru_cache(maxsize=1)
def _cosines() -> np.ndarray:
    """Liftered DCT-II, float32 [26, 4], for cepstra 1-4."""
    order = np.arange(1, CEPSTRA + 1)
    basis = np.sqrt(2 / BANDS) * np.cos(np.pi / BANDS * (np.arange(BANDS)[:, None] + 0.5) * order)
    return (basis * (1 + LIFTER / 2 * np.sin(np.pi * order / LIFTER))).astype(np.float32)


@lru_cache(maxsize=64)
def slope_weights(shape: Layout, low: float, high: float) -> np.ndarray:
    """Weights [bins] whose product with the spectrum in dB is the slope in dB per Hz between ``low`` and ``high`` Hz.

    Least squares over the bins of the band, of which the outermost count in part, as the band's edges cut them; the
    number of points is taken as the distance of the outermost bins, which is how the reference has it.
    """
    frequency = shape.frequencies
    above = int(np.searchsorted(frequency, low, side="right"))  # first bin above the lower edge
    left, left_weight = max(above - 1, 0), (frequency[above] - low) / shape.bin_width or 1.0
    upper = int(np.searchsorted(frequency, high, side="left"))  # first bin at or above the upper edge
    right, right_weight = (upper if frequency[upper] == high else upper - 1), (high - frequency[upper - 1]) / shape.bin_width
    part = np.zeros(shape.bins)
    part[left : right + 1] = 1.0
    part[left] = left_weight
    part[right] = right_weight or 1.0
    points, weighted = float(right - left), part * frequency
    total, squares = weighted.sum(), (weighted**2).sum()
    return (points * weighted - total * part) / (points * squares - total**2)


@dataclass
class ShortFrames:
    """Descriptors of the 20 ms frames: ``values`` float32 [T, 10] in the order of ``SHORT_NAMES``, ``power`` float64 [T]."""

    values: np.ndarray
    power: np.ndarray


def short_frames(wave: np.ndarray, sample_rate: int) -> ShortFrames:
    """All descriptors of the 20 ms frames of ``wave`` float32 [S], which must hold at least one."""
    shape = layout(sample_rate, SHORT_SECONDS)
    frames = shape.count(len(wave))
    values, power = np.zeros((frames, len(SHORT_NAMES)), np.float32), np.zeros(frames)
    before: np.ndarray | None = None
    for first, last in shape.blocks(frames):
        cut = shape.cut(wave, first, last)
        power[first:last] = np.einsum("ts,ts->t", cut, cut, dtype=np.float64) / shape.length
        magnitude = np.abs(np.fft.rfft(cut * hamming(shape.length), shape.size)).astype(np.float32)
        values[first:last] = _describe(magnitude, shape)
        values[first:last, 5] = _flux(magnitude, before, shape)
        before = magnitude[-1]
    return ShortFrames(values, power)


def _describe(magnitude: np.ndarray, shape: Layout) -> np.ndarray:
    """float32 [T, bins] → [T, 10], the flux left at 0."""
    power = magnitude * magnitude
    filters, centres = mel_filters(shape)
    bands = power @ filters
    loudness = (np.maximum(bands, BAND_FLOOR) * equal_loudness(centres)) ** COMPRESSION
    cepstra = np.log(np.maximum(bands * np.float32(32767.0**2), 1.0)) @ _cosines()
    decibels = 10 * np.log10(np.maximum(power, POWER_FLOOR))
    one, two, five = (int(np.searchsorted(shape.frequencies, edge)) for edge in (1000.0, 2000.0, 5000.0))
    five += int(five < shape.bins and shape.frequencies[five] == 5000.0)
    values = np.zeros((len(power), len(SHORT_NAMES)), np.float32)
    values[:, 0] = loudness.mean(1)
    values[:, 1] = _ratio(power[:, one:five].sum(1), power[:, :one].sum(1))
    values[:, 2] = _ratio(power[:, :two].max(1), power[:, two:five].max(1))
    values[:, 3] = decibels @ slope_weights(shape, 0.0, 500.0)
    values[:, 4] = decibels @ slope_weights(shape, 500.0, 1500.0)
    values[:, 6:] = cepstra
    return values


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """dB of a ratio of powers [T]; 0 where there is nothing to compare with."""
    safe = np.where(below > 0, below, 1.0)
    return np.where(below > 0, 10 * np.log10(np.maximum(above, POWER_FLOOR) / safe), 0.0)


def _flux(magnitude: np.ndarray, before: np.ndarray | None, shape: Layout) -> np.ndarray:
    """Root mean square change of the magnitudes below 5 kHz since the frame before, [T]; 0 for the very first frame."""
    bins = int(np.searchsorted(shape.frequencies, FLUX_HIGHEST))
    start = magnitude[:1] if before is None else before[None]
    change = np.diff(np.concatenate([start, magnitude])[:, :bins], axis=0)
    return np.sqrt(np.einsum("tf,tf->t", change, change) / bins)
