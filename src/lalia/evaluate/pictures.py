"""Bare pictures of matrices, one pixel a cell, on a colour scale that the caller fixes so that two of them can be compared."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

#: range of the mel pictures under the loudest part of the recording, in nepers (about 70 dB)
MEL_RANGE = 8.0


def mel_scale(recording: np.ndarray) -> tuple[float, float]:
    """Lowest and highest value that the colours of one clip's log-mels ``[M, T]`` tell apart, taken from the recording."""
    high = float(np.quantile(recording, 0.999))
    return high - MEL_RANGE, high


def heat(values: np.ndarray, low: float, high: float, colours: str = "magma") -> np.ndarray:
    """``values [rows, columns]``, row 0 at the bottom, as uint8 ``[rows, columns, 3]``."""
    import matplotlib

    share = (np.asarray(values, dtype=np.float64) - low) / max(high - low, 1e-9)
    return (matplotlib.colormaps[colours](share.clip(0, 1)[::-1])[..., :3] * 255).round().astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    """uint8 ``[rows, columns, 3]`` → a PNG file's bytes. A palette of 128 colours: a third of the size, no visible loss here."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).quantize(128).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def write_mel(path: Path, log_mel: np.ndarray, scale: tuple[float, float]) -> None:
    """Picture of ``log_mel [M, T]``."""
    path.write_bytes(png(heat(log_mel, *scale)))


def write_alignment(path: Path, attention: np.ndarray) -> None:
    """Picture of an alignment ``[T, L]``: time to the right, text upwards."""
    path.write_bytes(png(heat(attention.T, 0.0, float(max(attention.max(), 1e-9)), "viridis")))
