from __future__ import annotations

import numpy as np
import pytest

from lalia.evaluate.pitch import track_pitch

RATE, HOP = 16000, 200


@pytest.mark.parametrize("rate", [16000, 44100])
@pytest.mark.parametrize("hertz", [80.0, 123.4, 200.0, 311.0, 400.0])
def test_tones_with_harmonics_within_one_percent(hertz: float, rate: int) -> None:
    time = np.arange(rate // 2) / rate
    tone = sum(np.sin(2 * np.pi * hertz * k * time + k) / k for k in range(1, 8))
    pitch = track_pitch(0.1 * tone, rate, HOP)
    assert len(pitch) == rate // 2 // HOP
    inner = pitch[6:-6]
    assert (inner > 0).all()
    assert np.abs(inner / hertz - 1).max() < 0.01


def test_a_missing_fundamental_and_noise_at_20_db_are_no_obstacle() -> None:
    rng = np.random.default_rng(0)
    time = np.arange(RATE) / RATE
    tone = sum(np.sin(2 * np.pi * 150 * k * time) for k in (2, 3, 4, 5))
    noisy = tone + rng.normal(0, 0.1 * np.sqrt(2), RATE)
    inner = track_pitch(noisy, RATE, HOP)[5:-5]
    assert (inner > 0).mean() > 0.9
    assert np.abs(inner[inner > 0] / 150 - 1).max() < 0.02


def test_noise_and_silence_are_unvoiced() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, RATE)
    assert (track_pitch(noise, RATE, HOP) > 0).mean() < 0.02
    assert not track_pitch(np.zeros(RATE), RATE, HOP).any()
    quiet = np.concatenate([np.sin(2 * np.pi * 200 * np.arange(RATE) / RATE) * g for g in (0.5, 0.5e-3)])
    pitch = track_pitch(quiet, RATE, HOP)
    assert pitch[10:70].all() and not pitch[90:150].any()


def test_a_glide_is_followed_frame_by_frame() -> None:
    time = np.arange(2 * RATE) / RATE
    hertz = 120 * 2 ** (time / 2)
    wave = np.sin(2 * np.pi * np.cumsum(hertz) / RATE)
    pitch = track_pitch(wave, RATE, HOP)
    centres = hertz[HOP * np.arange(len(pitch)) + HOP // 2]
    assert np.abs(pitch[8:-8] / centres[8:-8] - 1).max() < 0.02


def test_short_and_bad_input() -> None:
    assert len(track_pitch(np.zeros(HOP - 1), RATE, HOP)) == 0
    with pytest.raises(ValueError, match="low"):
        track_pitch(np.zeros(RATE), RATE, HOP, low=300, high=100)
