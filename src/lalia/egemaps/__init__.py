"""eGeMAPSv02: 88 statistics of the voice for affective computing (Eyben et al. 2016, IEEE TAC 7(2), 190-202).

Our own implementation, in numpy. Values follow openSMILE 2.6's ``eGeMAPSv02`` configuration, peculiarities included, so
that numbers and models of the literature carry over; ``docs/egemaps.md`` has the measured agreement and the differences.
Nothing here needs openSMILE, whose licence allows research only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lalia.egemaps import statistics
from lalia.egemaps.formants import find_formants
from lalia.egemaps.frames import FULL_SCALE, HIGHEST_RATE, LONG_SECONDS, LOWEST_RATE, STEP_SECONDS, layout
from lalia.egemaps.harmonics import HARMONIC_NAMES, MISSING, harmonic_features
from lalia.egemaps.pitch import candidates, choose_pitch, semitones
from lalia.egemaps.spectrum import SHORT_NAMES, short_frames
from lalia.egemaps.voice import jitter_shimmer

#: changes whenever values change, so that stored features can be told apart
VERSION = "lalia-egemaps-1"

PITCH = "F0semitoneFrom27.5Hz"
QUALITY = ("jitterLocal", "shimmerLocaldB", *HARMONIC_NAMES[:3])
FORMANT_NAMES = tuple(f"F{index}{part}" for index in (1, 2, 3) for part in ("frequency", "bandwidth", "amplitudeLogRelF0"))
VOICE_NAMES = (*QUALITY, *FORMANT_NAMES)
SPECTRAL = SHORT_NAMES[1:6]  # alpha ratio, Hammarberg index, two slopes, flux
CEPSTRA = SHORT_NAMES[6:]
SOUND_FLOOR = 1e-12  # mean square of silence, -120 dB

_MOMENTS = ("amean", "stddevNorm")
_CONTOUR = (
    *_MOMENTS, "percentile20.0", "percentile50.0", "percentile80.0", "pctlrange0-2",
    "meanRisingSlope", "stddevRisingSlope", "meanFallingSlope", "stddevFallingSlope",
)  # fmt: skip


def _voiced_name(name: str) -> str:
    """``slope0-500`` → ``slopeV0-500``, ``mfcc1`` → ``mfcc1V``."""
    return name.replace("slope", "slopeV") if name.startswith("slope") else f"{name}V"


#: the 88 functionals, named and ordered as openSMILE's eGeMAPSv02
NAMES: tuple[str, ...] = (
    *(f"{PITCH}_sma3nz_{part}" for part in _CONTOUR),
    *(f"loudness_sma3_{part}" for part in _CONTOUR),
    *(f"{name}_sma3_{part}" for name in ("spectralFlux", *CEPSTRA) for part in _MOMENTS),
    *(f"{name}_sma3nz_{part}" for name in VOICE_NAMES for part in _MOMENTS),
    *(f"{_voiced_name(name)}_sma3nz_{part}" for name in (*SPECTRAL, *CEPSTRA) for part in _MOMENTS),
    *(f"{_voiced_name(name).replace('V', 'UV')}_sma3nz_amean" for name in SPECTRAL),
    "loudnessPeaksPerSec",
    "VoicedSegmentsPerSec",
    "MeanVoicedSegmentLengthSec",
    "StddevVoicedSegmentLengthSec",
    "MeanUnvoicedSegmentLength",
    "StddevUnvoicedSegmentLength",
    "equivalentSoundLevel_dBp",
)


@dataclass
class _Frames:
    """Unsmoothed descriptors. ``short`` [T', 10] of the 20 ms frames (T' ≥ T), ``power`` [T'] their mean squares;
    ``semitone`` [T] (0 is unvoiced) and ``voice`` [T, 14] (as ``VOICE_NAMES``) of the 60 ms frames,
    of which the pitch search had settled ``settled`` when the wave ended.
    """

    short: np.ndarray
    power: np.ndarray
    semitone: np.ndarray
    voice: np.ndarray
    settled: int


def functionals(wave: np.ndarray, sample_rate: int) -> np.ndarray:
    """The 88 functionals, float32 [88] in the order of ``NAMES``, of ``wave`` float [S] with full scale ±1.

    Statistics of pitch, voice and voicing are over the frames that the pitch search had settled when the wave ended, which
    leaves out the last 10 to 40 ms, mostly; so has the reference. Where none was settled all frames count.

    Always finite. The values are those at the wave's own rate, 8 to 48 kHz. A wave shorter than one frame of 60 ms is
    lengthened with silence; a statistic of voiced frames is 0 where there are none. Memory beyond the wave does not grow
    with its length but for some 300 bytes a frame of 10 ms.

    ValueError: not one channel, a sample that is not finite, a rate out of range.
    """
    found = _frames(*_checked(wave, sample_rate))
    used = found.settled or len(found.semitone)
    semitone, voice, spectral = found.semitone[:used], found.voice[:used], found.short[:used, 1:]
    voiced = semitone != 0
    notes, loudness = statistics.smoothed_present(semitone), statistics.smoothed(found.short[:, 0])
    values = [*_contour(notes[notes != 0]), *_contour(loudness)]
    for column in statistics.smoothed(found.short[:, 5:]).T:
        values += statistics.mean_and_variation(column)
    present = np.concatenate([voice, np.where(voiced[:, None], spectral, 0.0)], 1)
    for column in statistics.smoothed_present(present).T:
        values += statistics.mean_and_variation(column[column != 0])
    absent = statistics.smoothed_present(np.where(voiced[:, None], 0.0, spectral[:, : len(SPECTRAL)]))
    values += [statistics.mean(column[column != 0]) for column in absent.T]
    values += _rhythm(loudness, voiced)
    values.append(10 * np.log10(max(found.power.mean(), SOUND_FLOOR)))
    return np.array(values, np.float32)


def descriptors(wave: np.ndarray, sample_rate: int) -> dict[str, np.ndarray]:
    """The 25 low-level descriptors, each float32 [T], a frame every 10 ms, by openSMILE's names.

    They are smoothed over three frames, as ``_sma3`` and (zeros left out) ``_sma3nz`` in the names say. Formants are
    given for all frames; an unvoiced frame has 0 for pitch, jitter, shimmer, HNR and H1, and -201 dB for the formants'
    amplitudes. Errors as ``functionals``.
    """
    found = _frames(*_checked(wave, sample_rate), unvoiced_formants=True)
    short = statistics.smoothed(found.short)[: len(found.semitone)]
    named = {f"{name[0].upper() + name[1:] if i == 0 else name}_sma3": short[:, i] for i, name in enumerate(SHORT_NAMES)}
    named[f"{PITCH}_sma3nz"] = statistics.smoothed_present(found.semitone)
    smooth = statistics.smoothed_present(found.voice)
    named |= {f"{name}_sma3nz": smooth[:, i] for i, name in enumerate(VOICE_NAMES)}
    return {name: values.astype(np.float32) for name, values in named.items()}


def _checked(wave: np.ndarray, sample_rate: int) -> tuple[np.ndarray, int]:
    """float32 on openSMILE's scale, at least one frame long."""
    wave = np.asarray(wave)
    if wave.ndim != 1:
        raise ValueError(f"eGeMAPS takes one channel, a wave of shape [S], got {list(wave.shape)}: mix it down first")
    if not LOWEST_RATE <= sample_rate <= HIGHEST_RATE:
        raise ValueError(f"eGeMAPS takes {LOWEST_RATE}-{HIGHEST_RATE} Hz, got {sample_rate} Hz: resample the wave first")
    if not np.isfinite(wave).all():
        raise ValueError("the wave has samples that are not finite (NaN or infinite): repair the recording or leave it out")
    scaled = wave.astype(np.float32) * FULL_SCALE
    missing = layout(sample_rate, LONG_SECONDS).length - len(scaled)
    return np.pad(scaled, (0, max(missing, 0))), sample_rate


def _frames(wave: np.ndarray, sample_rate: int, unvoiced_formants: bool = False) -> _Frames:
    """All descriptors; formants and harmonics only where there is a pitch, unless ``unvoiced_formants``."""
    short = short_frames(wave, sample_rate)
    frequency, settled = choose_pitch(candidates(wave, sample_rate))
    voiced = np.flatnonzero(frequency > 0)
    chosen = np.arange(len(frequency)) if unvoiced_formants else voiced
    resonance = np.zeros((len(frequency), 2, 3))
    resonance[chosen] = np.stack(find_formants(wave, sample_rate, chosen), 1)
    harmonic = np.zeros((len(frequency), len(HARMONIC_NAMES)))
    harmonic[:, 3:] = MISSING
    harmonic[voiced] = harmonic_features(wave, sample_rate, voiced, frequency[voiced], resonance[voiced, 0])
    voice = np.zeros((len(frequency), len(VOICE_NAMES)))
    voice[:, 0], voice[:, 1] = jitter_shimmer(wave, sample_rate, frequency)
    voice[:, 2:5] = harmonic[:, :3]
    for index in range(3):
        voice[:, 5 + 3 * index : 7 + 3 * index] = resonance[:, :, index]
        voice[:, 7 + 3 * index] = harmonic[:, 3 + index]
    return _Frames(short.values, short.power, semitones(frequency), voice, settled)


def _contour(values: np.ndarray) -> list[float]:
    """The ten functionals of pitch and loudness: [T] → moments, percentiles, slopes."""
    slopes = statistics.slopes(values, statistics.turning_points(values), STEP_SECONDS)
    return [*statistics.mean_and_variation(values), *statistics.percentiles(values), *slopes]


def _rhythm(loudness: np.ndarray, voiced: np.ndarray) -> list[float]:
    """Loudness peaks and voiced stretches per second; mean and deviation of the voiced, then of the unvoiced lengths in s."""
    peaks = sum(is_peak for _, is_peak in statistics.turning_points(loudness))
    lengths, gaps = statistics.segments(voiced), statistics.segments(~voiced)
    values = [peaks / (len(loudness) * STEP_SECONDS), len(lengths) / (len(voiced) * STEP_SECONDS)]
    for part in (lengths, gaps):
        seconds = np.array(part, np.float64) * STEP_SECONDS
        values += [statistics.mean(seconds), float(seconds.std()) if len(seconds) else 0.0]
    return values
