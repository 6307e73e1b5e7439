"""Noise that belongs to a row."""

from __future__ import annotations

import pytest
import torch

from lalia.nn.noise import RowNoise, row_seeds


def test_seeds_depend_on_id_run_and_step_and_never_change() -> None:
    seeds = row_seeds(["a", "b"], 42, 7)
    assert seeds == [7645264655712229618, 9117292217698723590]
    different = {*seeds, *row_seeds(["a", "b"], 43, 7), *row_seeds(["a", "b"], 42, 8), *row_seeds(["c"], 42, 7)}
    assert len(different) == 7
    assert all(0 <= seed < 2**63 for seed in different)


def test_a_rows_noise_ignores_neighbours_and_padding() -> None:
    alone = RowNoise([11]).normal(3, [5])
    together = RowNoise([10, 11, 12]).normal(3, torch.tensor([9, 5, 2]), 20)
    assert together.shape == (3, 3, 20)
    assert torch.equal(together[1, :, :5], alone[0])
    assert not together[1, :, 5:].any() and not together[2, :, 2:].any()


def test_calls_follow_each_other_in_each_row() -> None:
    one, many = RowNoise([5]), RowNoise([4, 5])
    first, second = one.normal(2, [6]), one.uniform(3)
    assert not torch.equal(first, one.normal(2, [6]))
    assert torch.equal(many.normal(2, [8, 6])[1, :, :6], first[0])
    assert torch.equal(many.uniform(3)[1], second[0])


def test_grid_has_each_rows_own_rectangle() -> None:
    grid = RowNoise([1, 2]).normal_grid([4, 2], [3, 5])
    assert grid.shape == (2, 4, 5)
    assert torch.equal(grid[1, :2], RowNoise([2]).normal_grid([2], [5])[0])
    assert not grid[0, :, 3:].any() and not grid[1, 2:].any()


def test_distributions() -> None:
    noise = RowNoise(range(4))
    normal, uniform = noise.normal(50, [200] * 4), noise.uniform(5000)
    assert abs(float(normal.mean())) < 0.02 and abs(float(normal.std()) - 1) < 0.02
    assert float(uniform.min()) >= 0 and float(uniform.max()) < 1 and abs(float(uniform.mean()) - 0.5) < 0.02


def test_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    RowNoise([1]).normal(2, [3])
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_lengths_are_errors() -> None:
    with pytest.raises(ValueError, match="2 rows have a seed"):
        RowNoise([1, 2]).normal(2, [3])
    with pytest.raises(ValueError, match="9 positions does not fit into 4"):
        RowNoise([1]).normal(2, [9], 4)
