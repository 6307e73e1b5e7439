"""Seconds from a 5 s recording on the disk to the first token of the answer, on two threads, and where they go.

The networks have the size of Whisper-base and of our GPT at depth 12 (random weights: time does not depend on them).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _timing import tune_allocator

from lalia import audio
from lalia.mel import MelSpec, mel_filters
from lalia.nn.gpt import Gpt, GptConfig
from lalia.nn.whisper import FRAME, HOP, N_FFT, RATE, WhisperEncoder
from lalia.systems.omni.projector import Projector

BASE = {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048, "num_mel_bins": 80}
SECONDS, THREADS, DEPTH, VOCAB, PROMPT, STACK = 5.0, 2, 12, 32_768, 16, 4
GOAL = 2.0
PARTS = ("load", "mel", "encode", "project", "prefill", "step")


class Answer:
    """One question: each method is a part, in order; ``step`` is the second token."""

    def __init__(self, path: Path, trim: bool) -> None:
        torch.manual_seed(0)
        self.path, self.trim = path, trim
        self.encoder = WhisperEncoder(BASE, mel_filters(MelSpec(RATE, N_FFT, HOP, N_FFT, 80))).eval()
        self.language = Gpt(GptConfig(depth=DEPTH, vocab=VOCAB)).eval()
        self.projector = Projector(self.encoder.width, self.language.width, STACK, 2 * self.language.width).eval()
        self.tokens = torch.randint(0, VOCAB, (1, PROMPT))

    def load(self) -> None:
        wave, _ = audio.read(self.path, RATE)
        self.wave, self.lengths = torch.from_numpy(wave)[None], torch.tensor([len(wave)])

    def mel(self) -> None:
        total = -(-self.wave.shape[1] // FRAME) if self.trim else self.encoder.positions
        self.features = self.encoder.log_mel(self.wave, self.lengths, total, self.trim)

    def encode(self) -> None:
        states, self.frames = self.encoder.from_mel(self.features, self.lengths, self.trim)
        self.heard = states[-1][:, : int(self.frames[0])]

    def project(self) -> None:
        self.prefix, self.counts = self.projector(self.heard, self.frames)

    def prefill(self) -> None:
        self.logits, self.cache = self.language.prefill(self.tokens, None, self.prefix, self.counts)
        self.token = self.logits.argmax(-1)

    def step(self) -> None:
        self.logits, self.cache = self.language.step(self.token, self.cache)


def _timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _parts(answer: Answer, repeats: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {part: [] for part in PARTS}
    for turn in range(repeats + 1):
        for part in PARTS:
            seconds = _timed(getattr(answer, part))
            if turn:  # the first fills caches
                found[part].append(seconds)
    return found


def _summary(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(np.median(values)), "low": float(values.min()), "high": float(values.max())}


def run(repeats: int = 5) -> dict[str, dict[str, Any]]:
    """Wall-clock seconds of each part and of the first token (all parts but ``step``): median, least and most of ``repeats``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    tune_allocator()
    variants: dict[str, dict[str, float]] = {}
    try:
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            path = Path(folder) / "clip.wav"
            audio.write(path, (0.1 * np.sin(np.arange(round(SECONDS * RATE)) / 9)).astype(np.float32), RATE)
            for name, trim in (("trimmed", True), ("padded", False)):
                found = {part: np.array(values) for part, values in _parts(Answer(path, trim), repeats).items()}
                variants[f"first token, {name}"] = _summary(sum(found[part] for part in PARTS[:-1]))  # type: ignore[arg-type]
                variants |= {f"{part}, {name}": _summary(found[part]) for part in PARTS}
    finally:
        torch.set_num_threads(threads)
    reached = [name for name in ("trimmed", "padded") if variants[f"first token, {name}"]["mean"] < GOAL]
    note = (
        f"wall-clock seconds (median, least, most of {repeats}), {SECONDS:g} s wav, {THREADS} threads, float32, Whisper-base's"
        f" size, GPT depth {DEPTH}, vocabulary {VOCAB}, {STACK} frames a soft token, {PROMPT} text tokens; under {GOAL:g} s:"
        f" {', '.join(reached) or 'neither'}"
    )
    return {"first_token_seconds": {"variants": variants, "note": note}}


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
