"""WavLM and Whisper's encoder as functions of a padded batch whose rows get what they would get alone.

Legend: N utterances, S samples at 16 kHz, T frames, D width, M mel bins.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalia.mel import MelSpec, mel_filters
from lalia.nn.masks import sequence_mask
from lalia.nn.whisper import HOP, N_FFT, RATE, WhisperEncoder

VARIANCE_FLOOR = 1e-7  # of WavLM's feature extractor


class Backbone(Protocol):
    """What :class:`lalia.systems.emotion.encoders.SpeechEncoder` needs of a network."""

    layers: int
    width: int

    def states(self, wave: Tensor, lengths: Tensor) -> tuple[list[Tensor], Tensor]:
        """wave [N, S], lengths [N] in samples, the longest S → all hidden states, each [N, T, D], and lengths [N] in frames."""
        ...


class MaskedGroupNorm(nn.Module):
    """Group norm with one group per channel over each row's own frames.

    WavLM's base models normalise their first convolution over time, padding included, so that a row's hidden states
    would depend on how much it was padded. ``lengths`` int64 [N] must be set before each call.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        assert norm.num_groups == norm.num_channels, "WavLM's norm has one group per channel"
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.lengths: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, D, T] → [N, D, T]; what is beyond a row's length is finite and of no meaning."""
        assert self.lengths is not None, "set lengths first"
        mask = sequence_mask(self.lengths, hidden.shape[2]).unsqueeze(1)
        count = mask.sum(2, keepdim=True)
        values = hidden.float()
        mean = (values * mask).sum(2, keepdim=True) / count
        centred = (values - mean) * mask
        variance = centred.square().sum(2, keepdim=True) / count
        normed = centred * torch.rsqrt(variance + self.eps) * self.weight.unsqueeze(1) + self.bias.unsqueeze(1)
        return normed.to(hidden.dtype)


class WavlmBackbone(nn.Module):
    """transformers' WavLMModel (Chen et al. 2021, 2110.13900) without weights: all its hidden states, the embedding's first.

    ``settings`` is its configuration as a dict. ``normalize``: waves are given zero mean and unit variance (the large model).
    Spec-augmentation and layer drop are off: they would draw from generators that a repeated forward does not replay.
    """

    def __init__(self, settings: Mapping[str, Any], normalize: bool, freeze_extractor: bool = True) -> None:
        super().__init__()
        from transformers import WavLMConfig, WavLMModel

        self.model = WavLMModel(WavLMConfig.from_dict({**settings, "apply_spec_augment": False, "layerdrop": 0.0}))
        config = self.model.config
        self.layers, self.width = config.num_hidden_layers + 1, config.hidden_size
        self.kernels, self.strides = list(config.conv_kernel), list(config.conv_stride)
        self.normalize = normalize
        self.norm: list[MaskedGroupNorm] = []  # in a list: it is already registered where the model has it
        if config.feat_extract_norm == "group":
            first: Any = self.model.feature_extractor.conv_layers[0]
            first.layer_norm = MaskedGroupNorm(first.layer_norm)
            self.norm = [first.layer_norm]
        if hasattr(self.model, "masked_spec_embed"):
            self.model.masked_spec_embed.requires_grad_(False)
        if freeze_extractor:
            self.model.freeze_feature_encoder()

    @property
    def shortest(self) -> int:
        """Samples that make one frame."""
        length = 1
        for kernel, stride in zip(reversed(self.kernels), reversed(self.strides), strict=True):
            length = (length - 1) * stride + kernel
        return length

    def load(self, model: nn.Module) -> None:
        """Copy the weights of a WavLMModel of the same shape."""
        self.model.load_state_dict(model.state_dict())

    def frames(self, lengths: Tensor, convolutions: int | None = None) -> Tensor:
        """Lengths in samples → lengths in frames after so many of the convolutions (all by default)."""
        for kernel, stride in list(zip(self.kernels, self.strides, strict=True))[:convolutions]:
            lengths = (lengths - kernel) // stride + 1
        return lengths

    def states(self, wave: Tensor, lengths: Tensor) -> tuple[list[Tensor], Tensor]:
        """As :class:`Backbone` says. A row shorter than one frame is completed with zeros."""
        mask = sequence_mask(lengths, wave.shape[1])
        wave = wave.float() * mask
        if self.normalize:
            mean = wave.sum(1, keepdim=True) / lengths.unsqueeze(1)
            variance = ((wave - mean) * mask).square().sum(1, keepdim=True) / lengths.unsqueeze(1)
            wave = (wave - mean) * mask * torch.rsqrt(variance + VARIANCE_FLOOR)
        wave = F.pad(wave, (0, max(0, self.shortest - wave.shape[1])))
        lengths = lengths.clamp_min(self.shortest)
        for norm in self.norm:
            norm.lengths = self.frames(lengths, 1)
        heard = sequence_mask(lengths, wave.shape[1]).long() if len(wave) > 1 else None
        with warnings.catch_warnings():  # transformers gives torch a boolean and a float mask together, which is right
            warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
            states = self.model(wave, attention_mask=heard, output_hidden_states=True).hidden_states
        return list(states), self.frames(lengths)


class WhisperBackbone(nn.Module):
    """Whisper's encoder (:mod:`lalia.nn.whisper`) without weights: all its hidden states.

    ``settings`` is its configuration as a dict. With ``trim`` the batch is as long as its longest clip, and attention
    stays within a clip; without, every clip is followed by silence up to 30 s, as Whisper was trained.
    """

    def __init__(self, settings: Mapping[str, Any], trim: bool, freeze_extractor: bool = True) -> None:
        super().__init__()
        self.model = WhisperEncoder(settings, mel_filters(MelSpec(RATE, N_FFT, HOP, N_FFT, settings["num_mel_bins"])))
        self.layers, self.width, self.trim = len(self.model.layers) + 1, self.model.width, trim
        if freeze_extractor:
            self.model.conv1.requires_grad_(False)
            self.model.conv2.requires_grad_(False)

    def load(self, model: Any) -> None:
        """Copy the weights of a WhisperForConditionalGeneration whose encoder has the same shape."""
        self.model.load_state_dict(model.model.encoder.state_dict())

    def states(self, wave: Tensor, lengths: Tensor) -> tuple[list[Tensor], Tensor]:
        """As :class:`Backbone` says. ValueError for more samples than the model has positions."""
        return self.model(wave, lengths, self.trim)

    def log_mel(self, wave: Tensor, lengths: Tensor, total: int) -> Tensor:
        """wave [N, S] → Whisper's log-mel [N, M, 2 · total]. When trimmed, zero beyond a clip's own frames."""
        return self.model.log_mel(wave, lengths, total, self.trim)
