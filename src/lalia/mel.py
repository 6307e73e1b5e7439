"""Spectrogram and log-mel in torch, float32 whatever the surrounding autocast.

Legend: S samples, T frames, F bins, M mels. Frame ``t`` is centred on sample ``hop · t + hop / 2`` and sees ``n_fft``
samples, so it depends only on samples within ``n_fft / 2`` of its centre. Consequences worth knowing:

* ``S = T · hop`` gives exactly ``T`` frames, which is what lets a decoder map each frame to ``hop`` samples.
* In a padded batch the frames more than ``n_fft / (2 · hop)`` before a row's end equal those of the row alone.
  The last ones differ, because alone the end is mirrored and in the batch it is followed by padding. Compute features
  per clip.
* A wave shorter than the mirrored margin is mirrored as far as it goes and continued with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

MAGNITUDE_FLOOR = 1e-6  # added to the power under the root: a finite gradient at silence; the value of the VITS recipe
LOG_FLOOR = 1e-5

# Slaney's mel scale (Auditory Toolbox, 1998): linear below 1 kHz, logarithmic above with 27 mels per factor 6.4.
LINEAR_HZ_PER_MEL = 200.0 / 3.0
BREAK_HZ = 1000.0
BREAK_MEL = BREAK_HZ / LINEAR_HZ_PER_MEL
LOG_STEP = np.log(6.4) / 27.0


@dataclass(frozen=True)
class MelSpec:
    """One kind of spectrogram. ``fmax`` 0 means half the sample rate; lengths are in samples, frequencies in Hz."""

    sample_rate: int
    n_fft: int
    hop: int
    win: int
    mels: int
    fmin: float = 0.0
    fmax: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.hop <= self.n_fft:
            raise ValueError(f"hop must be in 1…n_fft, got hop {self.hop} and n_fft {self.n_fft}")
        if not 0 < self.win <= self.n_fft:
            raise ValueError(f"win must be in 1…n_fft, got win {self.win} and n_fft {self.n_fft}")
        if self.mels < 1:
            raise ValueError(f"mels must be at least 1, got {self.mels}")
        if not 0 <= self.fmin < self.top <= self.sample_rate / 2:
            raise ValueError(f"need 0 <= fmin < fmax <= {self.sample_rate / 2}, got {self.fmin} and {self.top}")

    @property
    def top(self) -> float:
        """The upper edge of the highest filter in Hz."""
        return self.fmax or self.sample_rate / 2


def spectrogram(wave: Tensor, spec: MelSpec) -> Tensor:
    """Magnitude spectrogram ``sqrt(|STFT|² + 1e-6)``.

    Args:
        wave: ``[..., S]``, any number of leading dimensions, S >= hop.

    Returns:
        float32 ``[..., n_fft // 2 + 1, T]`` with ``T = S // hop``.

    Raises:
        ValueError: fewer than ``hop`` samples.
    """
    samples = wave.shape[-1]
    if samples < spec.hop:
        raise ValueError(f"{samples} samples are less than one frame of {spec.hop}")
    with torch.autocast(wave.device.type, enabled=False):
        rows = wave.float().reshape(-1, samples)
        before = (spec.n_fft - spec.hop) // 2
        padded = _mirror(rows, before, spec.n_fft - spec.hop - before)
        transform = torch.stft(
            padded, spec.n_fft, spec.hop, spec.win, _window(spec.win, wave.device), center=False, return_complex=True
        )
        power = transform.real.square() + transform.imag.square()
        magnitude = torch.sqrt(power + MAGNITUDE_FLOOR)
    return magnitude.reshape(*wave.shape[:-1], *magnitude.shape[1:])


def mel_filters(spec: MelSpec) -> Tensor:
    """Triangular filters on Slaney's scale, each of area one (Slaney's normalisation): float32 ``[M, n_fft // 2 + 1]``.

    Cached by every field of ``spec``: two specs that differ in any number never share filters.
    """
    return _filters_on(spec, torch.device("cpu"))


def mel_from_spectrogram(magnitude: Tensor, spec: MelSpec) -> Tensor:
    """Natural log of the mel magnitudes, floored at 1e-5: ``[..., F, T]`` → float32 ``[..., M, T]``."""
    with torch.autocast(magnitude.device.type, enabled=False):
        mels = _filters_on(spec, magnitude.device) @ magnitude.float()
        return torch.log(mels.clamp(min=LOG_FLOOR))


def mel(wave: Tensor, spec: MelSpec) -> Tensor:
    """Log-mel of ``wave [..., S]``: float32 ``[..., M, T]`` with ``T = S // hop``."""
    return mel_from_spectrogram(spectrogram(wave, spec), spec)


def hz_to_mel(hertz: np.ndarray) -> np.ndarray:
    """Slaney's mel scale of frequencies in Hz, elementwise."""
    hertz = np.asarray(hertz, dtype=np.float64)
    logarithmic = BREAK_MEL + np.log(np.maximum(hertz, BREAK_HZ) / BREAK_HZ) / LOG_STEP
    return np.where(hertz < BREAK_HZ, hertz / LINEAR_HZ_PER_MEL, logarithmic)


def mel_to_hz(mels: np.ndarray) -> np.ndarray:
    """Inverse of :func:`hz_to_mel`."""
    mels = np.asarray(mels, dtype=np.float64)
    logarithmic = BREAK_HZ * np.exp(LOG_STEP * (np.maximum(mels, BREAK_MEL) - BREAK_MEL))
    return np.where(mels < BREAK_MEL, mels * LINEAR_HZ_PER_MEL, logarithmic)


def _mirror(rows: Tensor, before: int, after: int) -> Tensor:
    """Reflect ``rows [N, S]`` at both ends; a margin longer than S - 1 is completed with zeros."""
    most = rows.shape[-1] - 1
    reflected = functional.pad(rows.unsqueeze(1), (min(before, most), min(after, most)), mode="reflect").squeeze(1)
    return functional.pad(reflected, (max(0, before - most), max(0, after - most)))


@lru_cache(maxsize=64)
def _window(length: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor born in inference mode could not be used in a training step later
        return torch.hann_window(length, device=device)


@lru_cache(maxsize=64)
def _filters_on(spec: MelSpec, device: torch.device) -> Tensor:
    edges = mel_to_hz(np.linspace(hz_to_mel(np.array(spec.fmin)), hz_to_mel(np.array(spec.top)), spec.mels + 2))
    lower, centre, upper = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bins = np.linspace(0.0, spec.sample_rate / 2, spec.n_fft // 2 + 1)[None]
    triangles = np.minimum((bins - lower) / (centre - lower), (upper - bins) / (upper - centre)).clip(min=0.0)
    with torch.inference_mode(False):
        return torch.from_numpy(triangles * 2.0 / (upper - lower)).to(device, torch.float32)
