"""Whisper's encoder (Radford et al. 2022, 2212.04356) as a function of a padded batch whose rows get what they would get alone.

Padded, every clip is followed by silence up to 30 s, as Whisper was trained. Trimmed, the batch is as long as its longest clip and
attention stays within a clip: several times faster, and other hidden states, because there is no silence to attend to.

Legend: N clips, S samples at 16 kHz, T hidden frames (50 a second), D width, M mel bins. The parameters have the names that
transformers' WhisperEncoder gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalia.nn.masks import sequence_mask

RATE = 16_000
N_FFT, HOP = 400, 160  # the spectrogram: 25 ms every 10 ms
FRAME = 2 * HOP  # samples of one hidden frame
MEL_FLOOR, MEL_RANGE = 1e-10, 8.0  # power floor, and decades below the loudest value


def hidden_frames(lengths: Tensor) -> Tensor:
    """Lengths in samples → lengths in hidden frames, of which the last may be begun only."""
    return (lengths + FRAME - 1) // FRAME


class WhisperAttention(nn.Module):
    """Self-attention with ``heads`` heads; keys have no bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        """hidden [N, T, D], mask bool [N, 1, 1, T] of the frames that may be attended to → [N, T, D]."""
        query, key, value = (
            project(hidden).unflatten(2, (self.heads, -1)).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class WhisperLayer(nn.Module):
    """Attention and a GELU network, each behind a norm and beside a residual. Dropout acts in training only."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        width, inner = settings["d_model"], settings["encoder_ffn_dim"]
        self.self_attn = WhisperAttention(width, settings["encoder_attention_heads"])
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.dropout = float(settings.get("dropout", 0.0))
        self.attention_dropout = float(settings.get("attention_dropout", 0.0))
        self.activation_dropout = float(settings.get("activation_dropout", 0.0))

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """hidden [N, T, D], mask bool [N, 1, 1, T] or None → [N, T, D]."""
        mixed = self.self_attn(self.self_attn_layer_norm(hidden), mask, self.attention_dropout if self.training else 0.0)
        hidden = hidden + F.dropout(mixed, self.dropout, self.training)
        inner = F.gelu(self.fc1(self.final_layer_norm(hidden)))
        inner = self.fc2(F.dropout(inner, self.activation_dropout, self.training))
        return hidden + F.dropout(inner, self.dropout, self.training)


class WhisperEncoder(nn.Module):
    """All hidden states of Whisper's encoder. The first is the input of the first layer, the last one has the final norm.

    Args:
        settings: the model's configuration (config.json) as a mapping; only what concerns the encoder is read.
        filters: mel filters float32 [M, N_FFT // 2 + 1] on Slaney's scale.
    """

    filters: Tensor
    window: Tensor

    def __init__(self, settings: Mapping[str, Any], filters: Tensor) -> None:
        super().__init__()
        width, bins = settings["d_model"], settings["num_mel_bins"]
        if settings.get("activation_function", "gelu") != "gelu":
            raise ValueError(f"this Whisper's activation is {settings['activation_function']!r}; only gelu is known")
        if len(filters) != bins:
            raise ValueError(f"this Whisper hears {bins} mel bins, the filters have {len(filters)}")
        self.width, self.dropout = width, float(settings.get("dropout", 0.0))
        self.positions = int(settings.get("max_source_positions", 1500))
        self.conv1 = nn.Conv1d(bins, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(self.positions, width).requires_grad_(False)
        self.layers = nn.ModuleList(WhisperLayer(settings) for _ in range(settings["encoder_layers"]))
        self.layer_norm = nn.LayerNorm(width)
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("window", torch.hann_window(N_FFT), persistent=False)

    @property
    def longest(self) -> int:
        """Samples of the longest clip (30 s for every published model)."""
        return self.positions * FRAME

    def forward(self, wave: Tensor, lengths: Tensor, trim: bool = True) -> tuple[list[Tensor], Tensor]:
        """wave [N, S], lengths [N] in samples, the longest S → all hidden states, each [N, T, D], and lengths [N] in frames.

        ValueError for more samples than the model has positions.
        """
        total = -(-wave.shape[1] // FRAME) if trim else self.positions
        return self.from_mel(self.log_mel(wave, lengths, total, trim), lengths, trim)

    def from_mel(self, features: Tensor, lengths: Tensor, trim: bool = True) -> tuple[list[Tensor], Tensor]:
        """Log-mel [N, M, 2 · T] of :meth:`log_mel`, lengths [N] in samples → as :meth:`forward`."""
        frames, total = hidden_frames(lengths), features.shape[2] // 2
        hidden = F.gelu(self.conv2(F.gelu(self.conv1(features)))).transpose(1, 2)
        hidden = hidden + self.embed_positions.weight[:total]
        hidden = F.dropout(hidden, self.dropout, self.training)
        mask = sequence_mask(frames, total).view(-1, 1, 1, total) if trim and len(features) > 1 else None
        states = [hidden]
        for layer in self.layers:
            states.append(layer(states[-1], mask))
        states[-1] = self.layer_norm(states[-1])
        return states, frames

    def log_mel(self, wave: Tensor, lengths: Tensor, total: int, trim: bool = True) -> Tensor:
        """wave [N, S], lengths [N] → Whisper's log-mel [N, M, 2 · total]. When trimmed, zero beyond a clip's own frames."""
        if wave.shape[1] > self.longest:
            raise ValueError(f"{wave.shape[1] / RATE:g} s are more than this Whisper's {self.longest / RATE:g} s; window the wave")
        mask = sequence_mask(lengths, wave.shape[1])
        padded = F.pad(wave.float() * mask, (0, total * FRAME - wave.shape[1]))
        margin = N_FFT // 2
        padded = F.pad(F.pad(padded, (margin, 0), mode="reflect"), (0, margin), mode="constant" if trim else "reflect")
        with torch.autocast(wave.device.type, enabled=False):
            spectrum = torch.stft(padded, N_FFT, HOP, N_FFT, self.window, center=False, return_complex=True)[..., :-1]
            power = self.filters @ (spectrum.real.square() + spectrum.imag.square())
            decades = power.clamp_min(MEL_FLOOR).log10()
            if not trim:
                return (decades.maximum(decades.amax((1, 2), keepdim=True) - MEL_RANGE) + 4) / 4
            own = sequence_mask(2 * hidden_frames(lengths), 2 * total).unsqueeze(1)
            loudest = decades.masked_fill(~own, -torch.inf).amax((1, 2), keepdim=True)
            return (decades.maximum(loudest - MEL_RANGE) + 4) / 4 * own
