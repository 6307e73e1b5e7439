"""Rows → turns → batches. Training, files and live speech all come through :meth:`TurnReader.read`."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lalia import audio, egemaps
from lalia.data import BadRow, ManifestError, Row
from lalia.system import TensorBatch
from lalia.systems.emotion.config import Config, LabelConfig
from lalia.systems.emotion.stores import Stores

log = logging.getLogger(__name__)

SAMPLE_RATE = 16000
#: share of labels outside the scale above which the scale is wrong, not the labels
FAR_OUTSIDE = 0.05


@dataclass
class Turn:
    """One turn. ``labels`` [D] on the scale of the model, NaN where there is none. ``wave`` [S] at 16 kHz is there when an encoder
    needs it; ``prosody`` [88], pooled ``speech`` [layers, width], ``voice`` [192] when they are known already."""

    row: Row
    labels: Tensor
    seconds: float
    wave: Tensor | None = None
    prosody: Tensor | None = None
    speech: Tensor | None = None
    voice: Tensor | None = None


@dataclass
class Batch(TensorBatch):
    """N turns of B dialogues of at most T turns and P speakers, dialogue by dialogue.

    ``grid`` int64 [B, T]: the turn at each place, −1 after a dialogue's end; ``party`` int64 [B, T], who speaks, from 0 in each
    dialogue; ``labels`` [N, D]; ``wave`` [Σ S] of all turns that need theirs, one after the other, ``wave_lengths`` [N];
    ``prosody`` [N, 88]; ``speech`` [K, layers, width] of the turns where ``speech_known`` [N], ``voice`` likewise.
    """

    ids: list[str]
    rows: list[Row]
    grid: Tensor
    party: Tensor
    parties: int
    labels: Tensor
    wave: Tensor
    wave_lengths: Tensor
    prosody: Tensor | None
    speech: Tensor
    speech_known: Tensor
    voice: Tensor
    voice_known: Tensor
    audio_seconds: float = 0.0
    names: list[list[str]] = field(default_factory=list)  # speakers of each dialogue, in the order of ``party``


class TurnReader:
    """Makes turns as the run's configuration and tables want them."""

    def __init__(self, config: Config, tables: Mapping[str, Any]) -> None:
        self.config = config
        self.stores = Stores(config, tables)
        self.hears_speech = bool(tables.get("speech"))
        self.hears_voice = bool(config.model.speaker.source)
        known = tables.get("prosody", {}).get("version", egemaps.VERSION)
        if config.model.prosody and known != egemaps.VERSION:
            log.warning("this run learnt from functionals %s, but they are %s now: train it anew", known, egemaps.VERSION)

    def read(self, row: Row, keep: bool = False) -> Turn:
        """Row → Turn, with what the feature folder already has; BadRow when the recording cannot be used. ``keep``: functionals
        that are computed now go to that folder."""
        speech = self.stores.get("speech", row) if self.hears_speech else None
        voice = self.stores.get("voice", row) if self.hears_voice else None
        prosody = self.stores.get("egemaps", row) if self.config.model.prosody else None
        needs = (self.hears_speech and speech is None) or (self.hears_voice and voice is None)
        wave = None
        if needs or (self.config.model.prosody and prosody is None):
            wave = read_wave(row)
        if self.config.model.prosody and prosody is None:
            assert wave is not None
            prosody = torch.from_numpy(egemaps.functionals(wave, SAMPLE_RATE))
            self.stores.put("egemaps", row, prosody, keep)
        seconds = row.duration or (len(wave) / SAMPLE_RATE if wave is not None else 0.0)
        labels = scaled(row.labels, self.config.labels)
        kept = torch.from_numpy(wave) if wave is not None and needs else None
        return Turn(row, labels, seconds, kept, prosody, speech, voice)

    def hear(self, row: Row, wave: np.ndarray) -> Turn:
        """A live turn: ``wave`` float32 [S] at 16 kHz instead of a file."""
        prosody = torch.from_numpy(egemaps.functionals(wave, SAMPLE_RATE)) if self.config.model.prosody else None
        kept = torch.from_numpy(wave) if self.hears_speech or self.hears_voice else None
        return Turn(row, scaled(row.labels, self.config.labels), len(wave) / SAMPLE_RATE, kept, prosody)


def read_wave(row: Row) -> np.ndarray:
    """The row's recording, float32 [S] at 16 kHz; BadRow says why not."""
    if not row.audio:
        raise BadRow("no audio: an emotion is heard, not read")
    try:
        wave, _ = audio.read(row.audio, SAMPLE_RATE, row.start, row.duration)
    except (audio.AudioError, FileNotFoundError) as error:
        raise BadRow(str(error)) from error
    return checked(wave)


def checked(wave: np.ndarray) -> np.ndarray:
    """The wave as contiguous float32 [S]; BadRow without samples or with NaN."""
    if wave.ndim != 1 or not len(wave):
        raise BadRow(f"a turn is a wave of at least one sample, got the shape {list(wave.shape)}")
    if not np.isfinite(wave).all():
        raise BadRow("audio holds NaN or infinite samples")
    return np.ascontiguousarray(wave, dtype=np.float32)


# --- labels -----------------------------------------------------------------------------------------------------------
def scaled(labels: Mapping[str, float], config: LabelConfig) -> Tensor:
    """Labels in their own units → [D] in [0, 1], clipped to the scale; NaN where there is none."""
    span = config.high - config.low
    values = [labels.get(name, math.nan) for name in config.dimensions]
    return ((torch.tensor(values, dtype=torch.float32) - config.low) / span).clamp(0, 1)  # NaN stays NaN


def unscaled(answers: Tensor, config: LabelConfig) -> Tensor:
    """The model's scale → the labels' units, any shape."""
    return config.low + answers * (config.high - config.low)


def label_table(rows: Any, config: LabelConfig) -> dict[str, Any]:
    """Counts of the training labels: {"dimensions", "low", "high", "labelled", "missing", "clipped"}, each by dimension.

    ManifestError when a dimension has no label at all, or so many are outside the scale that it must be another one.
    """
    labels = rows.column("labels")
    table: dict[str, Any] = {"dimensions": list(config.dimensions), "low": config.low, "high": config.high}
    table |= {"labelled": {}, "missing": {}, "clipped": {}}
    for name in config.dimensions:
        values = np.array([given[name] for given in labels if name in given], dtype=np.float64)
        if not len(values):
            known = sorted({key for given in labels for key in given})
            raise ManifestError(f"no training row has the label {name!r}; rows have {', '.join(known) or 'no labels at all'}")
        outside = int(((values < config.low) | (values > config.high)).sum())
        if outside > max(3, FAR_OUTSIDE * len(values)):
            raise ManifestError(
                f"{outside} of {len(values)} {name} labels are outside {config.low:g} … {config.high:g} (they go from "
                f"{values.min():g} to {values.max():g}): set labels.low and labels.high to the corpus' scale"
            )
        table["labelled"][name], table["missing"][name] = len(values), len(labels) - len(values)
        table["clipped"][name] = outside
    return table


# --- batches ------------------------------------------------------------------------------------------------------------
def collate(turns: Sequence[Turn], together: bool) -> Batch:
    """Turns in their order → a batch. ``together``: rows of one ``dialogue`` are one; otherwise each turn is for itself."""
    places: dict[str, list[int]] = {}
    for index, turn in enumerate(turns):
        alone = not together or not turn.row.dialogue
        places.setdefault(f"\0{index}" if alone else turn.row.dialogue, []).append(index)
    longest = max(len(found) for found in places.values())
    grid = torch.full((len(places), longest), -1)
    party = torch.zeros(len(places), longest, dtype=torch.long)
    names: list[list[str]] = []
    for number, found in enumerate(places.values()):
        speakers = [turns[i].row.speaker for i in found]
        names.append(list(dict.fromkeys(speakers)))
        grid[number, : len(found)] = torch.tensor(found)
        party[number, : len(found)] = torch.tensor([names[-1].index(name) for name in speakers])
    waves = [turn.wave if turn.wave is not None else torch.zeros(0) for turn in turns]
    prosody = [turn.prosody for turn in turns if turn.prosody is not None]
    return Batch(
        ids=[turn.row.id for turn in turns],
        rows=[turn.row for turn in turns],
        grid=grid,
        party=party,
        parties=max(len(found) for found in names),
        labels=torch.stack([turn.labels for turn in turns]),
        wave=torch.cat(waves),
        wave_lengths=torch.tensor([len(wave) for wave in waves]),
        prosody=torch.stack(prosody) if prosody else None,
        speech=_stack([turn.speech for turn in turns]),
        speech_known=torch.tensor([turn.speech is not None for turn in turns]),
        voice=_stack([turn.voice for turn in turns]),
        voice_known=torch.tensor([turn.voice is not None for turn in turns]),
        audio_seconds=sum(turn.seconds for turn in turns),
        names=names,
    )


def _stack(items: Sequence[Tensor | None]) -> Tensor:
    known = [item for item in items if item is not None]
    return torch.stack(known) if known else torch.zeros(0)
