from __future__ import annotations

import numpy as np
import pytest

from lalia.batching import bucket_boundaries, bucket_counts, excluded, padding_waste, plan_epoch
from lalia.sections import BatchPlan, DataConfig

SEED_BOUNDARIES = [32.0, 300.0, 400.0, 500.0, 600.0, 700.0, 800.0, 900.0, 1000.0]
FRAME = 512 / 44100


def speech_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Frames of a corpus of read speech: lognormal, median 4 s."""
    return np.exp(np.random.default_rng(seed).normal(np.log(350), 0.5, count)).round()


def plan(lengths: np.ndarray, config: DataConfig, epoch: int = 0, rank: int = 0, world: int = 1) -> list[list[int]]:
    return plan_epoch(lengths, config, seconds_per_unit=FRAME, seed=7, epoch=epoch, rank=rank, world=world)


CONFIGS = [
    DataConfig(batch_size=7),
    DataConfig(batch_size=1000, batch_seconds=60),
    DataConfig(batch_size=7, plan=BatchPlan.buckets),
    DataConfig(batch_size=7, batch_seconds=30, plan=BatchPlan.buckets, boundaries=SEED_BOUNDARIES),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [8, 101, 500])
def test_every_clip_once_and_ranks_equal(config: DataConfig, world: int, count: int) -> None:
    lengths = speech_lengths(count)
    ranks = [plan(lengths, config, 3, rank, world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    held = sorted(i for batches in ranks for batch in batches for i in batch)
    expected = sorted(set(range(count)) - set(excluded(lengths, config)))
    assert set(held) == set(expected)
    single = all(len(b) == 1 for batches in ranks for b in batches)
    assert held == expected or (single and len(held) < len(expected) + world)
    for batch in (b for batches in ranks for b in batches):
        assert 0 < len(batch) <= config.batch_size
        if config.batch_seconds and len(batch) > 1:
            assert lengths[batch].max() * len(batch) * FRAME <= config.batch_seconds * (1 + 1e-9)


def test_batches_of_one_clip_are_repeated_only_to_fill_the_last_step() -> None:
    lengths = speech_lengths(10)
    ranks = [plan(lengths, DataConfig(batch_size=1), 0, rank, 4) for rank in range(4)]
    held = [i for batches in ranks for batch in batches for i in batch]
    assert [len(r) for r in ranks] == [3, 3, 3, 3]
    assert set(held) == set(range(10))
    assert len(held) == 12
    assert all(len(set(map(tuple, step))) >= 2 for step in zip(*ranks, strict=True))


def test_pure_function_of_its_arguments() -> None:
    lengths = speech_lengths(300)
    before, config = lengths.copy(), DataConfig(batch_size=8, plan=BatchPlan.buckets, boundaries=list(SEED_BOUNDARIES))
    for each in (config, DataConfig(batch_size=8)):
        first = plan(lengths, each, 1)
        np.random.seed(99)
        assert plan(lengths, each, 1) == first
        assert plan(list(lengths), each, 1) == first
        assert plan(lengths, each, 2) != first
        assert {tuple(sorted(b)) for b in plan(lengths, each, 2)} != {tuple(sorted(b)) for b in first}
    assert np.array_equal(lengths, before)
    assert config.boundaries == SEED_BOUNDARIES


def test_seed_bucket_semantics() -> None:
    """Bucket i is (b_i, b_{i+1}]; what is outside is excluded and said."""
    lengths = np.array([32.0, 32.5, 300.0, 301.0, 400.0, 1000.0, 1001.0, np.nan])
    config = DataConfig(batch_size=9, plan=BatchPlan.buckets, boundaries=SEED_BOUNDARIES)
    batches = {tuple(sorted(b)) for b in plan(lengths, config)}
    assert batches == {(1, 2), (3, 4), (5,)}
    assert excluded(lengths, config) == {
        0: "below the buckets: length 32 is not above 32",
        6: "above the buckets: length 1001 is over 1000",
        7: "no length: nan",
    }
    assert [c for _, _, c in bucket_counts(lengths, config)] == [2, 2, 0, 0, 0, 0, 0, 1]


def test_auto_boundaries_have_equal_cost() -> None:
    lengths = speech_lengths(5000)
    config = DataConfig(plan=BatchPlan.buckets, bucket_count=8)
    edges = bucket_boundaries(lengths, config)
    assert len(edges) == 9
    assert not excluded(lengths, config)
    costs = [lengths[(lengths > a) & (lengths <= b)].sum() for a, b in zip(edges[:-1], edges[1:], strict=True)]
    assert max(costs) / min(costs) < 1.1


def test_ranks_of_one_step_hold_clips_of_similar_length() -> None:
    lengths = speech_lengths(5000)
    config = DataConfig(batch_size=10_000, batch_seconds=200)
    ranks = [plan(lengths, config, 0, rank, 4) for rank in range(4)]
    longest = np.array([[lengths[b].max() for b in batches] for batches in ranks])
    assert np.median(longest.max(axis=0) / longest.min(axis=0)) < 1.1
    firsts = [int(np.argmin(longest[:, s])) for s in range(longest.shape[1])]
    assert len(set(firsts)) == 4, "the shortest batch goes to a different rank from step to step"


def test_steps_are_shuffled() -> None:
    lengths = speech_lengths(2000)
    longest = [lengths[b].max() for b in plan(lengths, DataConfig(batch_size=16))]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.3


def test_sorted_plan_wastes_little_and_the_measure_is_right() -> None:
    lengths = speech_lengths(5000)
    budget = DataConfig(batch_size=10_000, batch_seconds=200)
    assert padding_waste(lengths, plan(lengths, budget)) <= 0.015
    assert padding_waste([1.0, 3.0, 4.0], [[0, 1], [2]]) == pytest.approx(1 - 8 / 10)
    assert padding_waste([0.0, 0.0], [[0, 1]]) == 0.0


def test_jitter_changes_neighbours_from_epoch_to_epoch() -> None:
    lengths = speech_lengths(2000)
    still = DataConfig(batch_size=16, jitter=0.0)
    partners = [{frozenset(b) for b in plan(lengths, DataConfig(batch_size=16), e)} for e in (0, 1)]
    assert len(partners[0] & partners[1]) < 0.1 * len(partners[0])
    ordered = [sorted(lengths[b].max() for b in plan(lengths, still, e)) for e in (0, 1)]
    assert ordered[0] == ordered[1]


def test_drop_last_gives_full_batches_and_rotates_the_rest() -> None:
    lengths = speech_lengths(103)
    config = DataConfig(batch_size=10, drop_last=True)
    left_out = []
    for epoch in (0, 1):
        ranks = [plan(lengths, config, epoch, rank, 2) for rank in (0, 1)]
        assert all(len(b) == 10 for r in ranks for b in r)
        held = [i for r in ranks for b in r for i in b]
        assert len(held) == len(set(held)) == 100
        left_out.append(set(range(103)) - set(held))
    assert left_out[0] != left_out[1]


def test_errors() -> None:
    with pytest.raises(ValueError, match="no batch from 0 clips"):
        plan(np.zeros(0), DataConfig())
    with pytest.raises(ValueError, match="no batch from 5 clips"):
        plan(np.ones(5), DataConfig(batch_size=10, drop_last=True))
    with pytest.raises(ValueError, match="rank 2"):
        plan(np.ones(5), DataConfig(), 0, 2, 2)


def test_a_clip_over_the_budget_is_a_batch_of_one() -> None:
    lengths = np.array([100.0, 100.0, 9000.0])
    batches = plan(lengths, DataConfig(batch_size=10, batch_seconds=20))
    assert sorted(map(sorted, batches)) == [[0, 1], [2]]
