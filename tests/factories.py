"""Makers of waves, files and small corpora for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile

from lalia.config import load_run_config
from lalia.data import Row, write_manifest
from lalia.sections import RunConfig


def make_wave(seconds: float, sample_rate: int = 16000, seed: int = 0) -> np.ndarray:
    """A harmonic tone with vibrato under a syllable-like envelope and faint noise: float32 ``[S]``, peak about 0.5."""
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    pitch = 100.0 + 100.0 * random.random()
    phase = 2 * np.pi * (pitch * time + 0.5 * np.sin(2 * np.pi * 5 * time + random.random()))
    voice = np.sum([np.sin(k * phase) / k for k in range(1, 6)], axis=0)
    envelope = 0.25 + 0.75 * np.sin(np.pi * 4 * time + random.random()) ** 2
    return (0.25 * voice * envelope + 0.001 * random.standard_normal(len(time))).astype(np.float32)


def write_wav(
    path: str | Path,
    seconds: float = 1.0,
    sample_rate: int = 16000,
    *,
    channels: int = 1,
    subtype: str | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Write ``make_wave`` with soundfile, in the format of the suffix (wav, flac, ogg, mp3); returns the mono wave."""
    wave = make_wave(seconds, sample_rate, seed)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.repeat(wave[:, None], channels, axis=1), sample_rate, subtype=subtype)
    return wave


def write_container(path: str | Path, wave: np.ndarray, sample_rate: int, codec: str, container: str, layout: str = "mono") -> None:
    """Encode ``wave`` with FFmpeg (G.722, Opus in webm, AAC in m4a …). Lossy codecs add their delay."""
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=sample_rate, layout=layout)
        samples = np.clip(np.round(wave * 32767), -32768, 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = sample_rate
        size = stream.frame_size
        converter = av.AudioResampler(format=stream.format, layout=layout, rate=sample_rate, frame_size=size)
        for block in [*converter.resample(frame), *converter.resample(None)]:
            output.mux(stream.encode(block))
        output.mux(stream.encode(None))


def make_corpus(folder: str | Path, clips: int = 8, sample_rate: int = 16000, speakers: int = 2) -> Path:
    """A manifest ``folder/all.jsonl`` of short clips with fitting texts; returns its path."""
    folder = Path(folder)
    words = ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel"]
    rows = []
    for index in range(clips):
        seconds = 0.8 + 0.1 * (index % 5)
        path = folder / "audio" / f"clip{index:03d}.wav"
        write_wav(path, seconds, sample_rate, seed=index)
        text = f"{words[index % 8].capitalize()} {words[(index // 8 + 3 * index + 1) % 8]}."
        speaker = f"s{index % speakers}"
        rows.append(Row(path.stem, str(path), duration=seconds, text=text, speaker=speaker, language="en"))
    manifest = folder / "all.jsonl"
    write_manifest(manifest, rows)
    return manifest


TINY_VITS2 = [
    "audio.sample_rate=16000", "audio.n_fft=512", "audio.hop=256", "audio.win=512", "audio.mels=20",
    "data.batch_size=4", "data.segment_frames=16", "data.workers=0",
    "model.width=16", "model.filter=32", "model.layers=2", "model.speaker_layer=1", "model.posterior_layers=2",
    "model.flow=wavenet", "model.flows=2", "model.flow_layers=1", "model.speaker_width=8", "model.duration_width=16",
    "model.istft.channels=32", "model.istft.layers=1",
    "discriminator.scales=0", "discriminator.periods=[2]", "discriminator.channels=0.03125",
    "train.steps=2", "train.log_every=1", "train.eval_every=2", "train.valid_batches=1", "train.device=cpu", "train.threads=1",
]  # fmt: skip


def tiny_vits2_config(folder: str | Path, **overrides: Any) -> RunConfig:
    """A very small ``vits2`` on 8 synthetic clips of 2 speakers under ``folder/corpus`` (made once), two steps long.

    ``overrides`` are dotted keys: ``tiny_vits2_config(folder, **{"train.steps": 5, "discriminator.duration": False})``.
    """
    manifest = Path(folder) / "corpus" / "all.jsonl"
    if not manifest.is_file():
        make_corpus(manifest.parent)
    items = ["system=vits2", f"data.train=[{manifest}]", f"data.valid=[{manifest}]", *TINY_VITS2]
    items += [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in overrides.items()]
    return load_run_config(None, items)


def train_tiny_run(folder: str | Path, **overrides: Any) -> Path:
    """Train :func:`tiny_vits2_config` in ``folder/run``; returns the run folder. About two seconds."""
    from lalia.train import train

    run = Path(folder) / "run"
    train(tiny_vits2_config(folder, **overrides), run)
    return run


TINY_EMOTION = [
    "data.batch_size=3", "data.workers=0", "model.width=8", "model.dropout=0", "model.speech.kind=none", "model.state.kind=ema",
    "model.state.tbptt=2", "optimizers.main.lr=0.01", "optimizers.main.warmup_steps=0",
    "train.epochs=1", "train.steps=0", "train.log_every=1", "train.device=cpu", "train.threads=1",
]  # fmt: skip


def make_dialogues(folder: str | Path, dialogues: int = 4, turns: int = 5, seed: int = 0) -> Path:
    """A manifest ``folder/all.jsonl`` of dialogues of two speakers whose loudness follows their arousal; returns its path.

    Dialogues have ``turns`` turns, every second one a turn less; rows are in a shuffled order, labels in 1 … 5.
    """
    folder, random, rows = Path(folder), np.random.default_rng(seed), []
    for number in range(dialogues):
        for turn in range(turns - number % 2):
            name, level = f"d{number}t{turn}", float(random.uniform(1, 5))
            path = folder / "audio" / f"{name}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            wave = make_wave(0.3 + 0.05 * (turn % 3), seed=100 * number + turn)
            soundfile.write(path, wave * level / 5, 16000)
            labels = {"valence": float(random.uniform(1, 5)), "arousal": level}
            extra = {"session": f"s{number // 2}", "scripted": False, "time": float(turn)}
            speaker = f"s{number // 2}-{'ab'[turn % 2]}"
            rows.append(
                Row(
                    name,
                    str(path),
                    duration=len(wave) / 16000,
                    speaker=speaker,
                    labels=labels,
                    dialogue=f"d{number}",
                    turn=turn,
                    extra=extra,
                )
            )
    order = random.permutation(len(rows))
    manifest = folder / "all.jsonl"
    write_manifest(manifest, [rows[i] for i in order])
    return manifest


def tiny_emotion_config(folder: str | Path, **overrides: Any) -> RunConfig:
    """A very small ``emotion`` with EMA state on four dialogues under ``folder/dialogues`` (made once), one epoch long."""
    manifest = Path(folder) / "dialogues" / "all.jsonl"
    if not manifest.is_file():
        make_dialogues(manifest.parent)
    items = ["system=emotion", f"data.train=[{manifest}]", f"data.valid=[{manifest}]", *TINY_EMOTION]
    items += [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in overrides.items()]
    return load_run_config(None, items)


def train_tiny_emotion(folder: str | Path, name: str = "run", **overrides: Any) -> Path:
    """Train :func:`tiny_emotion_config` in ``folder/name``; returns the run folder."""
    from lalia.train import train

    run = Path(folder) / name
    train(tiny_emotion_config(folder, **overrides), run)
    return run
