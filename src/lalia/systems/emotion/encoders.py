"""Speech encoder: an utterance of any length → the mean over time of every hidden state of a pretrained network.

Legend: N utterances, S samples at 16 kHz, D width. The networks are in :mod:`lalia.systems.emotion.backbones`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lalia.nn.masks import sequence_mask
from lalia.nn.pieces import Piece, cut, pack, padded_size, rejoin, take
from lalia.nn.whisper import FRAME, RATE
from lalia.pretrained import load_wavlm, load_whisper, resolve
from lalia.pretrained.models import wants_normalized
from lalia.sections import ExternalModel
from lalia.systems.emotion.backbones import WavlmBackbone, WhisperBackbone

log = logging.getLogger(__name__)

KINDS = ("wavlm", "whisper")
#: windows encoded at once where an utterance is longer than one and nothing else bounds the memory
WINDOWS_AT_ONCE = 4


def describe_encoder(
    kind: str, config: ExternalModel, offline: bool = False, *, trim: bool = True, window_seconds: float = 30.0
) -> dict[str, Any]:
    """What :class:`SpeechEncoder` needs to build the network of ``config`` without its weights: JSON data for a run folder.

    Raises:
        PretrainedError: the model cannot be had.
        ValueError: an unknown kind, or a window that the model cannot hear at once.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown speech encoder {kind!r}; known: {', '.join(KINDS)}")
    folder = resolve(config.source, kind, offline, config.revision)
    if folder is not None:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        normalize = kind == "wavlm" and wants_normalized(folder)
    else:
        model: Any = load_wavlm(config) if kind == "wavlm" else load_whisper(config)[0]
        settings, normalize = json.loads(model.config.to_json_string()), False
    settings = {key: value for key, value in settings.items() if not key.startswith("_")}  # paths of the machine it was saved on
    longest = settings.get("max_source_positions", 1500) * FRAME / RATE if kind == "whisper" else float("inf")
    if not 1 <= window_seconds <= longest:
        raise ValueError(f"window_seconds must be from 1 to {longest:g} for {kind} {config.source}, got {window_seconds:g}")
    return {"kind": kind, "config": settings, "normalize": normalize, "trim": trim, "window_seconds": window_seconds}


def load_weights(encoder: SpeechEncoder, config: ExternalModel, offline: bool = False) -> None:
    """Fill the network of ``encoder`` from ``config``, the source that its description was made of. PretrainedError when it cannot
    be had, RuntimeError when it has other shapes."""
    model = load_wavlm(config, offline) if encoder.kind == "wavlm" else load_whisper(config, offline)[0]
    encoder.backbone.load(model)


class SpeechEncoder(nn.Module):
    """A pretrained network, pooled over time by layer, and a learnt softmax weight per layer (Yang et al. 2021, 2105.01051).

    Frozen (``tuned`` False), the network stays in evaluation mode without gradients whatever ``train()`` says. The result
    for an utterance does not depend on what it is batched with. Memory is bounded by ``micro_seconds``: so many padded seconds
    are encoded at once (0 = all), and a tuned network recomputes the activations of each such micro-batch in the backward
    pass. When memory runs out in the forward pass the bound is halved and the batch encoded again.

    Args:
        description: as :func:`describe_encoder` makes it.
        freeze_extractor: when tuned, leave the convolutions before the first layer as they are.
    """

    def __init__(
        self,
        description: Mapping[str, Any],
        *,
        tuned: bool = False,
        freeze_extractor: bool = True,
        micro_seconds: float = 0.0,
    ) -> None:
        super().__init__()
        self.description = dict(description)
        self.kind: str = description["kind"]
        self.tuned, self.micro_seconds = tuned, micro_seconds
        self.window = round(description["window_seconds"] * RATE)
        self.backbone: Any
        if self.kind == "wavlm":
            self.backbone = WavlmBackbone(description["config"], description["normalize"], freeze_extractor)
        else:
            self.backbone = WhisperBackbone(description["config"], description["trim"], freeze_extractor)
        if not tuned:
            self.backbone.requires_grad_(False)
        self.layer_weights = nn.Parameter(torch.zeros(self.layers))
        self._splittable = 0.0  # padded seconds of the last call's largest micro-batch of several pieces
        self.train(self.training)

    @property
    def layers(self) -> int:
        return self.backbone.layers

    @property
    def width(self) -> int:
        return self.backbone.width

    def train(self, mode: bool = True) -> SpeechEncoder:
        super().train(mode)
        if not self.tuned:
            self.backbone.eval()
        return self

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled hidden states [N, layers, D] → [N, D]."""
        return torch.einsum("nld,l->nd", pooled, self.layer_weights.softmax(0).to(pooled.dtype))

    def pooled(self, wave: Tensor, lengths: Tensor) -> Tensor:
        """wave [N, S] at 16 kHz, lengths [N] in samples → mean over time of every hidden state, float32 [N, layers, D].

        An utterance longer than the window is encoded in equal windows, averaged by duration. ValueError for no samples;
        torch.OutOfMemoryError, with advice, when a single window does not fit.
        """
        pieces = cut(lengths.tolist(), self.window)
        while True:
            groups = pack(pieces, self._budget(pieces))
            shared = [group for group in groups if len(group) > 1]
            self._splittable = max((padded_size(pieces, group) / RATE for group in shared), default=0.0)
            values = self._encode_groups(wave, pieces, groups)
            if values is not None:
                return rejoin(values, groups, pieces, len(wave))

    def shrink(self) -> bool:
        """Halve the micro-batch, after memory ran out in the backward pass. False when each piece is already by itself."""
        if not self._splittable:
            return False
        self.micro_seconds, self._splittable = self._splittable / 2, self._splittable / 2
        log.warning("out of memory: the speech encoder now takes %.1f padded seconds at once", self.micro_seconds)
        return True

    def _budget(self, pieces: Sequence[Piece]) -> int:
        if self.micro_seconds:
            return max(1, round(self.micro_seconds * RATE))
        return WINDOWS_AT_ONCE * self.window if any(piece.share < 1 for piece in pieces) else 0

    def _encode_groups(self, wave: Tensor, pieces: Sequence[Piece], groups: Sequence[list[int]]) -> list[Tensor] | None:
        """Pooled states of each group, or None when memory ran out and the micro-batch was halved."""
        learns = self.tuned and torch.is_grad_enabled()
        run = _recomputed(self._encode) if learns and len(groups) > 1 else self._encode
        values = []
        try:
            with torch.set_grad_enabled(learns):
                for group in groups:
                    values.append(run(*take(wave, [pieces[index] for index in group])))
        except torch.OutOfMemoryError as error:
            if not self.shrink():
                seconds = max(piece.samples for piece in pieces) / RATE
                raise torch.OutOfMemoryError(
                    f"{seconds:.1f} s of speech do not fit into memory even alone: lower model.speech.window_seconds, freeze"
                    f" the encoder (model.speech.tuned=false) or take a smaller one ({error})"
                ) from error
            return None
        return values

    def _encode(self, wave: Tensor, lengths: Tensor) -> Tensor:
        states, frames = self.backbone.states(wave, lengths)
        with torch.autocast(wave.device.type, enabled=False):
            share = sequence_mask(frames, states[0].shape[1]).float() / frames.unsqueeze(1)
            return torch.stack([torch.einsum("nt,ntd->nd", share, state.float()) for state in states], dim=1)


def _recomputed(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """``function`` without kept activations: the backward pass computes them again."""
    return lambda wave, lengths: checkpoint(function, wave, lengths, use_reentrant=False)
