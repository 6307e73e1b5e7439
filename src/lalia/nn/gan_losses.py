"""Least-squares GAN losses (Mao et al. 2017) and feature matching, in float32 whatever the autocast precision.

A score list holds one tensor per critic. Within a tensor everything is averaged, batch included; over critics the parts
are summed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _check_list(value: object, name: str) -> None:
    # iterating a tensor walks its batch dimension: the loss would become a sum over the batch without any error
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a list with one entry per critic, not a tensor")


def discriminator_loss(real: Sequence[Tensor], fake: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Σ over critics of mean (1 - real)² + mean fake² → (total, real part per critic, fake part per critic)."""
    _check_list(real, "real")
    _check_list(fake, "fake")
    real_parts = [(1 - score.float()).square().mean() for score in real]
    fake_parts = [score.float().square().mean() for score in fake]
    return torch.stack(real_parts + fake_parts).sum(), real_parts, fake_parts


def generator_loss(fake: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Σ over critics of mean (1 - fake)² → (total, part per critic)."""
    _check_list(fake, "fake")
    parts = [(1 - score.float()).square().mean() for score in fake]
    return torch.stack(parts).sum(), parts


def feature_loss(real: Sequence[Sequence[Tensor]], fake: Sequence[Sequence[Tensor]]) -> Tensor:
    """Feature matching (Kumar et al. 2019): twice the L1 distance of every feature map; the real side gets no
    gradient."""
    _check_list(real, "real")
    _check_list(fake, "fake")
    distances = [
        (real_map.detach().float() - fake_map.float()).abs().mean()
        for real_maps, fake_maps in zip(real, fake, strict=True)
        for real_map, fake_map in zip(real_maps, fake_maps, strict=True)
    ]
    return 2 * torch.stack(distances).sum()


def masked_mean(values: Tensor, mask: Tensor, count: Tensor | float | None = None) -> Tensor:
    """Mean over the valid cells. values, mask: same shape. ``count`` replaces the local number of valid cells as the
    divisor (its average over ranks, so that averaged gradients equal those of the concatenated batch)."""
    if values.shape != mask.shape:
        raise ValueError(f"values {tuple(values.shape)} and mask {tuple(mask.shape)} differ in shape")
    divisor = mask.float().sum().clamp(min=1) if count is None else count
    return (values.float() * mask.float()).sum() / divisor


def duration_discriminator_loss(
    real: Tensor, fakes: Sequence[Tensor], mask: Tensor, count: Tensor | float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (1 - real)² plus the mean over the predictors of mean fake², valid tokens only → (total, real part, fake
    part).

    real and each of fakes: scores [B, L, 1]; mask: [B, 1, L]. Several predictors are judged apart and averaged, never
    added up, so each score keeps its own target.
    """
    _check_list(fakes, "fakes")
    valid = mask.transpose(1, 2)
    real_part = masked_mean((1 - real.float()).square(), valid, count)
    fake_part = torch.stack([masked_mean(fake.float().square(), valid, count) for fake in fakes]).mean()
    return real_part + fake_part, real_part, fake_part


def duration_generator_loss(
    fakes: Sequence[Tensor], mask: Tensor, count: Tensor | float | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Mean over the predictors of mean (1 - fake)², valid tokens only → (total, part per predictor). Shapes as
    above."""
    _check_list(fakes, "fakes")
    valid = mask.transpose(1, 2)
    parts = [masked_mean((1 - fake.float()).square(), valid, count) for fake in fakes]
    return torch.stack(parts).mean(), parts
