"""Frames → soft tokens: counts, padding, scale."""

from __future__ import annotations

import math

import pytest
import torch

from lalia.systems.omni.projector import Projector


@pytest.mark.parametrize("stack", range(1, 9))
def test_token_count_is_frames_over_stack_rounded_up(stack: int) -> None:
    projector = Projector(6, 10, stack, 12)
    frames = torch.randn(3, 25, 6)
    soft, counts = projector(frames, torch.tensor([25, 8, 1]))
    assert soft.shape == (3, math.ceil(25 / stack), 10)
    assert counts.tolist() == [math.ceil(n / stack) for n in (25, 8, 1)]
    assert projector.tokens(torch.tensor([1500])).tolist() == [math.ceil(1500 / stack)]


def test_padding_and_what_lies_in_it_change_nothing() -> None:
    torch.manual_seed(0)
    projector = Projector(6, 10, 4, 12)
    clip = torch.randn(1, 7, 6)
    alone, count = projector(clip, torch.tensor([7]))
    padded = torch.cat([torch.cat([clip, 100 * torch.randn(1, 9, 6)], 1), torch.randn(1, 16, 6)])
    batched, counts = projector(padded, torch.tensor([7, 16]))
    torch.testing.assert_close(batched[0, : counts[0]], alone[0])
    assert counts[0] == count[0] == 2 and not batched[0, 2:].any()


def test_soft_tokens_are_as_large_as_token_embeddings() -> None:
    embeddings = 0.03 * torch.randn(50, 64)
    projector = Projector(6, 64, 2, 12)
    assert projector.match(embeddings) == pytest.approx(0.03, rel=0.1)
    soft, _ = projector(1000 * torch.randn(2, 10, 6), torch.tensor([10, 10]))
    torch.testing.assert_close(soft.square().mean(2).sqrt(), torch.full((2, 5), float(projector.scale)), rtol=1e-3, atol=0)
    assert "scale" in projector.state_dict(), "a run folder alone rebuilds it"


def test_the_scale_of_the_frames_does_not_matter() -> None:
    projector, frames = Projector(6, 8, 2, 12), torch.randn(1, 4, 6)
    lengths = torch.tensor([4])
    torch.testing.assert_close(projector(frames, lengths)[0], projector(50 * frames, lengths)[0], rtol=1e-3, atol=1e-3)


def test_every_parameter_and_the_frames_get_gradients() -> None:
    projector = Projector(6, 8, 3, 12)
    frames = torch.randn(2, 7, 6, requires_grad=True)
    soft, _ = projector(frames, torch.tensor([7, 4]))
    (soft * torch.randn_like(soft)).sum().backward()
    assert all(bool(p.grad.any()) for p in projector.parameters())
    assert frames.grad[0].any(1).all() and frames.grad[1, :4].any(1).all() and not frames.grad[1, 4:].any()


def test_bad_values_are_named() -> None:
    for stack in (0, 9):
        with pytest.raises(ValueError, match="1 … 8 frames"):
            Projector(6, 8, stack)
    with pytest.raises(ValueError, match="scale"):
        Projector(6, 8, scale=0)
    with pytest.raises(ValueError, match="7 channels.*made for 6"):
        Projector(6, 8)(torch.randn(1, 3, 7), torch.tensor([3]))
    with pytest.raises(ValueError, match="all zero"):
        Projector(6, 8).match(torch.zeros(3, 8))
