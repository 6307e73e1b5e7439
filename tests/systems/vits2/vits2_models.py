"""Small ``vits2`` systems and batches for this folder's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from trainer_children import mini_config

from lalia.data import Corpus
from lalia.system import Clock
from lalia.systems.vits2.data import Batch
from lalia.systems.vits2.system import Vits2

FULL = {"symbols": 112, "tones": 12, "languages": 3}  # sizes of the seed's tables


def build(folder: Path, seed: int = 0, **overrides: Any) -> tuple[Vits2, Corpus]:
    """A system with random weights, and the corpus of eight clips that its tables were made of."""
    config = mini_config(folder, **overrides)
    corpus = Corpus.read(config["data"].train)
    torch.manual_seed(seed)
    return Vits2(config, Vits2.make_tables(config, corpus)), corpus  # type: ignore[arg-type]


def stir(system: torch.nn.Module, scale: float = 0.05, seed: int = 1) -> None:
    """Move every parameter, so that what starts at zero (couplings, splines) does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in system.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def batch_of(system: Vits2, corpus: Corpus, rows: list[int]) -> Batch:
    return system.collate([system.prepare(corpus[row], Clock()) for row in rows])


def parameters(module: torch.nn.Module | None) -> int:
    assert module is not None
    return sum(p.numel() for p in module.parameters())
