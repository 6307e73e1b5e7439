"""Pictures: uint8 RGB, the right way up, nothing kept alive, nothing taken twice to the logarithm."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from lalia import plots


def panel(image: np.ndarray) -> np.ndarray:
    """The coloured area of the main axes: the widest run of columns that are not grey."""
    coloured = (image.max(2).astype(int) - image.min(2)) > 20
    rows = np.flatnonzero(coloured.sum(1) > 100)
    columns = np.flatnonzero(coloured.sum(0) > 0.5 * len(rows))
    gap = np.flatnonzero(np.diff(columns) > 10)
    last = columns[gap[0]] if len(gap) else columns[-1]
    return image[rows[0] : rows[-1] + 1, columns[0] : last + 1]


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.float32, torch.bfloat16])
def test_pictures_are_uint8_rgb_from_numpy_and_torch(kind: object) -> None:
    values = np.random.default_rng(0).normal(size=(80, 200))
    mel = torch.tensor(values, dtype=kind, requires_grad=True) if isinstance(kind, torch.dtype) else values.astype(kind)  # type: ignore[call-overload]
    for image in (plots.spectrogram_image(mel), plots.alignment_image(mel)):
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        assert image.flags.c_contiguous and image.shape[0] > 100 and image.shape[1] > 100


def test_low_bins_are_at_the_bottom_and_values_are_drawn_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    ramp = np.repeat(np.linspace(-11.0, 2.0, 80)[:, None], 100, axis=1)  # a log-mel has negative values
    picture = panel(plots.spectrogram_image(ramp)).astype(int).sum(2).mean(1)
    assert picture[-5] < picture[len(picture) // 2] < picture[5]
    drawn: list[np.ndarray] = []
    monkeypatch.setattr(plots, "figure_to_array", lambda figure: drawn.append(figure.axes[0].images[0].get_array()))
    plots.spectrogram_image(ramp)
    np.testing.assert_array_equal(drawn[0], ramp.astype(np.float32))  # no second logarithm of a log-mel


def test_alignment_has_frames_across_and_text_upwards() -> None:
    attention = np.zeros((300, 10))
    attention[:, 0] = 1.0  # all frames on the first token: the bottom row is lit
    lit = panel(plots.alignment_image(attention)).astype(int).sum(2)
    assert lit[-8].mean() > 1.3 * lit[len(lit) // 2].mean()
    assert np.mean(lit[-8] == np.median(lit[-8])) > 0.8


def test_wrong_shapes_are_named() -> None:
    for bad in (np.zeros(5), np.zeros((1, 2, 3)), np.zeros((0, 4))):
        with pytest.raises(ValueError, match="shape"):
            plots.spectrogram_image(bad)
    with pytest.raises(ValueError, match="3 token names for an alignment with 4"):
        plots.alignment_image(np.ones((5, 4)), ["a", "b", "c"])


def test_no_figure_outlives_its_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Figure]] = []
    real = plots.figure_to_array

    def watch(figure: Figure) -> np.ndarray:
        alive.append(weakref.ref(figure))
        return real(figure)

    monkeypatch.setattr(plots, "figure_to_array", watch)
    for _ in range(3):
        plots.spectrogram_image(np.ones((4, 4)))
    gc.collect()
    assert len(alive) == 3 and all(reference() is None for reference in alive)
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_smoothing_neither_lags_nor_bends_a_line_and_lessens_noise() -> None:
    for length in (1, 2, 3, 50, 501):
        line = 3.0 - 0.01 * np.arange(length)
        np.testing.assert_allclose(plots.smooth(line), line, rtol=1e-9)
    noise = np.random.default_rng(0).normal(size=1000)
    assert plots.smooth(noise)[100:-100].std() < 0.3


def test_curves_are_written_whatever_they_hold(tmp_path: Path) -> None:
    steps = list(range(1, 500))
    groups = {
        "loss/g": {"total": (steps, [100 / s for s in steps]), "gone": (steps, [float("nan")] * len(steps))},
        "empty": {"none": ([], [])},
    }
    path = plots.curves_png(tmp_path / "c.png", groups, "run")
    assert imread(path).shape[:2] == (320, 1100)
    plots.curves_png(path, {})
    assert imread(path).std() > 0
    assert [p.name for p in tmp_path.iterdir()] == ["c.png"]
