"""Critics of waveforms and of durations.

Waveform critics are called on the real and on the generated wave separately (never concatenated) and return their
scores together with the feature maps that the feature-matching loss compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

LEAK = 0.1
NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {"weight": weight_norm, "spectral": spectral_norm}


def _norm(name: str) -> Callable[[nn.Module], nn.Module]:
    if name not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {name!r}")
    return NORMS[name]


def _scaled(channels: Sequence[int], scale: float) -> list[int]:
    return [max(1, round(c * scale)) for c in channels]


class _Critic(nn.Module):
    """Convolutions with leaky ReLU, then a score map; every layer's output is a feature map."""

    layers: nn.ModuleList
    score: nn.Module

    def judge(self, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        for layer in self.layers:
            hidden = F.leaky_relu(layer(hidden), LEAK)
            features.append(hidden)
        hidden = self.score(hidden)
        features.append(hidden)
        return hidden.flatten(1), features


class ScaleDiscriminator(_Critic):
    """Grouped one-dimensional convolutions over the raw wave (MelGAN / HiFi-GAN). wave [B, 1, S] → scores [B, N],
    feature maps.

    ``pool`` halves the rate that many times first, by average pooling.
    """

    def __init__(self, channels_scale: float = 1.0, norm: str = "weight", pool: int = 0) -> None:
        super().__init__()
        wrap = _norm(norm)
        widths = [1, *_scaled([16, 64, 256, 1024, 1024, 1024], channels_scale)]
        shapes = [(15, 1, False), (41, 4, True), (41, 4, True), (41, 4, True), (41, 4, True), (5, 1, False)]
        self.layers = nn.ModuleList()
        for (kernel, stride, grouped), inputs, outputs in zip(shapes, widths[:-1], widths[1:], strict=True):
            groups = math.gcd(inputs, outputs, max(1, inputs // 4)) if grouped else 1
            self.layers.append(wrap(nn.Conv1d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)))
        self.score = wrap(nn.Conv1d(widths[-1], 1, 3, padding=1))
        self.pool = pool

    def forward(self, wave: Tensor) -> tuple[Tensor, list[Tensor]]:
        for _ in range(self.pool):
            wave = F.avg_pool1d(wave, 4, 2, padding=2)
        return self.judge(wave)


class PeriodDiscriminator(_Critic):
    """HiFi-GAN's period critic: the wave folded to [S / period, period], convolved along time. wave [B, 1, S] → scores,
    feature maps.

    The wave is reflect-padded to a multiple of the period.
    """

    def __init__(self, period: int, channels_scale: float = 1.0, norm: str = "weight") -> None:
        super().__init__()
        if period < 1:
            raise ValueError(f"period must be at least 1, got {period}")
        wrap = _norm(norm)
        widths = [1, *_scaled([32, 128, 512, 1024, 1024], channels_scale)]
        self.period = period
        self.layers = nn.ModuleList(
            wrap(nn.Conv2d(inputs, outputs, (5, 1), (stride, 1), (2, 0)))
            for stride, inputs, outputs in zip([3, 3, 3, 3, 1], widths[:-1], widths[1:], strict=True)
        )
        self.score = wrap(nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, wave: Tensor) -> tuple[Tensor, list[Tensor]]:
        missing = -wave.shape[-1] % self.period
        if missing:
            wave = F.pad(wave, (0, missing), "reflect")
        return self.judge(wave.unflatten(-1, (-1, self.period)))


class ResolutionDiscriminator(_Critic):
    """UnivNet's spectrogram critic (Jang et al. 2021): convolutions over an STFT magnitude. wave [B, 1, S] → scores,
    feature maps.

    ``resolution`` = [n_fft, hop, window], in samples. The STFT runs in float32.
    """

    def __init__(self, resolution: Sequence[int], channels_scale: float = 1.0, norm: str = "weight") -> None:
        super().__init__()
        if len(resolution) != 3:
            raise ValueError(f"a resolution is [n_fft, hop, window], got {list(resolution)}")
        self.n_fft, self.hop, win = resolution
        wrap, width = _norm(norm), _scaled([32], channels_scale)[0]
        shapes = [((3, 9), (1, 1)), ((3, 9), (1, 2)), ((3, 9), (1, 2)), ((3, 9), (1, 2)), ((3, 3), (1, 1))]
        self.layers = nn.ModuleList(
            wrap(nn.Conv2d(width if i else 1, width, kernel, stride, (kernel[0] // 2, kernel[1] // 2)))
            for i, (kernel, stride) in enumerate(shapes)
        )
        self.score = wrap(nn.Conv2d(width, 1, 3, padding=1))
        self.register_buffer("window", torch.hann_window(win), persistent=False)

    def forward(self, wave: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.judge(self.magnitude(wave).unsqueeze(1))

    def magnitude(self, wave: Tensor) -> Tensor:
        """wave [B, 1, S] → [B, n_fft // 2 + 1, T], float32; the floor keeps the gradient of the root finite at
        silence."""
        with torch.autocast(wave.device.type, enabled=False):
            padding = (self.n_fft - self.hop) // 2
            padded = F.pad(wave.float(), (padding, padding), "reflect").squeeze(1)
            window: Tensor = self.window.float()  # type: ignore[operator,assignment]
            spectrum = torch.stft(
                padded, self.n_fft, self.hop, window.numel(), window, center=False, return_complex=True
            )
            return (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()


class MultiDiscriminator(nn.Module):
    """All waveform critics together: VITS has one scale and the periods 2 3 5 7 11; spectrogram resolutions are an
    option.

    wave [B, 1, S] → (scores: one [B, N_i] per critic, feature maps: one list per critic). Call it once per wave.
    ``channels_scale`` multiplies every layer's channels; ``norm`` is "weight" or "spectral".
    """

    def __init__(
        self,
        scales: int = 1,
        periods: Sequence[int] = (2, 3, 5, 7, 11),
        resolutions: Sequence[Sequence[int]] = (),
        channels_scale: float = 1.0,
        norm: str = "weight",
    ) -> None:
        super().__init__()
        self.critics = nn.ModuleList(ScaleDiscriminator(channels_scale, norm, pool=i) for i in range(scales))
        self.critics.extend(PeriodDiscriminator(p, channels_scale, norm) for p in periods)
        self.critics.extend(ResolutionDiscriminator(r, channels_scale, norm) for r in resolutions)
        if not len(self.critics):
            raise ValueError("a discriminator needs at least one scale, period or resolution")

    def forward(self, wave: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        scores, features = [], []
        for critic in self.critics:
            score, maps = critic(wave)
            scores.append(score)
            features.append(maps)
        return scores, features


class DurationDiscriminator(nn.Module):
    """Tells real durations from predicted ones, token by token (VITS2, Kong et al. 2023), with a recurrent head.

    ``forward(hidden [B, width, L], mask [B, 1, L], log_durations, speaker)`` takes any number of log-duration tensors
    [B, 1, L] — the real ones come from the alignment search — and returns one score tensor [B, L, 1] in [0, 1] for
    each, zero where masked. Each is judged on its own; the text is encoded once and detached, so that the text encoder
    does not learn to fool this critic.
    """

    def __init__(
        self, width: int = 192, filter_width: int = 192, kernel: int = 3, dropout: float = 0.1, speaker_width: int = 0
    ) -> None:
        super().__init__()
        self.speaker = nn.Conv1d(speaker_width, width, 1) if speaker_width else None
        self.convs = nn.ModuleList(
            nn.Conv1d(w, filter_width, kernel, padding=kernel // 2) for w in (width, filter_width)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(filter_width) for _ in self.convs)
        self.dropout = nn.Dropout(dropout)
        self.duration = nn.Conv1d(1, filter_width, 1)
        self.recurrent = nn.LSTM(2 * filter_width, filter_width, batch_first=True, bidirectional=True)
        self.score = nn.Linear(2 * filter_width, 1)

    def forward(
        self, hidden: Tensor, mask: Tensor, log_durations: Sequence[Tensor], speaker: Tensor | None = None
    ) -> list[Tensor]:
        if isinstance(log_durations, Tensor):
            raise TypeError(
                "log_durations must be a list of tensors [B, 1, L]; a bare tensor would be split along the batch"
            )
        text = self.encode(hidden, mask, speaker)
        return [self.judge(text, mask, log_duration) for log_duration in log_durations]

    def encode(self, hidden: Tensor, mask: Tensor, speaker: Tensor | None = None) -> Tensor:
        """Text hidden [B, width, L] → [B, filter_width, L], without gradient to the text encoder and the speaker
        table."""
        hidden = hidden.detach()
        if self.speaker is not None:
            if speaker is None:
                raise ValueError("this discriminator is conditioned on a speaker vector [B, G, 1], but none was given")
            hidden = hidden + self.speaker(speaker.detach())
        for conv, norm in zip(self.convs, self.norms, strict=True):
            hidden = torch.relu(conv(hidden * mask))
            hidden = self.dropout(norm(hidden.transpose(1, 2)).transpose(1, 2))
        return hidden * mask

    def judge(self, text: Tensor, mask: Tensor, log_duration: Tensor) -> Tensor:
        """Encoded text [B, F, L] and log-durations [B, 1, L] → scores [B, L, 1]; padding is packed away, so it cannot
        matter."""
        joined = torch.cat([text, self.duration(log_duration * mask)], dim=1).transpose(1, 2)
        lengths = mask.sum((1, 2)).long().cpu()
        packed = pack_padded_sequence(joined, lengths, batch_first=True, enforce_sorted=False)
        output, _ = pad_packed_sequence(self.recurrent(packed)[0], batch_first=True, total_length=joined.shape[1])
        return torch.sigmoid(self.score(output)) * mask.transpose(1, 2)
