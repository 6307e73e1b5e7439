"""A stand-in for an aligned run: a random ear of one matrix, a projector and a tiny GPT behind the contract of ``omni-align``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lalia import checkpoint, sections
from lalia import config as configuration
from lalia.nn.gpt import Gpt, GptConfig
from lalia.runfolder import RunFolder
from lalia.system import System
from lalia.systems.omni.projector import Projector
from lalia.systems.omni.tokenizers import ByteTokenizer

FRAME = 320


class Ear(nn.Module):
    """Frames of 20 ms through one fixed matrix."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.width, self.calls = width, 0
        self.matrix = nn.Linear(FRAME, width)

    def features(self, waves: Tensor, lengths: Tensor) -> list[Tensor]:
        self.calls += len(waves)
        counts = (lengths + FRAME - 1) // FRAME
        waves = nn.functional.pad(waves, (0, -waves.shape[1] % FRAME))
        frames = self.matrix(10 * waves.unflatten(1, (-1, FRAME)))
        return [frame[:count] for frame, count in zip(frames, counts.tolist(), strict=True)]


@dataclass
class StandinConfig(sections.RunConfig):
    system: str = "standin-align"
    context: int = 256
    data: sections.DataConfig = field(default_factory=sections.DataConfig)


class Standin(System):
    Config = StandinConfig

    def __init__(self, config: StandinConfig, tables: Mapping[str, Any]) -> None:
        super().__init__(config, tables)
        self.tokenizer = ByteTokenizer()
        self.listener = Ear()
        self.language = Gpt(GptConfig(depth=2, vocab=self.tokenizer.size, context=config.context, aspect=16, head_width=16))
        self.projector = Projector(self.listener.width, self.language.width, stack=4, hidden=24)


def write_align(folder: Path, context: int = 256, seed: int = 0) -> Standin:
    """A run folder of a stand-in whose every weight is random (an untrained GPT has zeros that let no gradient through)."""
    torch.manual_seed(seed)
    system = Standin(StandinConfig(context=context), {})
    with torch.no_grad():
        for parameter in system.language.parameters():
            parameter.normal_(0, 0.08)
    folder.mkdir(parents=True, exist_ok=True)
    configuration.save(system.config, folder / "config.yaml")
    RunFolder(folder).write_tables({})
    checkpoint.save_set(folder, 1, system.state_dict(), {})
    return system
