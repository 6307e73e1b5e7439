"""Which clips go into which batch: a pure function of (lengths, config, seed, epoch, world), the same on every rank.

Two plans. ``sorted``: clips in order of their length times a small random factor, cut under the budget. ``buckets``:
clips of one bucket in random order, cut under the budget. In both, batches that stand next to each other in order of
length go to the ranks of one step, so that no rank waits for another, and the steps are shuffled.

Every clip is in exactly one batch of an epoch, and every rank has the same number of batches. Where the number of
batches does not divide by the number of ranks, the batches of the one incomplete step are halved until each rank has
one: nothing is lost and nothing repeated. Only when every batch is a single clip are some of them given to a second
rank. ``drop_last`` leaves the surplus out instead, other clips in each epoch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lalia.sections import BatchPlan, DataConfig


def plan_epoch(
    lengths: Sequence[float] | np.ndarray,
    config: DataConfig,
    *,
    seconds_per_unit: float,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
) -> list[list[int]]:
    """The batches of one rank in one epoch, as indices into ``lengths``.

    Args:
        lengths: [clips], in the unit of ``config.boundaries``; never modified.
        config: ``batch_size`` clips **per rank** and, if above 0, ``batch_seconds`` padded seconds limit a batch. A
            clip that exceeds the seconds by itself is a batch of one.
        seconds_per_unit: seconds in one unit of ``lengths``.
        seed, epoch: all that the randomness depends on.

    Clips listed by :func:`excluded` are in no batch. ValueError when there is nothing to plan.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not in a world of {world}")
    sizes = np.array(lengths, dtype=np.float64)
    rng = np.random.default_rng(np.random.SeedSequence([seed % 2**63, epoch]))
    budget = config.batch_seconds / seconds_per_unit if config.batch_seconds > 0 else np.inf
    batches = [b for part in _parts(sizes, config, rng) for b in _cut(part, sizes, config.batch_size, budget)]
    steps = _steps(batches, world, config.drop_last, rng)
    if not steps:
        raise ValueError(f"no batch from {len(sizes)} clips (batch_size {config.batch_size}, {world} ranks)")
    turned = rng.integers(0, world, len(steps))
    order = rng.permutation(len(steps))
    return [steps[s][(rank + turned[s]) % world].tolist() for s in order]


def excluded(lengths: Sequence[float] | np.ndarray, config: DataConfig) -> dict[int, str]:
    """Index → reason of every clip that no plan will hold: outside the boundaries, or of no finite length."""
    sizes = np.asarray(lengths, dtype=np.float64)
    reasons = {}
    for index in np.flatnonzero(~_usable(sizes, config)):
        size = float(sizes[index])
        if not np.isfinite(size) or size < 0:
            reasons[int(index)] = f"no length: {size}"
        elif size <= config.boundaries[0]:
            reasons[int(index)] = f"below the buckets: length {size:g} is not above {config.boundaries[0]:g}"
        else:
            reasons[int(index)] = f"above the buckets: length {size:g} is over {config.boundaries[-1]:g}"
    return reasons


def bucket_boundaries(lengths: Sequence[float] | np.ndarray, config: DataConfig) -> np.ndarray:
    """Rising boundaries b of the buckets (b_i, b_{i+1}]: the config's, or quantiles of equal sums of lengths."""
    if config.boundaries:
        return np.array(config.boundaries, dtype=np.float64)
    sizes = np.sort(np.asarray(lengths, dtype=np.float64))
    if len(sizes) == 0:
        return np.array([-1.0, 0.0])
    cost = np.cumsum(sizes)
    shares = np.arange(1, config.bucket_count) / config.bucket_count * cost[-1]
    inner = sizes[np.minimum(np.searchsorted(cost, shares), len(sizes) - 1)]
    return np.unique(np.concatenate([[-1.0], inner, sizes[-1:]]))


def bucket_counts(lengths: Sequence[float] | np.ndarray, config: DataConfig) -> list[tuple[float, float, int]]:
    """(above, up to, clips) of every bucket, empty ones too."""
    sizes = np.asarray(lengths, dtype=np.float64)
    edges = bucket_boundaries(sizes, config)
    bucket = np.searchsorted(edges, sizes, side="left") - 1
    return [(float(edges[i]), float(edges[i + 1]), int((bucket == i).sum())) for i in range(len(edges) - 1)]


def padding_waste(lengths: Sequence[float] | np.ndarray, batches: Sequence[Sequence[int]]) -> float:
    """Share of the padded batches that is padding, in [0, 1): 1 − Σ lengths / Σ (longest × clips)."""
    sizes = np.asarray(lengths, dtype=np.float64)
    held = sum(float(sizes[b].sum()) for b in batches)
    padded = sum(float(sizes[b].max()) * len(b) for b in batches)
    return 1.0 - held / padded if padded > 0 else 0.0


def _usable(sizes: np.ndarray, config: DataConfig) -> np.ndarray:
    fine = np.isfinite(sizes) & (sizes >= 0)
    if config.plan is BatchPlan.buckets and config.boundaries:
        fine &= (sizes > config.boundaries[0]) & (sizes <= config.boundaries[-1])
    return fine


def _parts(sizes: np.ndarray, config: DataConfig, rng: np.random.Generator) -> list[np.ndarray]:
    """Indices in the order they are to be cut, one array per bucket (or one in all)."""
    usable = np.flatnonzero(_usable(sizes, config))
    noise = rng.random(len(usable))
    kept = sizes[usable]
    if config.plan is BatchPlan.sorted:
        key = kept * (1 + config.jitter * (2 * noise - 1))
        # clips of equal length change places too: the noise is the second key
        parts = [usable[np.lexsort((noise, key))]]
    else:
        edges = bucket_boundaries(kept, config)
        bucket = np.searchsorted(edges, kept, side="left") - 1
        parts = [usable[bucket == i][np.argsort(noise[bucket == i])] for i in range(len(edges) - 1)]
    if config.drop_last and config.batch_seconds <= 0:
        parts = [_thin(p, len(p) % config.batch_size, rng) for p in parts]
    return [p for p in parts if len(p)]


def _thin(part: np.ndarray, surplus: int, rng: np.random.Generator) -> np.ndarray:
    """Leave ``surplus`` clips out, anywhere: leaving out the end of a sorted part would lose the longest for ever."""
    keep = np.ones(len(part), dtype=bool)
    keep[rng.choice(len(part), surplus, replace=False)] = False
    return part[keep]


def _cut(part: np.ndarray, sizes: np.ndarray, most: int, budget: float) -> list[np.ndarray]:
    """Greedily: a batch grows while its padded size (longest × clips) and its count stay within the limits."""
    if not np.isfinite(budget):
        return [part[i : i + most] for i in range(0, len(part), most)]
    cuts, begin, longest = [], 0, 0.0
    for position, size in enumerate(sizes[part].tolist()):
        longest = max(longest, size)
        count = position - begin + 1
        if count > 1 and (count > most or longest * count > budget):
            cuts.append(position)
            begin, longest = position, size
    return np.split(part, cuts)


def _steps(batches: list[np.ndarray], world: int, drop: bool, rng: np.random.Generator) -> list[list[np.ndarray]]:
    """Groups of ``world`` neighbouring batches, one for each rank; see the module's text for the incomplete one."""
    surplus = len(batches) % world
    odd: list[np.ndarray] = []
    if surplus:
        counts = np.convolve([len(b) for b in batches], np.ones(surplus, dtype=np.int64), mode="valid")
        begin = int(rng.integers(len(counts))) if drop else int(np.argmax(counts))
        odd = [] if drop else _halve(batches[begin : begin + surplus], world)
        batches = batches[:begin] + batches[begin + surplus :]
    if 0 < len(odd) < world:  # too few clips among those: halve any batch that has two
        batches = _halve(batches + odd, len(batches) + world)
        batches, odd = batches + batches[: -len(batches) % world], []
    return [batches[i : i + world] for i in range(0, len(batches), world)] + ([odd] if odd else [])


def _halve(batches: list[np.ndarray], wanted: int) -> list[np.ndarray]:
    """Halve the batch of most clips until there are ``wanted`` batches or only single clips."""
    parts = list(batches)
    while len(parts) < wanted:
        most = max(range(len(parts)), key=lambda i: len(parts[i]))
        if len(parts[most]) == 1:
            break
        parts[most : most + 1] = np.array_split(parts[most], 2)
    return parts
