"""Normalising flow between the latents of posterior and prior: mean-only couplings with flips, log-determinant 0."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lalia.nn.attention import RelativeEncoder
from lalia.nn.conv import WaveNet


class Flip(nn.Module):
    """Reverse the order of the channels; its own inverse, log-determinant 0."""

    def forward(
        self, latent: Tensor, mask: Tensor | None = None, speaker: Tensor | None = None, reverse: bool = False
    ) -> Tensor:
        """latent [B, D, T] → [B, D, T]; the other arguments are those of a coupling and are not used."""
        return latent.flip(1)


class MeanCoupling(nn.Module):
    """Additive coupling (Dinh et al. 2015): half of the channels shift the other, by what ``network`` makes of them.

    The last projection starts at zero, so that a new coupling is the identity. ``network`` maps [B, hidden, T],
    mask and speaker to [B, hidden, T]; with None it is given at each call (shared with other couplings, owned by
    the flow).
    """

    def __init__(self, width: int, hidden: int, network: nn.Module | None) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"a coupling halves its channels, so their number must be even, got {width}")
        self.half_width = width // 2
        self.enter = nn.Conv1d(self.half_width, hidden, 1)
        self.network = network
        self.leave = nn.Conv1d(hidden, self.half_width, 1)
        nn.init.zeros_(self.leave.weight)
        assert self.leave.bias is not None
        nn.init.zeros_(self.leave.bias)

    def forward(
        self,
        latent: Tensor,
        mask: Tensor,
        speaker: Tensor | None = None,
        reverse: bool = False,
        network: nn.Module | None = None,
    ) -> Tensor:
        """latent [B, D, T], mask [B, 1, T], speaker [B, G, 1] → [B, D, T], zero where masked."""
        network = self.network if self.network is not None else network
        assert network is not None, "a coupling without a network of its own needs one at the call"
        kept, shifted = latent.split(self.half_width, dim=1)
        shift = self.leave(network(self.enter(kept) * mask, mask, speaker))
        moved = shifted - shift if reverse else shifted + shift
        return torch.cat([kept, moved], dim=1) * mask


class WaveNetCoupling(MeanCoupling):
    """Mean-only coupling through a WaveNet of dilation 1 (VITS, Kim et al. 2021)."""

    def __init__(
        self, width: int, hidden: int, kernel: int, layers: int, speaker_width: int = 0, dropout: float = 0.0
    ) -> None:
        super().__init__(width, hidden, WaveNet(hidden, kernel, 1, layers, speaker_width, dropout))


class TransformerCoupling(MeanCoupling):
    """Mean-only coupling through a small transformer (VITS2, Kong et al. 2023)."""

    def __init__(
        self,
        width: int,
        hidden: int,
        kernel: int,
        layers: int,
        filter_width: int = 768,
        heads: int = 2,
        speaker_width: int = 0,
        dropout: float = 0.0,
    ) -> None:
        encoder = _transformer(hidden, filter_width, heads, layers, kernel, dropout, speaker_width)
        super().__init__(width, hidden, encoder)


def _transformer(
    hidden: int, filter_width: int, heads: int, layers: int, kernel: int, dropout: float, speaker_width: int
) -> RelativeEncoder:
    # fewer than three layers are allowed: the speaker then enters at the last one
    return RelativeEncoder(
        hidden,
        filter_width,
        heads,
        layers,
        kernel,
        dropout,
        speaker_width=speaker_width,
        speaker_layer=min(2, layers - 1),
    )


class Flow(nn.Module):
    """``flows`` × (mean-only coupling, flip). Forward goes from posterior to prior, ``reverse`` back; log-det 0.

    ``kind`` is "wavenet" (``kernel``, ``layers``) or "transformer" (``transformer_kernel``, ``transformer_layers``,
    ``filter_width``, ``heads``). With ``share_parameters`` all couplings use one network between their own
    projections.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        kernel: int = 5,
        layers: int = 4,
        flows: int = 4,
        speaker_width: int = 0,
        kind: str = "wavenet",
        transformer_layers: int = 3,
        transformer_kernel: int = 5,
        filter_width: int = 768,
        heads: int = 2,
        dropout: float = 0.0,
        share_parameters: bool = False,
    ) -> None:
        super().__init__()
        if kind not in ("wavenet", "transformer"):
            raise ValueError(f"unknown kind of flow {kind!r}; known: wavenet, transformer")

        def network() -> nn.Module:
            if kind == "wavenet":
                return WaveNet(hidden, kernel, 1, layers, speaker_width, dropout)
            return _transformer(
                hidden, filter_width, heads, transformer_layers, transformer_kernel, dropout, speaker_width
            )

        # owned once, outside the couplings, so that its weights stand once in the state dict (safetensors wants that)
        self.shared = network() if share_parameters else None
        self.couplings = nn.ModuleList(
            MeanCoupling(width, hidden, None if share_parameters else network()) for _ in range(flows)
        )
        self.flip = Flip()

    def forward(self, latent: Tensor, mask: Tensor, speaker: Tensor | None = None, reverse: bool = False) -> Tensor:
        """latent [B, D, T], mask [B, 1, T], speaker [B, G, 1] → [B, D, T], zero where masked."""
        if not reverse:
            for coupling in self.couplings:
                latent = self.flip(coupling(latent, mask, speaker, network=self.shared))
            return latent
        for coupling in reversed(self.couplings):
            latent = coupling(self.flip(latent), mask, speaker, reverse=True, network=self.shared)
        return latent
