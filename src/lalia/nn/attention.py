"""Self-attention with learned relative positions, and the encoder of VITS built from it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalia.nn.conv import LayerNorm, same_padding


class RelativeAttention(nn.Module):
    """Multi-head self-attention with relative key and value embeddings (Shaw et al. 2018), shared by the heads.

    A position sees the embedding of a distance up to ``window``; beyond it there is none (as in VITS). The relative
    terms touch only the 2·window+1 diagonals of the [T, T] scores. ``dropout`` falls on the attention weights.
    """

    def __init__(self, width: int, heads: int, window: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} cannot be split into {heads} heads")
        self.heads = heads
        self.head_width = width // heads
        self.window = window
        self.dropout = dropout
        self.query_key_value = nn.Conv1d(width, 3 * width, 1)
        self.output = nn.Conv1d(width, width, 1)
        self.relative_keys = nn.Parameter(torch.randn(2 * window + 1, self.head_width) * self.head_width**-0.5)
        self.relative_values = nn.Parameter(torch.randn(2 * window + 1, self.head_width) * self.head_width**-0.5)
        for projection in self.query_key_value.weight.data.chunk(3, dim=0):
            nn.init.xavier_uniform_(projection)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden [B, D, T], mask [B, 1, T] → [B, D, T]. Masked positions are never attended to."""
        batch, width, length = hidden.shape
        projected = self.query_key_value(hidden).view(batch, 3, self.heads, self.head_width, length)
        query, key, value = projected.unbind(1)  # each [B, H, D/H, T]
        query = query.transpose(-1, -2) / math.sqrt(self.head_width)
        index, inside = self._band(length, hidden.device)
        index = index.expand(batch, self.heads, -1, -1)
        scores = torch.matmul(query, key)
        near = torch.matmul(query, self.relative_keys.t()) * inside
        scores.scatter_add_(-1, index, near.to(scores.dtype))
        # the lowest finite number, not -inf: an item without any valid position must not give NaN
        scores.masked_fill_(mask.unsqueeze(1) == 0, torch.finfo(scores.dtype).min)
        weights = F.dropout(scores.softmax(-1), self.dropout, self.training)
        mixed = torch.matmul(weights, value.transpose(-1, -2))
        banded = weights.gather(-1, index) * inside
        mixed = mixed + torch.matmul(banded, self.relative_values)
        return self.output(mixed.transpose(-1, -2).reshape(batch, width, length))

    def _band(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Key position of each query and distance [T, 2w+1], clamped to the sequence, and whether it exists."""
        positions = torch.arange(length, device=device).unsqueeze(1)
        keys = positions + torch.arange(-self.window, self.window + 1, device=device)
        return keys.clamp(0, length - 1), (keys >= 0) & (keys < length)


class ConvFeedForward(nn.Module):
    """Two convolutions of an odd ``kernel`` around a ReLU, masked so that padding never leaks into valid positions."""

    def __init__(self, width: int, filter_width: int, kernel: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.widen = nn.Conv1d(width, filter_width, kernel, padding=same_padding(kernel))
        self.narrow = nn.Conv1d(filter_width, width, kernel, padding=same_padding(kernel))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden [B, D, T], mask [B, 1, T] → [B, D, T], zero where masked."""
        inner = F.dropout(F.relu(self.widen(hidden * mask)), self.dropout, self.training)
        return self.narrow(inner * mask) * mask


class RelativeEncoder(nn.Module):
    """Transformer encoder of VITS (Kim et al. 2021): relative attention, conv feed-forward, norm after each residual.

    With ``speaker_width`` above 0 the speaker vector, projected, is added to the hidden state before the layer of
    index ``speaker_layer`` (counted from 0; the third by default, as in VITS2, Kong et al. 2023).
    """

    def __init__(
        self,
        width: int,
        filter_width: int,
        heads: int,
        layers: int,
        kernel: int = 3,
        dropout: float = 0.0,
        window: int = 4,
        speaker_width: int = 0,
        speaker_layer: int = 2,
    ) -> None:
        super().__init__()
        if speaker_width and not 0 <= speaker_layer < layers:
            raise ValueError(
                f"speaker_layer {speaker_layer} is not one of the {layers} layers (counted from 0): "
                f"choose at most {layers - 1}, more layers, or speaker_width=0"
            )
        self.dropout = dropout
        self.speaker_layer = speaker_layer
        self.speaker = nn.Linear(speaker_width, width) if speaker_width else None
        self.attentions = nn.ModuleList(RelativeAttention(width, heads, window, dropout) for _ in range(layers))
        self.feed_forwards = nn.ModuleList(ConvFeedForward(width, filter_width, kernel, dropout) for _ in range(layers))
        self.norms = nn.ModuleList(LayerNorm(width) for _ in range(2 * layers))

    def forward(self, hidden: Tensor, mask: Tensor, speaker: Tensor | None = None) -> Tensor:
        """hidden [B, D, T], mask [B, 1, T], speaker [B, G, 1] → [B, D, T], zero where masked.

        Values on valid positions do not depend on the padding. ``speaker=None`` leaves the speaker out.
        """
        hidden = hidden * mask
        for layer, (attention, feed_forward) in enumerate(zip(self.attentions, self.feed_forwards, strict=True)):
            if layer == self.speaker_layer and self.speaker is not None and speaker is not None:
                hidden = (hidden + self.speaker(speaker.transpose(1, 2)).transpose(1, 2)) * mask
            hidden = self.norms[2 * layer](hidden + self._drop(attention(hidden, mask)))
            hidden = self.norms[2 * layer + 1](hidden + self._drop(feed_forward(hidden, mask)))
        return hidden * mask

    def _drop(self, hidden: Tensor) -> Tensor:
        return F.dropout(hidden, self.dropout, self.training)
