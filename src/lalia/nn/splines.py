"""Monotonic rational-quadratic splines with linear tails (Durkan et al. 2019, "Neural Spline Flows")."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_WIDTH = 1e-3
MIN_HEIGHT = 1e-3
MIN_DERIVATIVE = 1e-3


def rational_quadratic_spline(
    inputs: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor, inverse: bool = False, tail_bound: float = 5.0
) -> tuple[Tensor, Tensor]:
    """Map each input by its own spline on [-tail_bound, tail_bound], and by the identity outside.

    inputs [...]; widths, heights [..., K] and derivatives [..., K-1] are unnormalised network outputs (the
    derivative at both ends is 1, to meet the tails). Returns (outputs [...], log|d outputs / d inputs| [...]),
    computed in float32 whatever the autocast. ``inverse`` maps back, and its log-derivative is the negative of the
    forward one.
    """
    bins = widths.shape[-1]
    if heights.shape[-1] != bins or derivatives.shape[-1] != bins - 1:
        found = f"{bins} widths, {heights.shape[-1]} heights and {derivatives.shape[-1]} derivatives"
        raise ValueError(f"a spline of K bins takes K widths, K heights and K-1 derivatives; got {found}")
    if bins * max(MIN_WIDTH, MIN_HEIGHT) >= 1:
        raise ValueError(f"{bins} bins are too many for the least bin width {MIN_WIDTH}")
    with torch.autocast(inputs.device.type, enabled=False):
        values = inputs.float()
        inside = (values >= -tail_bound) & (values <= tail_bound)
        # outside values go through the spline too, at its edge, so that no NaN reaches the gradient of `where`
        clamped = values.clamp(-tail_bound, tail_bound)
        knots_in, size_in = _knots(widths.float(), MIN_WIDTH, tail_bound)
        knots_out, size_out = _knots(heights.float(), MIN_HEIGHT, tail_bound)
        slopes = F.pad(MIN_DERIVATIVE + F.softplus(derivatives.float()), (1, 1), value=1.0)
        knots = knots_out if inverse else knots_in
        index = torch.searchsorted(knots[..., 1:-1].contiguous(), clamped.unsqueeze(-1), right=True)
        left, size = _pick(knots_in, index), _pick(size_in, index)
        bottom, rise = _pick(knots_out, index), _pick(size_out, index)
        slope, next_slope = _pick(slopes, index), _pick(slopes, index + 1)
        if inverse:
            outputs, log_derivative = _backward(clamped, left, size, bottom, rise, slope, next_slope)
        else:
            outputs, log_derivative = _forward(clamped, left, size, bottom, rise, slope, next_slope)
        outputs = torch.where(inside, outputs, values)
        return outputs, torch.where(inside, log_derivative, torch.zeros_like(log_derivative))


def initial_derivative() -> float:
    """Unnormalised derivative whose slope is 1: a bias of it makes a new spline the identity."""
    return math.log(math.expm1(1 - MIN_DERIVATIVE))


def _knots(unnormalised: Tensor, least: float, bound: float) -> tuple[Tensor, Tensor]:
    """[..., K] logits → knot positions [..., K+1] from -bound to bound, and bin sizes [..., K]."""
    bins = unnormalised.shape[-1]
    shares = least + (1 - least * bins) * unnormalised.softmax(-1)
    inner = 2 * bound * shares.cumsum(-1)[..., :-1] - bound
    knots = F.pad(F.pad(inner, (1, 0), value=-bound), (0, 1), value=bound)  # the ends exact, whatever the rounding
    return knots, knots[..., 1:] - knots[..., :-1]


def _pick(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(-1, index).squeeze(-1)


def _forward(
    inputs: Tensor, left: Tensor, size: Tensor, bottom: Tensor, rise: Tensor, slope: Tensor, next_slope: Tensor
) -> tuple[Tensor, Tensor]:
    """Durkan et al. 2019, equations 4 and 5."""
    share = (inputs - left) / size
    outputs = bottom + rise * _fraction(share, rise / size, slope, next_slope)
    return outputs, _log_derivative(share, rise / size, slope, next_slope)


def _backward(
    outputs: Tensor, left: Tensor, size: Tensor, bottom: Tensor, rise: Tensor, slope: Tensor, next_slope: Tensor
) -> tuple[Tensor, Tensor]:
    """Durkan et al. 2019, equations 6 to 8: the root of a quadratic, in the form that does not cancel."""
    mean_slope = rise / size
    height = outputs - bottom
    bend = slope + next_slope - 2 * mean_slope
    a = rise * (mean_slope - slope) + height * bend
    b = rise * slope - height * bend
    c = -mean_slope * height
    discriminant = (b * b - 4 * a * c).clamp_min(1e-12)  # never 0 in exact arithmetic; keeps the gradient finite
    share = (2 * c / (-b - discriminant.sqrt())).clamp(0, 1)
    return left + share * size, -_log_derivative(share, mean_slope, slope, next_slope)


def _fraction(share: Tensor, mean_slope: Tensor, slope: Tensor, next_slope: Tensor) -> Tensor:
    between = share * (1 - share)
    top = mean_slope * share * share + slope * between
    return top / (mean_slope + (slope + next_slope - 2 * mean_slope) * between)


def _log_derivative(share: Tensor, mean_slope: Tensor, slope: Tensor, next_slope: Tensor) -> Tensor:
    between = share * (1 - share)
    top = next_slope * share * share + 2 * mean_slope * between + slope * (1 - share) ** 2
    bottom = mean_slope + (slope + next_slope - 2 * mean_slope) * between
    return 2 * mean_slope.log() + top.log() - 2 * bottom.log()
