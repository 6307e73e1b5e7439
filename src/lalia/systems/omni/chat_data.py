"""Rows of instructions → examples → batches. A row's recordings belong to its last user message."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lalia import audio
from lalia.data import BadRow, Row
from lalia.system import Message, TensorBatch
from lalia.systems.omni import conversation
from lalia.systems.omni.config_chat import ModelConfig

RATE = 16000


@dataclass
class Example:
    """One conversation: ``tokens`` with ``learnt`` [L], its recordings float32 [S] at 16 kHz and a name for each."""

    id: str
    tokens: list[int]
    learnt: list[bool]
    waves: list[np.ndarray]
    keys: list[str]


@dataclass
class Batch(TensorBatch):
    """B conversations. ``tokens`` int64 [B, L], ``lengths`` [B], ``learnt`` bool [B, L] (what the assistant says); ``clips``: how
    many recordings each has; ``wave`` float32 [Σ S] of all recordings, one after the other, ``wave_lengths`` [N], ``keys`` [N]."""

    ids: list[str]
    tokens: Tensor
    lengths: Tensor
    learnt: Tensor
    clips: list[int]
    wave: Tensor
    wave_lengths: Tensor
    keys: list[str]
    audio_seconds: float = 0.0


def clip_key(path: str, start: float, duration: float) -> str:
    """The name of a recording, the same wherever it occurs."""
    return f"{path}@{start:g}+{duration:g}"


def clips_of(row: Row) -> list[tuple[str, float, float]]:
    """(path, start, duration) of a row's recordings: its own, then ``extra.others``, relative to the folder of the first."""
    if not row.audio:
        return []
    folder = os.path.dirname(row.audio)
    others = [
        (os.path.normpath(os.path.join(folder, other["audio"])), other["start"], other["duration"])
        for other in row.extra.get("others", [])
    ]
    return [(row.audio, row.start, row.duration), *others]


def messages_of(row: Row, waves: Sequence[np.ndarray]) -> list[Message]:
    """The conversation of a row. BadRow when it has no message of a user, or does not end with the assistant's."""
    messages = [Message(str(item.get("role", "")), str(item.get("text", ""))) for item in row.extra["messages"]]
    asked = [message for message in messages if message.role == "user"]
    if not asked or messages[-1].role != "assistant" or not messages[-1].text:
        raise BadRow("an instruction needs a user message and an assistant's answer at its end")
    asked[-1].audio = list(waves)
    return messages


def read_example(row: Row, tokenizer: Any, config: ModelConfig) -> Example:
    """Row → Example; BadRow when the conversation or a recording does not suit the model."""
    clips = clips_of(row)
    waves = [audio.read(path, RATE, start, duration)[0] for path, start, duration in clips]
    long = [len(wave) / RATE for wave in waves if len(wave) > config.max_audio_seconds * RATE]
    if long:
        raise BadRow(f"too long: a recording of {long[0]:.1f} s, model.max_audio_seconds is {config.max_audio_seconds:g}")
    messages = messages_of(row, waves)
    try:
        conversation.check(messages, config.max_audios)
    except conversation.ConversationError as error:
        raise BadRow(str(error)) from error
    encoded = conversation.encode(messages, tokenizer)
    return Example(row.id, encoded.tokens, encoded.learnt, waves, [clip_key(*clip) for clip in clips])


def collate(examples: Sequence[Example]) -> Batch:
    """Examples → Batch, padded on the right."""
    waves = [torch.from_numpy(wave) for example in examples for wave in example.waves]
    return Batch(
        ids=[example.id for example in examples],
        tokens=pad_sequence([torch.tensor(example.tokens) for example in examples], batch_first=True),
        lengths=torch.tensor([len(example.tokens) for example in examples]),
        learnt=pad_sequence([torch.tensor(example.learnt) for example in examples], batch_first=True),
        clips=[len(example.waves) for example in examples],
        wave=torch.cat(waves) if waves else torch.zeros(0),
        wave_lengths=torch.tensor([len(wave) for wave in waves], dtype=torch.long),
        keys=[key for example in examples for key in example.keys],
        audio_seconds=sum(len(wave) for wave in waves) / RATE,
    )
