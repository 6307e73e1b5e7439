"""Pictures as arrays and PNG files. No pyplot: every figure is a local object, freed when its function returns."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lalia.runfolder import write_atomic

#: label → (steps [N], values [N])
Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def figure_to_array(figure: Figure) -> np.ndarray:
    """Render a figure to uint8 [height, width, 3] (RGB), as TensorBoard's ``dataformats="HWC"`` wants it."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba(), dtype=np.uint8)[:, :, :3].copy()


def spectrogram_image(mel: np.ndarray | Tensor, title: str = "") -> np.ndarray:
    """Picture of a spectrogram [M, T] that is already logarithmic: drawn as it is. Returns uint8 [height, width, 3]."""
    values = _matrix(mel, "a spectrogram [bins, frames]")
    figure = Figure(figsize=(8, 3), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, origin="lower", aspect="auto", interpolation="none", cmap="magma")
    figure.colorbar(image, ax=axes, pad=0.01)
    axes.set(xlabel="frame", ylabel="mel bin", title=title)
    return figure_to_array(figure)


def alignment_image(attention: np.ndarray | Tensor, tokens: Sequence[str] = (), title: str = "") -> np.ndarray:
    """Picture of an alignment [T, L] with frames across and text upwards. ``tokens`` (L strings) name the rows.

    Returns uint8 [height, width, 3].
    """
    values = _matrix(attention, "an alignment [frames, tokens]").T
    if tokens and len(tokens) != len(values):
        raise ValueError(f"{len(tokens)} token names for an alignment with {len(values)} tokens")
    named = bool(tokens) and len(tokens) <= 120
    figure = Figure(figsize=(8, max(3.0, 0.11 * len(values)) if named else 4.0), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, origin="lower", aspect="auto", interpolation="none", cmap="viridis", vmin=0.0)
    figure.colorbar(image, ax=axes, pad=0.01)
    axes.set(xlabel="frame", ylabel="text token", title=title)
    if named:
        axes.set_yticks(range(len(tokens)), labels=list(tokens), fontsize=7)
    return figure_to_array(figure)


def curves_png(path: str | Path, groups: Mapping[str, Curves], title: str = "") -> Path:
    """Write one PNG with a panel for each group of curves, one below the other; the file is replaced in one step.

    Long curves are drawn raw (faint) and smoothed; the vertical axis is logarithmic where all values are positive and
    span more than a factor of ten. The legend stands beside the panel.
    """
    shown = {name: kept for name, curves in groups.items() if (kept := _finite(curves))}
    figure = Figure(figsize=(11, 0.6 + 2.6 * max(1, len(shown))), dpi=100, layout="constrained")
    if title:
        figure.suptitle(title)
    if not shown:
        figure.add_subplot().set_axis_off()
        figure.axes[0].text(0.5, 0.5, "nothing recorded yet", ha="center", va="center")
    for index, (name, curves) in enumerate(shown.items()):
        _panel(figure.add_subplot(len(shown), 1, index + 1), name, curves)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_atomic(Path(path), buffer.getvalue())
    return Path(path)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average [N] over a twentieth of the curve; it narrows towards the ends, so nothing lags."""
    index = np.arange(len(values))
    half = np.minimum(max(1, len(values) // 40), np.minimum(index, len(values) - 1 - index))
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return (total[index + half + 1] - total[index - half]) / (2 * half + 1)


def _panel(axes: Axes, name: str, curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    for index, (label, (steps, values)) in enumerate(curves.items()):
        style: dict[str, Any] = {"color": f"C{index % 10}", "linestyle": ("-", "--", ":")[index // 10 % 3]}
        if len(values) < 40:
            axes.plot(steps, values, marker="." if len(values) < 20 else "", label=label, **style)
        else:
            axes.plot(steps, values, alpha=0.25, linewidth=0.8, **style)
            axes.plot(steps, smooth(values), linewidth=1.6, label=label, **style)
    together = np.concatenate([values for _, values in curves.values()])
    if together.min() > 0 and together.max() > 10 * together.min():
        axes.set_yscale("log")
    axes.set_title(name, loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)


def _finite(curves: Curves) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    kept = {}
    for label, (steps, values) in curves.items():
        across, up = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
        good = np.isfinite(up)
        if good.any():
            kept[label] = (across[good], up[good])
    return kept


def _matrix(values: np.ndarray | Tensor, what: str) -> np.ndarray:
    plain = values.detach().float().cpu().numpy() if isinstance(values, Tensor) else values
    array = np.asarray(plain, dtype=np.float32)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"expected {what} with at least one cell, got the shape {list(array.shape)}")
    return array
