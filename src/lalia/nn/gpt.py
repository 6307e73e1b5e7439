"""A decoder-only language model with one dial, ``depth``, that takes soft tokens (audio) before its text.

The architecture is nanochat's (github.com/karpathy/nanochat, MIT), so that its weights fit: rotary positions, QK norm, squared
ReLU, RMS norm without weights, no biases, an untied head under a soft cap (Gemma 2, 2408.00118), sliding windows, value embeddings
(after ResFormer, 2410.17897), "smear" (each position takes a little of the one before it), the input mixed into every layer, and
half-way features taken out before the head ("backout").

What is our own is the prefix. A row is audio, then text, without a gap: shorter prefixes are shifted right to meet the text, and
what is left of them is hidden. Audio positions

- pass the same norm and dtype as token embeddings, whatever the scale of the projector's output;
- have value embeddings of zero, since these are looked up by token;
- take part in smear, so that the first text token takes a little of the last audio frame, at the same scale as of a token;
- are visible to all text in every layer: the windows count only text;
- count against ``context``.

Legend: B rows, P audio positions, L text tokens, T = P + L, W width, H heads, D width of a head, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalia.nn.gemv import RowLinear
from lalia.nn.gpt_blocks import Block, GptConfig, norm
from lalia.nn.kv_cache import KvCache, visible
from lalia.nn.rope import Rotary

__all__ = ["Gpt", "GptConfig", "shift_right"]

SMEAR_CHANNELS = 24
EMBED_STD, HEAD_STD = 0.8, 0.001
MATRIX_RATE = 0.02  # nanochat's learning rate for matrices; the others are given as multiples of it
RATE_WIDTH = 768  # the width at which nanochat's rates for embeddings and head were tuned


class Gpt(nn.Module):
    """The language model. Every public method accepts rows of unlike length, and a row's result does not depend on the others."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.config = config
        self.width, self.vocab, self.context = config.width, config.vocab, config.context
        narrow = (config.kv_heads or config.heads) * config.head_width
        layers = range(config.depth)
        self.tokens = nn.Embedding(config.padded_vocab, config.width)
        self.blocks = nn.ModuleList([Block(config, layer) for layer in layers])
        self.head = RowLinear(config.width, config.padded_vocab, bias=False)
        self.value_tables = nn.ModuleDict(
            {str(i): nn.Embedding(config.padded_vocab, narrow) for i in layers if config.has_values(i)}
        )
        self.smear_channels = min(SMEAR_CHANNELS, config.width)
        self.smear_gate = RowLinear(self.smear_channels, 1, bias=False) if config.smear else None
        self.smear_scale = nn.Parameter(torch.zeros(1)) if config.smear else None
        falling = torch.linspace(0, 1, config.depth)
        self.residual_scale = nn.Parameter(1.15 - 0.1 * falling)
        self.input_scale = nn.Parameter(0.2 - 0.15 * falling)
        self.backout_scale = nn.Parameter(torch.full((1,), 0.2))
        self.rotary = Rotary(config.head_width, config.base)
        self._initialize()
        self._set_rates()

    @torch.no_grad()
    def _initialize(self) -> None:
        """Output matrices are zero: at first every block passes its input on, and the loss is ln V."""
        bound = math.sqrt(3 / self.width)
        nn.init.normal_(self.tokens.weight, std=EMBED_STD)
        nn.init.normal_(self.head.weight, std=HEAD_STD)
        for parameter in self.matrices():
            nn.init.uniform_(parameter, -bound, bound)
        for block in self.blocks:
            attention: Any = block.attention
            mlp: Any = block.mlp
            mlp.up.weight.mul_(0.4)
            nn.init.zeros_(attention.out.weight)
            nn.init.zeros_(mlp.down.weight)
            if attention.value_gate is not None:
                nn.init.uniform_(attention.value_gate.weight, 0.0, 0.02)
        for table in self.value_tables.values():
            nn.init.uniform_(cast(nn.Embedding, table).weight, -bound, bound)
        if self.smear_gate is not None:
            nn.init.uniform_(self.smear_gate.weight, 0.0, 0.02)

    # --- learning ---------------------------------------------------------------------------------------------------
    def matrices(self) -> list[nn.Parameter]:
        """The matrices of the blocks: what Muon learns."""
        return list(self.blocks.parameters())

    def others(self) -> list[nn.Parameter]:
        """Embeddings, head and scalars: what AdamW learns."""
        own = {id(p) for p in self.matrices()}
        return [p for p in self.parameters() if id(p) not in own]

    def _set_rates(self) -> None:
        """Mark each parameter with nanochat's settings for it, which :mod:`lalia.optim` follows under ``kind: muon``.

        Rates are multiples of the optimizer's; those of embeddings and head fall with the square root of the width.
        """
        wide = (self.width / RATE_WIDTH) ** -0.5 / MATRIX_RATE
        smear = [p for name, p in self.named_parameters() if name.startswith(("smear", "backout"))]
        tables = list(self.value_tables.parameters())
        _mark(self.matrices(), muon=True)
        _mark([self.head.weight], rate=0.004 * wide, betas=(0.8, 0.96), weight_decay=0.01)
        _mark([self.tokens.weight], rate=0.2 * wide, betas=(0.8, 0.995), weight_decay=0.001)
        _mark(tables, rate=0.1 * wide, betas=(0.8, 0.995), weight_decay=0.01)
        _mark([self.residual_scale], rate=0.005 / MATRIX_RATE, betas=(0.8, 0.95), weight_decay=0.05)
        _mark([self.input_scale], rate=0.5 / MATRIX_RATE, betas=(0.96, 0.95), weight_decay=0.0)
        _mark(smear, rate=0.2 / MATRIX_RATE, betas=(0.8, 0.95), weight_decay=0.0)

    # --- the model --------------------------------------------------------------------------------------------------
    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] → [B, L, W], as the first layer is given them (before smear): each of root mean square 1."""
        return norm(self.tokens(tokens))

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        prefix: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Logits of the text positions, float32 [B, L, V]; those beyond a row's length are meaningless.

        Args:
            tokens: int64 [B, L], each below V; rows shorter than L are filled up with any token.
            lengths: [B], 1 to L; None = all L.
            prefix: audio [B, P, W] of any scale; shorter rows are filled up at the end.
            prefix_lengths: [B], 0 to P; None = all P.
            wanted: bool [B, L]: the logits of these N positions alone, row by row, [N, V].

        Raises:
            ValueError: a row longer than ``context``, a prefix of another width, lengths without their values.
        """
        hidden, _, _ = self._prompt(tokens, lengths, prefix, prefix_lengths, None)
        text = hidden[:, -tokens.shape[1] :]
        return self._logits(text if wanted is None else text[wanted])

    @torch.no_grad()
    def prefill(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        prefix: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
    ) -> tuple[Tensor, KvCache]:
        """As :meth:`forward`, without gradients: logits [B, V] after each row's last token, and the cache to go on from."""
        batch, count = tokens.shape
        total = count + (0 if prefix is None else prefix.shape[1])
        end = torch.full((batch,), total, device=tokens.device) if lengths is None else lengths.to(tokens.device) + total - count
        longest, even = (total, True) if lengths is None else (int(end.max()), bool((end == end[0]).all()))
        empty = torch.empty(0, device=tokens.device)
        cache = KvCache(None, end, total - count, longest, longest, even, empty)
        hidden, embedded, cache.start = self._prompt(tokens, lengths, prefix, prefix_lengths, cache)
        if cache.start is not None:
            cache.used = int((end - cache.start).max())
        last = torch.arange(batch, device=tokens.device), end - 1
        cache.previous = embedded[last]
        return self._logits(hidden[last]), cache

    @torch.no_grad()
    def step(self, tokens: Tensor, cache: KvCache) -> tuple[Tensor, KvCache]:
        """One token [B] more for each row: logits [B, V] after it, and the same cache, which now counts it.

        Raises:
            ValueError: a row has reached ``context``.
        """
        self._check_room(cache.used + 1)
        embedded = self.embed(tokens.unsqueeze(1))
        place = cache.longest if cache.even else None
        table = self.rotary.upto(cache.longest + 1)
        rotation = table[:, cache.end, None, None] if place is None else table[:, place : place + 1]
        masks = self._step_masks(cache)
        hidden = self._layers(self._smeared(embedded, cache.previous.unsqueeze(1)), tokens.unsqueeze(1), 0, rotation, masks, cache)
        cache.advance(embedded[:, 0])
        return self._logits(hidden[:, 0]), cache

    def _prompt(
        self,
        tokens: Tensor,
        lengths: Tensor | None,
        prefix: Tensor | None,
        prefix_lengths: Tensor | None,
        cache: KvCache | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Last hidden states and embeddings before smear, [B, T, W] each, and where rows begin ([B], None = at 0)."""
        before = self._check_prompt(tokens, lengths, prefix, prefix_lengths)
        embedded, start = self.embed(tokens), None
        if prefix is not None and before:
            if prefix_lengths is not None:
                prefix, start = shift_right(prefix, prefix_lengths)
            embedded = torch.cat([norm(prefix.to(embedded.dtype)), embedded], dim=1)
        smeared = self._smeared(embedded[:, 1:], embedded[:, :-1])
        x = torch.cat([embedded[:, :1], smeared], dim=1)
        total = x.shape[1]
        rotation = self.rotary.upto(total)[:, :total]
        return self._layers(x, tokens, before, rotation, self._masks(total, before, start), cache), embedded, start

    def _layers(
        self, x: Tensor, tokens: Tensor, before: int, rotation: Tensor, masks: dict[int, Tensor | None], cache: KvCache | None
    ) -> Tensor:
        """The blocks, from smeared embeddings [B, T, W] to normed hidden states."""
        first = middle = x
        for layer, (block, window) in enumerate(zip(self.blocks, self.config.windows(), strict=True)):
            x = self.residual_scale[layer] * x + self.input_scale[layer] * first
            extra = None
            if str(layer) in self.value_tables:
                extra = F.pad(self.value_tables[str(layer)](tokens), (0, 0, before, 0))
            x = block(x, extra, rotation, masks[window], cache)
            if layer == self.config.depth // 2:
                middle = x
        return norm(x - self.backout_scale * middle)

    def _smeared(self, x: Tensor, previous: Tensor) -> Tensor:
        """Each position with a learnt share of the embedding before it, both [B, ·, W]. What precedes a row is zero."""
        if self.smear_gate is None or self.smear_scale is None:
            return x
        gate = self.smear_scale * torch.sigmoid(self.smear_gate(x[..., : self.smear_channels]))
        return x + gate * previous

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self.head(hidden)[..., : self.vocab].float()
        cap = self.config.softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def _masks(self, total: int, prefix: int, start: Tensor | None) -> dict[int, Tensor | None]:
        """Window → mask of a whole prompt, None where plain causal order hides the same."""
        queries = torch.arange(total, device=self.tokens.weight.device).unsqueeze(0)
        free = start is None
        return {
            window: None if free and (not window or total - 1 <= window) else visible(queries, total, window, prefix, start)
            for window in set(self.config.windows())
        }

    def _step_masks(self, cache: KvCache) -> dict[int, Tensor | None]:
        keys, free = cache.longest + 1, cache.start is None and cache.even
        span = cache.end.unsqueeze(1), keys
        return {
            window: None if free and (not window or keys - 1 <= window) else visible(*span, window, cache.prefix, cache.start)
            for window in set(self.config.windows())
        }

    # --- checks -----------------------------------------------------------------------------------------------------
    def _check_prompt(self, tokens: Tensor, lengths: Tensor | None, prefix: Tensor | None, prefix_lengths: Tensor | None) -> int:
        """P, after the checks that :meth:`forward` promises."""
        if not tokens.shape[1]:
            raise ValueError("a prompt needs at least one token; begin the text with the tokenizer's BOS")
        if prefix is None and prefix_lengths is not None:
            raise ValueError("prefix_lengths were given without a prefix")
        if prefix is not None and prefix.shape[-1] != self.width:
            raise ValueError(f"the audio prefix is {prefix.shape[-1]} wide, the language model {self.width}")
        before = 0 if prefix is None else prefix.shape[1]
        if before + tokens.shape[1] > self.context:  # else no row can be too long, and the device need not be asked
            audio = torch.full((len(tokens),), before) if prefix_lengths is None else prefix_lengths.cpu()
            text = torch.full((len(tokens),), tokens.shape[1]) if lengths is None else lengths.cpu()
            self._check_room(int((audio + text).max()))
        return before

    def _check_room(self, used: int) -> None:
        if used > self.context:
            raise ValueError(
                f"{used} positions of audio and text, but the language model has a context of {self.context}: shorten the audio"
                " or the text, stack more frames in the projector, or train with a longer context"
            )


def shift_right(prefix: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of prefix [B, P, W] moved to end at P, zeros before them; and where each begins, P - lengths [B]."""
    count = prefix.shape[1]
    start = count - lengths.to(prefix.device)
    source = torch.arange(count, device=prefix.device) - start.unsqueeze(1)
    moved = prefix.gather(1, source.clamp_min(0).unsqueeze(-1).expand_as(prefix))
    return moved.masked_fill((source < 0).unsqueeze(-1), 0.0), start


def _mark(parameters: Sequence[Tensor], **settings: Any) -> None:
    for parameter in parameters:
        parameter._learning = settings  # type: ignore[attr-defined]
