"""The concordance correlation coefficient (Lin 1989) as a streaming metric and as a loss.

    CCC = 2 σ_xy / (σ_x² + σ_y² + (μ_x − μ_y)²)        population moments over all pairs

The CCC of a set is no mean of the CCCs of its parts, so what is kept, merged and averaged here are sums. A target that is NaN
is a label that is not there: the pair counts for nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: n, Σx, Σy, Σx², Σy², Σxy
SUMS = 6
#: keeps 0/0 of constant predictions finite; labels are of the order of 1
EPSILON = 1e-8


def sums_of(prediction: Tensor, target: Tensor) -> Tensor:
    """Sums over N of ``prediction [N, D]`` and ``target [N, D]``: [D, 6], in the type of the prediction, differentiable."""
    there = target.isfinite()
    y = torch.where(there, target, torch.zeros_like(target)).to(prediction.dtype)
    x = torch.where(there, prediction, torch.zeros_like(prediction))
    return torch.stack([there.to(prediction.dtype), x, y, x * x, y * y, x * y], dim=-1).sum(0)


def ccc_of(sums: Tensor) -> Tensor:
    """CCC of ``sums [..., 6]`` → [...]. 0 where there is nothing to compare or both are constant and unequal."""
    count, x, y, xx, yy, xy = sums.unbind(-1)
    count = count.clamp_min(1)
    mean_x, mean_y = x / count, y / count
    variance_x = (xx / count - mean_x**2).clamp_min(0)
    variance_y = (yy / count - mean_y**2).clamp_min(0)
    return 2 * (xy / count - mean_x * mean_y) / (variance_x + variance_y + (mean_x - mean_y) ** 2 + EPSILON)


class Moments:
    """Sums of (prediction, target) pairs by dimension, float64 [D, 6]: add batches in any order, ask at the end.

    ``shift [D]`` is subtracted from both sides before summing and changes no result but its rounding; give the middle of the
    label scale where labels are far from 0.
    """

    def __init__(self, dimensions: int, shift: Tensor | float = 0.0) -> None:
        self.sums = torch.zeros(dimensions, SUMS, dtype=torch.float64)
        self.shift = torch.as_tensor(shift, dtype=torch.float64)

    def add(self, prediction: Tensor, target: Tensor) -> None:
        """``prediction``, ``target`` [N, D]; NaN targets are left out. ValueError on unequal shapes or a prediction of NaN."""
        if prediction.shape != target.shape or prediction.shape[-1] != len(self.sums):
            raise ValueError(f"prediction {list(prediction.shape)} and target {list(target.shape)} must be [N, {len(self.sums)}]")
        prediction, target = prediction.detach().double().cpu(), target.detach().double().cpu()
        if not prediction[target.isfinite()].isfinite().all():
            raise ValueError("a prediction is NaN or infinite")
        self.sums += sums_of(prediction - self.shift, target - self.shift)

    def merge(self, other: Moments) -> None:
        """Take in another part of the set, summed with the same ``shift``."""
        if not torch.equal(self.shift, other.shift):
            raise ValueError("moments with unlike shifts cannot be merged")
        self.sums += other.sums

    def count(self) -> Tensor:
        """Pairs that counted, by dimension: int64 [D]."""
        return self.sums[:, 0].long()

    def ccc(self) -> Tensor:
        """float64 [D]; NaN for a dimension without a pair."""
        return torch.where(self.sums[:, 0] > 0, ccc_of(self.sums), torch.full((len(self.sums),), torch.nan, dtype=torch.float64))


def ccc_loss(prediction: Tensor, target: Tensor, others: Tensor | None = None) -> Tensor:
    """1 − CCC by dimension, [D]; 0 for a dimension without any label.

    Args:
        prediction, target: [N, D], NaN targets are left out.
        others: [D, 6] sums of pairs that are not in this batch (other ranks, earlier batches), constants. The value is that of
            the whole set, and the gradient that of this batch's part of it. A batch of one, or constant predictions, give a
            finite loss.
    """
    sums = sums_of(prediction.float(), target.float())
    total = sums if others is None else sums + others.to(sums)
    return torch.where(total[:, 0] > 0, 1 - ccc_of(total), torch.zeros_like(total[:, 0]))
