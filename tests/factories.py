"""Makers of waves, files and small corpora for tests."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import soundfile

from lalia.data import Row, write_manifest


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


def write_container(
    path: str | Path, wave: np.ndarray, sample_rate: int, codec: str, container: str, layout: str = "mono"
) -> None:
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
