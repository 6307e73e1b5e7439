"""Masks and segments."""

from __future__ import annotations

import pytest
import torch

from lalia.nn.masks import channel_mask, segment_starts, sequence_mask, slice_segments


def test_sequence_mask() -> None:
    mask = sequence_mask(torch.tensor([2, 0, 3]), 4)
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]]
    assert sequence_mask(torch.tensor([2, 3])).shape == (2, 3)


def test_channel_mask() -> None:
    mask = channel_mask(torch.tensor([1, 3]), 4, torch.float64)
    assert mask.dtype == torch.float64 and mask.shape == (2, 1, 4)
    assert mask[:, 0].tolist() == [[1, 0, 0, 0], [1, 1, 1, 0]]


def test_segments_are_each_items_own() -> None:
    values = torch.randn(3, 2, 10)
    starts = torch.tensor([0, 3, 6])
    segments = slice_segments(values, starts, 4)
    for row, start in enumerate(starts.tolist()):
        assert torch.equal(segments[row], values[row, :, start : start + 4])


def test_segment_of_latent_and_wave_agree() -> None:
    hop, frames = 5, torch.arange(12.0).expand(2, 1, 12)
    wave = frames.repeat_interleave(hop, dim=-1)
    starts = torch.tensor([2, 7])
    latent = slice_segments(frames, starts, 3)
    assert torch.equal(slice_segments(wave, starts * hop, 3 * hop), latent.repeat_interleave(hop, dim=-1))


def test_clip_shorter_than_the_segment_is_filled_with_zeros() -> None:
    values = torch.ones(2, 1, 3)
    starts = segment_starts(torch.tensor([3, 2]), 5, torch.tensor([0.99, 0.5]))
    assert starts.tolist() == [0, 0]
    assert slice_segments(values, starts, 5)[0, 0].tolist() == [1, 1, 1, 0, 0]


def test_starts_cover_the_clip_and_stay_inside() -> None:
    lengths = torch.full((1000,), 12)
    starts = segment_starts(lengths, 8, torch.arange(1000) / 1000)
    assert starts.dtype == torch.int64
    assert set(starts.tolist()) == {0, 1, 2, 3, 4}
    assert segment_starts(lengths[:1], 8, torch.tensor([0.99999999])).tolist() == [4]  # 1.0 in float32


def test_segment_outside_is_an_error_that_names_the_item() -> None:
    with pytest.raises(IndexError, match="item 1"):
        slice_segments(torch.zeros(2, 1, 6), torch.tensor([0, 4]), 4)
