"""Dynamic time warping in numpy (Sakoe and Chiba, 1978): which frame of one utterance is said at which frame of another."""

from __future__ import annotations

import numpy as np

#: cells of the cost matrix; longer pairs are warped on every k-th frame
MAX_CELLS = 6_000_000
DIAGONAL, FROM_FIRST, FROM_SECOND = 0, 1, 2


def warp(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The cheapest monotonic path from both starts to both ends.

    Args:
        first: features ``[T1, D]``; second: ``[T2, D]``. The cost of a pair is the Euclidean distance.

    Returns:
        int ``[P, 2]`` frame indices into the two. Every frame of both occurs, unless ``T1 · T2`` is above ``MAX_CELLS``: then
        every k-th frame of both does, with the smallest k that fits.

    Raises:
        ValueError: one of the two has no frame.
    """
    if len(first) == 0 or len(second) == 0:
        raise ValueError(f"nothing to warp: {len(first)} and {len(second)} frames")
    stride = int(np.ceil(np.sqrt(max(1.0, len(first) * len(second) / MAX_CELLS))))
    return _trace(_moves(_distances(first[::stride], second[::stride]))) * stride


def _distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Euclidean distances ``[T1, T2]`` of all pairs of frames."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1)[None] - 2 * first @ second.T
    return np.sqrt(np.maximum(squares, 0.0))


def _moves(cost: np.ndarray) -> np.ndarray:
    """The best move into each cell, int8 ``[T1, T2]``, one anti-diagonal at a time (its cells do not depend on each other)."""
    rows, columns = cost.shape
    moves = np.full(cost.shape, DIAGONAL, dtype=np.int8)
    before = np.full(rows + 1, np.inf)  # before[i + 1]: total at row i of the diagonal before
    earlier = np.full(rows + 1, np.inf)
    earlier[0] = 0.0  # the virtual cell before (0, 0)
    for diagonal in range(rows + columns - 1):
        low, high = max(0, diagonal - columns + 1), min(rows - 1, diagonal)
        row = np.arange(low, high + 1)
        candidates = np.stack([earlier[row], before[row], before[row + 1]])  # from (i-1, j-1), (i-1, j), (i, j-1)
        best = candidates.argmin(0)
        moves[row, diagonal - row] = best
        total = np.full(rows + 1, np.inf)
        total[row + 1] = np.take_along_axis(candidates, best[None], 0)[0] + cost[row, diagonal - row]
        earlier, before = before, total
    return moves


def _trace(moves: np.ndarray) -> np.ndarray:
    i, j = moves.shape[0] - 1, moves.shape[1] - 1
    path = [(i, j)]
    while i or j:
        move = moves[i, j]
        if move != FROM_SECOND:
            i -= 1
        if move != FROM_FIRST:
            j -= 1
        path.append((i, j))
    return np.array(path[::-1])
