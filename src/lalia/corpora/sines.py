"""Five sines of five seconds, for the smoke run of ``omni``: the same bytes on every machine.

The captions differ only in what the recording alone tells: shuffled, they are equally likely, so that a model that does not
listen cannot do better than chance between them.
"""

from __future__ import annotations

import struct
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lalia.corpora._common import CorpusError, Options, PrepareResult
from lalia.data import Row, write_manifest

RATE = 16000
SECONDS = 5.0
AMPLITUDE = 0.5
FADE = 0.01  # seconds at both ends, against clicks
TOGETHER = "sines"  # all five fall into one split, the training part at the usual shares
#: Hz → caption; all captions have the same length
CAPTIONS = {
    220: "low, deep and dark",
    440: "standard pitch, a4",
    880: "an octave above it",
    1760: "very high whistles",
    3520: "piercing and thin.",
}


@dataclass
class SinesOptions(Options):
    """No option of its own: the set is fixed."""


def prepare_sines(options: SinesOptions) -> PrepareResult:
    """Write ``out/audio/sine-<Hz>.wav`` (mono, 16 kHz, 16 bit, 5 s) and ``out/manifest.jsonl`` with all five.

    Training and validation are on the same five clips, because the smoke run learns them by heart.
    """
    if options.sample_rate not in (None, RATE) or options.inputs:
        raise CorpusError(f"`prepare sines` makes one fixed set at {RATE} Hz: it takes no input and no --sample-rate")
    rows = []
    for hertz, caption in CAPTIONS.items():
        path = options.out / "audio" / f"sine-{hertz:04d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_pcm(path, sine(hertz))
        rows.append(Row(f"sine-{hertz:04d}", str(path), duration=SECONDS, text=caption, speaker="sine", language="en"))
    write_manifest(options.out / "manifest.jsonl", rows)
    notes = [f"{options.out / 'manifest.jsonl'} is what the smoke run trains on"]
    return PrepareResult(rows, [], split_keys={row.id: TOGETHER for row in rows}, notes=notes)


def sine(hertz: int) -> np.ndarray:
    """int16 [S] of ``SECONDS``. Whole periods of an integer frequency repeat each second, so that one second of 16-bit values,
    rounded from float64, is repeated; the fades are integer arithmetic. No machine rounds these otherwise."""
    phase = (np.arange(RATE, dtype=np.int64) * hertz % RATE).astype(np.float64) / RATE
    second = np.round(AMPLITUDE * 32767 * np.sin(2 * np.pi * phase), 3)
    samples = np.tile(np.floor(second + 0.5).astype(np.int64), int(SECONDS))
    count = int(FADE * RATE)
    ramp = np.arange(count, dtype=np.int64)
    samples[:count] = samples[:count] * ramp // count
    samples[-count:] = samples[-count:] * ramp[::-1] // count
    return samples.astype(np.int16)


def write_pcm(path: Path, samples: np.ndarray) -> None:
    """A RIFF file of 16-bit samples [S], with nothing in it that depends on time or library."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(struct.pack(f"<{len(samples)}h", *samples.tolist()))
