"""Alignment search: fast path against reference against brute force, the noise, the expansion."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lalia.nn import align
from lalia.nn.noise import RowNoise

HAS_NUMBA = align._kernel() is not None


def random_case(seed: int, batch: int, tokens: int, frames: int, ties: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text_lengths = torch.randint(1, tokens + 1, (batch,), generator=generator)
    frame_lengths = torch.stack(
        [torch.randint(int(n), max(int(n), frames) + 1, (1,), generator=generator)[0] for n in text_lengths]
    )
    shape = (batch, int(frame_lengths.max()), int(text_lengths.max()))
    scores = torch.randn(shape, generator=generator)
    if ties:  # small whole numbers: many paths of equal score, exact in float32
        scores = torch.randint(-2, 3, shape, generator=generator).float()
    return scores, text_lengths, frame_lengths


def path_score(scores: Tensor, durations: list[int]) -> float:
    tokens = np.repeat(np.arange(len(durations)), durations)
    return float(scores.double().numpy()[np.arange(len(tokens)), tokens].sum())


def brute_force(scores: Tensor, tokens: int, frames: int) -> float:
    best = -math.inf
    for cuts in itertools.combinations(range(1, frames), tokens - 1):
        ends = [0, *cuts, frames]
        best = max(best, path_score(scores, [b - a for a, b in itertools.pairwise(ends)]))
    return best


def check_durations(durations: Tensor, text_lengths: Tensor, frame_lengths: Tensor) -> None:
    assert durations.dtype == torch.int64
    assert durations.sum(1).tolist() == frame_lengths.tolist()
    for row, tokens in zip(durations, text_lengths.tolist(), strict=True):
        assert (row[:tokens] >= 1).all() and (row[tokens:] == 0).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4), st.integers(1, 8), st.booleans())
def test_search_finds_the_best_path(seed: int, batch: int, tokens: int, frames: int, ties: bool) -> None:
    scores, text_lengths, frame_lengths = random_case(seed, batch, tokens, frames, ties)
    durations = align.search_alignment(scores, text_lengths, frame_lengths)
    check_durations(durations, text_lengths, frame_lengths)
    assert torch.equal(durations, align._search_torch(scores, text_lengths, frame_lengths))
    for item, (count, total) in enumerate(zip(text_lengths.tolist(), frame_lengths.tolist(), strict=True)):
        found = path_score(scores[item], durations[item, :count].tolist())
        assert found == pytest.approx(brute_force(scores[item], count, total), abs=1e-5)


@pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed")
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 70), st.integers(1, 150), st.booleans())
def test_fast_path_equals_reference(seed: int, batch: int, tokens: int, frames: int, ties: bool) -> None:
    case = random_case(seed, batch, tokens, frames, ties)
    assert torch.equal(align.search_alignment(*case), align._search_torch(*case))


def test_threads_do_not_change_the_result() -> None:
    case = random_case(3, 7, 20, 60, ties=False)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = align.search_alignment(*case)
        torch.set_num_threads(3)
        assert torch.equal(align.search_alignment(*case), single)
    finally:
        torch.set_num_threads(threads)


def test_tie_goes_to_the_later_token() -> None:
    durations = align.search_alignment(torch.zeros(1, 5, 3), torch.tensor([3]), torch.tensor([5]))
    assert durations.tolist() == [[1, 1, 3]]


def test_padding_is_never_read() -> None:
    scores, text_lengths, frame_lengths = random_case(5, 3, 6, 15, ties=False)
    padded = torch.full((3, scores.shape[1] + 4, scores.shape[2] + 3), math.nan)
    for item, (tokens, frames) in enumerate(zip(text_lengths.tolist(), frame_lengths.tolist(), strict=True)):
        padded[item, :frames, :tokens] = scores[item, :frames, :tokens]
    expected = align.search_alignment(scores, text_lengths, frame_lengths)
    for search in (align.search_alignment, align._search_torch):
        assert torch.equal(search(padded, text_lengths, frame_lengths)[:, : scores.shape[2]], expected)


def test_minus_infinity_forbids_a_cell_even_when_it_leaves_no_path() -> None:
    scores = torch.zeros(2, 4, 2)
    scores[0, :3, 1] = -math.inf
    scores[1] = -math.inf
    lengths = torch.tensor([2, 2]), torch.tensor([4, 4])
    durations = align.search_alignment(scores, *lengths)
    assert durations[0].tolist() == [3, 1]
    check_durations(durations, *lengths)
    assert torch.equal(durations, align._search_torch(scores, *lengths))


@pytest.mark.parametrize("search", [align.search_alignment, align._search_torch])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_number_that_is_none_is_an_error(search, wrong: float) -> None:
    scores = torch.zeros(3, 6, 3)
    scores[1, 2, 2] = wrong
    with pytest.raises(ValueError, match="item 1 has NaN"):
        search(scores, torch.tensor([3, 3, 3]), torch.tensor([6, 6, 6]))


def test_impossible_lengths_name_the_item() -> None:
    scores = torch.zeros(2, 6, 4)
    with pytest.raises(ValueError, match="item 1 has 3 frames, fewer than its 4 text tokens"):
        align.search_alignment(scores, torch.tensor([4, 4]), torch.tensor([6, 3]))
    with pytest.raises(ValueError, match="item 0 has no text token"):
        align.search_alignment(scores, torch.tensor([0, 4]), torch.tensor([6, 6]))
    with pytest.raises(ValueError, match="item 1 claims 7 frames and 4 tokens"):
        align.search_alignment(scores, torch.tensor([4, 4]), torch.tensor([6, 7]))
    with pytest.raises(ValueError, match="2 items, but 1 text lengths"):
        align.search_alignment(scores, torch.tensor([4]), torch.tensor([6, 6]))


def test_works_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(7, 3, 9, 30, ties=True)
    expected = align.search_alignment(*case)
    monkeypatch.setitem(sys.modules, "numba", None)  # makes the import fail
    align._kernel.cache_clear()
    try:
        assert align._kernel() is None
        assert torch.equal(align.search_alignment(*case), expected)
    finally:
        align._kernel.cache_clear()


def test_search_takes_no_gradient_and_any_dtype() -> None:
    scores, *lengths = random_case(9, 2, 5, 12, ties=True)
    expected = align.search_alignment(scores, *lengths)
    assert torch.equal(align.search_alignment(scores.bfloat16().requires_grad_(), *lengths), expected)


def test_log_likelihood_equals_the_density() -> None:
    generator = torch.Generator().manual_seed(0)
    latent, mean, log_scale = (torch.randn(2, 24, n, generator=generator) for n in (17, 9, 9))
    log_scale = 0.3 * log_scale
    normal = torch.distributions.Normal(mean.double().unsqueeze(2), log_scale.double().exp().unsqueeze(2))
    exact = normal.log_prob(latent.double().unsqueeze(3)).sum(1)
    found = align.log_likelihood(latent, mean, log_scale)
    assert found.shape == (2, 17, 9)
    assert (found - exact).abs().max() <= 3e-6 * exact.abs().max()


def test_log_likelihood_is_float32_under_autocast() -> None:
    latent, mean, log_scale = torch.randn(1, 8, 5), torch.randn(1, 8, 3), torch.zeros(1, 8, 3)
    expected = align.log_likelihood(latent, mean, log_scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = align.log_likelihood(latent, mean, log_scale)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_log_likelihood_has_the_gradient_of_the_density() -> None:
    values = [torch.randn(1, 4, n, requires_grad=True) for n in (6, 3, 3)]
    align.log_likelihood(*values).sin().sum().backward()
    found = [v.grad.clone() for v in values]
    again = [v.detach().double().requires_grad_() for v in values]
    normal = torch.distributions.Normal(again[1].unsqueeze(2), again[2].exp().unsqueeze(2))
    normal.log_prob(again[0].unsqueeze(3)).sum(1).sin().sum().backward()
    for ours, exact in zip(found, again, strict=True):
        torch.testing.assert_close(ours.double(), exact.grad, rtol=1e-4, atol=1e-4)


def test_noise_scale_falls_to_zero_at_step_5000() -> None:
    assert align.mas_noise_scale(0) == 0.01
    assert align.mas_noise_scale(2500) == pytest.approx(0.005)
    assert align.mas_noise_scale(5000) == pytest.approx(0.0, abs=1e-12)
    assert align.mas_noise_scale(9000) == 0.0
    assert align.mas_noise_scale(1, initial=0.0) == 0.0


def test_noise_uses_the_deviation_of_valid_cells_only() -> None:
    scores = torch.randn(2, 7, 5)
    noise = RowNoise([1, 2]).normal_grid([7, 4], [5, 3])
    mask = torch.zeros(2, 7, 5, dtype=torch.bool)
    mask[0] = True
    mask[1, :4, :3] = True
    scores[1][~mask[1]] = 1e4  # padding that would swell the deviation
    noisy = align.mas_noise(scores, mask, 0.5, noise)
    alone = scores[1, :4, :3]
    torch.testing.assert_close(noisy[1, :4, :3], alone + 0.5 * alone.std() * noise[1, :4, :3])
    assert torch.equal(noisy[1][~mask[1]], scores[1][~mask[1]])
    assert align.mas_noise(scores, mask, 0.0, noise) is scores
    longer = align.mas_noise(*(torch.nn.functional.pad(t, (0, 2, 0, 3)) for t in (scores, mask)), 0.5, noise)
    torch.testing.assert_close(longer[:, :7, :5], noisy)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 5))
def test_expand_equals_repeat_interleave_and_the_matmul(seed: int, beyond: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    durations = torch.randint(0, 4, (3, 6), generator=generator)
    values = torch.randn(3, 2, 6, generator=generator)
    frames = int(durations.sum(1).max()) + beyond
    expanded = align.expand(values, durations, frames)
    assert expanded.shape == (3, 2, frames)
    for row in range(3):
        expected = values[row].repeat_interleave(durations[row], dim=1)
        assert torch.equal(expanded[row, :, : expected.shape[1]], expected)
        assert not expanded[row, :, expected.shape[1] :].any()
    path = align.attention_path(durations, frames)
    assert torch.equal(torch.matmul(values, path.transpose(1, 2)), expanded)
    assert torch.equal(path.sum(1), durations.float())


def test_expand_passes_the_gradient_to_each_token_once_per_frame() -> None:
    values = torch.randn(1, 2, 3, requires_grad=True)
    align.expand(values, torch.tensor([[2, 0, 3]]), 7).sum().backward()
    assert values.grad[0].tolist() == [[2, 0, 3], [2, 0, 3]]


def test_expand_cuts_at_the_asked_number_of_frames() -> None:
    values = torch.arange(3.0).view(1, 1, 3)
    assert align.expand(values, torch.tensor([[2, 2, 2]]), 3).tolist() == [[[0, 0, 1]]]
