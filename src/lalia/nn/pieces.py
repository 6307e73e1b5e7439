"""Batches of bounded size out of recordings of any length: cut the long ones, pack by length, put the results together.

Legend: N rows (recordings), P pieces, S samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """``samples`` samples of row ``row``, from ``start`` on. ``share`` is its part of the row, in (0, 1]."""

    row: int
    start: int
    samples: int
    share: float = 1.0


def cut(lengths: Sequence[int], longest: int) -> list[Piece]:
    """Rows of ``lengths`` samples → pieces of at most ``longest`` samples, in order.

    A row that is too long is cut into pieces of equal size (to a sample), so that no piece is a useless remainder.
    ValueError names the first row without samples.
    """
    pieces = []
    for row, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"recording {row} of {len(lengths)} has no samples: remove it or reject it before encoding")
        count = -(-length // longest)
        edges = [length * i // count for i in range(count + 1)]
        pieces += [Piece(row, start, end - start, (end - start) / length) for start, end in zip(edges[:-1], edges[1:], strict=True)]
    return pieces


def pack(pieces: Sequence[Piece], budget: int = 0) -> list[list[int]]:
    """Indices of ``pieces`` in groups whose padded size (longest piece · number) is at most ``budget`` samples.

    Longest first, so that neighbours are alike. A piece longer than the budget is a group of its own; 0 = one group.
    """
    order = sorted(range(len(pieces)), key=lambda index: -pieces[index].samples)
    groups: list[list[int]] = []
    for index in order:
        if groups and (not budget or pieces[groups[-1][0]].samples * (len(groups[-1]) + 1) <= budget):
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def padded_size(pieces: Sequence[Piece], group: Sequence[int]) -> int:
    """Samples of the padded batch that ``group`` makes."""
    return max(pieces[index].samples for index in group) * len(group)


def take(wave: Tensor, pieces: Sequence[Piece]) -> tuple[Tensor, Tensor]:
    """wave [N, S] → the pieces, padded with zeros: waves [P, longest], lengths int64 [P], on the wave's device."""
    longest = max(piece.samples for piece in pieces)
    out = wave.new_zeros(len(pieces), longest)
    for index, piece in enumerate(pieces):
        out[index, : piece.samples] = wave[piece.row, piece.start : piece.start + piece.samples]
    return out, torch.tensor([piece.samples for piece in pieces], device=wave.device)


def rejoin(values: Sequence[Tensor], groups: Sequence[Sequence[int]], pieces: Sequence[Piece], rows: int) -> Tensor:
    """Results of each group [P, ...] → rows [N, ...]: the mean of a row's pieces, weighted by their duration."""
    order = [index for group in groups for index in group]
    joined = torch.cat(list(values))
    shares = joined.new_tensor([pieces[index].share for index in order])
    owners = torch.tensor([pieces[index].row for index in order], device=joined.device)
    weighted = joined * shares.view(-1, *[1] * (joined.dim() - 1))
    return joined.new_zeros(rows, *joined.shape[1:]).index_add(0, owners, weighted)
