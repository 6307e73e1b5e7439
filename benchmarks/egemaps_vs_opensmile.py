"""Our eGeMAPS against openSMILE's: seconds for the 88 functionals of speech-like synthetic waves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _timing import interleave

from lalia.egemaps import functionals

RATE = 16000
SECONDS = (1.5, 3.5, 10.0)


def speech_like(seconds: float, seed: int) -> np.ndarray:
    """Half a second of gliding harmonics with two broad resonances, a fifth of a second of noise, and so on; float32 [S]."""
    generator = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE)) / RATE
    pitch = 140 + 40 * np.sin(2 * np.pi * 0.7 * time + seed) + 3 * np.sin(2 * np.pi * 6 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    wave = np.zeros_like(time)
    for harmonic in range(1, 30):
        hertz = harmonic * pitch
        strength = sum(1 / (1 + ((hertz - centre) / 150) ** 2) for centre in (550, 1600)) / harmonic**0.5
        wave += strength * np.sin(harmonic * phase)
    voiced = (time % 0.7) < 0.5
    wave = np.where(voiced, wave * 0.1, generator.normal(0, 0.01, len(time)))
    return (wave + generator.normal(0, 1e-4, len(time))).astype(np.float32)


def run(repeats: int = 11) -> dict[str, dict[str, Any]]:
    """Interleaved on one thread, both from the same waves in memory; the agreement is told, not assumed."""
    import opensmile

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    smile = opensmile.Smile(opensmile.FeatureSet.eGeMAPSv02, opensmile.FeatureLevel.Functionals, num_workers=1)
    waves = [speech_like(seconds, seed) for seed, seconds in enumerate(SECONDS)]
    try:
        pairs = [(functionals(wave, RATE), smile.process_signal(wave, RATE).to_numpy()[0]) for wave in waves]
        error = np.median([np.median(np.abs(a - b) / np.maximum(np.abs(b), 1e-9)) for a, b in pairs])
        ratio, p10, p90, ours, theirs = interleave(
            lambda: [functionals(wave, RATE) for wave in waves],
            lambda: [smile.process_signal(wave, RATE) for wave in waves],
            repeats,
        )
    finally:
        torch.set_num_threads(threads)
    return {
        "egemaps_vs_opensmile": {
            "ratio": ratio,
            "p10": p10,
            "p90": p90,
            "ours": ours,
            "theirs": theirs,
            "against": "opensmile (PyPI), eGeMAPSv02, functionals",
            "note": (
                f"CPU seconds for synthetic speech-like waves of {', '.join(map(str, SECONDS))} s at 16 kHz, one thread, "
                f"openSMILE through process_signal; median relative difference of the 88 values {error:.1e}"
            ),
        }
    }


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
