"""Small ``emotion`` systems and runs for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from factories import tiny_emotion_config

from lalia import checkpoint
from lalia.data import Corpus, write_manifest
from lalia.dialogues import group_rows
from lalia.loader import Loader
from lalia.systems.emotion.system import EmotionSystem


def build(folder: Path, **overrides: Any) -> tuple[EmotionSystem, Corpus]:
    config = tiny_emotion_config(folder, **overrides)
    rows = Corpus.read(config["data"].train)
    torch.manual_seed(0)
    system = EmotionSystem(config, EmotionSystem.make_tables(config, rows))  # type: ignore[arg-type]
    system.load_external()
    return system, rows


def one_batch(system: EmotionSystem, rows: Corpus) -> Any:
    loader = Loader(system, rows, system.config.data, seed=0)
    return next(loader.batches(0))


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.latest_set(checkpoint.RunFolder(run))
    assert found is not None
    return found.model()


def rewritten(folder: Path, out: Path, change: Any) -> Path:
    rows = [row for d in group_rows(Corpus.read([folder / "dialogues" / "all.jsonl"])) for row in d]
    for index, row in enumerate(rows):
        change(index, row)
    write_manifest(out, rows)
    return out
