"""Rows → examples → batches. Training and inference both come through :class:`TextSide`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lalia import audio, mel
from lalia.data import BadRow, Row
from lalia.system import TensorBatch
from lalia.systems.vits2.config import Config
from lalia.systems.vits2.generator import TextInput, mel_spec
from lalia.text import Analysis, OnUnknown, SymbolTable, TextError, analyse, blank_word2ph, intersperse


@dataclass
class Example:
    """One clip. ``text, tones, languages`` int64 [L]; ``spectrogram`` [F, T]; ``wave`` [S] with S = T · hop."""

    id: str
    text: Tensor
    tones: Tensor
    languages: Tensor
    speaker: int
    spectrogram: Tensor
    wave: Tensor
    word2ph: list[int] = field(default_factory=list)


@dataclass
class Batch(TensorBatch):
    """``text, tones, languages`` [B, L]; ``spectrogram`` [B, F, T]; ``wave`` [B, 1, S]; lengths and ``speaker`` [B]."""

    ids: list[str]
    text: Tensor
    tones: Tensor
    languages: Tensor
    text_lengths: Tensor
    speaker: Tensor
    spectrogram: Tensor
    frame_lengths: Tensor
    wave: Tensor
    bert: dict[str, Tensor] = field(default_factory=dict)

    def text_input(self) -> TextInput:
        return TextInput(
            text=self.text,
            tones=self.tones,
            languages=self.languages,
            lengths=self.text_lengths,
            speaker=self.speaker,
            bert=self.bert,
            reference=self.spectrogram,
            reference_lengths=self.frame_lengths,
        )


class TextSide:
    """Text → ids by the run's own symbol table, so that training and inference cannot differ."""

    def __init__(self, config: Config, tables: Mapping[str, Any]) -> None:
        self.config = config
        self.symbols = SymbolTable.from_dict(tables["symbols"])
        self.speakers: dict[str, int] = tables["speakers"]

    def analyse(self, text: str, language: str) -> Analysis:
        """Raises BadRow with the front end's reason, or when the language is not in this run's table."""
        if language not in self.symbols.languages:
            raise BadRow(f"language {language!r} is not in this model; it has {', '.join(self.symbols.languages)}")
        try:
            analysis = analyse(text, language, on_unknown=OnUnknown[self.config.data.on_unknown.name])
        except TextError as error:
            raise BadRow(str(error)) from error
        return analysis

    def ids(self, analysis: Analysis) -> tuple[Tensor, Tensor, Tensor, list[int]]:
        """Analysis → text, tones, languages int64 [L] and word2ph, with blanks between when ``data.add_blank``."""
        text = self.symbols.encode(analysis.phones)
        tones = self.symbols.encode_tones(analysis.tones, analysis.language)
        languages = [self.symbols.language_ids[analysis.language]] * len(text)
        word2ph = list(analysis.word2ph)
        if self.config.data.add_blank:
            text, tones = intersperse(text), intersperse(tones)
            languages = [languages[0]] * len(text)
            word2ph = blank_word2ph(word2ph)
        as_tensor = torch.tensor([text, tones, languages], dtype=torch.long)
        return as_tensor[0], as_tensor[1], as_tensor[2], word2ph

    def speaker(self, name: str) -> int:
        """Speaker id; '' is the first. BadRow with the known names otherwise. 0 when the voice comes from a recording."""
        if not name or self.config.model.reference_encoder:
            return 0
        if name not in self.speakers:
            raise BadRow(f"unknown speaker {name!r}; this run has {', '.join(list(self.speakers)[:20])}")
        return self.speakers[name]


def load_wave(row: Row, config: Config) -> Tensor:
    """The row's audio at the model's rate, cut to whole frames: float32 [S]. BadRow when it cannot be used."""
    try:
        wave, _ = audio.read(row.audio, config.audio.sample_rate, row.start, row.duration)
    except (audio.AudioError, FileNotFoundError) as error:
        raise BadRow(str(error)) from error
    hop = config.audio.hop
    frames = len(wave) // hop
    if frames < config.data.segment_frames:
        raise BadRow(f"too short: {frames} frames, one segment has {config.data.segment_frames}")
    wave = np.ascontiguousarray(wave[: frames * hop])
    if not np.isfinite(wave).all():
        raise BadRow("audio holds NaN or infinite samples")
    return torch.from_numpy(wave)


def read_text(row: Row, frames: float, config: Config, text_side: TextSide) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Text, tones, languages int64 [L] and word2ph of a row with ``frames`` frames of sound; BadRow says why not."""
    analysis = text_side.analyse(row.text, row.language or config.data.languages[0])
    if len(analysis.phones) > config.data.max_phones:
        raise BadRow(f"text too long: {len(analysis.phones)} phones, data.max_phones is {config.data.max_phones}")
    text, tones, languages, word2ph = text_side.ids(analysis)
    if frames < len(text):
        raise BadRow(f"text does not fit the audio: {len(text)} symbols (blanks included), but only {frames:.0f} frames")
    return text, tones, languages, word2ph


def prepare(row: Row, config: Config, text_side: TextSide) -> Example:
    """Row → Example; BadRow with the reason when text, speaker or audio cannot be used."""
    wave = load_wave(row, config)
    spectrogram = mel.spectrogram(wave, mel_spec(config.audio))
    text, tones, languages, word2ph = read_text(row, spectrogram.shape[1], config, text_side)
    return Example(row.id, text, tones, languages, text_side.speaker(row.speaker), spectrogram, wave, word2ph)


def pad_text(examples: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ragged ids → text, tones, languages [B, L] and lengths [B]."""
    lengths = torch.tensor([len(e.text) for e in examples])
    padded = torch.zeros(3, len(examples), int(lengths.max()), dtype=torch.long)
    for row, example in enumerate(examples):
        for kind, values in enumerate((example.text, example.tones, example.languages)):
            padded[kind, row, : len(values)] = values
    return padded[0], padded[1], padded[2], lengths


def collate(examples: Sequence[Example], bert_width: int, bert_languages: Sequence[str]) -> Batch:
    """Pads with zeros; a language without BERT features in the row gets zeros, in training and inference alike."""
    text, tones, languages, text_lengths = pad_text(examples)
    frame_lengths = torch.tensor([e.spectrogram.shape[1] for e in examples])
    frames, hop = int(frame_lengths.max()), examples[0].wave.shape[0] // examples[0].spectrogram.shape[1]
    spectrogram = torch.zeros(len(examples), examples[0].spectrogram.shape[0], frames)
    wave = torch.zeros(len(examples), 1, frames * hop)
    for row, example in enumerate(examples):
        spectrogram[row, :, : example.spectrogram.shape[1]] = example.spectrogram
        wave[row, 0, : example.wave.shape[0]] = example.wave
    bert = {name: torch.zeros(len(examples), bert_width, text.shape[1]) for name in bert_languages}
    return Batch(
        ids=[e.id for e in examples],
        text=text,
        tones=tones,
        languages=languages,
        text_lengths=text_lengths,
        speaker=torch.tensor([e.speaker for e in examples]),
        spectrogram=spectrogram,
        frame_lengths=frame_lengths,
        wave=wave,
        bert=bert,
    )
