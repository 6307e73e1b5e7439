"""A speech language model (WavLM) as critic: its hidden states, taken twice a step, and a discriminator on top of them
(StyleTTS 2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

WAVLM_RATE = 16_000


class Resampler(nn.Module):
    """Differentiable band-limited resampling: one strided convolution with a Kaiser-windowed sinc per output phase.

    ``forward(wave [..., S]) -> [..., ceil(S * to_rate / from_rate)]``, float32. ``zeros`` is the filter's half width in
    zero crossings, ``rolloff`` its cut-off as a share of the lower Nyquist frequency (Smith, "Digital Audio
    Resampling").
    """

    kernel: Tensor

    def __init__(
        self, from_rate: int, to_rate: int, zeros: int = 48, rolloff: float = 0.96, beta: float = 12.0
    ) -> None:
        super().__init__()
        if from_rate < 1 or to_rate < 1:
            raise ValueError(f"sample rates must be positive, got {from_rate} and {to_rate}")
        divisor = math.gcd(from_rate, to_rate)
        self.stride, self.phases = from_rate // divisor, to_rate // divisor
        kernel, self.reach = _sinc_kernel(self.stride, self.phases, zeros, rolloff, beta)
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, wave: Tensor) -> Tensor:
        if self.stride == self.phases:
            return wave.float()
        samples = wave.shape[-1]
        length = -(-samples * self.phases // self.stride)
        with torch.autocast(wave.device.type, enabled=False):
            rows = F.pad(wave.float().reshape(-1, 1, samples), (self.reach, self.reach + self.stride))
            phases = F.conv1d(rows, self.kernel, stride=self.stride)  # [rows, phases, blocks]
        return phases.transpose(1, 2).flatten(1)[:, :length].reshape(*wave.shape[:-1], length)


def _sinc_kernel(stride: int, phases: int, zeros: int, rolloff: float, beta: float) -> tuple[Tensor, int]:
    """Kernel [phases, 1, 2 * reach + stride] for blocks of ``stride`` input samples, and ``reach`` in input samples."""
    cutoff = min(1.0, phases / stride) * rolloff  # in units of the input's Nyquist frequency
    reach = math.ceil(zeros / cutoff)
    taps = torch.arange(-reach, reach + stride, dtype=torch.float64)
    centres = torch.arange(phases, dtype=torch.float64)[:, None] * stride / phases
    distance = (taps - centres) * cutoff
    inside = (1 - (distance / zeros).square()).clamp(min=0)
    window = torch.special.i0(beta * inside.sqrt()) / torch.special.i0(torch.tensor(beta, dtype=torch.float64))
    kernel = torch.sinc(distance) * window * (distance.abs() <= zeros) * cutoff
    return kernel.float().unsqueeze(1), reach


class WavLMFeatures(nn.Module):
    """Hidden states of a frozen WavLM, from waves at the synthesiser's own rate.

    ``features(wave [B, 1, S] or [B, S]) -> [B, layers * width, T']`` with gradient to the wave; :meth:`reference` is
    the same for recordings, without a graph. One step needs one call of each: the discriminator's turn uses
    ``features(fake).detach()`` and the generator's turn the very same tensor. The backbone is not a registered
    submodule: it is frozen, can be loaded anew, and must not be stored in every checkpoint; it still follows
    ``.to(device)`` and always stays in evaluation mode.
    """

    def __init__(self, backbone: nn.Module, sample_rate: int, normalize: bool | None = None) -> None:
        super().__init__()
        backbone.eval().requires_grad_(False)
        self._unregistered = [backbone]
        config: Any = backbone.config
        self.layers, self.width = int(config.num_hidden_layers) + 1, int(config.hidden_size)
        self.normalize = bool(getattr(backbone, "normalize_input", False)) if normalize is None else normalize
        self.resampler = Resampler(sample_rate, WAVLM_RATE)
        self.shortest = _shortest_input(config.conv_kernel, config.conv_stride)

    @property
    def backbone(self) -> nn.Module:
        return self._unregistered[0]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> WavLMFeatures:
        self.backbone._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, wave: Tensor) -> Tensor:
        if wave.dim() == 3:
            wave = wave.squeeze(1)  # only the channel: a bare squeeze would drop a batch of one as well
        if wave.dim() != 2:
            raise ValueError(f"wave must be [B, 1, S] or [B, S], got {tuple(wave.shape)}")
        samples = self.resampler(wave)
        if samples.shape[-1] < self.shortest:
            raise ValueError(
                f"WavLM needs at least {self.shortest} samples at 16 kHz, got {samples.shape[-1]}; use longer segments"
            )
        if self.normalize:
            variance, mean = torch.var_mean(samples, dim=-1, keepdim=True, correction=0)
            samples = (samples - mean) * torch.rsqrt(variance + 1e-7)
        states = self.backbone(samples, output_hidden_states=True).hidden_states
        return torch.cat([state.transpose(1, 2) for state in states], dim=1)

    @torch.no_grad()
    def reference(self, wave: Tensor) -> Tensor:
        """Hidden states of a recording: same shapes, no graph."""
        return self(wave)


def _shortest_input(kernels: list[int], strides: list[int]) -> int:
    length = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        length = (length - 1) * stride + kernel
    return length


def slm_feature_loss(real: Tensor, fake: Tensor, layers: int) -> Tensor:
    """Σ over layers of the mean L1 distance of the hidden states [B, layers * width, T']; the real side gets no
    gradient."""
    return layers * (real.detach().float() - fake.float()).abs().mean()


class WavLMDiscriminator(nn.Module):
    """Critic on stacked WavLM hidden states (StyleTTS 2, Li et al. 2023): states [B, layers * hidden, T'] → scores [B,
    T'].

    It takes hidden states, not a waveform; score lists for :mod:`lalia.nn.gan_losses` are ``[critic(states)]``.
    """

    def __init__(self, hidden: int = 768, layers: int = 13, channels: int = 64) -> None:
        super().__init__()
        self.inputs = hidden * layers
        self.first = weight_norm(nn.Conv1d(self.inputs, channels, 1))
        widths = [channels, 2 * channels, 4 * channels, 4 * channels]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv1d(a, b, 5, padding=2)) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.score = weight_norm(nn.Conv1d(widths[-1], 1, 3, padding=1))

    def forward(self, states: Tensor) -> Tensor:
        if states.dim() != 3 or states.shape[1] != self.inputs:
            raise ValueError(f"expected hidden states [B, {self.inputs}, T'], got {tuple(states.shape)}")
        hidden = self.first(states)
        for conv in self.convs:
            hidden = F.leaky_relu(conv(hidden), 0.1)
        return self.score(hidden).flatten(1)
