"""Losses of VITS2 that need no discriminator. Every one is a sum over a count averaged over ranks (see lalia.system)."""

from __future__ import annotations

import torch
from torch import Tensor

from lalia import dist
from lalia.systems.vits2.generator import Forward


def ratio(total: Tensor, count: Tensor | float) -> Tensor:
    """``total`` / mean count over ranks: the mean of this over ranks is the global Σ / Σ."""
    return total / dist.average(count).to(total.device).clamp(min=1e-8)


def share(batch_size: int, device: torch.device) -> Tensor:
    """This rank's clips relative to the mean over ranks: weighs a per-rank mean so that ranks of unequal batches average right."""
    count = torch.tensor(float(batch_size), device=device)
    return count / dist.average(count).to(device)


def kl_loss(out: Forward) -> Tensor:
    """KL(posterior ‖ prior) with the sampled latent: summed over channels, mean over valid frames (VITS eq. 4), float32.

    Σ mask · (logσ_p − logσ_q − ½ + ½ (z_p − μ_p)² e^{−2 logσ_p}) / Σ mask
    """
    z, mean = out.latent_prior.float(), out.mean_prior.float()
    log_p, log_q = out.log_scale_prior.float(), out.log_scale_posterior.float()
    kl = log_p - log_q - 0.5 + 0.5 * (z - mean) ** 2 * torch.exp(-2.0 * log_p)
    return ratio((kl * out.frame_mask).sum(), out.frame_mask.sum())


def mel_prior_loss(out: Forward) -> Tensor:
    """Grad-TTS's encoder loss: half the squared error of the mel frames that the tokens predict, per frame and mel bin."""
    assert out.mel is not None and out.mel_prior is not None
    error = 0.5 * (out.mel.float() - out.mel_prior.float()).square() * out.frame_mask
    return ratio(error.sum() / error.shape[1], out.frame_mask.sum())


def kl_share(step: int, start: float, ramp_steps: int) -> float:
    """Share of the KL at ``step``: linear from ``start`` to 1 over ``ramp_steps``, or ``start`` throughout when that is 0."""
    return start + (1.0 - start) * min(1.0, step / ramp_steps) if ramp_steps else start


def duration_loss(out: Forward) -> Tensor:
    """NLL of the stochastic predictor and squared errors of both predictions in the log domain, per valid token."""
    target = out.log_duration_target
    deterministic = (out.log_duration.float() - target).square().sum()
    sampled = (out.log_duration_sampled.float() - target).square().sum()
    return ratio(out.duration_nll.float().sum() + deterministic + sampled, out.text_mask.sum())


def token_count(out: Forward) -> Tensor:
    """Valid tokens of this batch, averaged over ranks."""
    return dist.average(out.text_mask.sum()).to(out.text_mask.device)
