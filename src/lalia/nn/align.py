"""Monotonic alignment search of Glow-TTS (Kim et al. 2020): which text token does each frame belong to?

``log_likelihood`` scores every frame against every token, ``search_alignment`` finds the durations of the best
monotonic path by dynamic programming, ``expand`` repeats token values by their durations.

A path gives each frame one token, starts at the first, ends at the last, and moves on by 0 or 1, so every token gets
at least one frame. Among paths of equal score each step to the next token is taken as early as possible. Scores are
added in float32, in the order of the frames.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def log_likelihood(latent: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log N(latent; mean, exp(log_scale)) of every frame under every token: [B, D, T] and twice [B, D, L] → [B, T, L].

    Natural logarithm, summed over D, in float32 whatever the autocast. The square is multiplied out, which leaves
    two batched matrix products and a term per token.
    """
    with torch.autocast(latent.device.type, enabled=False):
        frames = latent.float().transpose(1, 2)
        mean, log_scale = mean.float(), log_scale.float()
        precision = torch.exp(-2 * log_scale)
        constant = -0.5 * math.log(2 * math.pi) - log_scale - 0.5 * mean * mean * precision
        scores = torch.baddbmm(constant.sum(1, keepdim=True), frames * frames, precision, alpha=-0.5)
        return torch.baddbmm(scores, frames, mean * precision)


def mas_noise_scale(step: int, initial: float = 0.01, delta: float = 2e-6) -> float:
    """Scale of the alignment noise (VITS2, Kong et al. 2023): falls linearly, by default to 0 at step 5000."""
    return max(0.0, initial - delta * step)


def mas_noise(log_likelihood: Tensor, mask: Tensor, scale: float, noise: Tensor) -> Tensor:
    """Add ``noise`` · std · ``scale`` to the scores: all [B, T, L], ``mask`` 1 on the valid cells → [B, T, L].

    The standard deviation is that of each item's valid cells alone, so an item's noise depends neither on the
    padding nor on its neighbours in the batch. Noise of fewer frames or tokens than the scores counts as zero beyond.
    """
    if scale == 0:
        return log_likelihood
    valid = mask.to(log_likelihood.dtype)
    count = valid.sum((1, 2), keepdim=True)
    mean = (log_likelihood * valid).sum((1, 2), keepdim=True) / count.clamp_min(1)
    deviation = (log_likelihood - mean) * valid
    missing = (0, valid.shape[2] - noise.shape[2], 0, valid.shape[1] - noise.shape[1])
    variance = (deviation * deviation).sum((1, 2), keepdim=True) / (count - 1).clamp_min(1)
    return log_likelihood + F.pad(noise, missing) * valid * (variance.sqrt() * scale)


def search_alignment(log_likelihood: Tensor, text_lengths: Tensor, frame_lengths: Tensor) -> Tensor:
    """Durations of the best monotonic path: [B, T, L], [B], [B] → int64 [B, L] on the same device, in frames.

    Each of an item's tokens has at least 1, and together they have its frame length; padding tokens have 0.
    Scores on another device are copied to the CPU in one transfer. Uses numba when it is there, else torch.

    ValueError, naming the item: no token, fewer frames than tokens, lengths beyond the tensor, NaN or +inf in a
    valid cell.
    """
    scores = log_likelihood.detach().to("cpu", torch.float32)
    texts, frames = text_lengths.to("cpu", torch.int64), frame_lengths.to("cpu", torch.int64)
    _check_lengths(scores, texts, frames)
    kernel = _kernel()
    durations = _search_torch(scores, texts, frames) if kernel is None else _search_numba(kernel, scores, texts, frames)
    return durations.to(log_likelihood.device)


def _check_lengths(scores: Tensor, text_lengths: Tensor, frame_lengths: Tensor) -> None:
    batch, total_frames, total_tokens = scores.shape
    if len(text_lengths) != batch or len(frame_lengths) != batch:
        raise ValueError(f"{batch} items, but {len(text_lengths)} text lengths and {len(frame_lengths)} frame lengths")
    for item, (tokens, frames) in enumerate(zip(text_lengths.tolist(), frame_lengths.tolist(), strict=True)):
        if tokens < 1:
            raise ValueError(f"item {item} has no text token to align")
        if frames < tokens:
            raise ValueError(f"item {item} has {frames} frames, fewer than its {tokens} text tokens")
        if tokens > total_tokens or frames > total_frames:
            lengths = f"{frames} frames and {tokens} tokens"
            raise ValueError(f"item {item} claims {lengths}, the scores hold {total_frames} and {total_tokens}")


def _raise_not_a_number(item: int) -> None:
    raise ValueError(f"item {item} has NaN or +inf among its alignment scores")


def _search_torch(scores: Tensor, text_lengths: Tensor, frame_lengths: Tensor) -> Tensor:
    """The obvious reference, and the path without numba. float32 [B, T, L] → int64 [B, L]."""
    batch, total_frames, total_tokens = scores.shape
    valid = torch.arange(total_frames)[:, None] < frame_lengths[:, None, None]
    valid = valid & (torch.arange(total_tokens) < text_lengths[:, None, None])
    wrong = ((scores.isnan() | (scores == math.inf)) & valid).any(2).any(1)
    if wrong.any():
        _raise_not_a_number(int(wrong.nonzero()[0]))
    value = torch.full((batch, total_tokens + 1), -math.inf)  # slot 0 stands before the first token
    value[:, 0] = 0
    moved = torch.zeros(batch, total_frames, total_tokens, dtype=torch.bool)
    for frame in range(total_frames):
        stay, move = value[:, 1:], value[:, :-1]
        moved[:, frame] = move > stay
        value = F.pad(scores[:, frame] + torch.maximum(stay, move), (1, 0), value=-math.inf)
    durations = torch.zeros(batch, total_tokens, dtype=torch.int64)
    rows, token = torch.arange(batch), text_lengths - 1
    for frame in range(total_frames - 1, -1, -1):
        active = frame < frame_lengths
        durations[rows, token] += active
        token = token - (active & (token > 0) & (moved[rows, frame, token] | (token == frame))).long()
    return durations


def _search_numba(kernel: Callable[..., int], scores: Tensor, text_lengths: Tensor, frame_lengths: Tensor) -> Tensor:
    durations = np.zeros((scores.shape[0], scores.shape[2]), np.int64)
    table, texts, frames = scores.contiguous().numpy(), text_lengths.numpy(), frame_lengths.numpy()
    # plain threads, not numba's: those break when two Python threads call at once, and after a fork
    parts = max(1, min(torch.get_num_threads(), len(table)))
    if parts == 1:
        wrong = [kernel(table, texts, frames, durations, 0, 1)]
    else:
        with ThreadPoolExecutor(parts) as pool:
            wrong = list(pool.map(lambda part: kernel(table, texts, frames, durations, part, parts), range(parts)))
    bad = [item for item in wrong if item >= 0]
    if bad:
        _raise_not_a_number(min(bad))
    return torch.from_numpy(durations)


def _search_items(scores, text_lengths, frame_lengths, durations, first, step):  # type: ignore[no-untyped-def]
    """Items first, first+step, … in nogil numba. Returns the first item with NaN or +inf in a valid cell, or -1.

    The inner loop runs over the tokens of one frame without a branch, so that LLVM vectorises it: the value of a
    frame lives in two rolling rows (slot 0 stays -inf, before the first token), and one byte per cell says where
    the path came from.
    """
    longest = scores.shape[2]
    moved = np.empty((scores.shape[1], longest), np.uint8)
    rows = np.empty((2, longest + 1), np.float32)
    for item in range(first, scores.shape[0], step):
        tokens, frames = text_lengths[item], frame_lengths[item]
        rows[:] = -np.inf
        rows[0, 0] = 0
        wrong = 0
        for frame in range(frames):
            score, came = scores[item, frame], moved[frame]
            move = rows[frame % 2]
            stay = move[1:]
            value = rows[(frame + 1) % 2][1:]
            for token in range(tokens):
                wrong |= not (score[token] < np.inf)
                came[token] = move[token] > stay[token]
                value[token] = score[token] + max(move[token], stay[token])
            rows[frame % 2, 0] = -np.inf
        if wrong:
            return item
        token = tokens - 1
        for frame in range(frames - 1, -1, -1):
            durations[item, token] += 1
            if token > 0 and (moved[frame, token] or token == frame):
                token -= 1
    return -1


@lru_cache(maxsize=1)
def _kernel() -> Callable[..., int] | None:
    """``_search_items`` compiled, or None without numba. Compiled once per machine where a cache can be written."""
    try:
        numba: Any = importlib.import_module("numba")
    except ImportError:
        return None
    try:
        return numba.njit(cache=True, nogil=True)(_search_items)
    except RuntimeError:  # no writable place for numba's cache
        return numba.njit(nogil=True)(_search_items)


def frame_tokens(durations: Tensor, frames: int) -> Tensor:
    """Token index of each frame: int64 [B, L] → int64 [B, frames]; L where the durations are used up."""
    ends = durations.cumsum(-1)
    positions = torch.arange(frames, device=durations.device).expand(durations.shape[0], frames)
    return torch.searchsorted(ends, positions.contiguous(), right=True)


def expand(values: Tensor, durations: Tensor, frames: int) -> Tensor:
    """Repeat token values by their durations: [B, D, L], int64 [B, L] → [B, D, frames], zero beyond their sum."""
    index = frame_tokens(durations, frames).unsqueeze(1).expand(-1, values.shape[1], -1)
    return F.pad(values, (0, 1)).gather(-1, index)  # the padded token of zeros serves the frames beyond


def attention_path(durations: Tensor, frames: int) -> Tensor:
    """Durations [B, L] → hard alignment float [B, frames, L], for pictures; use :func:`expand` to compute with it."""
    index = frame_tokens(durations, frames)
    return (index.unsqueeze(-1) == torch.arange(durations.shape[1], device=durations.device)).float()
