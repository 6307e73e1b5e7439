"""Convolutional blocks over sequences ``[B, D, T]``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lalia.nn.linear import Linear


class LayerNorm(nn.Module):
    """Layer normalisation over the channels of ``[B, D, T]`` (Ba et al. 2016)."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: Tensor) -> Tensor:
        channels_last = hidden.transpose(1, 2)
        normed = F.layer_norm(channels_last, self.weight.shape, self.weight, self.bias, self.eps)
        # without a copy what follows would work element by element on memory in another order than its gradient's
        return normed.transpose(1, 2).contiguous()


def same_padding(kernel: int, dilation: int = 1) -> int:
    """Padding that keeps the length of an odd, dilated kernel; ValueError for an even kernel."""
    if kernel % 2 == 0:
        raise ValueError(f"the kernel must be odd to keep the length, got {kernel}")
    return dilation * (kernel - 1) // 2


class WaveNet(nn.Module):
    """Gated dilated convolutions with residual and skip paths (van den Oord et al. 2016), non-causal as in WaveGlow.

    The speaker is projected once for all layers. Layer i has dilation ``dilation_rate ** i``; ``kernel`` is odd.
    """

    def __init__(
        self,
        width: int,
        kernel: int,
        dilation_rate: int,
        layers: int,
        speaker_width: int = 0,
        dropout: float = 0.0,
        weight_norm: bool = True,
    ) -> None:
        super().__init__()
        self.width = width
        self.dropout = dropout
        wrap = parametrizations.weight_norm if weight_norm else _unchanged
        self.speaker = wrap(nn.Conv1d(speaker_width, 2 * width * layers, 1)) if speaker_width else None
        self.gates = nn.ModuleList()
        self.mixers = nn.ModuleList()
        for layer in range(layers):
            dilation = dilation_rate**layer
            gate = nn.Conv1d(width, 2 * width, kernel, dilation=dilation, padding=same_padding(kernel, dilation))
            # the last layer has no successor, hence no residual half
            mixer = nn.Conv1d(width, 2 * width if layer + 1 < layers else width, 1)
            self.gates.append(wrap(gate))
            self.mixers.append(wrap(mixer))

    def forward(self, hidden: Tensor, mask: Tensor, speaker: Tensor | None = None) -> Tensor:
        """hidden [B, D, T], mask [B, 1, T], speaker [B, G, 1] → sum of the skip paths [B, D, T], zero where masked."""
        hidden = hidden * mask
        shifts: list[Tensor | None] = [None] * len(self.gates)
        if self.speaker is not None and speaker is not None:
            shifts = list(self.speaker(speaker).chunk(len(self.gates), dim=1))
        skips = None
        for gate, mixer, shift in zip(self.gates, self.mixers, shifts, strict=True):
            mixed = mixer(self._activate(gate(hidden), shift))
            skip = mixed[:, -self.width :]
            skips = skip if skips is None else skips + skip
            if mixed.shape[1] > self.width:
                hidden = (hidden + mixed[:, : self.width]) * mask
        assert skips is not None, "WaveNet needs at least one layer"
        return skips * mask

    def _activate(self, gated: Tensor, shift: Tensor | None) -> Tensor:
        if shift is not None:
            gated = gated + shift
        signal, gate = gated.chunk(2, dim=1)
        return F.dropout(torch.tanh(signal) * torch.sigmoid(gate), self.dropout, self.training)


def _unchanged(module: nn.Module) -> nn.Module:
    return module


def fold_norms(network: nn.Module) -> None:
    """Fold weight and spectral norms into plain weights, for inference: the output stays, the state dict's names change.

    Calling it twice is harmless. The network should not be trained afterwards.
    """
    for module in network.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


class ConvNeXtBlock(nn.Module):
    """ConvNeXt block in one dimension (Liu et al. 2022, as in Vocos, Siuzdak 2023), with an optional speaker.

    Depthwise convolution → LayerNorm → (speaker scale and shift, FiLM, Perez et al. 2018) → linear, GELU, linear →
    layer scale → residual. An output frame depends on ``kernel // 2`` frames on each side. The speaker's projection
    starts at zero, so that a new block ignores the speaker.
    """

    def __init__(
        self, width: int, hidden_width: int, kernel: int = 7, layer_scale: float = 1.0, speaker_width: int = 0
    ) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(width, width, kernel, padding=same_padding(kernel), groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.widen = Linear(width, hidden_width)
        self.narrow = Linear(hidden_width, width)
        self.scale = nn.Parameter(torch.full((width,), layer_scale))
        self.speaker = nn.Linear(speaker_width, 2 * width) if speaker_width else None
        if self.speaker is not None:
            nn.init.zeros_(self.speaker.weight)
            nn.init.zeros_(self.speaker.bias)

    def forward(self, hidden: Tensor, speaker: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """hidden [B, D, T], speaker [B, G, 1] or None, mask [B, 1, T] or None → [B, D, T]."""
        if mask is not None:
            hidden = hidden * mask
        inner = self.norm(self.depthwise(hidden).transpose(1, 2))
        if self.speaker is not None and speaker is not None:
            gain, shift = self.speaker(speaker.transpose(1, 2)).chunk(2, dim=-1)
            inner = inner * (1 + gain) + shift
        inner = self.narrow(self.widen.gelu(inner)) * self.scale
        hidden = hidden + inner.transpose(1, 2)
        return hidden if mask is None else hidden * mask


def depthwise_conv(layer: nn.Module, hidden: Tensor) -> Tensor:
    """A depthwise convolution of stride 1: [B, D, T] → [B, D, T]. On a CPU as a sum of shifted products.

    For the kernel of 3 of the duration predictors that is 4 to 5 times as fast there, forward and backward, as the
    library's dilated depthwise convolution.
    """
    if hidden.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return layer(hidden)
    assert isinstance(layer, nn.Conv1d) and layer.bias is not None
    (kernel,), (dilation,), reach = layer.kernel_size, layer.dilation, int(layer.padding[0])
    length, padded = hidden.shape[-1], F.pad(hidden, (reach, reach))
    total = layer.bias.unsqueeze(-1)
    for tap in range(kernel):
        total = torch.addcmul(total, padded[..., tap * dilation : tap * dilation + length], layer.weight[:, :, tap])
    return total


class DDSConv(nn.Module):
    """Dilated depth-separable convolutions of VITS' stochastic duration predictor (Kim et al. 2021, appendix).

    Layer i has dilation ``kernel ** i``.
    """

    def __init__(self, width: int, kernel: int, layers: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.depthwise = nn.ModuleList(
            nn.Conv1d(width, width, kernel, groups=width, dilation=kernel**i, padding=same_padding(kernel, kernel**i))
            for i in range(layers)
        )
        self.pointwise = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(layers))
        self.norms = nn.ModuleList(LayerNorm(width) for _ in range(2 * layers))

    def forward(self, hidden: Tensor, mask: Tensor, condition: Tensor | None = None) -> Tensor:
        """hidden [B, D, T], mask [B, 1, T], condition [B, D, T or 1] added to it → [B, D, T], zero where masked."""
        if condition is not None:
            hidden = hidden + condition
        for layer, (depthwise, pointwise) in enumerate(zip(self.depthwise, self.pointwise, strict=True)):
            inner = F.gelu(self.norms[2 * layer](depthwise_conv(depthwise, hidden * mask)))
            inner = F.gelu(self.norms[2 * layer + 1](pointwise(inner)))
            hidden = hidden + F.dropout(inner, self.dropout, self.training)
        return hidden * mask
