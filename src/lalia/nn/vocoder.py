"""Decoders from a latent sequence to a waveform, behind one shape contract.

``decoder(latent [B, D, T], speaker [B, G, 1] | None) -> wave [B, 1, T * hop]``. Every decoder has ``hop`` (samples per
frame) and ``context_frames`` (frames on each side that one output frame depends on), which is all :func:`decode_stream`
needs to decode in pieces that join without a seam.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lalia.nn.conv import ConvNeXtBlock, fold_norms
from lalia.nn.linear import Linear

LEAK = 0.1  # slope of the leaky ReLU in HiFi-GAN
BLOCK_KERNEL = 7  # depthwise kernel of the ConvNeXt blocks
LOG_MAGNITUDE_LIMIT = math.log(100.0)  # Vocos caps magnitudes at 100: an early outlier must not blow up the waveform


class ResidualStack(nn.Module):
    """One branch of HiFi-GAN's multi-receptive-field fusion: for each dilation a dilated and a plain convolution. [B,
    C, S] → same."""

    def __init__(self, channels: int, kernel: int, dilations: Sequence[int]) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"residual kernels must be odd, got {kernel}")
        self.dilated = nn.ModuleList(_same_conv(channels, kernel, d) for d in dilations)
        self.plain = nn.ModuleList(_same_conv(channels, kernel, 1) for _ in dilations)
        self.radius = (kernel - 1) // 2 * (sum(dilations) + len(dilations))  # samples seen on each side

    def forward(self, hidden: Tensor) -> Tensor:
        for dilated, plain in zip(self.dilated, self.plain, strict=True):
            residual = dilated(F.leaky_relu(hidden, LEAK))
            hidden = hidden + plain(F.leaky_relu(residual, LEAK))
        return hidden


def _same_conv(channels: int, kernel: int, dilation: int) -> nn.Module:
    return weight_norm(nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=(kernel - 1) * dilation // 2))


class HifiGanDecoder(nn.Module):
    """HiFi-GAN V1 generator (Kong et al. 2020) as VITS uses it: a speaker vector is added after the first convolution.

    ``forward(latent [B, width, T], speaker [B, speaker_width, 1] | None) -> wave [B, 1, T * prod(rates)]`` in (-1, 1).
    ValueError when a rate and its kernel cannot give exactly ``rate`` samples per input.
    """

    def __init__(
        self,
        width: int,
        channels: int = 512,
        rates: Sequence[int] = (8, 8, 2, 2, 2),
        kernels: Sequence[int] = (16, 16, 8, 2, 2),
        residual_kernels: Sequence[int] = (3, 7, 11),
        dilations: Sequence[int] = (1, 3, 5),
        speaker_width: int = 0,
    ) -> None:
        super().__init__()
        _check_rates(channels, rates, kernels)
        self.hop = math.prod(rates)
        self.first = nn.Conv1d(width, channels, 7, padding=3)
        self.speaker = nn.Conv1d(speaker_width, channels, 1) if speaker_width else None
        self.upsamplers, self.fusions = nn.ModuleList(), nn.ModuleList()
        for rate, kernel in zip(rates, kernels, strict=True):
            up = nn.ConvTranspose1d(channels, channels // 2, kernel, rate, padding=(kernel - rate) // 2)
            self.upsamplers.append(weight_norm(up))
            channels //= 2
            self.fusions.append(nn.ModuleList(ResidualStack(channels, k, dilations) for k in residual_kernels))
        self.last = nn.Conv1d(channels, 1, 7, padding=3, bias=False)
        radius = (max(residual_kernels) - 1) // 2 * (sum(dilations) + len(dilations))
        self.context_frames = _hifigan_context(rates, kernels, radius)

    def forward(self, latent: Tensor, speaker: Tensor | None = None) -> Tensor:
        hidden = _add_speaker(self.first(latent), self.speaker, speaker)
        for upsampler, stacks in zip(self.upsamplers, self.fusions, strict=True):
            hidden = upsampler(F.leaky_relu(hidden, LEAK))
            total = stacks[0](hidden)  # type: ignore[index]
            for stack in stacks[1:]:  # type: ignore[index]
                total = total + stack(hidden)
            hidden = total / len(stacks)  # type: ignore[arg-type]
        # torch's default slope here, as in the published model: its weights expect it
        return torch.tanh(self.last(F.leaky_relu(hidden)))

    def remove_weight_norm(self) -> None:
        """Fold weight normalisation into plain weights, for inference. The output does not change; calling it twice is
        harmless."""
        fold_norms(self)


def _check_rates(channels: int, rates: Sequence[int], kernels: Sequence[int]) -> None:
    if len(rates) != len(kernels) or not rates:
        raise ValueError(f"upsampling needs one kernel per rate, got rates {list(rates)} and kernels {list(kernels)}")
    for rate, kernel in zip(rates, kernels, strict=True):
        if kernel < rate or (kernel - rate) % 2:
            raise ValueError(
                f"upsampling kernel {kernel} must be at least the rate {rate} and differ from it by an even number"
            )
    if channels % 2 ** len(rates):
        raise ValueError(f"{channels} channels cannot be halved {len(rates)} times")


def _hifigan_context(rates: Sequence[int], kernels: Sequence[int], stack_radius: int) -> int:
    """Frames of context on each side: the receptive field walked from the last sample back to the first convolution."""
    radius = 3
    for rate, kernel in zip(reversed(rates), reversed(kernels), strict=True):
        radius += stack_radius
        padding = (kernel - rate) // 2
        radius = max(radius + kernel - 1 - padding, radius + padding + rate - 1) // rate
    return radius + 3


def _add_speaker(hidden: Tensor, projection: nn.Module | None, speaker: Tensor | None) -> Tensor:
    if projection is None:
        return hidden
    if speaker is None:
        raise ValueError("this decoder is conditioned on a speaker vector [B, G, 1], but none was given")
    return hidden + projection(speaker)


class IstftDecoder(nn.Module):
    """Vocos-style decoder (Siuzdak 2023): ConvNeXt blocks at the frame rate, then magnitude and phase of an inverse
    STFT.

    ``forward(latent [B, width, T], speaker [B, speaker_width, 1] | None) -> wave [B, 1, T * hop]``, not clipped.
    ``n_fft`` 0 means 4 * hop. The Fourier part runs in float32 whatever the autocast precision.
    """

    def __init__(
        self,
        width: int,
        hop: int,
        channels: int = 512,
        layers: int = 8,
        inner: int = 0,
        n_fft: int = 0,
        speaker_width: int = 0,
    ) -> None:
        super().__init__()
        self.hop, self.n_fft = hop, n_fft or 4 * hop
        if self.n_fft % hop or self.n_fft < 2 * hop or (self.n_fft - hop) % 2:
            raise ValueError(
                f"n_fft must be a multiple of hop, at least twice it, and differ from it by an even number; "
                f"got {self.n_fft} and {hop}"
            )
        self.first = nn.Conv1d(width, channels, 7, padding=3)
        self.speaker = nn.Conv1d(speaker_width, channels, 1) if speaker_width else None
        self.first_norm = nn.LayerNorm(channels, eps=1e-6)
        self.blocks = nn.ModuleList(
            ConvNeXtBlock(channels, inner or 3 * channels, BLOCK_KERNEL, 1 / layers) for _ in range(layers)
        )
        self.last_norm = nn.LayerNorm(channels, eps=1e-6)
        self.head = Linear(channels, self.n_fft + 2)
        self.register_buffer("window", torch.hann_window(self.n_fft), persistent=False)
        self.apply(_small_weights)
        self.context_frames = 3 + BLOCK_KERNEL // 2 * layers + self.n_fft // hop // 2

    def forward(self, latent: Tensor, speaker: Tensor | None = None) -> Tensor:
        hidden = _add_speaker(self.first(latent), self.speaker, speaker)
        hidden = self.first_norm(hidden.transpose(1, 2)).transpose(1, 2)
        for block in self.blocks:
            hidden = block(hidden)
        log_magnitude, phase = self.head(self.last_norm(hidden.transpose(1, 2))).chunk(2, dim=-1)
        with torch.autocast(latent.device.type, enabled=False):
            magnitude = log_magnitude.float().clamp(max=LOG_MAGNITUDE_LIMIT).exp()
            phase = phase.float()
            spectrum = torch.complex(magnitude * phase.cos(), magnitude * phase.sin())  # torch.polar is not vectorised
            return inverse_stft(spectrum, self.window.float(), self.hop).unsqueeze(1)  # type: ignore[operator,arg-type]


def _small_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv1d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def inverse_stft(spectrum: Tensor, window: Tensor, hop: int) -> Tensor:
    """Inverse STFT whose output has exactly T * hop samples ("same" padding); differentiable.

    spectrum: complex [B, T, n_fft // 2 + 1]; window: [n_fft], n_fft a multiple of hop → wave [B, T * hop]. Frames are
    windowed, overlap-added and divided by the overlapped squared window (Griffin & Lim 1984); (n_fft - hop) / 2 samples
    fall off each end.
    """
    frames = torch.fft.irfft(spectrum, n=window.numel(), dim=-1) * window
    envelope = _overlap_add((window * window).expand(1, spectrum.shape[1], -1), hop)
    trim = (window.numel() - hop) // 2
    wave = _overlap_add(frames, hop)[:, trim:-trim] if trim else _overlap_add(frames, hop)
    return wave / (envelope[:, trim:-trim] if trim else envelope)


def _overlap_add(frames: Tensor, hop: int) -> Tensor:
    """[B, T, n_fft] → [B, (T - 1) * hop + n_fft]: because n_fft is a multiple of hop, a few shifted sums of whole hops
    do it."""
    batch, count, length = frames.shape
    overlap = length // hop
    pieces = frames.reshape(batch, count, overlap, hop)
    shifted = (F.pad(pieces[:, :, i], (0, 0, i, overlap - 1 - i)) for i in range(overlap))
    total = next(shifted)
    for piece in shifted:
        total = total + piece
    return total.reshape(batch, -1)


def decode_stream(
    decoder: nn.Module, latent: Tensor, speaker: Tensor | None = None, chunk_frames: int = 64
) -> Iterator[Tensor]:
    """Decode ``latent`` [B, D, T] in pieces; yields waves [B, 1, chunk_frames * hop] (the last may be shorter).

    Each piece is decoded together with ``decoder.context_frames`` real neighbours, so the pieces joined equal the
    offline result.
    """
    if chunk_frames < 1:
        raise ValueError(f"chunk_frames must be at least 1, got {chunk_frames}")
    hop, context = int(decoder.hop), int(decoder.context_frames)  # type: ignore[arg-type]
    for start in range(0, latent.shape[-1], chunk_frames):
        end = min(start + chunk_frames, latent.shape[-1])
        left = max(0, start - context)
        wave = decoder(latent[:, :, left : end + context], speaker)
        yield wave[:, :, (start - left) * hop : (end - left) * hop]
