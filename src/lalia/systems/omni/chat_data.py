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
from lalia.cache import ShardStore
from lalia.data import BadRow, Row
from lalia.system import Message, TensorBatch
from lalia.systems.omni import conversation
from lalia.systems.omni.config_chat import ModelConfig

RATE = 16000
FRAMES_PER_SECOND = 50  # of the encoder


@dataclass
class Example:
    """One conversation: ``tokens`` with ``learnt`` [L], its recordings and a name for each, and the tokens ``opening`` that stand
    before them. A recording is either ``heard`` [T, C, D] from the shards, or a wave float32 [S] at 16 kHz."""

    id: str
    tokens: list[int]
    learnt: list[bool]
    clips: list[np.ndarray | Tensor]
    keys: list[str]
    opening: list[int]


@dataclass
class Batch(TensorBatch):
    """B conversations. ``tokens`` int64 [B, L], ``lengths`` [B], ``learnt`` bool [B, L] (what the assistant says); ``clips``: how
    many recordings each has, and what stands before them (``openings``). Of all N recordings, one after the other: ``wave`` float32
    [Σ S] and ``heard`` float16 [Σ T, C, D], of which a recording has either, ``wave_lengths`` and ``heard_lengths`` [N], ``keys``
    [N]."""

    ids: list[str]
    tokens: Tensor
    lengths: Tensor
    learnt: Tensor
    clips: list[int]
    wave: Tensor
    wave_lengths: Tensor
    heard: Tensor
    heard_lengths: Tensor
    keys: list[str]
    openings: list[list[int]]
    audio_seconds: float = 0.0


def clip_key(path: str, start: float, duration: float) -> str:
    """The name of a recording, the same wherever it occurs."""
    return f"{path}@{start:g}+{duration:g}"


def clips_of(row: Row) -> list[Row]:
    """A row's recordings: its own, then ``extra.others``, relative to the folder of the first. Their ids are ``extra.clips``."""
    if not row.audio:
        return []
    folder = os.path.dirname(row.audio)
    others = [
        (os.path.normpath(os.path.join(folder, other["audio"])), other["start"], other["duration"])
        for other in row.extra.get("others", [])
    ]
    places = [(row.audio, row.start, row.duration), *others]
    names = [str(name) for name in row.extra.get("clips", [])] or [row.id]
    names += [f"{row.id}-{number}" for number in range(len(names), len(places))]
    return [Row(n, path, start=start, duration=seconds) for n, (path, start, seconds) in zip(names, places, strict=False)]


def messages_of(row: Row, waves: Sequence[Any]) -> list[Message]:
    """The conversation of a row. BadRow when it has no message of a user, or does not end with the assistant's."""
    messages = [Message(str(item.get("role", "")), str(item.get("text", ""))) for item in row.extra["messages"]]
    asked = [message for message in messages if message.role == "user"]
    if not asked or messages[-1].role != "assistant" or not messages[-1].text:
        raise BadRow("an instruction needs a user message and an assistant's answer at its end")
    asked[-1].audio = list(waves)
    return messages


def read_example(row: Row, tokenizer: Any, config: ModelConfig, store: ShardStore | None = None) -> Example:
    """Row → Example, with what ``store`` has heard of its recordings; BadRow when the conversation or a recording does not suit the
    model."""
    rows = clips_of(row)
    clips = [_clip(one, store) for one in rows]
    long = [size for size in map(seconds_of, clips) if size > config.max_audio_seconds]
    if long:
        raise BadRow(f"too long: a recording of {long[0]:.1f} s, model.max_audio_seconds is {config.max_audio_seconds:g}")
    messages = messages_of(row, clips)
    try:
        conversation.check(messages, config.max_audios)
    except conversation.ConversationError as error:
        raise BadRow(str(error)) from error
    encoded = conversation.encode(messages, tokenizer)
    keys = [clip_key(one.audio, one.start, one.duration) for one in rows]
    return Example(row.id, encoded.tokens, encoded.learnt, clips, keys, encoded.opening)


def _clip(row: Row, store: ShardStore | None) -> np.ndarray | Tensor:
    heard = store.get(row) if store is not None else None
    return heard if heard is not None else audio.read(row.audio, RATE, row.start, row.duration)[0]


def seconds_of(clip: np.ndarray | Tensor) -> float:
    """Length of a recording; to a frame where it is known by what was heard of it."""
    return len(clip) / (FRAMES_PER_SECOND if isinstance(clip, Tensor) else RATE)


def collate(examples: Sequence[Example]) -> Batch:
    """Examples → Batch, padded on the right."""
    clips = [clip for example in examples for clip in example.clips]
    waves = [torch.from_numpy(clip) if isinstance(clip, np.ndarray) else torch.zeros(0) for clip in clips]
    heard = [clip for clip in clips if isinstance(clip, Tensor)]
    return Batch(
        ids=[example.id for example in examples],
        tokens=pad_sequence([torch.tensor(example.tokens) for example in examples], batch_first=True),
        lengths=torch.tensor([len(example.tokens) for example in examples]),
        learnt=pad_sequence([torch.tensor(example.learnt) for example in examples], batch_first=True),
        clips=[len(example.clips) for example in examples],
        wave=torch.cat(waves) if waves else torch.zeros(0),
        wave_lengths=torch.tensor([len(wave) for wave in waves], dtype=torch.long),
        heard=torch.cat(heard) if heard else torch.zeros(0),
        heard_lengths=torch.tensor([len(clip) if isinstance(clip, Tensor) else 0 for clip in clips], dtype=torch.long),
        keys=[key for example in examples for key in example.keys],
        openings=[example.opening for example in examples],
        audio_seconds=sum(map(seconds_of, clips)),
    )
