"""One vits2 training step at the seed's full size, by part, and what each lever changes.

The seed's settings (``configs/vits2/seed.yaml``) without WavLM: 44.1 kHz, batch 4, 100 text tokens, 500 frames, 32 frames decoded.
Parts are timed alone, forward and backward, on inputs of their true shapes; whole steps are timed with optimizer and clipping, in
rounds over all variants, each compared with the seed's settings of the same round.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _timing import seconds, tune_allocator

from lalia import mel, optim
from lalia.config import load_run_config
from lalia.nn.gan_losses import discriminator_loss, feature_loss, generator_loss
from lalia.nn.noise import RowNoise
from lalia.run_setup import turn_figures
from lalia.system import Clock, loss_weights
from lalia.systems.vits2.data import Batch
from lalia.systems.vits2.system import Vits2
from lalia.text import SymbolTable

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "vits2"
BATCH, TOKENS, FRAMES, SEGMENT = 4, 100, 500, 32
NO_WAVLM = "discriminator.wavlm=false"
LEAN = "discriminator.channels=0.5"
ISTFT, WAVENET = "model.decoder=istft", "model.flow=wavenet"
BASE = "configs/vits2/base.yaml"
SPECTROGRAM_CRITICS = [
    "discriminator.scales=0",
    "discriminator.periods=[]",
    "discriminator.resolutions=[[1024,256,1024],[2048,512,2048],[512,128,512]]",
]
#: name → (configuration, overrides, bf16 autocast)
VARIANTS: dict[str, tuple[str, list[str], bool]] = {
    "seed": ("seed", [], False),
    "+ bf16": ("seed", [], True),
    "+ bf16, istft": ("seed", [ISTFT], True),
    "+ bf16, istft, wavenet flow": ("seed", [ISTFT, WAVENET], True),
    f"{BASE}: + critics of half width": ("base", [], True),
    f"{BASE} in float32": ("base", [], False),
}
#: other ways to make the critics cheap: name → overrides of ``seed``
CRITICS: dict[str, list[str]] = {
    "scale and periods 2 3 5 7 11": [],
    "at half width": [LEAN],
    "at a quarter of the width": ["discriminator.channels=0.25"],
    "periods 2 3 5 at half width": [LEAN, "discriminator.scales=0", "discriminator.periods=[2,3,5]"],
    "three STFT resolutions of 32 channels": SPECTROGRAM_CRITICS,
}


def build(name: str, overrides: list[str], bf16: bool) -> Vits2:
    """The system of a configuration, random weights."""
    torch.manual_seed(0)
    config = load_run_config(CONFIGS / f"{name}.yaml", [NO_WAVLM, *overrides])
    system = Vits2(config, {"symbols": SymbolTable.from_languages(["en"]).to_dict(), "speakers": {"one": 0}})
    system.autocast_dtype = torch.bfloat16 if bf16 else None
    return system.train()


def batch_for(system: Vits2) -> Batch:
    """Random clips of equal length, with spectrograms of their own waves."""
    generator = torch.Generator().manual_seed(0)
    wave = 0.1 * torch.randn(BATCH, 1, FRAMES * system.config.audio.hop, generator=generator)
    return Batch(
        ids=[str(row) for row in range(BATCH)],
        text=torch.randint(1, len(system.text_side.symbols.symbols), (BATCH, TOKENS), generator=generator),
        tones=torch.zeros(BATCH, TOKENS, dtype=torch.long),
        languages=torch.zeros(BATCH, TOKENS, dtype=torch.long),
        text_lengths=torch.full((BATCH,), TOKENS),
        speaker=torch.zeros(BATCH, dtype=torch.long),
        spectrogram=mel.spectrogram(wave.squeeze(1), system.mel_spec),
        frame_lengths=torch.full((BATCH,), FRAMES),
        wave=wave,
    )


def stepper(system: Vits2) -> Callable[[], None]:
    """A whole step as the trainer does it."""
    batch, weights = batch_for(system), loss_weights(system.config)
    optimizers = optim.build(system, system.config)

    def step() -> None:
        for name, losses in system.turns(batch, Clock(step=0)):
            optimizer = optimizers[name]
            optimizer.zero_grad(set_to_none=True)
            turn_figures(name, losses, weights)[f"loss/{name}/total"].backward()
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            optim.clip_gradients(parameters, optim.section(system.config, name).clip)
            optimizer.step()

    return step


# --- parts ------------------------------------------------------------------------------------------------------------
def parts(system: Vits2) -> dict[str, Callable[[], Any]]:
    """Name → one forward and backward of that part alone."""
    generator, batch, hop = system.generator, batch_for(system), system.config.audio.hop
    width, speaker = system.config.model.width, torch.randn(BATCH, system.config.model.speaker_width, 1)
    text, frame_mask = batch.text_input(), torch.ones(BATCH, 1, FRAMES)
    latent, noise = torch.randn(BATCH, width, FRAMES, requires_grad=True), torch.randn(BATCH, width, FRAMES)
    real, fake = 0.1 * torch.randn(2, BATCH, 1, SEGMENT * hop)
    with torch.no_grad():
        prior = generator.encode_text(text, speaker)
    durations = torch.full((BATCH, 1, TOKENS), FRAMES / TOKENS)
    return {
        "text encoder": lambda: _back(generator.encode_text(text, speaker).mean),
        "posterior encoder": lambda: _back(generator.posterior_encoder(batch.spectrogram, frame_mask, speaker, noise)[0]),
        "flow": lambda: _back(generator.flow(latent, frame_mask, speaker)),
        "alignment": lambda: generator.align(
            latent.detach(), prior, (batch.text_lengths, batch.frame_lengths), 0.01, RowNoise(range(BATCH)), 0.0
        ),
        "durations": lambda: _durations(system, prior, speaker, durations),
        "decoder": lambda: _back(generator.decoder(latent[:, :, :SEGMENT], speaker)),
        "critics, D turn": lambda: _critics(system, real, fake),
        "duration critic": lambda: _duration_critic(system, prior, speaker),
        "critics, G turn": lambda: _critics_for_generator(system, real, fake),
        "mel": lambda: _back(system._mel_loss(real, fake.clone().requires_grad_())),
    }


def _back(value: Tensor) -> None:
    value.float().square().mean().backward()


def _durations(system: Vits2, prior: Any, speaker: Tensor, durations: Tensor) -> None:
    generator, noise = system.generator, torch.randn(BATCH, 2, TOKENS)
    condition = generator.stochastic_duration.condition(prior.hidden, prior.mask, speaker)
    nll = generator.stochastic_duration(condition, prior.mask, durations, noise)
    sampled = generator.stochastic_duration.sample(condition, prior.mask, noise)
    (nll.mean() + sampled.square().mean() + generator.duration(prior.hidden, prior.mask, speaker).square().mean()).backward()


def _critics(system: Vits2, real: Tensor, fake: Tensor) -> None:
    discriminator_loss(system.discriminator(real)[0], system.discriminator(fake)[0])[0].backward()


def _critics_for_generator(system: Vits2, real: Tensor, fake: Tensor) -> None:
    fake = fake.clone().requires_grad_()
    with system.frozen(system.discriminator):
        with torch.no_grad():
            real_features = system.discriminator(real)[1]
        scores, features = system.discriminator(fake)
    (generator_loss(scores)[0] + feature_loss(real_features, features)).backward()


def _duration_critic(system: Vits2, prior: Any, speaker: Tensor) -> None:
    """Its own turn, and its part of the generator's."""
    critic = system.duration_discriminator
    assert critic is not None
    for count in (3, 2):
        made = [torch.randn(BATCH, 1, TOKENS, requires_grad=True) for _ in range(count)]
        sum(score.square().mean() for score in critic(prior.hidden, prior.mask, made, speaker)).backward()


def _optimizer_part(system: Vits2) -> Callable[[], None]:
    """Norms and AdamW of all networks; every gradient present."""
    optimizers = optim.build(system, system.config)
    for parameter in system.parameters():
        parameter.grad = torch.full_like(parameter, 1e-4)

    def call() -> None:
        for name, optimizer in optimizers.items():
            optim.clip_gradients([p for g in optimizer.param_groups for p in g["params"]], optim.section(system.config, name).clip)
            optimizer.step()

    return call


def time_parts(repeats: int) -> dict[str, float]:
    """Part → median CPU seconds in the seed's settings."""
    system = build(*VARIANTS["seed"])
    calls = parts(system)
    calls["norms and AdamW"] = _optimizer_part(system)
    times: dict[str, float] = {}
    for name, call in calls.items():
        call()
        times[name] = float(np.median([seconds(call) for _ in range(repeats)]))
    return times


def time_critics(repeats: int) -> dict[str, float]:
    """Kind of critics → median CPU seconds of both turns."""
    times, real, fake = {}, *(0.1 * torch.randn(2, BATCH, 1, SEGMENT * 512))
    for name, overrides in CRITICS.items():
        system = build("seed", [*overrides, ISTFT, WAVENET], False)

        def both(system: Vits2 = system) -> None:
            _critics(system, real, fake)
            _critics_for_generator(system, real, fake)

        both()
        times[name] = float(np.median([seconds(both) for _ in range(repeats)]))
    return times


# --- whole steps ------------------------------------------------------------------------------------------------------
def time_steps(repeats: int) -> dict[str, list[float]]:
    """Variant → CPU seconds of a step in each round."""
    steps = {name: stepper(build(*settings)) for name, settings in VARIANTS.items()}
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(repeats):
        for name in list(steps)[:: 1 if index % 2 else -1]:
            times[name].append(seconds(steps[name]))
    return times


def run(repeats: int = 3) -> dict[str, dict[str, Any]]:
    """``train_step_parts``: seconds of one step, ``configs/vits2/base.yaml`` against the seed's settings, both as configured."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tuned = tune_allocator()
    try:
        by_part, critics, steps = time_parts(repeats), time_critics(repeats), time_steps(repeats)
    finally:
        torch.set_num_threads(threads)
    return {"train_step_parts": _result(by_part, critics, steps, tuned)}


def _result(
    by_part: dict[str, float], critics: dict[str, float], steps: dict[str, list[float]], tuned: bool
) -> dict[str, Any]:
    seed, total = np.array(steps["seed"]), sum(by_part.values())
    gains = {name: seed / np.array(times) for name, times in steps.items()}
    chosen = next(name for name in steps if name.startswith(f"{BASE}:"))
    p10, p90 = np.percentile(gains[chosen], [10, 90])
    shares = ", ".join(f"{n} {1000 * t:.0f} ms {100 * t / total:.1f} %" for n, t in sorted(by_part.items(), key=lambda i: -i[1]))
    levers = ", ".join(f"{name} {np.median(gain):.2f} x" for name, gain in gains.items() if name != "seed")
    first = next(iter(critics.values()))
    lean = ", ".join(f"{name} {1000 * t:.0f} ms ({first / t:.1f} x)" for name, t in critics.items())
    note = (
        f"CPU seconds a step, batch {BATCH}, {TOKENS} tokens, {FRAMES} frames, 44.1 kHz, no WavLM, 1 thread, allocator "
        f"{'tuned' if tuned else 'as it is'}; the seed's settings run in Lalia's own step, which leaves out gradients that nobody "
        f"needs. "
        f"Parts in float32: {shares} (sum {total:.2f} s). Whole step: {levers}. Critics, both turns: {lean}"
    )
    return {
        "ratio": float(np.median(gains[chosen])),
        "p10": float(p10),
        "p90": float(p90),
        "ours": float(np.median(steps[chosen])),
        "theirs": float(np.median(seed)),
        "against": "the seed's settings (configs/vits2/seed.yaml: HiFi-GAN, transformer flow, critics at full width, float32)",
        "note": note,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run(), indent=2) + "\n")
