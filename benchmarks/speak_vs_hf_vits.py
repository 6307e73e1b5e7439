"""Text to speech on one CPU thread: Lalia's full-size ``istft`` profile against ``transformers`` VitsModel at the size of mms-tts.

Both have random weights, 16 kHz and hop 256, and get equally many tokens; the durations of both are scaled until they make
equally long audio (random predictors would otherwise decide the ratio). Lalia is timed from text through the public ``speak``,
with splitting, normalisation and pronunciation; VitsModel from token ids, without its tokenizer.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _parts import Stopwatch, shares
from _timing import interleave, tune_allocator

from lalia.config import load_run_config
from lalia.system import SpeakRequest
from lalia.systems.vits2.speak import decode, predict, sentences
from lalia.systems.vits2.system import Vits2
from lalia.text import SymbolTable

BASE = Path(__file__).resolve().parents[1] / "configs" / "vits2" / "base.yaml"
RATE, HOP, SECONDS = 16000, 256, 6.4
TEXT = "The ferry leaves the northern harbour at seven, and whoever misses it waits two hours for the next one."
AUDIO = [f"audio.{key}" for key in (f"sample_rate={RATE}", f"hop={HOP}", "n_fft=1024", "win=1024", "mels=80")]
#: critics are not used in speaking: the least that can be built
NO_CRITICS = ["discriminator.wavlm=false", "discriminator.scales=0", "discriminator.periods=[2]", "discriminator.channels=0.01"]


def our_voice(*overrides: str) -> Vits2:
    """``configs/vits2/base.yaml`` at 16 kHz, random weights, ready for inference."""
    torch.manual_seed(0)
    config = load_run_config(BASE, [*AUDIO, *NO_CRITICS, *overrides])
    tables = {"symbols": SymbolTable.from_languages(["en"]).to_dict(), "speakers": {"one": 0}}
    system = Vits2(config, tables)
    system.for_inference()
    return system


def their_voice() -> Any:
    """VitsModel with the default configuration, which is that of facebook/mms-tts-*."""
    from transformers import VitsConfig, VitsModel

    torch.manual_seed(0)
    model = VitsModel(VitsConfig()).eval()
    for name, value in (("noise_scale_duration", 0.0), ("noise_scale", 0.667)):
        setattr(model, name, value)
    return model


def scale_to(samples: Callable[[float], int]) -> float:
    """The length scale at which ``samples(scale)`` comes nearest to SECONDS, by bisection."""
    low, high = 0.05, 50.0
    for _ in range(25):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if samples(middle) < SECONDS * RATE else (low, middle)
    return high


def ours(system: Vits2) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    """(text → wave by ``speak``, the networks alone, samples of the wave)."""
    request = SpeakRequest(TEXT, noise_scale_w=0.0)
    decoder = system.generator.decoder
    system.generator.decoder = _Silence(HOP)  # only the length is asked for
    scale = scale_to(lambda value: len(system.speak([replace(request, length_scale=value)])[0].wave))
    system.generator.decoder = decoder
    request = replace(request, length_scale=scale)
    prepared = sentences(system, request)
    assert len(prepared) == 1, "the text of this benchmark is one sentence"

    def networks() -> None:
        decode(system, predict(system, prepared)[0])

    return lambda: system.speak([request]), networks, len(system.speak([request])[0].wave)


class _Silence(torch.nn.Module):
    def __init__(self, hop: int) -> None:
        super().__init__()
        self.hop, self.context_frames = hop, 0

    def forward(self, latent: torch.Tensor, speaker: torch.Tensor | None = None) -> torch.Tensor:
        return torch.zeros(latent.shape[0], 1, latent.shape[2] * self.hop)


def theirs(model: Any, tokens: int) -> tuple[Callable[[], Any], int]:
    """(token ids → wave, samples of the wave)."""
    ids = torch.randint(1, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def call() -> torch.Tensor:
        return model(input_ids=ids).waveform

    decoder = model.decoder
    model.decoder = _Silence(HOP)

    def samples(scale: float) -> int:
        model.speaking_rate = 1 / scale
        return call().shape[-1]

    model.speaking_rate = 1 / scale_to(samples)
    model.decoder = decoder
    return call, call().shape[-1]


def breakdown(system: Vits2, call: Callable[[], Any], repeats: int = 3) -> str:
    """Shares of one call of ``speak``: the best of ``repeats``."""
    watch, generator = Stopwatch(), system.generator
    watch.watch(generator, "encode_text", "text encoder")
    watch.watch(generator.stochastic_duration, "condition", "durations")
    watch.watch(generator.stochastic_duration, "sample", "durations")
    watch.watch(generator.duration, "forward", "durations")
    watch.watch(generator.flow, "forward", "flow")
    watch.watch(generator.decoder, "forward", "decoder")
    watch.watch(system.text_side, "analyse", "text front end")
    best: dict[str, float] = {}
    total = float("inf")
    for _ in range(repeats):
        with watch.watching() as seconds:
            start = time.process_time()
            call()
            spent = time.process_time() - start
        if spent < total:
            best, total = dict(seconds), spent
    return shares(best, total)


def run(repeats: int = 7) -> dict[str, dict[str, Any]]:
    """``speak_vs_hf_vits``: seconds for 6.4 s of audio. Both float32; the note has bf16 for both and the transformer flow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tuned = tune_allocator()
    try:
        return {"speak_vs_hf_vits": _measure(repeats, tuned)}
    finally:
        torch.set_num_threads(threads)


def _measure(repeats: int, tuned: bool) -> dict[str, Any]:
    system, transformer, model = our_voice(), our_voice("model.flow=transformer"), their_voice()
    speak, networks, samples = ours(system)
    tokens = len(sentences(system, SpeakRequest(TEXT))[0].text)
    call, their_samples = theirs(model, tokens)
    if abs(samples - their_samples) > 0.01 * samples:
        raise AssertionError(f"unequal audio: {samples} and {their_samples} samples")
    ratio, p10, p90, seconds, their_seconds = interleave(speak, call, repeats)
    few = max(2, repeats // 3)
    alone = interleave(networks, call, few)[0]
    other = interleave(ours(transformer)[0], call, few)[0]
    with torch.autocast("cpu", torch.bfloat16):
        both = interleave(speak, call, few)
    note = (
        f"CPU seconds for {samples / RATE:.2f} s of 16 kHz audio from {tokens} tokens, 1 thread, float32, allocator "
        f"{'tuned' if tuned else 'as it is'}; durations scaled so that both give {samples} samples; ours from text, theirs from "
        f"ids; real-time factor {seconds / samples * RATE:.3f} against {their_seconds / samples * RATE:.3f}. Networks alone "
        f"{alone:.1f} x; with the transformer flow {other:.1f} x; both under bf16 autocast {both[0]:.1f} x (ours {both[3]:.3f} s). "
        f"Ours: {breakdown(system, speak)}"
    )
    return {
        "ratio": ratio,
        "p10": p10,
        "p90": p90,
        "ours": seconds,
        "theirs": their_seconds,
        "against": "transformers VitsModel at mms-tts size (random weights)",
        "note": note,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run(), indent=2) + "\n")
