"""From the frames of an encoder to soft tokens of a language model.

Legend: B clips, T frames, P soft tokens, D width of the encoder, W width of the language model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalia.nn.masks import sequence_mask

MOST_STACKED = 8


class Projector(nn.Module):
    """``stack`` frames side by side → two linear layers with a GELU between → one soft token (the design of SLAM-ASR, 2402.08846).

    Frames come in on the scale of any layer of the encoder: they are normalised first. A soft token goes out with the root mean
    square of the language model's own token embeddings, ``scale``, or the model would not hear it beside them.

    Args:
        in_width: D. width: W. stack: frames in a token, 1 … 8. hidden: width between the layers. scale: see above.
    """

    scale: Tensor

    def __init__(self, in_width: int, width: int, stack: int = 4, hidden: int = 1024, scale: float = 1.0) -> None:
        super().__init__()
        if not 1 <= stack <= MOST_STACKED:
            raise ValueError(f"the projector stacks 1 … {MOST_STACKED} frames, got {stack}")
        if scale <= 0:
            raise ValueError(f"the projector's scale must be above 0, got {scale}")
        self.in_width, self.width, self.stack = in_width, width, stack
        self.norm = nn.LayerNorm(in_width)
        self.inner = nn.Linear(stack * in_width, hidden)
        self.outer = nn.Linear(hidden, width)
        self.register_buffer("scale", torch.tensor(float(scale)))

    def tokens(self, lengths: Tensor) -> Tensor:
        """Lengths in frames → lengths in soft tokens, of which the last may be begun only."""
        return (lengths + self.stack - 1) // self.stack

    @torch.no_grad()
    def match(self, embeddings: Tensor) -> float:
        """Set ``scale`` to the root mean square of token embeddings [..., W]; returns it. ValueError when they are all zero."""
        value = float(embeddings.float().square().mean().sqrt())
        if not value > 0:
            raise ValueError("the language model's token embeddings are all zero")
        self.scale.fill_(value)
        return value

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """frames [B, T, D], lengths [B] in frames → soft tokens [B, ceil(T / stack), W] and their lengths [B].

        Soft tokens beyond a clip's own are zero. ValueError for frames of another width.
        """
        if frames.shape[2] != self.in_width:
            channels = f"frames have {frames.shape[2]} channels, this projector was made for {self.in_width}"
            raise ValueError(f"{channels}: another Whisper?")
        frames = self.norm(frames.to(self.norm.weight.dtype))
        frames = frames * sequence_mask(lengths, frames.shape[1]).unsqueeze(2)
        missing = -frames.shape[1] % self.stack
        stacked = F.pad(frames, (0, 0, 0, missing)).unflatten(1, (-1, self.stack)).flatten(2)
        soft = self.outer(F.gelu(self.inner(stacked)))
        soft = F.rms_norm(soft.float(), (self.width,)) * self.scale
        counts = self.tokens(lengths)
        return soft * sequence_mask(counts, soft.shape[1]).unsqueeze(2), counts
