"""Text encoder (prior), posterior encoder and reference encoder of VITS2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalia.nn.attention import RelativeEncoder
from lalia.nn.conv import WaveNet
from lalia.systems.vits2.config import ModelConfig


@dataclass
class Prior:
    """``hidden, mean, log_scale`` [B, D, L]; ``mask`` [B, 1, L]; ``mel`` [B, M, L], the mel frame each token predicts, or None."""

    hidden: Tensor
    mean: Tensor
    log_scale: Tensor
    mask: Tensor
    mel: Tensor | None = None


class TextEncoder(nn.Module):
    """Phones, tones and languages (and BERT features) → Gaussian prior per token.

    VITS2 section 2.4: the speaker vector enters at layer ``speaker_layer``. Embeddings are scaled by √width. With ``mels``
    above 0 each token also predicts its mel frame (the encoder of Grad-TTS, 2105.06337), which finds alignments sooner.
    """

    def __init__(self, config: ModelConfig, symbols: int, tones: int, languages: int, mels: int = 0) -> None:
        super().__init__()
        width = config.width
        self.width = width
        self.symbol = nn.Embedding(symbols, width)
        self.tone = nn.Embedding(tones, width)
        self.language = nn.Embedding(languages, width)
        for table in (self.symbol, self.tone, self.language):
            nn.init.normal_(table.weight, 0.0, width**-0.5)
        self.bert = nn.ModuleDict({name: nn.Conv1d(config.bert_width, width, 1) for name in config.bert_languages})
        self.encoder = RelativeEncoder(
            width=width,
            filter_width=config.filter,
            heads=config.heads,
            layers=config.layers,
            kernel=config.kernel,
            dropout=config.dropout,
            window=config.window,
            speaker_width=config.speaker_width if config.speaker_conditioned_encoder else 0,
            speaker_layer=config.speaker_layer,
        )
        self.projection = nn.Conv1d(width, 2 * width, 1)
        self.mel = nn.Conv1d(width, mels, 1) if mels else None
        if self.mel is not None and self.mel.bias is not None:
            nn.init.constant_(self.mel.bias, -4.0)  # about the mean of a log-mel, which is slow to learn

    def forward(
        self,
        text: Tensor,
        tones: Tensor,
        languages: Tensor,
        mask: Tensor,
        bert: Mapping[str, Tensor],
        speaker: Tensor | None,
    ) -> Prior:
        """``text, tones, languages`` int64 [B, L]; ``mask`` [B, 1, L]; ``bert[name]`` [B, bert_width, L]; ``speaker`` [B, G, 1]."""
        hidden = self.symbol(text) + self.tone(tones) + self.language(languages)
        hidden = hidden.transpose(1, 2)
        for name, projection in self.bert.items():
            hidden = hidden + projection(bert[name])
        hidden = self.encoder(hidden * math.sqrt(self.width) * mask, mask, speaker)
        mean, log_scale = (self.projection(hidden) * mask).chunk(2, dim=1)
        return Prior(hidden, mean, log_scale, mask, self.mel(hidden) * mask if self.mel is not None else None)


class PosteriorEncoder(nn.Module):
    """Linear spectrogram → Gaussian posterior per frame (a non-causal WaveNet; VITS section 2.5)."""

    def __init__(self, config: ModelConfig, bins: int) -> None:
        super().__init__()
        self.width = config.width
        self.before = nn.Conv1d(bins, config.width, 1)
        self.wavenet = WaveNet(
            width=config.width,
            kernel=config.posterior_kernel,
            dilation_rate=1,
            layers=config.posterior_layers,
            speaker_width=config.speaker_width,
        )
        self.projection = nn.Conv1d(config.width, 2 * config.width, 1)

    def forward(self, spectrogram: Tensor, mask: Tensor, speaker: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``spectrogram`` [B, F, T], ``noise`` [B, D, T] → sample, mean, log_scale [B, D, T]."""
        hidden = self.wavenet(self.before(spectrogram) * mask, mask, speaker)
        mean, log_scale = (self.projection(hidden) * mask).float().chunk(2, dim=1)
        return (mean + noise * log_scale.exp()) * mask, mean, log_scale


class ReferenceEncoder(nn.Module):
    """A recording → speaker vector: six strided 2-D convolutions and a GRU (GST, 1803.09017), for runs without a table."""

    CHANNELS = (32, 32, 64, 64, 128, 128)

    def __init__(self, bins: int, speaker_width: int) -> None:
        super().__init__()
        self.bins = bins
        sizes = (1, *self.CHANNELS)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(sizes, sizes[1:], strict=False)
        )
        for _ in self.CHANNELS:
            bins = (bins - 1) // 2 + 1
        self.gru = nn.GRU(self.CHANNELS[-1] * bins, 128, batch_first=True)
        self.projection = nn.Linear(128, speaker_width)

    def forward(self, spectrogram: Tensor, lengths: Tensor) -> Tensor:
        """``spectrogram`` [B, F, T] with ``lengths`` [B] → [B, G, 1]; padding does not reach the result."""
        hidden = spectrogram.transpose(1, 2).unsqueeze(1)
        for convolution in self.convolutions:
            positions = torch.arange(hidden.shape[2], device=hidden.device)
            hidden = hidden * (positions < lengths[:, None])[:, None, :, None]
            hidden = F.relu(convolution(hidden))
            lengths = torch.div(lengths - 1, 2, rounding_mode="floor") + 1
        hidden = hidden.transpose(1, 2).flatten(2)
        outputs, _ = self.gru(hidden)
        last = outputs[torch.arange(outputs.shape[0], device=outputs.device), lengths.clamp(min=1) - 1]
        return self.projection(last).unsqueeze(-1)
