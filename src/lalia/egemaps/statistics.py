"""Statistics over an utterance: smoothing, moments, percentiles, slopes between peaks, segments."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

#: a rise or fall of less than this fraction of the range makes no peak
PEAK_RANGE = 0.1
SHORTEST_SEGMENT, SHORTEST_PAUSE = 3, 2  # frames


def smoothed(values: np.ndarray) -> np.ndarray:
    """Mean of each frame and its two neighbours, [T] or [T, N]; the ends are repeated."""
    padded = np.concatenate([values[:1], values, values[-1:]])
    return (padded[:-2] + padded[1:-1] + padded[2:]) / 3


def smoothed_present(values: np.ndarray) -> np.ndarray:
    """As ``smoothed``, but 0 means absent: absent frames stay 0 and their neighbours do without them."""
    padded = np.concatenate([values[:1], values, values[-1:]])
    present = padded != 0
    count = present[:-2].astype(int) + present[1:-1] + present[2:]
    total = padded[:-2] + padded[1:-1] + padded[2:]
    return np.where(present[1:-1], total / np.maximum(count, 1), 0.0)


def mean(values: np.ndarray) -> float:
    """Arithmetic mean of [T]; 0 of nothing."""
    return float(values.mean()) if len(values) else 0.0


def mean_and_variation(values: np.ndarray) -> tuple[float, float]:
    """Mean, and standard deviation over mean (over 1 where the mean is 0), of [T]; 0 of nothing."""
    average = mean(values)
    return average, float(values.std() / (average or 1.0)) if len(values) else 0.0


def percentiles(values: np.ndarray) -> tuple[float, float, float, float]:
    """20th, 50th, 80th percentile (linear between ranks) and the distance of the outer two, of [T]; 0 of nothing."""
    if not len(values):
        return 0.0, 0.0, 0.0, 0.0
    low, middle, high = (float(value) for value in np.percentile(values, [20, 50, 80]))
    return low, middle, high, high - low


def turning_points(values: np.ndarray) -> list[tuple[int, bool]]:
    """Alternating peaks and valleys of [T] as (frame, is a peak), in order.

    Small movements count for nothing: a peak must rise, and a valley fall, by a tenth of the range. Of two peaks with no
    valley between them the higher stays, of two valleys the lower.
    """
    if len(values) < 5:
        return []
    inner = np.arange(2, len(values) - 2)
    rises, falls = values[inner] > values[inner - 1], values[inner] < values[inner - 1]
    turns = (rises & (values[inner] > values[inner + 1])) | (falls & (values[inner] < values[inner + 1]))
    points = [(int(frame), bool(values[frame] > values[frame - 1])) for frame in inner[turns]]
    threshold = PEAK_RANGE * float(values.max() - values.min())
    return _alternating(values, _deep_valleys(values, _high_peaks(values, points, threshold), threshold))


def _high_peaks(values: np.ndarray, points: list[tuple[int, bool]], threshold: float) -> list[tuple[int, bool]]:
    """Drop the peaks that rise too little above the last valley that counted, or stand beside a peak as high."""
    dropped: set[int] = set()
    previous = lowest = highest = float(values[0])
    summit, fallen = -1, False  # the last peak that counted; whether a valley that counts came since
    for frame, is_peak in points:
        value = float(values[frame])
        steep = abs(value - previous) >= threshold
        if is_peak and steep:
            fallen, highest, summit = False, value, frame
        elif is_peak and value - lowest < threshold:
            dropped.add(frame)
        elif is_peak:
            if value > highest * 1.05:
                dropped.add(summit)
                highest, summit = value, frame
            elif fallen:
                highest, summit = value, frame
            else:
                dropped.add(frame)
            fallen = False
        elif steep:
            fallen, lowest = True, value
        previous = value
    return [point for point in points if point[0] not in dropped]


def _deep_valleys(values: np.ndarray, points: list[tuple[int, bool]], threshold: float) -> list[tuple[int, bool]]:
    """Drop the valleys that lie too little below the peak before them."""
    kept, highest = [], float(values[0])
    for frame, is_peak in points:
        if is_peak:
            highest = float(values[frame])
        elif highest - float(values[frame]) < threshold:
            continue
        kept.append((frame, is_peak))
    return kept


def _alternating(values: np.ndarray, points: list[tuple[int, bool]]) -> list[tuple[int, bool]]:
    """Of neighbours of one kind keep the more extreme, the earlier of equals."""
    kept: list[tuple[int, bool]] = []
    for frame, is_peak in points:
        if not kept or kept[-1][1] != is_peak:
            kept.append((frame, is_peak))
        elif values[frame] > values[kept[-1][0]] if is_peak else values[frame] < values[kept[-1][0]]:
            kept[-1] = (frame, is_peak)
    return kept


def slopes(values: np.ndarray, points: list[tuple[int, bool]], period: float) -> tuple[float, float, float, float]:
    """Mean and deviation of the rising, then of the falling slopes between turning points, per second; [T].

    The way from the last turning point to the end counts for the mean, with its sign turned, and not for the deviation;
    so has the reference. Without turning points the one slope from end to end is taken per frame.
    """
    if not len(values):
        return 0.0, 0.0, 0.0, 0.0
    if not points:
        slope = float(values[-1] - values[0]) / len(values)
        return max(slope, 0.0), 0.0, min(slope, 0.0), 0.0
    rates: dict[bool, list[float]] = {True: [], False: []}
    for (start, _), (end, rising) in pairwise([(0, False), *points]):
        change = float(values[end]) - float(values[start])
        rates[rising].append((change if rising else -change) / ((end - start) * period))
    last, is_peak = points[-1]
    tail = (float(values[-1]) - float(values[last])) / ((len(values) - 1 - last) * period)
    result: list[float] = []
    for rising in (True, False):
        total = np.array(rates[rising])
        extra = [tail] if rising != is_peak else []
        count = len(total) + len(extra)
        average = (float(total.sum()) + sum(extra)) / max(count, 1)
        result += [average, float(np.sqrt(((total - average) ** 2).sum() / max(count, 1)))]
    return result[0], result[1], result[2], result[3]


def segments(present: np.ndarray) -> list[int]:
    """Lengths in frames of the stretches where ``present`` [T] is true.

    A stretch begins with three frames (a gap of one frame between them is bridged) and ends with two absent ones.
    """
    lengths: list[int] = []
    begin, seen, missing = -1, 0, 0
    for frame, here in enumerate(present.tolist()):
        if here:
            if begin < 0:
                begin, seen, missing = frame, 0, 0
            seen += 1
            missing = 0
        elif begin >= 0:
            missing += 1
            if missing >= SHORTEST_PAUSE:
                if seen >= SHORTEST_SEGMENT:
                    lengths.append(frame - missing - begin)
                begin = -1
    if begin >= 0 and seen >= SHORTEST_SEGMENT:
        lengths.append(len(present) - 1 - missing - begin)
    return lengths
