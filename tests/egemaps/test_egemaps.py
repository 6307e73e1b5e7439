"""eGeMAPS as a whole: names, bad input, any rate and length, blocks, and agreement with openSMILE where it is installed."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from egemaps_waves import RATE, speech_like, vowel

from lalia.egemaps import NAMES, VERSION, descriptors, frames, functionals

COLUMN = {name: index for index, name in enumerate(NAMES)}


def test_there_are_88_names() -> None:
    assert len(set(NAMES)) == len(NAMES) == 88
    assert NAMES[0] == "F0semitoneFrom27.5Hz_sma3nz_amean" and NAMES[-1] == "equivalentSoundLevel_dBp"
    assert "slopeUV500-1500_sma3nz_amean" in COLUMN and "mfcc4V_sma3nz_stddevNorm" in COLUMN
    assert VERSION and all(part.isprintable() for part in VERSION)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: np.zeros(n),
        lambda n: np.ones(n),
        lambda n: np.sign(vowel(130.0, seconds=1.0))[:n],  # clipped as hard as can be
        lambda n: np.random.default_rng(0).normal(0, 1e-7, n),
        lambda n: np.where(np.arange(n) == n // 2, 1.0, 0.0),
    ],
    ids=["silence", "constant", "clipped", "faint", "click"],
)
@pytest.mark.parametrize("samples", [0, 1, 2, 319, 960, 961, 5000])
def test_always_finite(make: Callable[[int], np.ndarray], samples: int) -> None:
    wave = make(samples).astype(np.float32)
    values = functionals(wave, RATE)
    assert values.shape == (88,) and values.dtype == np.float32 and np.isfinite(values).all()
    contours = descriptors(wave, RATE)
    assert len(contours) == 25 and len({values.shape for values in contours.values()}) == 1
    assert all(np.isfinite(values).all() for values in contours.values())


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_other_rates_tell_the_same_voice(rate: int) -> None:
    values, reference = functionals(vowel(150.0, rate), rate), functionals(vowel(150.0), RATE)
    assert np.isfinite(values).all()
    pitch = COLUMN["F0semitoneFrom27.5Hz_sma3nz_amean"]
    assert values[pitch] == pytest.approx(reference[pitch], abs=0.1)


def test_bad_input_is_named() -> None:
    wave = vowel(150.0, seconds=0.3)
    for broken in (np.nan, np.inf):
        with pytest.raises(ValueError, match="not finite"):
            functionals(np.append(wave, np.float32(broken)), RATE)
    with pytest.raises(ValueError, match=r"\[2, 4800\].*mix"):
        functionals(np.stack([wave, wave]), RATE)
    for rate in (4000, 96000):
        with pytest.raises(ValueError, match="resample"):
            descriptors(wave, rate)


def test_the_sound_level_is_that_of_the_wave() -> None:
    tone = 0.5 * np.sin(2 * np.pi * 400 * np.arange(RATE) / RATE).astype(np.float32)
    assert functionals(tone, RATE)[-1] == pytest.approx(20 * np.log10(0.5 / np.sqrt(2)), abs=0.01)


def test_voiced_stretches_are_counted() -> None:
    wave = np.concatenate([np.concatenate([vowel(140.0, seconds=0.4), np.zeros(4800, np.float32)]) for _ in range(4)])
    values = functionals(wave, RATE)
    assert values[COLUMN["VoicedSegmentsPerSec"]] == pytest.approx(4 / 2.8, rel=0.03)
    assert values[COLUMN["MeanVoicedSegmentLengthSec"]] == pytest.approx(0.4, abs=0.06)


def test_loudness_peaks_are_counted() -> None:
    swell = 0.55 - 0.45 * np.cos(2 * np.pi * 3 * np.arange(2 * RATE) / RATE)  # three a second
    wave = (vowel(140.0, seconds=2.0) * swell).astype(np.float32)
    assert functionals(wave, RATE)[COLUMN["loudnessPeaksPerSec"]] == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("block", [1, 37])
def test_blocks_equal_the_whole(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wave = speech_like(1.3, seed=3)
    whole, contours = functionals(wave, RATE), descriptors(wave, RATE)
    monkeypatch.setattr(frames, "BLOCK", block)
    np.testing.assert_allclose(functionals(wave, RATE), whole, rtol=2e-3, atol=1e-5)
    for name, values in descriptors(wave, RATE).items():
        assert np.median(np.abs(values - contours[name])) <= 1e-4 * np.abs(contours[name]).mean(), name


def test_memory_does_not_grow_with_the_spectra() -> None:
    wave = np.tile(speech_like(3.0), 20)
    functionals(wave[:RATE], RATE)
    tracemalloc.start()
    functionals(wave, RATE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6, f"{peak / 1e6:.0f} MB for one minute"


def test_the_wave_is_left_alone_and_the_result_repeats() -> None:
    wave = speech_like(0.8)
    before = wave.copy()
    np.testing.assert_array_equal(functionals(wave, RATE), functionals(wave.astype(np.float64), RATE))
    np.testing.assert_array_equal(wave, before)


# --- the reference --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("rate", "seed"), [(16000, 0), (16000, 2), (44100, 1), (8000, 0), (22050, 1)])
def test_agrees_with_opensmile(rate: int, seed: int) -> None:
    opensmile = pytest.importorskip("opensmile", reason="opensmile (research licence) is not installed")
    wave = speech_like(2.0, rate, seed)
    smile = opensmile.Smile(opensmile.FeatureSet.eGeMAPSv02, opensmile.FeatureLevel.LowLevelDescriptors)
    theirs = smile.process_signal(wave, rate)
    for name, ours in descriptors(wave, rate).items():
        pair = np.stack([ours, theirs[name].to_numpy()[: len(ours)]])[:, :-5]  # the reference ends otherwise
        formant = "A3" in name or name[:2] in ("F1", "F2", "F3")  # ill-conditioned in float32, which the reference works in
        assert np.corrcoef(pair)[0, 1] > (0.9 if formant else 0.999), name
        assert np.median(np.abs(pair[0] - pair[1])) <= (1e-2 if formant else 1e-4) * np.abs(pair[1]).mean(), name
    smile = opensmile.Smile(opensmile.FeatureSet.eGeMAPSv02, opensmile.FeatureLevel.Functionals)
    assert tuple(smile.feature_names) == NAMES
    reference = smile.process_signal(wave, rate).to_numpy()[0]
    relative = np.abs(functionals(wave, rate) - reference) / np.maximum(np.abs(reference), 1e-6)
    assert (relative < 0.1).sum() >= 84 and np.median(relative) < 1e-5
