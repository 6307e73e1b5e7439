"""Whisper features of short clips: Lalia's trimmed batches against the same encoder with every clip padded to 30 s, as transformers
feeds it. The hidden states differ (no silence to attend to): the note says by how much."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _timing import interleave, tune_allocator

from lalia.mel import MelSpec, mel_filters
from lalia.nn.whisper import FRAME, HOP, N_FFT, RATE, WhisperEncoder

#: Whisper-base's encoder
BASE = {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048, "num_mel_bins": 80}
SECONDS = (1.2, 2.0, 3.5, 5.0)


def _clips() -> tuple[Tensor, Tensor]:
    """Noise under a slow envelope: waves [N, S] and their lengths."""
    random = torch.Generator().manual_seed(0)
    lengths = torch.tensor([round(seconds * RATE) for seconds in SECONDS])
    time = torch.arange(int(lengths.max())) / RATE
    waves = 0.1 * torch.randn(len(lengths), len(time), generator=random) * (1 + torch.sin(20 * time))
    return waves * (torch.arange(len(time)) < lengths.unsqueeze(1)), lengths


def _encoder(source: str) -> tuple[Any, str]:
    """Whisper-base: the weights of ``source``, or random ones of its size."""
    torch.manual_seed(0)
    if not source:
        encoder = WhisperEncoder(BASE, mel_filters(MelSpec(RATE, N_FFT, HOP, N_FFT, 80)))
        return encoder.eval().requires_grad_(False), "random weights"
    from lalia.pretrained.whisper import FrozenWhisper, describe_listener
    from lalia.sections import ExternalModel

    ear = FrozenWhisper(describe_listener(ExternalModel(source=source)))
    ear.load_external(ExternalModel(source=source))
    return ear.encoder.eval(), "its own weights"


def run(repeats: int = 5, source: str = "") -> dict[str, dict[str, Any]]:
    """Interleaved on one thread. ``source``: a Whisper to take the weights of; random ones of Whisper-base's size if empty."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tuned = tune_allocator()
    encoder, weights = _encoder(source)
    waves, lengths = _clips()
    try:
        with torch.inference_mode():

            def padded() -> list[Tensor]:
                return [encoder(wave[None, :n], n[None], trim=False)[0][-1] for wave, n in zip(waves, lengths, strict=True)]

            ratio, p10, p90, ours, theirs = interleave(lambda: encoder(waves, lengths, trim=True), padded, repeats)
            trimmed = encoder(waves, lengths, trim=True)[0][-1]
            pairs = [(a[: n // FRAME], b[0, : n // FRAME]) for a, b, n in zip(trimmed, padded(), lengths.tolist(), strict=True)]
            alike = torch.cat([F.cosine_similarity(a, b, dim=1) for a, b in pairs])
    finally:
        torch.set_num_threads(threads)
    note = (
        f"CPU seconds for {len(lengths)} clips of {', '.join(map(str, SECONDS))} s, encoder of Whisper-base ({weights}), float32,"
        f" 1 thread, allocator {'tuned' if tuned else 'as it is'}; one trimmed batch against clips one by one in 30 s."
        f" Last hidden states differ: cosine {float(alike.mean()):.3f} on average, {float(alike.quantile(0.1)):.3f} at p10"
    )
    result = {"ratio": ratio, "p10": p10, "p90": p90, "ours": ours, "theirs": theirs}
    return {"whisper_features_vs_padded": {**result, "against": "the same encoder, padded to 30 s", "note": note}}


if __name__ == "__main__":
    print(json.dumps(run(source=sys.argv[1] if len(sys.argv) > 1 else ""), indent=2, ensure_ascii=False))
