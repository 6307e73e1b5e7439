"""Few-shot adaptation to a speaker: some labelled turns shift and stretch the answers about the rest.

For each speaker and dimension answers a are corrected to slope · a + shift, the maximum a posteriori estimate under normal priors
around slope 1 and shift 0 (ridge regression towards "no correction"). A few turns can only move the shift; a slope needs many.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lalia.system import Emotion
from lalia.systems.emotion.config import LabelConfig
from lalia.systems.emotion.data import scaled, unscaled

#: strength of the priors, in turns: as if so many labelled turns at the middle of the scale had shown that no correction is needed
SHIFT_PRIOR = 2.0
SLOPE_PRIOR = 2.0


class Personalizer:
    """Collects the first ``turns`` labelled turns of each speaker of one dialogue, and corrects what comes after them.

    ``turns`` None: every turn that comes with a label (a live dialogue).
    """

    def __init__(self, labels: LabelConfig, turns: int | None) -> None:
        if turns is not None and turns < 0:
            raise ValueError(f"calibrate takes a number of turns, 0 or above, got {turns}")
        self.labels, self.turns = labels, turns
        self.seen: dict[str, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)

    def answer(self, id: str, speaker: str, answer: Tensor, given: Mapping[str, float]) -> Emotion:
        """``answer`` [D] on the model's scale → the corrected answer in the labels' units, within their scale.

        A label that calibrates is learnt from after the turn's own answer, which it does not change.
        """
        raw = answer.double().numpy()
        values = unscaled(torch.from_numpy(self._correct(speaker, raw)).clamp(0, 1), self.labels).tolist()
        wanted = self.turns is None or len(self.seen[speaker]) < self.turns
        label = scaled(given, self.labels).double().numpy()
        used = wanted and bool(np.isfinite(label).any())
        if used:
            self.seen[speaker].append((raw, label))
        named = dict(zip(self.labels.dimensions, values, strict=True))
        return Emotion(id, speaker, named, used)

    def _correct(self, speaker: str, raw: np.ndarray) -> np.ndarray:
        known = self.seen.get(speaker, [])
        if not known:
            return raw
        answers, labels = np.stack([a for a, _ in known]), np.stack([b for _, b in known])
        fits = [fit(answers[:, d], labels[:, d]) for d in range(len(raw))]
        return np.array([slope * (value - 0.5) + shift + 0.5 for value, (slope, shift) in zip(raw, fits, strict=True)])


def fit(answers: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(slope, shift) around the middle of the scale from ``answers`` and ``labels`` [K], NaN labels left out.

    The minimum of Σ (label − slope · answer − shift)² + SLOPE_PRIOR · (slope − 1)² / 12 + SHIFT_PRIOR · shift²; 1/12 is the
    variance of answers spread evenly over the scale.
    """
    there = np.isfinite(labels)
    heard, wanted = answers[there] - 0.5, labels[there] - 0.5
    slope_prior = SLOPE_PRIOR / 12
    normal = np.array([[heard @ heard + slope_prior, heard.sum()], [heard.sum(), len(heard) + SHIFT_PRIOR]])
    slope, shift = np.linalg.solve(normal, np.array([heard @ wanted + slope_prior, wanted.sum()]))
    return float(slope), float(shift)
