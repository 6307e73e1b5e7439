"""The ear: a frozen Whisper encoder and what is heard of its layers.

Legend: N clips, S samples at 16 kHz, T hidden frames (50 a second), C chosen layers, D width of the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lalia.nn.whisper import FRAME, RATE
from lalia.pretrained.whisper import FrozenWhisper, Layers, describe_listener, frames_of

__all__ = ["FRAME", "RATE", "Layers", "Listener", "describe_listener", "frames_of"]


class Listener(FrozenWhisper):
    """:class:`lalia.pretrained.whisper.FrozenWhisper`, and what is heard of the chosen layers: one of them, several side by side,
    or a softmax-weighted sum (Yang et al. 2021, 2105.01051) whose weights are all that learns here.

    Args:
        description: as :func:`describe_listener` makes it.
    """

    def __init__(self, description: Mapping[str, Any]) -> None:
        super().__init__(description)
        self.layer_weights = nn.Parameter(torch.zeros(len(self.numbers))) if self.layers is Layers.weighted else None

    @property
    def width(self) -> int:
        """Channels of :meth:`features`."""
        return self.encoder.width * (len(self.numbers) if self.layers is Layers.list else 1)

    def features(self, waves: Tensor, lengths: Tensor) -> list[Tensor]:
        """waves [N, S] float, lengths [N] in samples → the frames of each clip, [T_i, D] (``list``: [T_i, C · D]).

        ValueError names the first clip without samples.
        """
        return [self.mix(heard) for heard in self.hear(waves, lengths)]

    def mix(self, heard: Tensor) -> Tensor:
        """Chosen layers [..., C, D] of any float type → what is heard of them, [..., D] (``list``: [..., C · D])."""
        if self.layer_weights is not None:
            heard = heard.to(self.layer_weights.dtype) if heard.dtype is torch.float16 else heard
            return torch.einsum("...cd,c->...d", heard, self.layer_weights.softmax(0).to(heard.dtype))
        return heard.flatten(-2)
