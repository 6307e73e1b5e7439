"""Random numbers that belong to a row: the same whoever shares the batch, however long the padding, on any rank.

That makes a step a pure function of (seed, step, row): batch equals single, two ranks equal one, resume equals
uninterrupted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def row_seeds(ids: Sequence[str], seed: int, step: int) -> list[int]:
    """One stable 63-bit seed per row from (row id, run seed, step); the same on every machine and Python version."""
    return [_hash(f"{seed}\0{step}\0{name}") for name in ids]


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class RowNoise:
    """One CPU random stream per row: values depend on its seed, its size and the calls made before, on nothing else.

    All rows draw on the CPU, whatever the device, so that CPU and GPU see the same numbers; one transfer moves them.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def normal(self, width: int, lengths: Sequence[int] | Tensor, total: int | None = None) -> Tensor:
        """Standard normal [B, width, total]; zero beyond each row's length. ``total`` defaults to the longest."""
        return self._fill([width] * len(self.streams), lengths, width, total)

    def normal_grid(self, heights: Sequence[int] | Tensor, widths: Sequence[int] | Tensor) -> Tensor:
        """Standard normal [B, max(heights), max(widths)]; zero outside each row's own rectangle."""
        return self._fill(_sizes(heights), widths, None, None)

    def uniform(self, count: int = 1) -> Tensor:
        """Uniform in [0, 1): [B, count]."""
        drawn = torch.empty(len(self.streams), count)
        for row, stream in enumerate(self.streams):
            drawn[row].uniform_(generator=stream)
        return drawn.to(self.device)

    def _fill(
        self, heights: list[int], widths: Sequence[int] | Tensor, height: int | None, width: int | None
    ) -> Tensor:
        sizes = _sizes(widths)
        if not len(sizes) == len(heights) == len(self.streams):
            raise ValueError(f"{len(self.streams)} rows have a seed, but {len(sizes)} have a length")
        height = max(heights, default=0) if height is None else height
        width = max(sizes, default=0) if width is None else width
        if any(size > width for size in sizes):
            raise ValueError(f"a row of {max(sizes)} positions does not fit into {width}")
        drawn = torch.zeros(len(self.streams), height, width)
        for row, (stream, rows, columns) in enumerate(zip(self.streams, heights, sizes, strict=True)):
            drawn[row, :rows, :columns] = torch.randn(rows, columns, generator=stream)
        return drawn.to(self.device, non_blocking=True)


def _sizes(lengths: Sequence[int] | Tensor) -> list[int]:
    return [int(length) for length in (lengths.tolist() if isinstance(lengths, Tensor) else lengths)]
