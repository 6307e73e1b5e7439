from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import make_wave

from lalia.mel import MelSpec, hz_to_mel, mel, mel_filters, mel_from_spectrogram, mel_to_hz, spectrogram

SPECS = [
    MelSpec(16000, 1024, 256, 1024, 80),
    MelSpec(44100, 2048, 512, 2048, 128),
    MelSpec(22050, 1024, 256, 800, 80, fmin=0.0, fmax=8000.0),
    MelSpec(24000, 1024, 300, 1000, 100, fmin=50.0, fmax=11000.0),
    MelSpec(16000, 401, 160, 400, 20, fmin=20.0),  # odd n_fft - hop
]


def slow_filters(spec: MelSpec) -> np.ndarray:
    """Slaney's filters bin by bin, from the definition."""

    def to_hertz(mels: float) -> float:
        return mels * 200 / 3 if mels < 15 else 1000 * math.exp((mels - 15) * math.log(6.4) / 27)

    def to_mels(hertz: float) -> float:
        return hertz * 3 / 200 if hertz < 1000 else 15 + math.log(hertz / 1000) * 27 / math.log(6.4)

    low, high = to_mels(spec.fmin), to_mels(spec.fmax or spec.sample_rate / 2)
    edges = [to_hertz(low + (high - low) * i / (spec.mels + 1)) for i in range(spec.mels + 2)]
    filters = np.zeros((spec.mels, spec.n_fft // 2 + 1))
    for m in range(spec.mels):
        left, middle, right = edges[m : m + 3]
        for f in range(filters.shape[1]):
            hertz = f * (spec.sample_rate / 2) / (filters.shape[1] - 1)
            if left < hertz <= middle:
                filters[m, f] = (hertz - left) / (middle - left)
            elif middle < hertz < right:
                filters[m, f] = (right - hertz) / (right - middle)
        filters[m] *= 2 / (right - left)
    return filters


def slow_spectrogram(wave: np.ndarray, spec: MelSpec) -> np.ndarray:
    """Frame by frame with numpy's FFT of mirrored samples."""
    before = (spec.n_fft - spec.hop) // 2
    padded = np.pad(wave.astype(np.float64), (before, spec.n_fft - spec.hop - before), mode="reflect")
    window = np.zeros(spec.n_fft)
    first = (spec.n_fft - spec.win) // 2
    window[first : first + spec.win] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(spec.win) / spec.win)
    count = len(wave) // spec.hop
    frames = [padded[t * spec.hop : t * spec.hop + spec.n_fft] * window for t in range(count)]
    return np.sqrt(np.abs(np.fft.rfft(np.stack(frames))) ** 2 + 1e-6).T


@pytest.mark.parametrize("spec", SPECS)
def test_filters_equal_the_definition(spec):
    got = mel_filters(spec)
    assert got.dtype == torch.float32 and got.shape == (spec.mels, spec.n_fft // 2 + 1)
    np.testing.assert_allclose(got.numpy(), slow_filters(spec), atol=1e-7)


@pytest.mark.parametrize("spec", [s for s in SPECS if s.n_fft % 2 == 0])
def test_filters_equal_transformers(spec):
    utils = pytest.importorskip("transformers.audio_utils")
    theirs = utils.mel_filter_bank(
        spec.n_fft // 2 + 1, spec.mels, spec.fmin, spec.top, spec.sample_rate, norm="slaney", mel_scale="slaney"
    )
    np.testing.assert_allclose(mel_filters(spec).numpy(), theirs.T, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("extra", [0, 7])
def test_spectrogram_equals_the_definition(spec, extra):
    wave = make_wave(0.3, spec.sample_rate)
    wave = wave[: len(wave) // spec.hop * spec.hop + extra - (spec.hop if extra else 0)]
    got = spectrogram(torch.from_numpy(wave), spec)
    assert got.shape == (spec.n_fft // 2 + 1, len(wave) // spec.hop)
    np.testing.assert_allclose(got.numpy(), slow_spectrogram(wave, spec), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("spec", SPECS)
def test_frames_are_samples_over_hop(spec):
    for frames in (1, 2, 3, 10):
        for extra in (0, 1, spec.hop - 1):
            wave = torch.randn(frames * spec.hop + extra)
            assert mel(wave, spec).shape == (spec.mels, frames)
    with pytest.raises(ValueError, match="less than one frame"):
        mel(torch.randn(spec.hop - 1), spec)


def test_a_wave_shorter_than_the_margin_is_finished_with_zeros():
    spec = SPECS[0]
    wave = torch.randn(300)  # the margin is 384 on each side
    before = (spec.n_fft - spec.hop) // 2
    mirrored = torch.cat([wave.flip(0)[:-1], wave, wave.flip(0)[1:]])
    missing = before - 299
    padded = torch.nn.functional.pad(mirrored, (missing, missing))
    frame = torch.fft.rfft(padded[: spec.n_fft] * torch.hann_window(spec.n_fft)).abs()
    torch.testing.assert_close(spectrogram(wave, spec)[:, 0], (frame**2 + 1e-6).sqrt(), atol=1e-3, rtol=1e-3)


def test_leading_dimensions_are_kept():
    """Trap R16: a batch of one keeps its dimension."""
    spec = SPECS[0]
    waves = torch.randn(2, 3, 1, 2560)
    got = mel(waves, spec)
    assert got.shape == (2, 3, 1, 80, 10)
    torch.testing.assert_close(got[1, 2, 0], mel(waves[1, 2, 0], spec))
    assert mel(waves[:1, 0, 0], spec).shape == (1, 80, 10)


@pytest.mark.parametrize(
    "change", [{"sample_rate": 22050}, {"n_fft": 2048}, {"mels": 40}, {"fmin": 40.0}, {"fmax": 6000.0}]
)
def test_every_number_of_the_spec_counts(change):
    """Trap R23: the seed cached its filters by fmax alone."""
    spec = SPECS[0]
    first = mel_filters(spec)
    other = mel_filters(replace(spec, **change))
    assert other.shape != first.shape or not torch.equal(other, first)
    assert mel_filters(spec) is first


def test_log_is_natural_with_a_floor():
    spec = SPECS[0]
    magnitude = torch.zeros(513, 4)
    assert torch.equal(mel_from_spectrogram(magnitude, spec), torch.full((80, 4), math.log(1e-5)))
    magnitude = torch.rand(513, 4)
    expected = np.log(np.maximum(slow_filters(spec) @ magnitude.numpy().astype(np.float64), 1e-5))
    np.testing.assert_allclose(mel_from_spectrogram(magnitude, spec).numpy(), expected, atol=1e-4)


def test_far_from_the_end_a_padded_batch_equals_the_single_clip():
    spec = SPECS[0]
    wave = torch.randn(20 * spec.hop)
    batch = torch.zeros(2, 40 * spec.hop)
    batch[0, : len(wave)] = wave
    edge = spec.n_fft // (2 * spec.hop)
    torch.testing.assert_close(mel(batch, spec)[0, :, : 20 - edge], mel(wave, spec)[:, : 20 - edge])


def test_float32_under_autocast_and_after_inference_mode():
    spec = MelSpec(16000, 512, 128, 512, 33)  # a spec that no other test has cached
    wave = torch.randn(1280)
    with torch.inference_mode():
        expected = mel(wave, spec)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = mel(wave.bfloat16(), spec)
    assert got.dtype == torch.float32 and expected.dtype == torch.float32
    wave.requires_grad_()
    mel(wave, spec).sum().backward()  # filters cached in inference mode would refuse this
    assert torch.isfinite(wave.grad).all() and wave.grad.abs().max() > 0


def test_the_gradient_at_silence_is_finite():
    wave = torch.zeros(2560, requires_grad=True)
    mel(wave, SPECS[0]).sum().backward()
    assert torch.isfinite(wave.grad).all()


def test_mel_scale_round_trip_and_break():
    hertz = np.array([0.0, 440.0, 999.9, 1000.0, 6400.0, 22050.0])
    np.testing.assert_allclose(mel_to_hz(hz_to_mel(hertz)), hertz, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(hz_to_mel(np.array([1000.0, 6400.0])), [15.0, 42.0])


@pytest.mark.parametrize(
    ("numbers", "word"),
    [
        ((16000, 256, 512, 256, 80), "hop"),
        ((16000, 512, 128, 1024, 80), "win"),
        ((16000, 512, 128, 512, 0), "mels"),
        ((16000, 512, 128, 512, 80, 0.0, 9000.0), "fmax"),
        ((16000, 512, 128, 512, 80, 5000.0, 4000.0), "fmin"),
    ],
)
def test_impossible_specs_are_named(numbers, word):
    with pytest.raises(ValueError, match=word):
        MelSpec(*numbers)
