"""The concordance coefficient: its definition, its sums, its loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lalia.nn.ccc import Moments, ccc_loss, sums_of


def by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """Lin (1989), with population moments."""
    return 2 * np.mean((x - x.mean()) * (y - y.mean())) / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)


def ccc(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """[N, D], [N, D] → [D], by sums of the whole set."""
    moments = Moments(prediction.shape[1])
    moments.add(prediction, target)
    return moments.ccc()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 200), st.floats(-3, 3), st.floats(0.1, 4))
def test_ccc_equals_its_definition(seed: int, count: int, shift: float, scale: float) -> None:
    random = np.random.default_rng(seed)
    target = random.normal(size=(count, 2))
    prediction = scale * target + shift + random.normal(size=(count, 2))
    expected = [by_definition(prediction[:, d], target[:, d]) for d in range(2)]
    assert ccc(torch.tensor(prediction), torch.tensor(target)).numpy() == pytest.approx(expected, abs=1e-6)


def test_ccc_punishes_shift_and_scale_where_correlation_does_not() -> None:
    target = torch.linspace(0, 1, 50)[:, None]
    assert float(ccc(target, target)) == pytest.approx(1, abs=1e-6)
    assert float(ccc(-target, target - 1)) == pytest.approx(-1, abs=1e-6)
    assert 0 < float(ccc(target + 0.3, target)) < 0.9
    assert 0 < float(ccc(0.3 * target, target)) < 0.9


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_moments_of_parts_are_those_of_the_whole_in_any_order(seed: int, sizes: list[int]) -> None:
    random = np.random.default_rng(seed)
    count = sum(sizes)
    prediction, target = torch.tensor(random.normal(size=(count, 2))) + 3, torch.tensor(random.normal(size=(count, 2))) + 3
    target[random.random((count, 2)) < 0.2] = math.nan
    parts = list(zip(prediction.split(sizes), target.split(sizes), strict=True))
    streamed, merged = Moments(2, shift=3.0), Moments(2, shift=3.0)
    for part in parts[::-1]:
        streamed.add(*part)
        other = Moments(2, shift=3.0)
        other.add(*part)
        merged.merge(other)
    assert torch.allclose(streamed.sums, merged.sums)
    for d in range(2):
        there = target[:, d].isfinite()
        assert int(streamed.count()[d]) == int(there.sum())
        if there.sum() > 1:
            expected = by_definition(prediction[there, d].numpy(), target[there, d].numpy())
            assert float(streamed.ccc()[d]) == pytest.approx(expected, abs=1e-6)


def test_the_mean_of_batches_is_not_the_ccc_of_the_set() -> None:
    target = torch.linspace(1, 5, 64, dtype=torch.float64)[:, None]
    prediction = target + 0.5 * torch.sin(7 * target)
    parts = [float(ccc(p, t)) for p, t in zip(prediction.split(8), target.split(8), strict=True)]
    assert abs(np.mean(parts) - float(ccc(prediction, target))) > 0.2


@pytest.mark.parametrize("prediction", [[[0.3]], [[0.5], [0.5], [0.5]], [[0.1], [0.9], [0.4]]])
def test_loss_and_gradient_are_finite_on_constants_and_a_batch_of_one(prediction: list[list[float]]) -> None:
    answers = torch.tensor(prediction, requires_grad=True)
    for target in (torch.full_like(answers, 0.5), torch.full_like(answers, math.nan)):
        loss = ccc_loss(answers, target.detach()).sum()
        (gradient,) = torch.autograd.grad(loss, answers)
        assert loss.isfinite() and gradient.isfinite().all()


def test_missing_labels_count_for_nothing() -> None:
    random = torch.Generator().manual_seed(0)
    prediction, target = torch.rand(20, 1, generator=random), torch.rand(20, 1, generator=random)
    holes = target.clone()
    holes[::3] = math.nan
    kept = holes.isfinite()[:, 0]
    assert torch.allclose(ccc_loss(prediction, holes), ccc_loss(prediction[kept], target[kept]))


def test_loss_with_others_has_the_value_and_gradient_of_the_whole_set() -> None:
    """What two ranks, or two micro-batches, know of each other is enough for the gradient of the concatenated batch."""
    random = torch.Generator().manual_seed(1)
    prediction, target = torch.rand(30, 2, generator=random), torch.rand(30, 2, generator=random)
    whole = prediction.clone().requires_grad_(True)
    loss = ccc_loss(whole, target).mean()
    (expected,) = torch.autograd.grad(loss, whole)
    gradients = []
    for mine, other in ((slice(0, 11), slice(11, 30)), (slice(11, 30), slice(0, 11))):
        part = prediction[mine].clone().requires_grad_(True)
        value = ccc_loss(part, target[mine], sums_of(prediction[other], target[other])).mean()
        assert value.item() == pytest.approx(loss.item(), abs=1e-6)
        gradients.append(torch.autograd.grad(value, part)[0])
    assert torch.allclose(torch.cat(gradients), expected, atol=1e-6)


def test_moments_refuse_what_would_be_wrong() -> None:
    moments = Moments(2)
    with pytest.raises(ValueError, match=r"must be \[N, 2\]"):
        moments.add(torch.zeros(3, 1), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="NaN"):
        moments.add(torch.full((1, 2), math.nan), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="shifts"):
        moments.merge(Moments(2, shift=1.0))
    assert moments.ccc().isnan().all()
