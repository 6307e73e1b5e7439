"""Shape and layers of :class:`lalia.nn.gpt.Gpt`: attention with QK norm and value embeddings, and the two matrices after it.

Legend: B rows, T positions, W width, H heads, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lalia.nn.gemv import RowLinear
from lalia.nn.kv_cache import KvCache
from lalia.nn.rope import rotate

VOCAB_MULTIPLE = 64
WINDOW_MULTIPLE = 128
QK_SCALE = 1.2
GATE_CHANNELS = 12


@dataclass(frozen=True)
class GptConfig:
    """Shape of a :class:`Gpt`. Raises ValueError for values that make no model.

    Args:
        depth: layers; the width is ``aspect · depth`` rounded up to whole heads of ``head_width``.
        vocab: tokens; tables hold a multiple of 64, and the logits of what was added are cut off.
        context: positions, audio and text together, that a row may have.
        window: one letter a layer, repeated: L sees everything, S ``short_window`` positions back. The last layer is always L.
        kv_heads: heads of keys and values; 0 = as many as of queries.
        softcap: logits are kept within ± this; 0 = off.
        flash: insist on torch's flash kernel where a layer needs no mask (RuntimeError where the device has none); False leaves
            the choice to torch.
    """

    depth: int
    vocab: int
    context: int = 2048
    aspect: int = 64
    head_width: int = 128
    window: str = "SSSL"
    softcap: float = 15.0
    base: float = 1e5
    value_embeddings: bool = True
    smear: bool = True
    kv_heads: int = 0
    flash: bool = False

    def __post_init__(self) -> None:
        for name in ("depth", "vocab", "context", "aspect", "head_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.window or set(self.window) - set("SL"):
            raise ValueError(f"window must be letters S (short) and L (long), got {self.window!r}")
        if self.kv_heads and (self.kv_heads < 0 or self.heads % self.kv_heads):
            raise ValueError(f"kv_heads must divide the {self.heads} heads, got {self.kv_heads}")

    @property
    def heads(self) -> int:
        return -(-self.aspect * self.depth // self.head_width)

    @property
    def width(self) -> int:
        return self.heads * self.head_width

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def short_window(self) -> int:
        """A quarter of the context, rounded up to whole tiles of 128."""
        return -(-self.context // (4 * WINDOW_MULTIPLE)) * WINDOW_MULTIPLE

    def windows(self) -> list[int]:
        """Per layer how many positions back text sees; 0 = all."""
        letters = [self.window[layer % len(self.window)] for layer in range(self.depth - 1)] + ["L"]
        return [self.short_window if letter == "S" else 0 for letter in letters]

    def has_values(self, layer: int) -> bool:
        """Value embeddings are in every other layer, the last one included."""
        return self.value_embeddings and layer % 2 == (self.depth - 1) % 2


def norm(values: Tensor) -> Tensor:
    """RMS norm over the last dimension (1910.07467), without a weight. Zeros stay zeros."""
    return F.rms_norm(values, (values.shape[-1],))


class Attention(nn.Module):
    """Causal self-attention of one layer."""

    def __init__(self, config: GptConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.flash, self.head_width = layer, config.flash, config.head_width
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        width, narrow = config.width, self.kv_heads * config.head_width
        self.query = RowLinear(width, width, bias=False)
        self.key = RowLinear(width, narrow, bias=False)
        self.value = RowLinear(width, narrow, bias=False)
        self.out = RowLinear(width, width, bias=False)
        self.gate_channels = min(GATE_CHANNELS, width)
        self.value_gate = RowLinear(self.gate_channels, self.kv_heads, bias=False) if config.has_values(layer) else None

    def forward(self, x: Tensor, extra: Tensor | None, rotation: Tensor, mask: Tensor | None, cache: KvCache | None) -> Tensor:
        """x [B, T, W], value embeddings [B, T, ·] or None, mask (see :func:`visible`) or None = plainly causal → [B, T, W]."""
        query, key = (self._split(part(x)) for part in (self.query, self.key))
        value = self._split(self.value(x) if extra is None else self._gated(x, extra))
        query, key = (norm(rotate(part, rotation)) * QK_SCALE for part in (query, key))
        query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast the norm is float32
        if cache is not None:
            whole = len(cache.keys) <= self.layer
            key, value = cache.begin(key, value) if whole else cache.extend(self.layer, key, value)
        return self.out(self._attend(query, key, value, mask).transpose(1, 2).flatten(2))

    def _split(self, values: Tensor) -> Tensor:
        """[B, T, heads · D] → [B, heads, T, D]."""
        return values.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def _gated(self, x: Tensor, extra: Tensor) -> Tensor:
        """Values with the value embedding added, each head by its own gate in (0, 3)."""
        assert self.value_gate is not None
        gate = 3 * torch.sigmoid(self.value_gate(x[..., : self.gate_channels]))
        value = self.value(x).unflatten(-1, (self.kv_heads, -1))
        return (value + gate.unsqueeze(-1) * extra.to(value.dtype).unflatten(-1, (self.kv_heads, -1))).flatten(-2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        grouped, causal = self.kv_heads != self.heads, mask is None and query.shape[2] > 1
        if self.flash and mask is None:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, enable_gqa=grouped)


class Mlp(nn.Module):
    """Squared ReLU (Primer, 2109.08668) between two matrices: [..., W] → [..., W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = RowLinear(width, 4 * width, bias=False)
        self.down = RowLinear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    """Attention, then the MLP, each of the normed input and added to it. Positions [B, T, W] → [B, T, W]."""

    def __init__(self, config: GptConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.mlp = Mlp(config.width)

    def forward(self, x: Tensor, extra: Tensor | None, rotation: Tensor, mask: Tensor | None, cache: KvCache | None) -> Tensor:
        x = x + self.attention(norm(x), extra, rotation, mask, cache)
        return x + self.mlp(norm(x))
