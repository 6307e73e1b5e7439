"""Keys and values of the positions that a transformer has seen, with rows that began and ended at unlike places."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

ROOM = 128  # positions allocated beyond what is needed, so that most steps copy nothing


@dataclass
class KvCache:
    """Row b has used positions ``start[b] … end[b] - 1``; positions below ``prefix`` are audio, the others text.

    ``start`` is None where every row begins at 0. ``longest`` is the greatest ``end``, ``used`` the greatest ``end - start``,
    ``even`` whether all rows end alike: plain numbers, so that a step need not ask the device. ``previous`` [B, W] is the embedding
    of each row's last token. Keys and values of a layer: [B, H, capacity, D].
    """

    start: Tensor | None
    end: Tensor
    prefix: int
    longest: int
    used: int
    even: bool
    previous: Tensor
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def begin(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take the next layer's keys and values of the whole prompt, [B, H, T, D]; returns them."""
        self.keys.append(F.pad(key, (0, 0, 0, ROOM)))
        self.values.append(F.pad(value, (0, 0, 0, ROOM)))
        return key, value

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write one position, [B, H, 1, D], at the end of each row; returns [B, H, longest + 1, D] of both."""
        return self._write(self.keys, layer, key), self._write(self.values, layer, value)

    def _write(self, held: list[Tensor], layer: int, new: Tensor) -> Tensor:
        if self.longest >= held[layer].shape[2]:
            held[layer] = F.pad(held[layer], (0, 0, 0, max(ROOM, held[layer].shape[2])))
        if self.even:
            held[layer][:, :, self.longest] = new[:, :, 0]
        else:
            held[layer][torch.arange(len(new), device=new.device), :, self.end] = new[:, :, 0]
        return held[layer][:, :, : self.longest + 1]

    def advance(self, previous: Tensor) -> None:
        """After the last layer of a step: each row has one position more, whose embedding is ``previous`` [B, W]."""
        self.end = self.end + 1
        self.longest, self.used, self.previous = self.longest + 1, self.used + 1, previous


def visible(queries: Tensor, keys: int, window: int, prefix: int, start: Tensor | None) -> Tensor:
    """Which keys each query may see: bool [B or 1, 1, Q, keys].

    A key is hidden when it comes after the query, before the row's ``start``, or more than ``window`` (0 = any number of)
    positions back; but positions below ``prefix`` are inside every window, so that text always reaches all of the audio. Every
    query sees itself, those of padding too: a softmax over nothing would be NaN.

    Args:
        queries: positions [B, Q] or [1, Q].
        start: [B], or None for rows that all begin at 0.
    """
    query, key = queries.unsqueeze(-1), torch.arange(keys, device=queries.device)
    seen = key <= query
    if window:
        seen = seen & ((key >= query - window) | (key < prefix))
    if start is not None:
        seen = seen & (key >= start[:, None, None]) | (key == query)
    return seen.unsqueeze(1)
