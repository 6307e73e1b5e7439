"""How well predicted numbers agree with true ones over a whole set, with bootstrap intervals over dialogues.

Everything comes from sums by dialogue, so that the figure of any draw of dialogues is exact and costs one matrix product.

    CCC = 2 σ_xy / (σ_x² + σ_y² + (μ_x − μ_y)²)        population moments (Lin 1989)

A dialogue is the unit that is drawn, because turns of one dialogue are told by the same two people in one mood.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lalia.evaluate import bootstrap
from lalia.evaluate.results import Better, Figure
from lalia.nn.ccc import SUMS, Moments, ccc_of

MEAN = "mean"
#: fewer dialogues than this make an interval that is too narrow
FEW_DIALOGUES = 10
MEASURES = ("ccc", "pearson", "rmse")


@dataclass(frozen=True)
class Pair:
    """One turn: what was predicted and what is true, by dimension. A dimension that is not in ``truth`` has no label."""

    dialogue: str
    predicted: Mapping[str, float]
    truth: Mapping[str, float]


class Agreement:
    """Sums of the turns of each dialogue: ``sums`` float64 [dialogues, D, 6], dialogues in the order of their names."""

    def __init__(self, dimensions: Sequence[str], pairs: Sequence[Pair], dialogues: Sequence[str] | None = None) -> None:
        """``dialogues`` fixes which dialogues there are, so that two agreements can be compared draw by draw."""
        self.dimensions = list(dimensions)
        self.turns = sum(any(name in pair.truth for name in dimensions) for pair in pairs)
        self.dialogues = sorted({pair.dialogue for pair in pairs}) if dialogues is None else list(dialogues)
        shift = _centre(self.dimensions, pairs)
        moments = {name: Moments(len(self.dimensions), shift) for name in self.dialogues}
        for pair in pairs:
            moments[pair.dialogue].add(_vector(pair.predicted, self.dimensions), _vector(pair.truth, self.dimensions))
        shape = (len(self.dialogues), len(self.dimensions), SUMS)
        self.sums = np.stack([m.sums.numpy() for m in moments.values()]) if moments else np.zeros(shape)
        self.counts = self.sums[..., 0].sum(0).astype(int)

    def values(self, measure: str, drawn: np.ndarray | None = None) -> np.ndarray:
        """``measure`` (ccc, pearson, rmse) of all dialogues [D], or of drawn dialogue indices [R, N]: [R, D]. nan if undefined."""
        return _MEASURED[measure](self.sums.sum(0) if drawn is None else self.drawn(drawn))

    def drawn(self, drawn: np.ndarray) -> np.ndarray:
        """Sums of drawn dialogue indices [R, N]: [R, D, 6]."""
        rows, count = len(drawn), len(self.sums)
        places = drawn + count * np.arange(rows)[:, None]
        times = np.bincount(places.ravel(), minlength=rows * count).reshape(rows, count)
        return (times @ self.sums.reshape(count, -1)).reshape(rows, *self.sums.shape[1:])

    def figures(self, suffix: str = "", note: str = "", seed: int = 0, measures: Sequence[str] = MEASURES) -> list[Figure]:
        """``<measure>.<dimension><suffix>`` of every dimension that has labels, and ``ccc.mean<suffix>``."""
        found = [self._figure(m, i, suffix, note, seed) for m in measures for i in range(len(self.dimensions)) if self.counts[i]]
        if "ccc" in measures and self.measured:
            found.insert(len(self.measured), self.mean_figure(suffix, note, seed))
        return found

    @property
    def measured(self) -> list[int]:
        """Dimensions that have labels, as indices."""
        return [index for index, count in enumerate(self.counts) if count]

    def mean_figure(self, suffix: str = "", note: str = "", seed: int = 0) -> Figure:
        """The mean over the labelled dimensions of the CCC over all turns."""
        low, high = bootstrap.interval(lambda drawn: self.mean(drawn), len(self.dialogues), seed=seed)
        value = float(self.mean())
        return Figure(f"ccc.{MEAN}{suffix}", value, low, high, self.turns, "", Better.higher, self._note(note))

    def mean(self, drawn: np.ndarray | None = None) -> np.ndarray:
        """Mean CCC over the labelled dimensions, [] or [R]."""
        return self.values("ccc", drawn)[..., self.measured].mean(-1)

    def gain(self, name: str, other: Agreement, note: str = "", seed: int = 0) -> Figure:
        """How much higher this mean CCC is than that of ``other`` on the same turns, with the interval of the difference."""
        assert self.dialogues == other.dialogues, "two agreements that are compared have the same dialogues"
        low, high = bootstrap.interval(lambda drawn: self.mean(drawn) - other.mean(drawn), len(self.dialogues), seed=seed)
        value = float(self.mean() - other.mean())
        return Figure(name, value, low, high, self.turns, "", Better.higher, self._note(note))

    def _figure(self, measure: str, index: int, suffix: str, note: str, seed: int) -> Figure:
        low, high = bootstrap.interval(lambda drawn: self.values(measure, drawn)[:, index], len(self.dialogues), seed=seed)
        value = float(self.values(measure)[index])
        better = Better.lower if measure == "rmse" else Better.higher
        name = f"{measure}.{self.dimensions[index]}{suffix}"
        return Figure(name, value, low, high, int(self.counts[index]), "", better, self._note(note))

    def _note(self, note: str) -> str:
        few = len(self.dialogues)
        caution = "one dialogue: no interval" if few < 2 else f"only {few} dialogues: the interval is too narrow"
        return "; ".join(part for part in (note, caution if few < FEW_DIALOGUES else "") if part)


def _vector(values: Mapping[str, float], dimensions: Sequence[str]) -> torch.Tensor:
    return torch.tensor([[values.get(name, math.nan) for name in dimensions]], dtype=torch.float64)


def _centre(dimensions: Sequence[str], pairs: Sequence[Pair]) -> torch.Tensor:
    """Mean truth by dimension: sums around it lose no digits. Changes no figure."""
    known = [[pair.truth[name] for pair in pairs if name in pair.truth] for name in dimensions]
    return torch.tensor([math.fsum(values) / len(values) if values else 0.0 for values in known], dtype=torch.float64)


# --- from sums [..., 6] (n, Σx, Σy, Σx², Σy², Σxy) to values [...] --------------------------------------------------
def _ccc(sums: np.ndarray) -> np.ndarray:
    values = ccc_of(torch.from_numpy(np.ascontiguousarray(sums, dtype=np.float64))).numpy()
    return np.where(sums[..., 0] > 0, values, np.nan)


def _pearson(sums: np.ndarray) -> np.ndarray:
    count, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    scale = np.sqrt(np.maximum(count * xx - x * x, 0) * np.maximum(count * yy - y * y, 0))
    return np.divide(count * xy - x * y, scale, out=np.full(count.shape, np.nan), where=scale > 1e-12)


def _rmse(sums: np.ndarray) -> np.ndarray:
    count, squares = sums[..., 0], sums[..., 3] - 2 * sums[..., 5] + sums[..., 4]
    return np.sqrt(np.divide(np.maximum(squares, 0), count, out=np.full(count.shape, np.nan), where=count > 0))


_MEASURED = {"ccc": _ccc, "pearson": _pearson, "rmse": _rmse}
