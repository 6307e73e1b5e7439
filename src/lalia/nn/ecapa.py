"""ECAPA-TDNN, a speaker's voice as one vector (Desplanques et al. 2020, 2005.07143), in SpeechBrain's published layout.

Names and shapes of the weights, the log-mel front end and the mirrored padding are those of SpeechBrain's
``spkrec-ecapa-voxceleb``, so its ``embedding_model.ckpt`` loads as it is and a single recording gets the same vector.
Unlike there, a recording in a padded batch gets the vector it gets alone: convolutions mirror at each row's own end,
and every mean, maximum and softmax is over a row's own frames.

Legend: B batch, S samples, T frames, M mel bins, C channels, W width of the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalia.nn.masks import sequence_mask
from lalia.nn.pieces import cut, pack, rejoin, take

RATE, N_FFT, HOP = 16_000, 400, 160
POWER_FLOOR = 1e-10
DYNAMIC_RANGE = 80.0  # dB below a recording's loudest mel value
VARIANCE_FLOOR = 1e-12
LONGEST = 60 * RATE  # a longer recording is embedded in equal pieces
BUDGET = 60 * RATE  # padded samples that are embedded at once


@dataclass
class Frames:
    """Which frames of a padded batch are real: ``lengths`` int64 [B], of ``total`` frames."""

    lengths: Tensor
    total: int

    @cached_property
    def mask(self) -> Tensor:
        """[B, 1, T], True on real frames."""
        return sequence_mask(self.lengths, self.total).unsqueeze(1)

    @cached_property
    def _mirrors(self) -> dict[int, Tensor]:
        return {}

    def mirror(self, hidden: Tensor, margin: int) -> Tensor:
        """Reflect each row [B, C, T] at both its ends: [B, C, T + 2 · margin]. What follows a row's margin is of no meaning.

        A row with fewer frames than the margin is reflected back and forth, where torch's own padding would refuse.
        """
        if margin not in self._mirrors:
            last = (self.lengths - 1).clamp_min(0).unsqueeze(1)
            period = (2 * last).clamp_min(1)
            place = torch.arange(-margin, self.total + margin, device=self.lengths.device) % period
            self._mirrors[margin] = torch.minimum(place, period - place).minimum(last).unsqueeze(1)
        return hidden.gather(2, self._mirrors[margin].expand(-1, hidden.shape[1], -1))


class Conv(nn.Module):
    """Convolution that keeps the length, mirrored at a row's ends: [B, C, T] → [B, C', T]. Weights at ``conv.*``."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.margin = dilation * (kernel - 1) // 2
        self.conv = nn.Conv1d(inputs, outputs, kernel, dilation=dilation)

    def forward(self, hidden: Tensor, frames: Frames | None = None) -> Tensor:
        if self.margin:
            assert frames is not None
            hidden = frames.mirror(hidden, self.margin)
        return self.conv(hidden)


class Norm(nn.Module):
    """Batch normalisation, weights at ``norm.*``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden)


class Tdnn(nn.Module):
    """Convolution → ReLU → batch norm."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = Conv(inputs, outputs, kernel, dilation)
        self.norm = Norm(outputs)

    def forward(self, hidden: Tensor, frames: Frames) -> Tensor:
        return self.norm(F.relu(self.conv(hidden, frames)))


class Res2Net(nn.Module):
    """``scale`` groups of channels: the first passes, each other is convolved after the previous result was added to it."""

    def __init__(self, channels: int, scale: int, kernel: int, dilation: int) -> None:
        super().__init__()
        if channels % scale:
            raise ValueError(f"{channels} channels cannot be divided into {scale} groups")
        part = channels // scale
        self.scale = scale
        self.blocks = nn.ModuleList(Tdnn(part, part, kernel, dilation) for _ in range(scale - 1))

    def forward(self, hidden: Tensor, frames: Frames) -> Tensor:
        first, *others = hidden.chunk(self.scale, dim=1)
        done = [first]
        for index, (block, group) in enumerate(zip(self.blocks, others, strict=True)):
            done.append(block(group if index == 0 else group + done[-1], frames))
        return torch.cat(done, dim=1)


class SqueezeExcitation(nn.Module):
    """Channels scaled by a function of their means over the recording."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.conv1 = Conv(channels, squeezed)
        self.conv2 = Conv(squeezed, channels)

    def forward(self, hidden: Tensor, frames: Frames) -> Tensor:
        mean = (hidden * frames.mask).sum(2, keepdim=True) / frames.mask.sum(2, keepdim=True)
        return torch.sigmoid(self.conv2(F.relu(self.conv1(mean)))) * hidden


class SeRes2Net(nn.Module):
    """Tdnn → Res2Net → Tdnn → squeeze and excitation, with a residual."""

    def __init__(self, inputs: int, outputs: int, scale: int, squeezed: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.tdnn1 = Tdnn(inputs, outputs)
        self.res2net_block = Res2Net(outputs, scale, kernel, dilation)
        self.tdnn2 = Tdnn(outputs, outputs)
        self.se_block = SqueezeExcitation(outputs, squeezed)
        self.shortcut = Conv(inputs, outputs) if inputs != outputs else None

    def forward(self, hidden: Tensor, frames: Frames) -> Tensor:
        residual = hidden if self.shortcut is None else self.shortcut(hidden)
        inner = self.tdnn2(self.res2net_block(self.tdnn1(hidden, frames), frames), frames)
        return self.se_block(inner, frames) + residual


class AttentivePooling(nn.Module):
    """Mean and standard deviation over time, weighted per channel by attention that sees the global ones (section 3.1)."""

    def __init__(self, channels: int, attention: int) -> None:
        super().__init__()
        self.tdnn = Tdnn(3 * channels, attention)
        self.conv = Conv(attention, channels)

    def forward(self, hidden: Tensor, frames: Frames) -> Tensor:
        """hidden [B, C, T] → [B, 2C, 1]."""
        share = frames.mask / frames.mask.sum(2, keepdim=True)
        mean, deviation = _moments(hidden, share)
        inner = self.tdnn.norm(F.relu(self._project(hidden, mean, deviation)))
        scores = self.conv(torch.tanh(inner)).masked_fill(~frames.mask, -math.inf)
        return torch.cat(_moments(hidden, scores.softmax(2)), dim=1)

    def _project(self, hidden: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
        """The first convolution on [hidden; mean; deviation], without repeating the last two for every frame."""
        layer = self.tdnn.conv.conv
        own, of_mean, of_deviation = layer.weight.chunk(3, dim=1)
        return F.conv1d(hidden, own, layer.bias) + F.conv1d(mean, of_mean) + F.conv1d(deviation, of_deviation)


def _moments(hidden: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and standard deviation over time, each [B, C, 1]."""
    mean = (weights * hidden).sum(2, keepdim=True)
    variance = (weights * (hidden - mean).square()).sum(2, keepdim=True)
    return mean, variance.clamp_min(VARIANCE_FLOOR).sqrt()


class Ecapa(nn.Module):
    """ECAPA-TDNN with its front end. It is used as it was trained: always in evaluation mode, whatever ``train()`` says.

    ``channels``, ``kernels`` and ``dilations`` are of the first layer, the SE-Res2Net blocks and the aggregation.
    """

    window: Tensor
    filters: Tensor

    def __init__(
        self,
        channels: Sequence[int] = (1024, 1024, 1024, 1024, 3072),
        kernels: Sequence[int] = (5, 3, 3, 3, 1),
        dilations: Sequence[int] = (1, 2, 3, 4, 1),
        mels: int = 80,
        attention: int = 128,
        squeezed: int = 128,
        scale: int = 8,
        width: int = 192,
    ) -> None:
        super().__init__()
        if not len(channels) == len(kernels) == len(dilations) >= 3:
            raise ValueError("channels, kernels and dilations must have the same length, at least 3")
        self.width = width
        self.blocks = nn.ModuleList([Tdnn(mels, channels[0], kernels[0], dilations[0])])
        for i in range(1, len(channels) - 1):
            self.blocks.append(SeRes2Net(channels[i - 1], channels[i], scale, squeezed, kernels[i], dilations[i]))
        self.mfa = Tdnn(sum(channels[1:-1]), channels[-1], kernels[-1], dilations[-1])
        self.asp = AttentivePooling(channels[-1], attention)
        self.asp_bn = Norm(2 * channels[-1])
        self.fc = Conv(2 * channels[-1], width)
        self.register_buffer("window", torch.hamming_window(N_FFT), persistent=False)
        self.register_buffer("filters", mel_filters(mels), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> Ecapa:
        """Stays in evaluation mode: batch statistics of a few turns would ruin the vectors."""
        return super().train(False)

    def forward(self, mel: Tensor, lengths: Tensor) -> Tensor:
        """Normalised log-mel [B, T, M] and lengths [B] in frames → embeddings [B, W]."""
        frames = Frames(lengths, mel.shape[1])
        hidden = self.blocks[0](mel.transpose(1, 2), frames)
        states = []
        for block in self.blocks[1:]:
            hidden = block(hidden, frames)
            states.append(hidden)
        hidden = self.mfa(torch.cat(states, dim=1), frames)
        return self.fc(self.asp_bn(self.asp(hidden, frames))).squeeze(2)

    def features(self, wave: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """wave [B, S] at 16 kHz, lengths [B] in samples → log-mel in dB of zero mean [B, T, M], lengths [B] in frames.

        25 ms Hamming windows every 10 ms, the first centred on the first sample, zeros outside the recording.
        """
        wave = wave.float() * sequence_mask(lengths, wave.shape[1])
        spectrum = torch.stft(
            wave, N_FFT, HOP, N_FFT, self.window, center=True, pad_mode="constant", return_complex=True
        ).transpose(1, 2)
        power = (spectrum.real.square() + spectrum.imag.square()) @ self.filters
        decibel = 10 * power.clamp_min(POWER_FLOOR).log10()
        count = lengths // HOP + 1
        real = sequence_mask(count, decibel.shape[1]).unsqueeze(2)
        loudest = decibel.masked_fill(~real, -math.inf).amax((1, 2), keepdim=True)
        decibel = decibel.maximum(loudest - DYNAMIC_RANGE)
        mean = (decibel * real).sum(1, keepdim=True) / count.view(-1, 1, 1)
        return decibel - mean, count

    @torch.no_grad()
    def embed(self, wave: Tensor, lengths: Tensor) -> Tensor:
        """Voices as vectors: wave [B, S] at 16 kHz, lengths [B] in samples → float32 [B, W], of no particular length.

        A recording above 60 s is embedded in equal pieces and their vectors averaged, so that memory is bounded. The
        sizes are those of SpeechBrain's ``encode_batch``, before its optional centring. ValueError for no samples.
        """
        pieces = cut(lengths.tolist(), LONGEST)
        groups = pack(pieces, BUDGET)
        vectors = []
        with torch.autocast(wave.device.type, enabled=False):
            for group in groups:
                mel, frames = self.features(*take(wave.float(), [pieces[index] for index in group]))
                vectors.append(self(mel, frames))
        return rejoin(vectors, groups, pieces, len(wave))


def mel_filters(mels: int, top: float = RATE / 2) -> Tensor:
    """Triangles of height one on the mel scale 2595 · log10(1 + f / 700), as SpeechBrain draws them: float32 [F, M].

    Both slopes of a triangle have the width of its left one, so it is symmetric in Hz (HTK's are not).
    """
    edges = torch.linspace(0, 2595 * math.log10(1 + top / 700), mels + 2)
    hertz = 700 * (10 ** (edges / 2595) - 1)
    band, centre = (hertz[1:] - hertz[:-1])[:-1], hertz[1:-1]
    slope = (torch.linspace(0, top, N_FFT // 2 + 1).unsqueeze(1) - centre) / band
    return torch.minimum(slope + 1, 1 - slope).clamp_min(0)
