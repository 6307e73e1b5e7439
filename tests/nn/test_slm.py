from __future__ import annotations

import numpy as np
import pytest
import soxr
import torch

from lalia.nn.gan_losses import discriminator_loss, generator_loss
from lalia.nn.slm import Resampler, WavLMDiscriminator, WavLMFeatures, slm_feature_loss
from lalia.pretrained import load_wavlm
from lalia.sections import ExternalModel


@pytest.fixture(scope="module")
def features() -> WavLMFeatures:
    return WavLMFeatures(load_wavlm(ExternalModel("tiny")), 44_100)


def band_limited(rate: int, seconds: float, limit: float) -> np.ndarray:
    generator = np.random.default_rng(0)
    times = np.arange(int(rate * seconds)) / rate
    tones = [
        np.sin(2 * np.pi * f * times + p) for f, p in zip(generator.uniform(50, limit, 40), range(40), strict=True)
    ]
    return (np.sum(tones, 0) * np.hanning(len(times)) / 40).astype(np.float32)


@pytest.mark.parametrize("rate", [44_100, 48_000, 22_050, 24_000, 16_000, 8_000])
def test_resampler_agrees_with_soxr(rate):
    wave = band_limited(rate, 0.5, min(7000, 0.42 * rate))
    ours = Resampler(rate, 16_000)(torch.from_numpy(wave).reshape(1, 1, -1)).flatten().numpy()
    theirs = soxr.resample(wave, rate, 16_000, quality="VHQ")
    assert len(ours) == -(-len(wave) * 16_000 // rate)
    shared = min(len(ours), len(theirs))
    error = np.abs(ours[:shared] - theirs[:shared]).max()
    assert error < 2e-3 * np.abs(theirs).max()


def test_resampler_removes_what_would_alias():
    times = torch.arange(44_100, dtype=torch.float64) / 44_100
    wave = torch.sin(2 * torch.pi * 11_000 * times).float()
    assert Resampler(44_100, 16_000)(wave)[200:-200].abs().max() < 1e-5


def test_resampler_passes_the_gradient_on():
    resampler = Resampler(3, 2, zeros=4)
    wave = torch.randn(2, 1, 20, requires_grad=True)
    resampler(wave).square().sum().backward()
    numeric = torch.zeros(20)
    with torch.no_grad():
        for i in range(20):
            shifted = torch.zeros(20)
            shifted[i] = 1e-2
            high, low = (resampler(wave[0, 0] + sign * shifted).square().sum() for sign in (1, -1))
            numeric[i] = (high - low) / 2e-2
    torch.testing.assert_close(wave.grad[0, 0], numeric, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("batch", [1, 2])
def test_hidden_states_are_stacked_for_any_batch(features, batch):
    wave = torch.randn(batch, 1, 16_384)
    states = features(wave)
    assert states.shape[:2] == (batch, features.layers * features.width)
    assert torch.equal(features(wave.squeeze(1)), states)
    expected = features.backbone(features.resampler(wave).squeeze(1), output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[:, : features.width], expected[0].transpose(1, 2))
    torch.testing.assert_close(states[:, -features.width :], expected[-1].transpose(1, 2))


def test_two_backbone_passes_a_step(features):
    calls = []
    handle = features.backbone.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    critic = WavLMDiscriminator(features.width, features.layers, 8)
    real_wave, fake_wave = torch.randn(2, 1, 8_192), torch.randn(2, 1, 8_192, requires_grad=True)
    real, fake = features.reference(real_wave), features(fake_wave)
    discriminator_loss([critic(real)], [critic(fake.detach())])[0].backward()
    assert fake_wave.grad is None
    (slm_feature_loss(real, fake, features.layers) + generator_loss([critic(fake)])[0]).backward()
    handle.remove()
    assert calls == [False, True]
    assert fake_wave.grad.isfinite().all() and fake_wave.grad.abs().sum() > 0
    assert not real.requires_grad


def test_feature_loss_sums_over_layers_and_only_teaches_the_fake():
    real, fake = torch.ones(2, 6, 5, requires_grad=True), torch.zeros(2, 6, 5, requires_grad=True)
    loss = slm_feature_loss(real, fake, layers=3)
    assert loss.item() == 3.0
    loss.backward()
    assert real.grad is None and fake.grad is not None


def test_the_backbone_is_not_saved_and_not_trained(features):
    parent = torch.nn.ModuleDict({"features": features}).train()
    assert not list(parent.parameters()) and not parent.state_dict()
    assert not features.backbone.training
    parent.to(torch.float64)
    assert next(features.backbone.parameters()).dtype == torch.float64
    parent.to(torch.float32)


def test_large_models_get_normalised_waves():
    plain, normal = (WavLMFeatures(load_wavlm(ExternalModel("tiny")), 16_000, flag) for flag in (False, True))
    wave = 0.1 * torch.randn(1, 1, 4_000) + 0.3
    torch.testing.assert_close(normal(wave), normal(5 * wave - 1), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(plain(wave), plain(5 * wave - 1), atol=1e-4)


def test_wrong_waves_are_refused(features):
    with pytest.raises(ValueError, match="400 samples"):
        features(torch.zeros(1, 1, 1_000))
    with pytest.raises(ValueError, match=r"\[B, 1, S\]"):
        features(torch.zeros(8_192))


def test_discriminator_counts_and_shapes():
    critic = WavLMDiscriminator(768, 13, 64)
    assert sum(p.numel() for p in critic.parameters()) == 1_173_634
    assert critic(torch.randn(1, 13 * 768, 18)).shape == (1, 18)
    with pytest.raises(ValueError, match="9984"):
        critic(torch.randn(1, 1, 16_384))
