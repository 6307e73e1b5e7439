"""Synthetic waves whose properties are known."""

from __future__ import annotations

import numpy as np

RATE = 16000


def pulses(times: np.ndarray, heights: np.ndarray, rate: int = RATE, seconds: float = 1.0) -> np.ndarray:
    """Band-limited pulses (narrow Gaussians) at ``times`` s with ``heights``, float32 [S]."""
    axis = np.arange(int(seconds * rate)) / rate
    wave = np.zeros_like(axis)
    for time, height in zip(times, heights, strict=True):
        first = max(0, int((time - 0.002) * rate))
        part = axis[first : first + int(0.004 * rate)]
        wave[first : first + len(part)] += height * np.exp(-0.5 * ((part - time) / 0.00015) ** 2)
    return (0.5 * wave).astype(np.float32)


def vowel(pitch: float, rate: int = RATE, seconds: float = 1.0, centres: tuple[float, ...] = (700, 1200, 2500)) -> np.ndarray:
    """Harmonics of ``pitch`` Hz under three resonances and a slope of 6 dB an octave, float32 [S]."""
    axis = np.arange(int(seconds * rate)) / rate
    wave = np.zeros_like(axis)
    for harmonic in range(1, int(0.45 * rate / pitch)):
        hertz = harmonic * pitch
        strength = 0.02 + sum(1 / (1 + ((hertz - centre) / 100) ** 2) for centre in centres)
        wave += strength / harmonic * np.cos(2 * np.pi * hertz * axis)
    return (0.5 * wave / np.abs(wave).max()).astype(np.float32)


def speech_like(seconds: float = 2.0, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """Gliding vowels, noise and pauses in turn, float32 [S] in 16-bit steps."""
    generator = np.random.default_rng(seed)
    axis = np.arange(int(seconds * rate)) / rate
    pitch = 150 + 40 * np.sin(2 * np.pi * 0.8 * axis + seed) + 4 * np.sin(2 * np.pi * 5.3 * axis)
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    wave = np.zeros_like(axis)
    for harmonic in range(1, 25):
        hertz = harmonic * pitch
        strength = sum(1 / (1 + ((hertz - centre) / 150) ** 2) for centre in (600 + 80 * seed, 1700)) / harmonic**0.5
        wave += strength * np.sin(harmonic * phase)
    loud = 0.08 * (0.4 + 0.6 * np.abs(np.sin(2 * np.pi * 1.7 * axis)))
    wave = np.where(axis % 0.6 < 0.4, wave * loud, generator.normal(0, 0.01, len(axis)))
    wave += generator.normal(0, 3e-4, len(axis))
    return (np.trunc(wave * 32768) / 32768).astype(np.float32)
