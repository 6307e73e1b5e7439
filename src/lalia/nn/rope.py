"""Rotary positions (Su et al. 2021, 2104.09864): queries and keys are turned by an angle that grows with the position."""

from __future__ import annotations

import torch
from torch import Tensor, nn

GROWTH = 256  # the table grows by whole pieces of so many positions


class Rotary(nn.Module):
    """Table of cosines and sines, which grows as longer sequences come; it is computed in float64 and not saved.

    Positions act through their differences alone, so a sequence may begin anywhere in the table.

    Args:
        width: of one head, even.
        base: the slowest pair of channels turns about once in ``2π · base`` positions.
    """

    table: Tensor

    def __init__(self, width: int, base: float = 1e5) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"rotary positions need an even head width, got {width}")
        self.width, self.base = width, base
        self.register_buffer("table", self._rows(GROWTH), persistent=False)

    def _rows(self, positions: int) -> Tensor:
        speeds = self.base ** (-torch.arange(0, self.width, 2, dtype=torch.float64) / self.width)
        angles = torch.outer(torch.arange(positions, dtype=torch.float64), speeds)
        return torch.stack([angles.cos(), angles.sin()]).float()  # [2, positions, width / 2]

    def upto(self, positions: int) -> Tensor:
        """Cosines and sines of positions 0 … ``positions`` - 1 at least: [2, ≥ positions, width / 2]."""
        if positions > self.table.shape[1]:
            self.table = self._rows(-(-positions // GROWTH) * GROWTH).to(self.table)
        return self.table


def rotate(values: Tensor, rotation: Tensor) -> Tensor:
    """Turn by minus the angle, the convention of nanochat's weights.

    Args:
        values: [B, H, T, width]; channel c and channel c + width / 2 are one pair.
        rotation: cosines and sines, [2, T, width / 2], or [2, B, 1, T, width / 2] when rows stand at unlike positions.
    """
    cos, sin = rotation.to(values.dtype)
    first, second = values.chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)
