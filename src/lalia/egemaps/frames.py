"""Cutting a wave into the two kinds of frame of GeMAPS, and compiling the hot loops when numba is there."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

STEP_SECONDS = 0.010
#: 60 ms Gaussian frames for pitch and harmonics, 20 ms Hamming frames for everything else (GeMAPS, section 3)
LONG_SECONDS, SHORT_SECONDS = 0.060, 0.020
LOWEST_RATE, HIGHEST_RATE = 8000, 48000
#: frames that are in memory as spectra at one time
BLOCK = 512
#: 16-bit samples are divided by 32767 in the reference, by 32768 in every reader of floats
FULL_SCALE = np.float32(32768 / 32767)


@dataclass(frozen=True)
class Layout:
    """Frames of ``length`` samples every ``step`` samples, transformed with ``size`` points (the next power of 2)."""

    sample_rate: int
    length: int
    step: int
    size: int

    @property
    def bins(self) -> int:
        return self.size // 2 + 1

    @property
    def bin_width(self) -> float:
        """Hz between two bins."""
        return self.sample_rate / self.size

    @property
    def frequencies(self) -> np.ndarray:
        """Hz of every bin, float64 [bins]."""
        return np.arange(self.bins) * self.bin_width

    def count(self, samples: int) -> int:
        """Whole frames in a wave of ``samples`` samples."""
        return max(0, 1 + (samples - self.length) // self.step)

    def cut(self, wave: np.ndarray, first: int, last: int) -> np.ndarray:
        """Frames ``first`` (with) to ``last`` (without) of ``wave`` [S]: a view [last - first, length]."""
        part = wave[first * self.step : (last - 1) * self.step + self.length]
        return np.lib.stride_tricks.sliding_window_view(part, self.length)[:: self.step]

    def take(self, wave: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """The frames with these ``indices`` [N]: a copy [N, length]."""
        return np.lib.stride_tricks.sliding_window_view(wave, self.length)[indices * self.step]

    def blocks(self, frames: int) -> Iterator[tuple[int, int]]:
        """``(first, last)`` of every block of up to ``BLOCK`` frames."""
        for first in range(0, frames, BLOCK):
            yield first, min(first + BLOCK, frames)


@lru_cache(maxsize=64)
def layout(sample_rate: int, seconds: float) -> Layout:
    """The layout of frames of ``seconds`` at ``sample_rate`` Hz; samples are rounded half up."""
    length = math.floor(seconds * sample_rate + 0.5)
    step = math.floor(STEP_SECONDS * sample_rate + 0.5)
    return Layout(sample_rate, length, step, 1 << (length - 1).bit_length())


@lru_cache(maxsize=16)
def gaussian(length: int, sigma: float = 0.4) -> np.ndarray:
    """Gaussian window, float32 [length]; ``sigma`` in half lengths."""
    centre = (length - 1) / 2
    return np.exp(-0.5 * ((np.arange(length) - centre) / (sigma * centre)) ** 2).astype(np.float32)


@lru_cache(maxsize=16)
def hamming(length: int) -> np.ndarray:
    """Hamming window, float32 [length]."""
    return np.hamming(length).astype(np.float32)


def parabola(left: np.ndarray, middle: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The top of the parabola through three neighbours: offset from the middle in bins, and height; any equal shapes.

    Where the three lie on a line the middle is returned.
    """
    curvature = left - 2 * middle + right
    flat = curvature == 0
    offset = np.where(flat, 0.0, 0.5 * (left - right) / np.where(flat, 1.0, curvature))
    return offset, middle - 0.25 * (left - right) * offset


@lru_cache(maxsize=8)
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` compiled by numba, or itself (the same values, slower) where numba is not installed."""
    try:
        numba: Any = importlib.import_module("numba")
    except ImportError:
        return function
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no writable place for numba's cache
        return numba.njit(nogil=True)(function)
