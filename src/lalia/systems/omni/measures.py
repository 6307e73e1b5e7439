"""How well projected audio and the words of its text agree: retrieval, linear CKA, and a picture.

Legend: N pairs, W width. Row i of both matrices belongs to the same recording.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lalia.plots import figure_to_array
from lalia.runfolder import write_atomic

KS = (1, 5, 10)
LINES = 200  # pairs joined by a line in the picture


def retrieval(audio: Tensor, text: Tensor, names: Sequence[str] = (), ks: Sequence[int] = KS) -> dict[str, float]:
    """Share of recordings whose own text is among the ``k`` nearest by cosine, both sides centred: ``retrieval@k``, and its chance.

    Args:
        audio, text: [N, W] each.
        names: the texts; recordings of equal text count as right for each other. All different if absent.

    Ties count against. ``retrieval@k`` is left out where N is not above k.
    """
    size = len(audio)
    similarity = _unit(_centred(audio)) @ _unit(_centred(text)).T
    labels = list(names) or [str(i) for i in range(size)]
    groups = {name: number for number, name in enumerate(dict.fromkeys(labels))}
    own = torch.tensor([groups[name] for name in labels])
    right = own.unsqueeze(1) == own
    best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    rank = ((similarity >= best) & ~right).sum(1)
    found: dict[str, float] = {}
    for k in (k for k in ks if k < size):
        found[f"retrieval@{k}"] = float((rank < k).float().mean())
        miss = [_miss(size, int(count), k) for count in right.sum(1)]
        found[f"retrieval@{k}_chance"] = 1 - float(np.mean(miss))
    return found


def _miss(size: int, right: int, k: int) -> float:
    """Probability that none of ``right`` among ``size`` is drawn in ``k`` draws."""
    return float(np.prod([max(0, size - right - i) / (size - i) for i in range(k)]))


def linear_cka(audio: Tensor, text: Tensor) -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019, 1905.00414) of [N, W] and [N, W'], in [0, 1].

    The estimate is biased upwards where N is not much above W: compare with :func:`shuffled_cka`.
    """
    x, y = _centred(audio), _centred(text)
    grams = x @ x.T, y @ y.T
    return float((grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm()).clamp_min(1e-30))


def shuffled_cka(audio: Tensor, text: Tensor, draws: int = 10) -> float:
    """Mean linear CKA when texts are given to the wrong recordings: what agreement by chance looks like."""
    generator = torch.Generator().manual_seed(0)
    return float(np.mean([linear_cka(audio, text[torch.randperm(len(text), generator=generator)]) for _ in range(draws)]))


def agreement(audio: Tensor, text: Tensor, names: Sequence[str] = ()) -> dict[str, float]:
    """All figures of N pairs. Empty when there are fewer than three."""
    if len(audio) < 3:
        return {}
    figures = {"cka": linear_cka(audio, text), "cka_shuffled": shuffled_cka(audio, text), "pairs": float(len(audio))}
    return figures | retrieval(audio, text, names)


def picture(audio: Tensor, text: Tensor) -> np.ndarray:
    """The two first principal components of both sides together, pairs joined by lines: uint8 [height, width, 3]."""
    both = _centred(torch.cat([audio, text]))
    _, sizes, directions = torch.linalg.svd(both, full_matrices=False)
    points = (both @ directions[:2].T).numpy()
    share = (sizes.square() / sizes.square().sum().clamp_min(1e-30))[:2].tolist()
    heard, read = points[: len(audio)], points[len(audio) :]
    figure = Figure(figsize=(6, 6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for one, other in zip(heard[:LINES], read[:LINES], strict=True):
        axes.plot(*zip(one, other, strict=True), color="0.85", linewidth=0.6, zorder=0)
    axes.scatter(heard[:, 0], heard[:, 1], s=10, label="projected audio")
    axes.scatter(read[:, 0], read[:, 1], s=10, label="text embeddings")
    axes.set(xlabel=f"first component ({100 * share[0]:.0f} %)", ylabel=f"second component ({100 * share[1]:.0f} %)")
    axes.legend()
    return figure_to_array(figure)


def write(folder: str | Path, audio: Tensor, text: Tensor, names: Sequence[str] = ()) -> dict[str, Any]:
    """``alignment.json`` and ``alignment.png`` in ``folder``; returns the figures. ValueError for fewer than three pairs."""
    from matplotlib.image import imsave

    figures = agreement(audio, text, names)
    if not figures:
        raise ValueError(f"{len(audio)} recordings are too few to measure how audio and text agree; give at least three")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    imsave(folder / "alignment.png", picture(audio, text))
    write_atomic(folder / "alignment.json", json.dumps(figures, indent=1) + "\n")
    return figures


def _centred(values: Tensor) -> Tensor:
    values = values.detach().cpu().double()
    return values - values.mean(0)


def _unit(values: Tensor) -> Tensor:
    return values / values.norm(dim=1, keepdim=True).clamp_min(1e-30)
