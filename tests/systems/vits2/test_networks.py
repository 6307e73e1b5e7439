"""The networks: sizes against the published model, shapes, inverses, and losses against plain numpy."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import make_corpus
from torch import Tensor
from vits2_models import FULL, batch_of, build, parameters, stir

from lalia.nn.align import expand, mas_noise_scale
from lalia.nn.discriminators import DurationDiscriminator, MultiDiscriminator
from lalia.nn.masks import channel_mask
from lalia.nn.noise import RowNoise, row_seeds
from lalia.nn.slm import WavLMDiscriminator
from lalia.system import Clock
from lalia.systems.vits2.config import Config, DecoderKind, DiscriminatorConfig, FlowKind, ModelConfig
from lalia.systems.vits2.duration import StochasticDurationPredictor, gaussian_nll
from lalia.systems.vits2.encoders import ReferenceEncoder
from lalia.systems.vits2.generator import Forward, Generator, cut_durations
from lalia.systems.vits2.losses import duration_loss, kl_loss, mel_prior_loss


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    make_corpus(folder / "corpus")
    return folder


def forward(system: Any, batch: Any, noise_scale: float = 0.01, seed: int = 0) -> Forward:
    noise = RowNoise(row_seeds(batch.ids, seed, 0))
    return system.generator(batch.text_input(), batch.spectrogram, batch.frame_lengths, noise_scale, noise)


# --- sizes (spec 3.2, measured on the published model) --------------------------------------------------------------
@pytest.fixture(scope="module")
def full() -> Generator:
    model = ModelConfig(decoder=DecoderKind.hifigan, bert_languages=["zh", "ja", "en"])
    with torch.device("meta"):
        return Generator(Config(model=model), speakers=2, **FULL)


@pytest.mark.parametrize(
    ("part", "millions"),
    [("text_encoder", 7.01), ("posterior_encoder", 10.49), ("flow", 26.56), ("stochastic_duration", 1.42), ("duration", 0.44),
     ("decoder", 14.66), ("", 60.59)],
)  # fmt: skip
def test_parameters_of_the_full_size(full: Generator, part: str, millions: float) -> None:
    assert parameters(full.get_submodule(part)) == pytest.approx(millions * 1e6, rel=0.02)


def test_parameters_of_the_discriminators() -> None:
    with torch.device("meta"):
        assert parameters(MultiDiscriminator()) == pytest.approx(46.75e6, rel=0.02)
        assert len(MultiDiscriminator().critics) == 6
        assert parameters(WavLMDiscriminator(768, 13, 64)) == pytest.approx(1.17e6, rel=0.02)
        judge = DurationDiscriminator(192, 192, 3, 0.1, 512)
    assert parameters(judge) == pytest.approx(1.21e6, rel=0.02)


# --- the contract of the training pass (V-22 … V-28, A1 … A6) -------------------------------------------------------
def test_shapes_of_the_training_pass(corpus: Path) -> None:
    system, rows = build(corpus)
    batch = batch_of(system, rows, [0, 3, 4])
    out = forward(system, batch)
    tokens, frames, width, hop, segment = batch.text.shape[1], batch.spectrogram.shape[2], 16, 128, 8
    shapes: dict[str, tuple[int, ...]] = {
        "wave": (3, 1, segment * hop), "starts": (3,), "text_mask": (3, 1, tokens), "frame_mask": (3, 1, frames),
        "durations": (3, tokens), "duration_nll": (3,), "hidden": (3, width, tokens), "speaker": (3, 8, 1),
        **{name: (3, width, frames) for name in ("latent_prior", "mean_prior", "log_scale_prior", "log_scale_posterior")},
        **{name: (3, 1, tokens) for name in ("log_duration", "log_duration_sampled", "log_duration_target")},
    }  # fmt: skip
    assert {name: tuple(getattr(out, name).shape) for name in shapes} == shapes
    assert batch.spectrogram.shape[1] == 129  # A4: the linear spectrogram, not the mel
    assert torch.equal(out.durations.sum(1), batch.frame_lengths)
    assert bool((out.durations[out.text_mask[:, 0] > 0] >= 1).all()) and bool((out.durations[out.text_mask[:, 0] == 0] == 0).all())
    assert all(0 <= start <= length - segment for start, length in zip(out.starts, batch.frame_lengths, strict=True))
    target = torch.log(out.durations.float() + 1e-6) * out.text_mask[:, 0]
    assert torch.allclose(out.log_duration_target[:, 0], target)  # A6: the target is what the alignment found


def test_latent_comes_from_the_posterior_and_durations_from_the_prior(corpus: Path) -> None:
    """A1: the decoder never sees the text, the prior is expanded, the flow is not inverted in training."""
    system, rows = build(corpus)
    stir(system.eval())
    batch = batch_of(system, rows, [0, 1])
    out = forward(system, batch)
    other = copy.copy(batch)
    other.text = batch.text.flip(1)
    assert torch.equal(forward(system, other).wave, out.wave)
    prior = system.generator.encode_text(batch.text_input(), out.speaker)
    assert torch.equal(out.mean_prior, expand(prior.mean, out.durations, batch.spectrogram.shape[2]))
    latent, _, mask = system.generator.encode_audio(
        batch.spectrogram, batch.frame_lengths, out.speaker, RowNoise(row_seeds(batch.ids, 0, 0))
    )
    assert torch.allclose(system.generator.flow(latent, mask, out.speaker), out.latent_prior, atol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours(corpus: Path) -> None:
    """R16, R25: alone, with longer neighbours, padded: the same losses and the same slice, alignment noise included."""
    system, rows = build(corpus)
    stir(system)
    system.eval()
    batch, alone = batch_of(system, rows, [0, 4]), batch_of(system, rows, [0])
    assert batch.spectrogram.shape[2] > alone.spectrogram.shape[2]
    with torch.no_grad():
        together, single = forward(system, batch), forward(system, alone)
    assert torch.equal(together.durations[0, : alone.text.shape[1]], single.durations[0])
    assert torch.equal(together.starts[0], single.starts[0])
    assert torch.allclose(together.wave[0], single.wave[0], atol=1e-5)
    assert torch.allclose(together.duration_nll[0], single.duration_nll[0], rtol=1e-4)
    frames = alone.spectrogram.shape[2]
    assert torch.allclose(together.latent_prior[0, :, :frames], single.latent_prior[0], atol=1e-4)


def test_what_learns_from_what(corpus: Path) -> None:
    """The duration losses reach neither text encoder nor speaker table; the decoder's loss reaches no text encoder."""
    system, rows = build(corpus)
    stir(system)
    out = forward(system, batch_of(system, rows, [0, 1]))
    g = system.generator

    def reached(loss: Tensor) -> set[str]:
        system.zero_grad()
        loss.backward(retain_graph=True)
        return {name for name, module in g.named_children() if any(p.grad is not None for p in module.parameters())}

    assert reached(duration_loss(out)) == {"duration", "stochastic_duration"}
    assert reached(out.wave.square().sum()) == {"decoder", "posterior_encoder", "speaker_table"}
    assert reached(kl_loss(out)) == {"text_encoder", "posterior_encoder", "flow", "speaker_table"}


# --- durations ------------------------------------------------------------------------------------------------------
def test_stochastic_durations_invert() -> None:
    """What the density's flow makes of log-durations, sampling undoes; and its volume is that of the Jacobian."""
    torch.manual_seed(0)
    predictor = StochasticDurationPredictor(8, 3, 0.0, flows=4, speaker_width=4).double()
    stir(predictor, 0.2)
    mask = channel_mask(torch.tensor([3, 2])).double()
    condition = predictor.condition(torch.randn(2, 8, 3).double() * mask, mask, torch.randn(2, 4, 1).double())
    value = torch.randn(2, 2, 3).double() * mask
    moved, volume = predictor.prior(value, mask, condition)
    assert torch.allclose(predictor.prior.inverse(moved, mask, condition), value, atol=1e-3)  # splines run in float32
    assert torch.allclose(predictor.sample(condition, mask, moved), value[:, :1], atol=1e-3)

    def second(flat: Tensor) -> Tensor:
        return predictor.prior(flat.view(1, 2, 2), mask[1:, :, :2], condition[1:, :, :2])[0].flatten()

    jacobian = torch.autograd.functional.jacobian(second, value[1, :, :2].flatten().clone())
    assert float(torch.linalg.slogdet(jacobian)[1]) == pytest.approx(float(volume[1].detach()), abs=1e-4)


def test_duration_density_is_normalised() -> None:
    """Averaged over the variational noise, exp(-nll) over the durations of one token sums to at most 1, and to most of it."""
    torch.manual_seed(0)
    predictor = StochasticDurationPredictor(4, 3, 0.0, flows=2, speaker_width=2)
    mask = torch.ones(1, 1, 1)
    condition = predictor.condition(torch.randn(1, 4, 1), mask, torch.randn(1, 2, 1))
    draws, longest = 48, 250
    durations = torch.arange(1, longest).float().repeat(draws)[:, None, None]
    noise = torch.randn(draws, 2, 1, generator=torch.Generator().manual_seed(3)).repeat_interleave(longest - 1, 0)
    with torch.no_grad():
        nll = predictor(condition.expand(len(durations), -1, -1), torch.ones_like(durations), durations, noise)
    total = float((-nll).exp().sum()) / draws
    assert 0.8 < total < 1.05  # longer durations are missing, and the draws are few


def test_gaussian_nll_oracle() -> None:
    noise, mask = torch.randn(2, 2, 3), channel_mask(torch.tensor([3, 1]))
    wanted = [0.5 * np.sum(np.log(2 * np.pi) + noise[b, :, :n].numpy() ** 2) for b, n in enumerate([3, 1])]
    assert gaussian_nll(noise, mask).tolist() == pytest.approx(wanted, rel=1e-5)


def test_cut_durations() -> None:
    durations = torch.tensor([[3, 4, 5], [1, 1, 1]])
    assert cut_durations(durations, 6).tolist() == [[3, 3, 0], [1, 1, 1]]


# --- losses ---------------------------------------------------------------------------------------------------------
def test_kl_and_duration_losses_oracle(corpus: Path) -> None:
    system, rows = build(corpus, **{"model.mel_prior": True})
    stir(system)
    batch = batch_of(system, rows, [0, 4, 2])
    out = forward(system, batch)
    a = {name: getattr(out, name).detach().double().numpy() for name in ("latent_prior", "mean_prior", "log_scale_prior",
         "log_scale_posterior", "log_duration", "log_duration_sampled", "log_duration_target", "duration_nll")}  # fmt: skip
    total = 0.0
    for row, frames in enumerate(batch.frame_lengths.tolist()):
        z, m, p, q = (a[n][row, :, :frames] for n in ("latent_prior", "mean_prior", "log_scale_prior", "log_scale_posterior"))
        total += np.sum(p - q - 0.5 + 0.5 * (z - m) ** 2 * np.exp(-2 * p))
    assert float(kl_loss(out).detach()) == pytest.approx(total / int(batch.frame_lengths.sum()), rel=1e-4)

    errors = (out.mel - out.mel_prior).detach().double().numpy()  # type: ignore[operator]
    whole = np.concatenate([errors[row, :, :frames].ravel() for row, frames in enumerate(batch.frame_lengths.tolist())])
    assert float(mel_prior_loss(out).detach()) == pytest.approx(0.5 * np.mean(whole**2), rel=1e-4)

    total = a["duration_nll"].sum()
    for row, tokens in enumerate(batch.text_lengths.tolist()):
        for name in ("log_duration", "log_duration_sampled"):
            total += np.sum((a[name][row, 0, :tokens] - a["log_duration_target"][row, 0, :tokens]) ** 2)
    assert float(duration_loss(out).detach()) == pytest.approx(total / int(batch.text_lengths.sum()), rel=1e-4)


def test_alignment_noise_follows_its_schedule(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """V-27: 0.01 at first, falling by 2e-6 a step to nothing at step 5000; none at all in VITS1 mode."""
    assert [mas_noise_scale(step) for step in (0, 2500, 5000, 9000)] == pytest.approx([0.01, 0.005, 0.0, 0.0])
    system, rows = build(corpus)
    batch = batch_of(system, rows, [0])
    used: list[float] = []
    real = system.generator.align
    monkeypatch.setattr(system.generator, "align", lambda *a: (used.append(a[3]), real(*a))[1])
    for step in (0, 2500, 5000):
        next(system.turns(batch, Clock(step=step)))
    system.config.model.noise_scaled_mas = False
    next(system.turns(batch, Clock(step=0)))
    assert used == pytest.approx([0.01, 0.005, 0.0, 0.0])


# --- speakers and modes (V-32, V-33) --------------------------------------------------------------------------------
def test_reference_encoder_ignores_padding_and_hears_the_voice(corpus: Path) -> None:
    system, rows = build(corpus, **{"model.reference_encoder": True, "model.speaker_conditioned_encoder": False})
    assert system.generator.speaker_table is None
    batch, alone = batch_of(system, rows, [0, 4]), batch_of(system, rows, [0])
    together = system.generator.speaker_vector(batch.text_input())
    assert torch.allclose(together[0], system.generator.speaker_vector(alone.text_input())[0], atol=1e-6)
    assert not torch.allclose(together[0], together[1])
    loss = dict(system.turns(batch, Clock()))["g"]["loss_mel"]
    loss.backward()
    assert all(p.grad is not None for p in system.generator.reference.parameters())  # type: ignore[union-attr]
    row = rows[0]
    row.speaker = "never heard of"
    assert system.reject(row) == "" and system.prepare(row, Clock()).speaker == 0


def test_reference_encoder_shortens_lengths_as_its_convolutions_do() -> None:
    encoder = ReferenceEncoder(17, 4)
    for frames in (1, 2, 63, 64, 65):
        assert encoder(torch.randn(1, 17, frames), torch.tensor([frames])).shape == (1, 4, 1)


def test_both_kinds_of_speaker_at_once_is_an_error() -> None:
    with pytest.raises(ValueError, match="speaker_conditioned_encoder needs a speaker table"):
        ModelConfig(reference_encoder=True, speaker_conditioned_encoder=True)


@pytest.mark.parametrize("conditioned", [True, False])
def test_speaker_conditioned_encoder_on_and_off(corpus: Path, conditioned: bool) -> None:
    """R1: off works too, and then the text encoder does not know the speaker."""
    system, rows = build(corpus, **{"model.speaker_conditioned_encoder": conditioned})
    stir(system.eval())
    text = batch_of(system, rows, [0]).text_input()
    first, second = (system.generator.encode_text(text, torch.full((1, 8, 1), float(v))).mean for v in (0, 1))
    assert torch.equal(first, second) is not conditioned


VITS1 = {
    "model.noise_scaled_mas": False,
    "model.flow": "wavenet",
    "model.speaker_conditioned_encoder": False,
    "discriminator.duration": False,
    "model.decoder": "hifigan",
    "model.hifigan.channels": 16,
    "model.hifigan.rates": "[8, 4, 4]",
    "model.hifigan.kernels": "[16, 8, 8]",
    "model.hifigan.residual_kernels": "[3]",
}
MODES: dict[str, dict[str, Any]] = {
    "vits1": VITS1,
    "transformer flow of one layer": {"model.flow": "transformer", "model.flow_layers": 1},
    "shared flow": {"model.flow": "transformer", "model.flow_layers": 3, "model.flow_share_parameters": True},
    "spectral norm": {"discriminator.spectral_norm": True, "discriminator.scales": 1},
    "mel prior": {"model.mel_prior": True},
    "spectrogram critics": {"discriminator.periods": "[]", "discriminator.resolutions": "[[64, 16, 64]]"},
}


@pytest.mark.parametrize("name", list(MODES))
def test_modes_build_learn_and_speak(name: str, corpus: Path) -> None:
    """V-33, R1, R2: each mode takes a step with finite losses and gradients, and speaks."""
    from lalia.system import SpeakRequest

    system, rows = build(corpus, **MODES[name])
    batch = batch_of(system, rows, [0, 1])
    turns = []
    for turn, losses in system.turns(batch, Clock()):
        torch.stack(list(losses.values())).sum().backward()
        turns.append(turn)
    assert turns == (["d", "g"] if name == "vits1" else ["d", "dur", "g"])
    missing = [n for n, p in system.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not missing
    assert system.eval().speak([SpeakRequest("Alpha.", max_seconds=1)])[0].wave.size > 0


def test_configuration_errors() -> None:
    with pytest.raises(ValueError, match="multiply to 512, but audio.hop is 256"):
        Config(model=ModelConfig(decoder=DecoderKind.hifigan), audio=Config().audio.__class__(hop=256))
    with pytest.raises(ValueError, match="accumulate"):
        Config(train=Config().train.__class__(accumulate=2))
    with pytest.raises(ValueError, match="speaker_layer"):
        ModelConfig(layers=2)
    with pytest.raises(ValueError, match="even"):
        ModelConfig(width=15)
    assert ModelConfig().flow is FlowKind.transformer and DiscriminatorConfig().periods == [2, 3, 5, 7, 11]
