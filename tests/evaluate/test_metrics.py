from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lalia.evaluate import bootstrap, metrics
from lalia.evaluate.results import Better, Figure
from lalia.evaluate.warp import MAX_CELLS, warp


@pytest.mark.parametrize(
    ("said", "heard", "errors"),
    [
        ("the cat sat", "the cat sat", 0),
        ("the cat sat", "the bat sat", 1),
        ("the cat sat", "the sat", 1),
        ("the cat sat", "the cat sat down now", 2),
        ("the cat sat", "", 3),
        ("", "a b", 2),
        ("a b c d", "b c d a", 2),
        ("one two three four five", "two one three five five six", 4),
    ],
)
def test_edit_distance_by_hand(said: str, heard: str, errors: int) -> None:
    assert metrics.edit_distance(said.split(), heard.split()) == errors


@settings(max_examples=60, deadline=None)
@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_edit_distance_agrees_with_the_textbook_recursion(first: str, second: str) -> None:
    table = [[i + j if not i or not j else 0 for j in range(len(second) + 1)] for i in range(len(first) + 1)]
    for i, a in enumerate(first, 1):
        for j, b in enumerate(second, 1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a != b))
    assert metrics.edit_distance(first, second) == table[-1][-1]


def test_word_error_rate_is_of_the_corpus_not_the_mean_of_clips() -> None:
    figure = metrics.ratio_figure("wer", [1, 0], [1, 9], seed=0, scale=100, unit="%")
    assert figure is not None and figure.value == pytest.approx(10.0)  # the mean of the clips would be 50


def test_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        low, high = bootstrap.mean_interval(rng.exponential(2.0, 60), seed=trial)
        hits += low <= 2.0 <= high
    assert 0.87 <= hits / 200 <= 0.99


def test_interval_is_seeded_ordered_and_shrinks() -> None:
    values = np.random.default_rng(0).normal(5, 1, 400)
    low, high = bootstrap.mean_interval(values, seed=3)
    assert (low, high) == bootstrap.mean_interval(values, seed=3) != bootstrap.mean_interval(values, seed=4)
    assert low < values.mean() < high
    few = bootstrap.mean_interval(values[:25], seed=3)
    assert few[1] - few[0] > 2 * (high - low)
    median = bootstrap.median_interval(values, seed=3)
    assert median[0] < np.median(values) < median[1]


def test_interval_in_chunks_equals_interval_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(30.0)
    whole = bootstrap.mean_interval(values)
    monkeypatch.setattr(bootstrap, "CHUNK", 30 * 7)
    assert bootstrap.mean_interval(values) == whole


def test_one_clip_has_no_interval_and_says_so() -> None:
    figure = metrics.mean_figure("mel", [0.5], seed=0)
    assert figure is not None and math.isnan(figure.low) and math.isnan(figure.high)
    assert "no interval" in figure.note
    assert Figure.from_dict(figure.to_dict()).to_dict() == figure.to_dict()
    assert figure.to_dict()["low"] is None


def test_few_clips_are_cautioned_and_none_gives_no_figure() -> None:
    figure = metrics.mean_figure("mel", [0.5, None, 0.7], seed=0, note="warped")
    assert figure is not None and figure.n == 2 and figure.note.startswith("warped; only 2 clips")
    assert metrics.mean_figure("mel", [None], seed=0) is None
    assert metrics.ratio_figure("wer", [0], [0], seed=0) is None


def test_correlation_figure() -> None:
    first = np.arange(20.0)
    figure = metrics.correlation_figure("r", list(first), list(-first), seed=0)
    assert figure is not None and figure.value == pytest.approx(-1) and figure.high == pytest.approx(-1)
    assert figure.better is Better.higher
    assert metrics.correlation_figure("r", [1.0, 1.0, 1.0], [1.0, 2.0, 3.0], seed=0) is None


def test_cepstral_distortion_of_a_pure_cosine() -> None:
    mels, amplitude = 80, 0.7
    flat = np.zeros((mels, 5))
    wave = amplitude * np.cos(np.pi * 3 * (np.arange(mels) + 0.5) / mels)[:, None] * np.ones((1, 5))
    path = metrics.straight_path(5, 5)
    expected = 10 * math.sqrt(2) / math.log(10) * amplitude
    assert metrics.cepstral_distortion(flat, wave, path) == pytest.approx(expected)
    assert metrics.cepstral_distortion(flat, flat + 2.0, path) == pytest.approx(0)  # loudness alone does not count
    assert metrics.mel_distance(flat, flat + 2.0, path) == pytest.approx(2.0)


def test_warp_finds_a_stretch() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(size=(40, 8))
    repeats = rng.integers(1, 4, 40)
    second = np.repeat(first, repeats, axis=0)
    path = warp(first, second)
    assert np.abs(first[path[:, 0]] - second[path[:, 1]]).max() == 0
    assert np.array_equal(path[0], [0, 0]) and np.array_equal(path[-1], [39, len(second) - 1])
    steps = np.diff(path, axis=0)
    assert steps.min() >= 0 and steps.max() == 1 and (steps.sum(1) >= 1).all()


def test_warp_costs_no_more_than_the_textbook() -> None:
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(9, 3)), rng.normal(size=(13, 3))
    cost = np.linalg.norm(first[:, None] - second[None], axis=2)
    total = np.full((10, 14), np.inf)
    total[0, 0] = 0
    for i in range(9):
        for j in range(13):
            total[i + 1, j + 1] = cost[i, j] + min(total[i, j], total[i, j + 1], total[i + 1, j])
    path = warp(first, second)
    assert cost[path[:, 0], path[:, 1]].sum() == pytest.approx(total[9, 13])


def test_warp_of_long_and_empty_input() -> None:
    long = np.linspace(0, 1, 5000)[:, None]
    path = warp(long, long)
    assert len(path) < np.sqrt(MAX_CELLS) * 1.01 and (path[:, 0] == path[:, 1]).all()
    with pytest.raises(ValueError, match="0 and 3 frames"):
        warp(np.zeros((0, 2)), np.zeros((3, 2)))


def test_pitch_agreement_in_semitones() -> None:
    first = np.array([0.0] * 5 + list(np.linspace(100, 200, 30)))
    path = metrics.straight_path(35, 35)
    error, r = metrics.pitch_agreement(first, first * 2 ** (3 / 12), path)
    assert error == pytest.approx(3.0) and r == pytest.approx(1.0)
    assert metrics.pitch_agreement(first, np.zeros(35), path) == (None, None)
    assert metrics.pitch_agreement(first, np.where(first > 0, 120.0, 0.0), path)[1] is None  # flat: no correlation
