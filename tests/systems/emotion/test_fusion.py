from __future__ import annotations

import pytest
import torch

from lalia.systems.emotion.fusion import Film, ProsodyEncoder


def test_a_new_film_returns_its_input_bit_for_bit():
    torch.manual_seed(0)
    hidden, condition = torch.randn(3, 5, 8), 100 * torch.randn(3, 1, 4)
    assert torch.equal(Film(8, 4)(hidden, condition), hidden)


def test_film_learns_a_scale_and_a_shift_of_its_condition():
    torch.manual_seed(0)
    film = Film(2, 1)
    condition = torch.rand(64, 1)
    hidden = torch.randn(64, 2)
    target = hidden * (1 + condition) - condition
    optimizer = torch.optim.Adam(film.parameters(), 0.03)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (film(hidden, condition) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 1e-2 and all(parameter.grad is not None for parameter in film.parameters())


def test_z_scores_use_the_statistics_they_were_given():
    torch.manual_seed(0)
    rows = torch.randn(500, 3) * torch.tensor([1.0, 1e-3, 50.0]) + torch.tensor([5.0, 0.0, -200.0])
    encoder = ProsodyEncoder(rows.mean(0).tolist(), rows.std(0, correction=0).tolist(), 16)
    scores = encoder.z_scores(rows)
    torch.testing.assert_close(scores.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(scores.std(0, correction=0), torch.ones(3), atol=1e-4, rtol=0)
    assert encoder(rows).shape == (500, 16)


def test_a_constant_functional_is_ignored_and_an_outlier_is_bounded():
    encoder = ProsodyEncoder([1.0, 0.0], [0.0, 1.0], 4)
    scores = encoder.z_scores(torch.tensor([[1.5, 1e6]]))
    assert scores.tolist() == [[0.0, 10.0]]


def test_statistics_travel_with_the_weights():
    ours, theirs = ProsodyEncoder([1.0, 2.0], [3.0, 4.0], 4), ProsodyEncoder([0.0, 0.0], [1.0, 1.0], 4)
    theirs.load_state_dict(ours.state_dict())
    rows = torch.randn(2, 2)
    assert torch.equal(ours(rows), theirs(rows))


@pytest.mark.parametrize(("mean", "deviation"), [([0.0], [1.0, 1.0]), ([float("nan")], [1.0]), ([0.0], [-1.0])])
def test_statistics_that_cannot_be_are_refused(mean, deviation):
    with pytest.raises(ValueError, match="functional"):
        ProsodyEncoder(mean, deviation, 4)
