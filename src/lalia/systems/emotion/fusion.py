"""Prosody as a vector, and feature-wise modulation by it and by the speaker."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

DEVIATION_FLOOR = 1e-5  # a functional that does not vary in training says nothing: its z-score is 0, not noise blown up
OUTLIER = 10.0  # standard deviations beyond which a functional is taken to be broken


class Film(nn.Module):
    """Scale and shift of every channel by a condition (Perez et al. 2018): ``hidden · (1 + γ) + β``.

    The last layer starts at zero, so a new module returns its input unchanged, bit for bit.
    """

    def __init__(self, width: int, condition_width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(condition_width, width)
        self.outer = nn.Linear(width, 2 * width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """hidden [..., D], condition [..., C] with the same leading dimensions (or such as broadcast) → [..., D]."""
        gain, shift = self.outer(nn.functional.gelu(self.inner(condition))).chunk(2, dim=-1)
        return hidden * (1 + gain) + shift


class ProsodyEncoder(nn.Module):
    """Functionals (eGeMAPS, 88) → z-scores → two layers. ``mean`` and ``deviation`` are of the training rows alone.

    They are stored with the weights. ValueError when they are not of one length or not finite.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Sequence[float], deviation: Sequence[float], width: int, dropout: float = 0.0) -> None:
        super().__init__()
        centre, spread = torch.tensor(mean, dtype=torch.float32), torch.tensor(deviation, dtype=torch.float32)
        if centre.shape != spread.shape or centre.dim() != 1:
            raise ValueError(f"mean has {len(mean)} values and deviation {len(deviation)}; each functional needs one of both")
        if not (centre.isfinite().all() and spread.isfinite().all() and (spread >= 0).all()):
            raise ValueError("statistics of the functionals must be finite, and deviations not negative")
        self.register_buffer("mean", centre)
        self.register_buffer("scale", torch.where(spread > DEVIATION_FLOOR, 1 / spread.clamp_min(DEVIATION_FLOOR), 0.0))
        self.network = nn.Sequential(
            nn.Linear(len(centre), width), nn.LayerNorm(width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, width)
        )

    def z_scores(self, functionals: Tensor) -> Tensor:
        """Functionals [..., 88] in their own units → z-scores of the same shape, within ±10."""
        return ((functionals.float() - self.mean) * self.scale).clamp(-OUTLIER, OUTLIER)

    def forward(self, functionals: Tensor) -> Tensor:
        """Functionals [..., 88] in their own units → [..., D]."""
        return self.network(self.z_scores(functionals))
