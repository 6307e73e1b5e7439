"""The figures of an evaluation from its clips."""

from __future__ import annotations

from collections.abc import Sequence

from lalia.evaluate import metrics
from lalia.evaluate.results import RECORDING, RESYNTHESIS, SPEECH, Better, ClipResult, ConditionResult, Figure

STRAIGHT = "frame by frame"
WARPED = "along the warping path"


def all_figures(clips: Sequence[ClipResult], conditions: Sequence[str], seed: int) -> list[Figure]:
    """Every figure that the clips allow, error rates first."""
    found: list[Figure | None] = []
    for condition in conditions:
        found += _error_rates(clips, condition, seed)
    for condition in conditions:
        if condition != RECORDING:
            found += _closeness(clips, condition, seed)
            found.append(_real_time_factor(clips, condition, seed))
    if SPEECH in conditions:
        found += _durations(clips, seed)
    return [figure for figure in found if figure is not None]


def _error_rates(clips: Sequence[ClipResult], condition: str, seed: int) -> list[Figure | None]:
    results = [clip.conditions[condition] for clip in clips]
    failed = sum(bool(result.failure) for result in results)
    note = f"{failed} clips without sound count as wholly wrong" if failed else ""
    words = [result.word_errors for result in results]
    characters = [result.character_errors for result in results]
    return [
        metrics.ratio_figure(f"wer.{condition}", words, [c.words for c in clips], seed, scale=100, unit="%", note=note),
        metrics.ratio_figure(f"cer.{condition}", characters, [c.characters for c in clips], seed, scale=100, unit="%", note=note),
    ]


def _closeness(clips: Sequence[ClipResult], condition: str, seed: int) -> list[Figure | None]:
    results = [clip.conditions[condition] for clip in clips]
    way = STRAIGHT if condition == RESYNTHESIS else WARPED
    higher = Better.higher
    return [
        metrics.mean_figure(f"mel_distance.{condition}", [r.mel_distance for r in results], seed, "nepers", note=way),
        metrics.mean_figure(f"cepstral_distortion.{condition}", [r.cepstral_distortion for r in results], seed, "dB", note=way),
        metrics.median_figure(f"pitch_error.{condition}", [r.pitch_error for r in results], seed, "semitones", note=way),
        metrics.mean_figure(f"pitch_correlation.{condition}", [r.pitch_correlation for r in results], seed, "r", higher, way),
    ]


def _real_time_factor(clips: Sequence[ClipResult], condition: str, seed: int) -> Figure | None:
    made = _made(clips, condition)
    compute, audio = [r.compute_seconds for _, r in made], [r.seconds for _, r in made]
    return metrics.ratio_figure(
        f"rtf.{condition}", compute, audio, seed, note="seconds of computing per second of sound, one clip at a time"
    )


def _durations(clips: Sequence[ClipResult], seed: int) -> list[Figure | None]:
    made = _made(clips, SPEECH)
    spoken, recorded = [r.seconds for _, r in made], [clip.conditions[RECORDING].seconds for clip, _ in made]
    return [
        metrics.ratio_figure(
            "duration_ratio.speech", spoken, recorded, seed, better=Better.one, note="length of speech / recording"
        ),
        metrics.correlation_figure("duration_correlation.speech", spoken, recorded, seed, note="over clips"),
    ]


def _made(clips: Sequence[ClipResult], condition: str) -> list[tuple[ClipResult, ConditionResult]]:
    """Clips for which the system gave sound."""
    pairs = [(clip, clip.conditions[condition]) for clip in clips]
    return [(clip, result) for clip, result in pairs if not result.failure]
