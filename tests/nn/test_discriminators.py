from __future__ import annotations

import pytest
import torch

from lalia.nn.discriminators import (
    DurationDiscriminator,
    MultiDiscriminator,
    PeriodDiscriminator,
    ResolutionDiscriminator,
    ScaleDiscriminator,
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_full_size_counts():
    with torch.device("meta"):
        assert count(MultiDiscriminator()) == 46_747_132
        assert count(DurationDiscriminator(192, 192, 3, 0.1, 512)) == 1_209_409


@pytest.mark.parametrize("norm", ["weight", "spectral"])
@pytest.mark.parametrize("channels_scale", [1 / 16, 0.1])
def test_every_critic_gives_scores_and_features(norm, channels_scale):
    critics = MultiDiscriminator(2, [2, 3], [[64, 16, 48]], channels_scale, norm)
    wave = torch.randn(3, 1, 1000, requires_grad=True)
    scores, features = critics(wave)
    assert len(scores) == len(features) == 5
    assert all(score.dim() == 2 and score.shape[0] == 3 for score in scores)
    assert all(len(maps) == 6 or len(maps) == 7 for maps in features)
    sum(score.mean() for score in scores).backward()
    assert wave.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in critics.parameters())


def test_rows_are_judged_apart():
    critics = MultiDiscriminator(1, [2, 3], [[64, 16, 48]], 1 / 16).eval()
    wave = torch.randn(3, 1, 700)
    together, _ = critics(wave)
    alone, _ = critics(wave[1:2])
    for many, one in zip(together, alone, strict=True):
        torch.testing.assert_close(many[1:2], one, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("period", [2, 3, 5, 7, 11])
@pytest.mark.parametrize("samples", [770, 771, 779])
def test_period_fold_is_reflect_padded(period, samples):
    critic = PeriodDiscriminator(period, 1 / 16)
    seen = []
    critic.layers[0].register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    wave = torch.arange(samples, dtype=torch.float32).reshape(1, 1, -1)
    critic(wave)
    (folded,) = seen
    assert folded.shape == (1, 1, -(-samples // period), period)
    flat = folded.flatten()
    missing = flat.numel() - samples
    assert torch.equal(flat[:samples], wave.flatten())
    assert torch.equal(flat[samples:], wave.flatten()[samples - 1 - missing : samples - 1].flip(0))


def test_resolution_magnitude_has_a_finite_gradient_at_silence():
    critic = ResolutionDiscriminator([64, 16, 64], 1 / 8)
    wave = torch.zeros(1, 1, 320, requires_grad=True)
    magnitude = critic.magnitude(wave)
    assert magnitude.shape == (1, 33, 20)
    magnitude.sum().backward()
    assert wave.grad.isfinite().all()


def test_a_critic_learns_to_tell_noise_from_tone():
    critic = ScaleDiscriminator(1 / 16)
    optimizer = torch.optim.Adam(critic.parameters(), 5e-3)
    tone = torch.sin(torch.arange(512) * 0.05).expand(4, 1, -1)
    for _ in range(40):
        real, _ = critic(tone)
        fake, _ = critic(torch.randn(4, 1, 512))
        loss = (1 - real).square().mean() + fake.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3


def duration_inputs(lengths: list[int], total: int):
    mask = (torch.arange(total) < torch.tensor(lengths)[:, None]).float().unsqueeze(1)
    return (
        torch.randn(len(lengths), 8, total),
        mask,
        torch.randn(len(lengths), 1, total),
        torch.randn(len(lengths), 4, 1),
    )


def test_durations_are_judged_apart_and_padding_does_not_matter():
    critic = DurationDiscriminator(8, 8, 3, 0.1, 4).eval()
    hidden, mask, duration, speaker = duration_inputs([6, 3, 1], 6)
    real, fake = critic(hidden, mask, [duration, duration + 1], speaker)
    assert real.shape == fake.shape == (3, 6, 1)
    assert ((real >= 0) & (real <= 1)).all() and not torch.allclose(real, fake)
    assert (real[1, 3:] == 0).all()
    torch.testing.assert_close(critic(hidden, mask, [duration + 1], speaker)[0], fake)
    for row, length in enumerate([6, 3, 1]):
        one = slice(row, row + 1)
        alone = critic(hidden[one, :, :length], mask[one, :, :length], [duration[one, :, :length]], speaker[one])[0]
        torch.testing.assert_close(alone, real[one, :length], atol=1e-6, rtol=1e-5)
    noisy = hidden + 100 * (1 - mask)
    torch.testing.assert_close(critic(noisy, mask, [duration + 5 * (1 - mask)], speaker)[0], real)


def test_duration_critic_teaches_the_predictor_and_not_the_text_encoder():
    critic = DurationDiscriminator(8, 8, 3, 0.0, 4)
    hidden, mask, duration, speaker = duration_inputs([5, 4], 5)
    inputs = [hidden.requires_grad_(), duration.requires_grad_(), speaker.requires_grad_()]
    critic(hidden, mask, [duration], speaker)[0].sum().backward()
    assert inputs[0].grad is None and inputs[2].grad is None
    assert inputs[1].grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("build", "error"),
    [
        (lambda: MultiDiscriminator(0, [], []), ValueError),
        (lambda: MultiDiscriminator(norm="batch"), ValueError),
        (lambda: PeriodDiscriminator(0), ValueError),
        (lambda: ResolutionDiscriminator([64, 16]), ValueError),
        (lambda: DurationDiscriminator(8, 8)(*duration_inputs([3], 3)[:2], torch.zeros(1, 1, 3)), TypeError),
        (lambda: DurationDiscriminator(8, 8, speaker_width=4)(*duration_inputs([3], 3)[:2], []), ValueError),
    ],
)
def test_wrong_arguments_are_refused(build, error):
    with pytest.raises(error):
        build()
