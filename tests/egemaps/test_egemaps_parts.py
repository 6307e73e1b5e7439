"""The parts of eGeMAPS against properties that are known beforehand."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from egemaps_waves import RATE, pulses, speech_like, vowel

from lalia.egemaps import descriptors, formants, frames, pitch, spectrum, voice
from lalia.egemaps.harmonics import local_peaks, nearest_peaks
from lalia.egemaps.statistics import (
    mean_and_variation,
    percentiles,
    segments,
    slopes,
    smoothed,
    smoothed_present,
    turning_points,
)

INSIDE = slice(10, -10)  # frames that the ends of the wave do not touch


@pytest.mark.parametrize("hertz", [90.0, 143.0, 220.0, 310.0])
def test_pitch_is_found_in_semitones_above_27_5_hz(hertz: float) -> None:
    found = descriptors(vowel(hertz), RATE)["F0semitoneFrom27.5Hz_sma3nz"][INSIDE]
    assert np.abs(found - 12 * np.log2(hertz / 27.5)).max() < 0.1


def test_an_octave_is_twelve_semitones() -> None:
    low, high = (descriptors(vowel(hertz), RATE)["F0semitoneFrom27.5Hz_sma3nz"][INSIDE] for hertz in (110.0, 220.0))
    assert np.median(high - low) == pytest.approx(12, abs=0.1)


def test_noise_and_silence_have_no_pitch() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32)
    for wave in (noise, np.zeros(RATE, np.float32), vowel(150.0) * 1e-4):
        assert (descriptors(wave, RATE)["F0semitoneFrom27.5Hz_sma3nz"] > 0).mean() < 0.1


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.03])
def test_jitter_is_the_known_difference_of_periods(spread: float) -> None:
    period = 0.008 * (1 + spread / 2 * (-1.0) ** np.arange(120))  # neighbours differ by `spread` of the mean
    wave = pulses(np.cumsum(period) - 0.004, np.ones(120))
    jitter, _ = voice.jitter_shimmer(wave, RATE, np.full(90, 125.0))
    assert np.mean(jitter[INSIDE]) == pytest.approx(spread, abs=0.001)


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.2])
def test_shimmer_is_the_known_difference_of_amplitudes(spread: float) -> None:
    heights = 1 + spread / 2 * (-1.0) ** np.arange(120)
    wave = pulses(np.cumsum(np.full(120, 0.008)) - 0.004, heights)
    _, shimmer = voice.jitter_shimmer(wave, RATE, np.full(90, 125.0))
    assert np.mean(shimmer[INSIDE]) == pytest.approx(20 * np.log10(1 + spread), abs=0.02)


@pytest.mark.parametrize("noise_level", [0.0, 0.02, 0.05])
def test_hnr_is_that_of_the_mixture(noise_level: float) -> None:
    hertz, wave = 200.0, vowel(200.0, seconds=2.0)
    noise = np.random.default_rng(1).normal(0, 1, len(wave)).astype(np.float32) * noise_level
    found = descriptors(wave + noise, RATE)["HNRdBACF_sma3nz"][INSIDE]
    window = np.exp(-((1 / hertz / (0.4 * 0.03)) ** 2) / 4)  # what the window leaves of a perfect period
    correlation = window * wave.var() / (wave.var() + noise.var())
    assert np.median(found) == pytest.approx(10 * np.log10(correlation / (1 - correlation)), abs=1.0)


def poles_of(centres: list[float], widths: list[float], real: float) -> np.ndarray:
    """Coefficients [1, 11] of the filter with these resonances at 11 kHz and one real pole."""
    size = np.exp(-np.pi * np.array(widths) / formants.RATE)
    upper = size * np.exp(2j * np.pi * np.array(centres) / formants.RATE)
    return np.real(np.poly(np.concatenate([upper, upper.conj(), [real]])))[None, 1:]


def test_resonances_of_a_known_filter() -> None:
    centres, widths = [2500.0, 700.0, 1220.0, 3500.0, 4500.0], [120.0, 80.0, 90.0, 200.0, 300.0]
    frequency, bandwidth = formants.resonances(poles_of(centres, widths, 0.9))
    np.testing.assert_allclose(frequency[0], [700, 1220, 2500], rtol=1e-6)
    np.testing.assert_allclose(bandwidth[0], [80, 90, 120], rtol=1e-5)


def test_the_predictor_finds_the_filter_that_made_the_signal() -> None:
    known = poles_of([600.0, 1500.0, 2500.0, 3400.0, 4400.0], [150.0, 200.0, 250.0, 300.0, 350.0], 0.7)[0]
    response = np.zeros(1500)
    response[0] = 1.0
    for n in range(1, len(response)):
        past = response[max(0, n - formants.ORDER) : n][::-1]
        response[n] = -(known[: len(past)] * past).sum()
    np.testing.assert_allclose(formants.predictor(response[None])[0], known, atol=1e-6)
    assert not formants.predictor(np.zeros((1, 220))).any()


def test_loudness_follows_the_power_law() -> None:
    wave = speech_like(1.0)
    quiet, loud = (descriptors(wave * gain, RATE)["Loudness_sma3"] for gain in (0.5, 1.0))
    assert (loud > quiet).all()
    assert np.median(loud / quiet) == pytest.approx(4**spectrum.COMPRESSION, rel=0.01)


def test_mel_triangles_share_every_inner_bin() -> None:
    shape = frames.layout(RATE, frames.SHORT_SECONDS)
    filters, centres = spectrum.mel_filters(shape)
    inner = (shape.frequencies > centres[0]) & (shape.frequencies < centres[-1])
    np.testing.assert_allclose(filters[inner].sum(1), 1.0, atol=1e-5)
    assert (np.diff(centres) > 0).all() and centres[-1] < 8000


def test_a_tilted_spectrum_has_a_steeper_slope_and_ratios() -> None:
    bright, dark = (vowel(125.0, centres=centres) for centres in ((400, 2600, 3400), (400,)))
    bright, dark = descriptors(bright, RATE), descriptors(dark, RATE)
    assert np.median(bright["alphaRatio_sma3"]) > np.median(dark["alphaRatio_sma3"]) + 3
    assert np.median(bright["hammarbergIndex_sma3"]) < np.median(dark["hammarbergIndex_sma3"]) - 3
    rising, falling = (descriptors(vowel(125.0, centres=(centre,)), RATE)["slope500-1500_sma3"] for centre in (1500, 500))
    assert np.median(rising) > 0 > np.median(falling)


def test_flux_is_nothing_for_a_steady_sound() -> None:
    steady = descriptors(vowel(100.0), RATE)["spectralFlux_sma3"][INSIDE]  # the hop is one period
    assert steady.max() < 1e-3 < descriptors(speech_like(1.0), RATE)["spectralFlux_sma3"].mean()


def test_the_spline_passes_through_its_points_and_keeps_lines() -> None:
    source = np.log2(np.arange(1.0, 30.0))
    target = np.linspace(source[0], source[-1], 50)
    np.testing.assert_allclose(pitch._spline(source, source), np.eye(29), atol=1e-12)
    np.testing.assert_allclose(pitch._spline(source, target) @ (3 * source - 1), 3 * target - 1, atol=1e-12)


def test_the_path_does_not_follow_a_single_octave_jump() -> None:
    hertz = np.zeros((40, pitch.CANDIDATES))
    hertz[:, 0], hertz[:, 1] = 150.0, 300.0
    voicing = np.where(hertz > 0, 0.85, 0.0)
    voicing[20] = [0.80, 0.90, 0, 0, 0, 0]
    voicing[:5] = voicing[-5:] = 0.1
    found, _ = pitch.choose_pitch(pitch.Candidates(hertz, voicing, np.ones(40, bool)))
    assert (found[5:-5] == 150.0).all() and not found[:5].any() and not found[-5:].any()


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
def test_the_compiled_loops_give_what_the_plain_ones_give() -> None:
    found = pitch.candidates(speech_like(1.5), RATE)
    arguments = (
        pitch.local_costs(found.frequency, found.voicing), np.log(np.maximum(found.frequency, 1)), found.frequency > 0, 40,
    )  # fmt: skip
    (fast, fast_settled), (slow, slow_settled) = frames.compiled(pitch.best_path)(*arguments), pitch.best_path(*arguments)
    np.testing.assert_array_equal(fast, slow)
    assert fast_settled == slow_settled > 100
    part = vowel(140.0)[:900].astype(np.float64)
    fast, slow = (call(part, 102, 126, 114.3, 160, 0.5) for call in (frames.compiled(voice.match_periods), voice.match_periods))
    np.testing.assert_allclose(fast[0], slow[0], rtol=1e-9)
    assert fast[1] == slow[1] and len(fast[0]) >= 5


def test_nearest_peaks() -> None:
    peak = local_peaks(np.array([[3.0, 1.0, 2.0, 1.0, 1.0, 4.0]]))
    np.testing.assert_array_equal(peak[0], [True, False, True, False, False, True])
    below, above = nearest_peaks(peak)
    np.testing.assert_array_equal(below[0], [0, 0, 2, 2, 2, 5])
    np.testing.assert_array_equal(above[0], [0, 2, 2, 5, 5, 5])


# --- statistics -----------------------------------------------------------------------------------------------------
def test_smoothing_with_and_without_absent_frames() -> None:
    values = np.array([3.0, 0.0, 6.0, 9.0, 0.0])
    np.testing.assert_allclose(smoothed(values), [2, 3, 5, 5, 3])
    np.testing.assert_allclose(smoothed_present(values), [3, 0, 7.5, 7.5, 0])


def test_moments_and_percentiles() -> None:
    values = np.arange(11.0)
    assert mean_and_variation(values) == pytest.approx((5.0, np.sqrt(10) / 5))
    assert percentiles(values) == pytest.approx((2, 5, 8, 6))
    assert mean_and_variation(values[:0]) == (0, 0) and percentiles(values[:0]) == (0, 0, 0, 0)


def test_slopes_of_a_triangle_wave() -> None:
    teeth = np.concatenate([np.arange(10.0), np.arange(10.0, 0, -2)])  # up 1, down 2 a frame
    values = np.tile(teeth, 8)
    points = turning_points(values)
    assert [is_peak for _, is_peak in points] == [True, False] * 7 + [True]
    rising, rising_spread, falling, _ = slopes(values[:-4], points[:-1], 0.01)
    assert (rising, rising_spread) == pytest.approx((100, 0)) and falling == pytest.approx(200)


def test_ripple_is_no_turning_point() -> None:
    axis = np.arange(400)
    wave = np.sin(axis / 30) + 0.03 * np.sin(axis)
    assert len(turning_points(wave)) == pytest.approx(400 / 30 / np.pi, abs=1.5)
    assert turning_points(np.ones(50)) == [] and slopes(np.ones(50), [], 0.01) == (0, 0, 0, 0)


def test_segments_bridge_one_frame_and_need_three() -> None:
    pattern = "..xxx.xxx..xx..xxxxx"
    assert segments(np.array([character == "x" for character in pattern])) == [6, 4]
    assert segments(np.zeros(0, bool)) == []
