"""Duration predictors of VITS: stochastic (a normalising flow over log-durations) and deterministic."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalia.nn.conv import DDSConv, LayerNorm
from lalia.nn.splines import rational_quadratic_spline

LOG_2_PI = math.log(2 * math.pi)


class ElementwiseAffine(nn.Module):
    """Per-channel shift and scale; the volume term is summed over channels and frames."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width, 1))
        self.log_scale = nn.Parameter(torch.zeros(width, 1))

    def forward(self, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        moved = (self.shift + self.log_scale.exp() * value) * mask
        return moved, (self.log_scale * mask).sum(dim=(1, 2))

    def inverse(self, value: Tensor, mask: Tensor) -> Tensor:
        return (value - self.shift) * (-self.log_scale).exp() * mask


class SplineCoupling(nn.Module):
    """Moves the second half of the channels by a rational-quadratic spline whose knots come from the first half."""

    BINS, TAIL = 10, 5.0

    def __init__(self, width: int, kernel: int, layers: int = 3) -> None:
        super().__init__()
        self.width = width
        self.before = nn.Conv1d(1, width, 1)
        self.convolutions = DDSConv(width, kernel, layers, dropout=0.0)
        self.projection = nn.Conv1d(width, 3 * self.BINS - 1, 1)
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)  # type: ignore[arg-type]

    def _spline(self, value: Tensor, mask: Tensor, condition: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        first, second = value.chunk(2, dim=1)
        hidden = self.convolutions(self.before(first), mask, condition)
        knots = (self.projection(hidden) * mask).float().transpose(1, 2)  # [B, L, 3·bins-1]
        widths, heights = knots[..., : self.BINS], knots[..., self.BINS : 2 * self.BINS]
        scale = 1.0 / math.sqrt(self.width)
        moved, log_determinant = rational_quadratic_spline(
            second.squeeze(1).float(),
            widths * scale,
            heights * scale,
            knots[..., 2 * self.BINS :],
            inverse=inverse,
            tail_bound=self.TAIL,
        )
        result = torch.cat([first, moved.unsqueeze(1)], dim=1) * mask
        return result, (log_determinant.unsqueeze(1) * mask).sum(dim=(1, 2))

    def forward(self, value: Tensor, mask: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        return self._spline(value, mask, condition, inverse=False)

    def inverse(self, value: Tensor, mask: Tensor, condition: Tensor) -> Tensor:
        return self._spline(value, mask, condition, inverse=True)[0]


class SplineFlow(nn.Module):
    """An affine and ``flows`` spline couplings, channels flipped after each."""

    def __init__(self, width: int, kernel: int, flows: int) -> None:
        super().__init__()
        self.affine = ElementwiseAffine(2)
        self.couplings = nn.ModuleList(SplineCoupling(width, kernel) for _ in range(flows))

    def forward(self, value: Tensor, mask: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        value, log_determinant = self.affine(value, mask)
        for coupling in self.couplings:
            value, volume = coupling(value, mask, condition)
            value = value.flip(1)
            log_determinant = log_determinant + volume
        return value, log_determinant

    def inverse(self, value: Tensor, mask: Tensor, condition: Tensor) -> Tensor:
        for coupling in reversed(self.couplings):
            value = coupling.inverse(value.flip(1), mask, condition)  # type: ignore[operator]
        return self.affine.inverse(value, mask)


def gaussian_nll(noise: Tensor, mask: Tensor) -> Tensor:
    """-log N(noise; 0, 1) summed over channels and tokens: [B]."""
    return (0.5 * (LOG_2_PI + noise**2) * mask).sum(dim=(1, 2))


class StochasticDurationPredictor(nn.Module):
    """Density of log-durations by variational dequantisation and augmentation (VITS section 2.2.2 and appendix).

    ``hidden`` and ``speaker`` are detached: the predictor does not shape the text encoder.
    """

    def __init__(self, width: int, kernel: int, dropout: float, flows: int, speaker_width: int) -> None:
        super().__init__()
        self.before = nn.Conv1d(width, width, 1)
        self.convolutions = DDSConv(width, kernel, 3, dropout=dropout)
        self.projection = nn.Conv1d(width, width, 1)
        self.speaker = nn.Conv1d(speaker_width, width, 1)
        self.duration_before = nn.Conv1d(1, width, 1)
        self.duration_convolutions = DDSConv(width, kernel, 3, dropout=dropout)
        self.duration_projection = nn.Conv1d(width, width, 1)
        self.prior = SplineFlow(width, kernel, flows)
        self.posterior = SplineFlow(width, kernel, flows)

    def condition(self, hidden: Tensor, mask: Tensor, speaker: Tensor) -> Tensor:
        """Text and speaker → condition of both flows [B, D, L]."""
        encoded = self.before(hidden.detach()) + self.speaker(speaker.detach())
        return self.projection(self.convolutions(encoded, mask)) * mask

    def forward(self, condition: Tensor, mask: Tensor, durations: Tensor, noise: Tensor) -> Tensor:
        """Upper bound of -log p(durations) per clip [B]; ``durations`` float [B, 1, L], ``noise`` [B, 2, L]."""
        encoded = self.duration_convolutions(self.duration_before(durations), mask)
        encoded = self.duration_projection(encoded) * mask
        noise = noise * mask
        posterior, volume = self.posterior(noise, mask, condition + encoded)
        log_u, augmentation = posterior.split([1, 1], dim=1)
        offset = torch.sigmoid(log_u) * mask
        remainder = (durations - offset) * mask
        volume = volume + ((F.logsigmoid(log_u) + F.logsigmoid(-log_u)) * mask).sum(dim=(1, 2))
        log_q = -gaussian_nll(noise, mask) - volume

        log_remainder = torch.log(remainder.clamp(min=1e-5)) * mask
        log_volume = -log_remainder.sum(dim=(1, 2))
        flowed, volume = self.prior(torch.cat([log_remainder, augmentation], dim=1), mask, condition)
        return gaussian_nll(flowed, mask) - log_volume - volume + log_q

    def sample(self, condition: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
        """Log-durations [B, 1, L] from ``noise`` [B, 2, L]."""
        return self.prior.inverse(noise * mask, mask, condition)[:, :1]


class DurationPredictor(nn.Module):
    """Two convolutions with norm → log-duration per token [B, 1, L] (FastSpeech's predictor, as in VITS)."""

    def __init__(self, width: int, hidden: int, kernel: int, dropout: float, speaker_width: int) -> None:
        super().__init__()
        self.speaker = nn.Conv1d(speaker_width, width, 1)
        self.convolutions = nn.ModuleList(
            [nn.Conv1d(width, hidden, kernel, padding=kernel // 2), nn.Conv1d(hidden, hidden, kernel, padding=kernel // 2)]
        )
        self.norms = nn.ModuleList([LayerNorm(hidden), LayerNorm(hidden)])
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Conv1d(hidden, 1, 1)

    def forward(self, hidden: Tensor, mask: Tensor, speaker: Tensor) -> Tensor:
        hidden = hidden.detach() + self.speaker(speaker.detach())
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            hidden = self.dropout(norm(torch.relu(convolution(hidden * mask))))
        return self.projection(hidden * mask) * mask
