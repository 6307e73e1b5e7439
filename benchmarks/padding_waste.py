"""Padding of the batch plans on a realistic length distribution: ours, the seed's fixed buckets, Lhotse's method.

5,000 clips, lognormal lengths (median 4 s), 44.1 kHz with hop 512, at most 200 padded seconds a batch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from lalia.batching import excluded, padding_waste, plan_epoch
from lalia.sections import BatchPlan, DataConfig

FRAME = 512 / 44100
BUDGET = 200.0
CLIPS = 5000
SEED_BOUNDARIES = [32.0, 300.0, 400.0, 500.0, 600.0, 700.0, 800.0, 900.0, 1000.0]
SORTED = DataConfig(batch_size=CLIPS, batch_seconds=BUDGET)
FIXED = DataConfig(
    batch_size=CLIPS, batch_seconds=BUDGET, plan=BatchPlan.buckets, boundaries=SEED_BOUNDARIES, max_bad_fraction=1.0
)


def speech_lengths(seed: int) -> np.ndarray:
    """Frames [CLIPS]."""
    return np.exp(np.random.default_rng(seed).normal(np.log(4 / FRAME), 0.5, CLIPS)).round()


def dynamic_buckets(lengths: np.ndarray, buckets: int = 30, held: int = 2500, seed: int = 0) -> list[list[int]]:
    """Batches by the method of Lhotse's DynamicBucketingSampler, written here after its documentation.

    Boundaries are quantiles of equal total duration; a buffer of ``held`` clips is kept filled from the shuffled stream
    and sorted into the buckets; a random bucket that can fill a batch gives one, up to the budget of seconds, counting
    the padded cost. When none can, the fullest gives what it has.
    """
    rng = np.random.default_rng(seed)
    cost = np.cumsum(np.sort(lengths))
    edges = np.sort(lengths)[np.searchsorted(cost, np.arange(1, buckets) / buckets * cost[-1])]
    stream = rng.permutation(len(lengths)).tolist()
    queues: list[list[int]] = [[] for _ in range(buckets)]
    batches = []
    waiting = 0
    while stream or waiting:
        while stream and waiting < held:
            clip = stream.pop()
            queues[int(np.searchsorted(edges, lengths[clip]))].append(clip)
            waiting += 1
        full = [q for q in queues if q and lengths[q].max() * len(q) * FRAME >= BUDGET]
        queue = full[int(rng.integers(len(full)))] if full else max(queues, key=len)
        taken = _take(queue, lengths)
        waiting -= len(taken)
        batches.append(taken)
    return batches


def _take(queue: list[int], lengths: np.ndarray) -> list[int]:
    longest, count = 0.0, 0
    for clip in queue:
        longest = max(longest, float(lengths[clip]))
        if count and longest * (count + 1) * FRAME > BUDGET:
            break
        count += 1
    taken = queue[:count]
    del queue[:count]
    return taken


def _waste(lengths: np.ndarray, batches: Sequence[Sequence[int]]) -> float:
    return 100 * padding_waste(lengths, batches)


def run(corpora: int = 10) -> dict[str, dict]:
    """``padding_waste``: percent of padding, ours against Lhotse's method, over several corpora drawn at random."""
    ours, theirs, fixed, lost = [], [], [], []
    for seed in range(corpora):
        lengths = speech_lengths(seed)
        plans = [plan_epoch(lengths, c, seconds_per_unit=FRAME, seed=seed, epoch=0) for c in (SORTED, FIXED)]
        ours.append(_waste(lengths, plans[0]))
        fixed.append(_waste(lengths, plans[1]))
        lost.append(len(excluded(lengths, FIXED)))
        theirs.append(_waste(lengths, dynamic_buckets(lengths, seed=seed)))
    ratios = np.array(theirs) / np.array(ours)
    note = (
        f"percent of padding, median of {corpora} corpora of {CLIPS} clips, {BUDGET:g} s budget; "
        f"the seed's fixed buckets: {np.median(fixed):.1f} % and {np.median(lost):.0f} clips dropped; "
        "the other method is our own writing of it"
    )
    result = {
        "ratio": float(np.median(ratios)),
        "p10": float(np.percentile(ratios, 10)),
        "p90": float(np.percentile(ratios, 90)),
        "ours": float(np.median(ours)),
        "theirs": float(np.median(theirs)),
        "against": "Lhotse's DynamicBucketingSampler method",
        "note": note,
    }
    return {"padding_waste": result}


if __name__ == "__main__":
    for name, figures in run().items():
        sys.stdout.write(f"{name}: {figures}\n")
