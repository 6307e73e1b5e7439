"""Rational-quadratic splines: inverse, Jacobian, tails, precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lalia.nn.splines import initial_derivative, rational_quadratic_spline


def random_spline(seed: int, count: int = 200, bins: int = 10, spread: float = 2.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    inputs = 12 * torch.rand(count, generator=generator) - 6  # inside and outside of the interval
    parameters = (spread * torch.randn(count, n, generator=generator) for n in (bins, bins, bins - 1))
    return (inputs, *parameters)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 10]))
def test_inverse_undoes_forward(seed: int, bins: int) -> None:
    inputs, *parameters = random_spline(seed, bins=bins)
    outputs, forward_log = rational_quadratic_spline(inputs, *parameters)
    back, inverse_log = rational_quadratic_spline(outputs, *parameters, inverse=True)
    # where the spline is very flat, float32 cannot hold the input in the output: measure there in the output
    again, _ = rational_quadratic_spline(back, *parameters)
    steepness = forward_log.exp().clamp(max=1.0)
    assert ((back - inputs).abs() * steepness).max() < 1e-4
    assert (again - outputs).abs().max() < 1e-4
    gentle = (forward_log.abs() < 2) & ((back - inputs).abs() < 1e-5)
    assert (forward_log + inverse_log)[gentle].abs().max() < 2e-2


def test_inverse_is_exact_for_gentle_splines() -> None:
    inputs, *parameters = random_spline(1, count=5000, spread=0.7)
    outputs, forward_log = rational_quadratic_spline(inputs, *parameters)
    back, inverse_log = rational_quadratic_spline(outputs, *parameters, inverse=True)
    assert (back - inputs).abs().max() < 1e-4
    assert (forward_log + inverse_log).abs().max() < 1e-3


@pytest.mark.parametrize("inverse", [False, True])
def test_log_derivative_is_that_of_autograd(inverse: bool) -> None:
    inputs, *parameters = random_spline(2, count=1000, spread=1.0)
    inputs.requires_grad_()
    outputs, log_derivative = rational_quadratic_spline(inputs, *parameters, inverse=inverse)
    (slope,) = torch.autograd.grad(outputs.sum(), inputs)
    assert (slope > 0).all()
    torch.testing.assert_close(log_derivative, slope.log(), rtol=1e-3, atol=1e-3)


def test_rises_and_is_the_identity_outside() -> None:
    _, *parameters = random_spline(3, count=1)
    line = torch.linspace(-7, 7, 2001)
    outputs, log_derivative = rational_quadratic_spline(line, *(p.expand(2001, -1) for p in parameters))
    assert (outputs.diff() > 0).all()
    outside = line.abs() > 5
    assert torch.equal(outputs[outside], line[outside]) and not log_derivative[outside].any()
    edges = torch.tensor([-5.0, 5.0])
    torch.testing.assert_close(rational_quadratic_spline(edges, *(p.expand(2, -1) for p in parameters))[0], edges)


def test_equal_bins_and_slope_one_are_the_identity() -> None:
    inputs = torch.linspace(-6, 6, 101)
    zeros = torch.zeros(101, 10)
    outputs, log_derivative = rational_quadratic_spline(inputs, zeros, zeros, zeros[:, 1:] + initial_derivative())
    torch.testing.assert_close(outputs, inputs, atol=1e-5, rtol=0)
    assert log_derivative.abs().max() < 1e-5


def test_float32_under_autocast() -> None:
    case = random_spline(4)
    expected = rational_quadratic_spline(*case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = rational_quadratic_spline(*case)
        half = rational_quadratic_spline(*(c.bfloat16() for c in case))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert half[0].dtype == torch.float32


def test_gradients_are_finite_at_the_edges_and_outside() -> None:
    _, *parameters = random_spline(5, count=6)
    for inverse in (False, True):
        inputs = torch.tensor([-100.0, -5.0, -0.0, 5.0, 5.0001, 1e6], requires_grad=True)
        learned = [p.clone().requires_grad_() for p in parameters]
        outputs, log_derivative = rational_quadratic_spline(inputs, *learned, inverse=inverse)
        (outputs.sum() + log_derivative.sum()).backward()
        assert all(t.grad.isfinite().all() for t in (inputs, *learned))


def test_wrong_parameter_counts_are_an_error() -> None:
    with pytest.raises(ValueError, match="K-1 derivatives"):
        rational_quadratic_spline(torch.zeros(3), torch.zeros(3, 10), torch.zeros(3, 10), torch.zeros(3, 10))
