"""The calibration plot: how predictions and true labels lie to each other along the scale."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lalia.runfolder import write_atomic

if TYPE_CHECKING:
    from lalia.evaluate.emotion_results import EmotionEvaluation, TurnResult

BINS = 10
MOST_POINTS = 3000


def binned(by: np.ndarray, values: np.ndarray, bins: int = BINS) -> tuple[np.ndarray, np.ndarray]:
    """Means of ``by [N]`` and of ``values [N]`` in groups of about equally many, ordered by ``by``. Ties stay together."""
    if not len(by):
        return np.zeros(0), np.zeros(0)
    edges = np.unique(np.quantile(by, np.linspace(0, 1, min(bins, len(by)) + 1)[1:-1]))
    group = np.searchsorted(edges, by, side="right")
    kept = np.unique(group)
    return tuple(np.array([part[group == g].mean() for g in kept]) for part in (by, values))  # type: ignore[return-value]


def write_calibration(path: Path, evaluation: EmotionEvaluation) -> None:
    """One panel a dimension: turns as dots, the mean prediction by bins of the truth, and (reliability) the mean truth by bins of
    the prediction. A calibrated model's reliability lies on the diagonal; a model that dares too little is flat in the first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scored = [turn for turn in evaluation.turns if turn.clean]
    shown = [name for name in evaluation.dimensions if any(name in turn.truth for turn in scored)]
    figure = Figure(figsize=(4.4 * max(1, len(shown)), 4.4), dpi=110, layout="constrained")
    for index, name in enumerate(shown):
        _panel(figure.add_subplot(1, len(shown), index + 1), name, scored)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())


def _panel(axes: object, name: str, turns: Sequence[TurnResult]) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    pairs = np.array([(t.truth[name], t.predicted[name]) for t in turns if name in t.truth])
    truth, predicted = pairs.T
    low, high = float(pairs.min()), float(pairs.max())
    margin = 0.05 * (high - low) or 0.5
    limits = (low - margin, high + margin)
    step = max(1, len(pairs) // MOST_POINTS)
    axes.scatter(truth[::step], predicted[::step], s=5, alpha=0.2, color="0.5", linewidths=0)
    axes.plot(limits, limits, color="0.6", linewidth=1, linestyle=":")
    across, up = binned(truth, predicted)
    axes.plot(across, up, color="C0", marker="o", markersize=4, label="prediction, by bins of the truth")
    along, true = binned(predicted, truth)
    label = "reliability: truth, by bins of the prediction"
    axes.plot(true, along, color="C3", marker="s", markersize=4, linestyle="--", label=label)
    axes.set(xlim=limits, ylim=limits, xlabel=f"true {name}", ylabel=f"predicted {name}", aspect="equal")
    axes.set_title(f"{name}, {len(pairs)} turns", fontsize=10)
    axes.legend(fontsize=7, loc="upper left", frameon=False)
