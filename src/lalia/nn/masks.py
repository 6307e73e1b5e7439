"""Masks of padded sequences, and segments cut out of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sequence_mask(lengths: Tensor, total: int | None = None) -> Tensor:
    """Lengths [B] → bool [B, total], True on the valid positions. ``total`` defaults to the longest (a device sync)."""
    if total is None:
        total = int(lengths.max())
    return torch.arange(total, device=lengths.device) < lengths.unsqueeze(-1)


def channel_mask(lengths: Tensor, total: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Lengths [B] → float [B, 1, total], the form of mask that the networks take."""
    return sequence_mask(lengths, total).unsqueeze(1).to(dtype)


def segment_starts(lengths: Tensor, size: int, fractions: Tensor) -> Tensor:
    """Where a segment of ``size`` positions begins in each clip: int64 [B].

    ``fractions`` [B], uniform in [0, 1), choose among all starts that keep the segment inside the clip's own length.
    A clip shorter than the segment starts at 0 (:func:`slice_segments` fills it up with zeros).
    """
    choices = (lengths - size + 1).clamp_min(1)
    drawn = (fractions.to(lengths.device, torch.float64) * choices).floor().to(torch.int64)
    return torch.minimum(drawn, choices - 1).clamp_min(0)


def slice_segments(values: Tensor, starts: Tensor, size: int) -> Tensor:
    """Cut ``size`` positions from each item: [B, D, T], starts [B] → [B, D, size].

    A tensor shorter than ``size`` is first filled up with zeros on the right. A segment that would reach beyond the
    end of the (filled) tensor is an error: on the CPU an IndexError that names the item, on other devices the
    gather's own.
    """
    missing = size - values.shape[-1]
    if missing > 0:
        values = F.pad(values, (0, missing))
    if starts.device.type == "cpu":  # on other devices reading the starts would wait for the device
        for item, start in enumerate(starts.tolist()):
            if not 0 <= start <= values.shape[-1] - size:
                raise IndexError(f"segment {start}:{start + size} of item {item} is not inside {values.shape[-1]}")
    positions = starts.to(values.device).unsqueeze(-1) + torch.arange(size, device=values.device)
    return values.gather(-1, positions.unsqueeze(1).expand(-1, values.shape[1], -1))
