"""``omni-smoke``: wav → Whisper → projector → random GPT → text, learnt by heart in a few steps.

It shows that everything between a recording and a loss works. Because a model that never listens learns captions by heart as well,
the control (``data.shuffled=true``) gives each caption the recording of another, drawn anew at each step: it must end higher.
Legend: B clips, S samples at 16 kHz, T frames, L tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from lalia import audio, dist
from lalia.data import Row
from lalia.nn.gpt import Gpt
from lalia.system import Clock, System, TensorBatch
from lalia.systems.omni import config as settings
from lalia.systems.omni.listen import RATE, Listener, describe_listener
from lalia.systems.omni.projector import Projector
from lalia.systems.omni.tokenizers import ByteTokenizer, tokenizer_from_dict

IGNORED = -1


@dataclass
class Clip:
    """One row: ``wave`` float32 [S], ``tokens`` of its caption without marks."""

    id: str
    wave: np.ndarray
    tokens: list[int]


@dataclass
class Batch(TensorBatch):
    """``waves`` float32 [B, S] with ``wave_lengths`` [B]; ``tokens`` and ``targets`` int64 [B, L] with ``lengths`` [B]; targets
    are −1 where nothing is to be said."""

    ids: list[str]
    waves: Tensor
    wave_lengths: Tensor
    tokens: Tensor
    targets: Tensor
    lengths: Tensor
    audio_seconds: float


class OmniSmoke(System):
    """See the module. Whisper is frozen; projector and GPT learn together, both from random weights."""

    Config = settings.SmokeConfig
    config: settings.SmokeConfig

    def __init__(self, config: settings.SmokeConfig, tables: Mapping[str, Any]) -> None:
        super().__init__(config, tables)
        self.tokenizer = tokenizer_from_dict(tables["tokenizer"])
        self.listener = Listener(tables["listener"])
        self.language = Gpt(config.model.gpt(self.tokenizer.size))
        self.projector = Projector(self.listener.width, self.language.width, config.listen.stack, config.listen.hidden)
        self._heard: dict[str, Tensor] = {}  # the encoder is frozen, and the clips are few

    @classmethod
    def make_tables(cls, config: Any, rows: Any) -> dict[str, Any]:
        """The byte tokenizer and the encoder's architecture."""
        return {"tokenizer": ByteTokenizer().to_dict(), "listener": describe_listener(config.listen.whisper, trim=True)}

    def load_external(self) -> None:
        self.listener.load_external(self.config.listen.whisper)

    # --- data -------------------------------------------------------------------------------------------------------
    def reject(self, row: Row) -> str:
        return "no audio" if not row.audio else "" if row.text else "no text"

    def prepare(self, row: Row, clock: Clock) -> Clip:
        wave, _ = audio.read(row.audio, RATE, row.start, row.duration)
        return Clip(row.id, wave, self.tokenizer.encode(row.text))

    def collate(self, examples: Sequence[Clip]) -> Batch:
        """The document mark stands between recording and caption, and is the target after the caption's last token."""
        bos = self.tokenizer.bos
        tokens = [torch.tensor([bos, *clip.tokens]) for clip in examples]
        targets = [torch.tensor([*clip.tokens, bos]) for clip in examples]
        return Batch(
            [clip.id for clip in examples],
            pad_sequence([torch.from_numpy(clip.wave) for clip in examples], batch_first=True),
            torch.tensor([len(clip.wave) for clip in examples]),
            pad_sequence(tokens, batch_first=True, padding_value=bos),
            pad_sequence(targets, batch_first=True, padding_value=IGNORED),
            torch.tensor([len(row) for row in tokens]),
            sum(len(clip.wave) for clip in examples) / RATE,
        )

    # --- learning ---------------------------------------------------------------------------------------------------
    def hear(self, batch: Batch) -> list[Tensor]:
        """Frames of each clip, [T, D]; encoded once in a process."""
        new = [place for place, name in enumerate(batch.ids) if name not in self._heard]
        if new:
            features = self.listener.features(batch.waves[new], batch.wave_lengths[new])
            self._heard.update({batch.ids[place]: heard.detach() for place, heard in zip(new, features, strict=True)})
        return [self._heard[name] for name in batch.ids]

    def losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        heard = self.hear(batch)
        if self.config.data.shuffled:
            heard = [heard[place] for place in shuffled(len(heard), clock)]
        frames = torch.tensor([len(one) for one in heard], device=batch.tokens.device)
        with self.autocast():
            prefix, counts = self.projector(pad_sequence(heard, batch_first=True), frames)
            logits = self.language(batch.tokens, batch.lengths, prefix, counts)
        total = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return {"loss_next": total / dist.average((batch.targets != IGNORED).sum()).clamp_min(1)}


def shuffled(count: int, clock: Clock) -> list[int]:
    """An order of ``count`` recordings that tells nothing of the captions: drawn anew from (seed, step), the true one included."""
    generator = torch.Generator().manual_seed(clock.seed * 1_000_003 + clock.step)
    return torch.randperm(count, generator=generator).tolist()
