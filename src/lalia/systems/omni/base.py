"""``omni-base``: the GPT learns text, before it hears anything.

In training a batch of rows is one stream, each row after the document mark, cut into windows of ``model.context`` tokens: nothing
is lost and nothing padded but the last window. In validation each row stands alone, so that its figure does not depend on what it
is batched with. Legend: N windows, L tokens of a window, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lalia import dist
from lalia.data import Row
from lalia.nn.gpt import Gpt
from lalia.system import Clock, Media, System, TensorBatch
from lalia.systems.omni import config as settings
from lalia.systems.omni.sampling import generate
from lalia.systems.omni.tokenizers import build_tokenizer, tokenizer_from_dict

log = logging.getLogger(__name__)

IGNORED = -1  # targets that are not learnt


@dataclass
class Piece:
    """A row as tokens int32 [L], without the document mark. ``more``: its document goes on in another row."""

    id: str
    tokens: np.ndarray
    text_bytes: int
    more: bool
    together: bool  # packed with others into windows


@dataclass
class Batch(TensorBatch):
    """``tokens`` and ``targets`` int64 [N, L], targets −1 where nothing is to be said; ``text_bytes`` of UTF-8 in all its rows."""

    ids: list[str]
    tokens: Tensor
    targets: Tensor
    text_bytes: int


class BitsPerByte:
    """−log₂ of the probability of all the text, over its bytes: comparable between tokenizers. Document marks are not counted."""

    def __init__(self) -> None:
        self.nats, self.count, self.bytes = 0.0, 0, 0

    def add(self, nats: float, count: int, text_bytes: int) -> None:
        self.nats, self.count, self.bytes = self.nats + nats, self.count + count, self.bytes + text_bytes

    def figures(self) -> dict[str, float]:
        if not self.bytes:
            return {}
        bits = self.nats / math.log(2) / self.bytes
        return {"bits_per_byte": bits, "nats_per_token": self.nats / max(1, self.count), "megabytes": self.bytes / 1e6}


class OmniBase(System):
    """See the module. ``model`` is the :class:`~lalia.nn.gpt.Gpt` that later stages take over, with ``tokenizer``."""

    Config = settings.Config
    best_metric = "bits_per_byte"
    headline: ClassVar[dict[str, str]] = {"bits/byte": "bits_per_byte"}
    config: settings.Config

    def __init__(self, config: settings.Config, tables: Mapping[str, Any]) -> None:
        super().__init__(config, tables)
        self.tokenizer = tokenizer_from_dict(tables["tokenizer"])
        self.model = Gpt(config.model.gpt(self.tokenizer.size))
        self._figures: dict[str, float | Tensor] = {}

    @classmethod
    def make_tables(cls, config: Any, rows: Any) -> dict[str, Any]:
        """The tokenizer; a BPE is trained here."""
        return {"tokenizer": build_tokenizer(config.tokenizer, rows).to_dict()}

    # --- data -------------------------------------------------------------------------------------------------------
    def reject(self, row: Row) -> str:
        return "" if row.text else "no text"

    def length(self, row: Row) -> float:
        """All rows count alike, so that batches are drawn at random."""
        return 1.0

    def prepare(self, row: Row, clock: Clock) -> Piece:
        tokens = np.asarray(self.tokenizer.encode(row.text), dtype=np.int32)
        return Piece(row.id, tokens, len(row.text.encode("utf-8")), bool(row.extra.get("more")), clock.training)

    def collate(self, examples: Sequence[Piece]) -> Batch:
        tokens, targets = windows(examples, self.tokenizer.bos, self.config.model.context)
        return Batch([piece.id for piece in examples], tokens, targets, sum(piece.text_bytes for piece in examples))

    # --- learning ---------------------------------------------------------------------------------------------------
    def losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        with self.autocast():
            logits = self.model(batch.tokens)
        each = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED, reduction="none")
        counted = batch.targets.flatten() != IGNORED
        text = counted & (batch.targets.flatten() != self.tokenizer.bos)
        nats = (each.detach() * text).double().sum()
        if isinstance(self.meter, BitsPerByte):
            self.meter.add(float(nats), int(text.sum()), batch.text_bytes)
        self._figures = {"train_bits_per_byte": nats / math.log(2) / max(1, batch.text_bytes), "tokens": counted.sum()}
        return {"loss_next": each.sum() / dist.average(counted.sum()).clamp_min(1)}

    def new_meter(self) -> BitsPerByte:
        return BitsPerByte()

    def scalars(self) -> dict[str, float | Tensor]:
        return self._figures

    def media(self, batch: Batch, clock: Clock) -> Media:
        """What the model writes after each prompt, greedily and by chance."""
        sample, texts = self.config.sample, dict[str, str]()
        for prompt in sample.prompts if sample.tokens else []:
            for name, temperature in (("greedy", 0.0), ("sampled", sample.temperature)):
                said = self.generate(prompt, max_tokens=sample.tokens, temperature=temperature, top_k=sample.top_k)
                texts[f"{name}/{prompt.strip() or 'empty'}"] = prompt + said
        return Media(texts=texts)

    # --- inference --------------------------------------------------------------------------------------------------
    def generate(self, prompt: str, *, max_tokens: int = 256, temperature: float = 0.0, top_k: int = 0, seed: int = 0) -> str:
        """How the model goes on from ``prompt``, a document's beginning; see :func:`~lalia.systems.omni.sampling.generate`."""
        self.eval()
        ids = [self.tokenizer.bos, *self.tokenizer.encode(prompt)]
        stop = {self.tokenizer.bos, self.tokenizer.eos}
        with self.autocast():
            said = generate(self.model, ids, max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed, stop=stop)
            return self.tokenizer.decode(list(said))


def windows(pieces: Sequence[Piece], bos: int, context: int) -> tuple[Tensor, Tensor]:
    """Pieces → tokens and targets int64 [N, L], L at most ``context``.

    A piece is the document mark and its tokens; each position's target is the next token, the last one's the mark of the next
    document, unless the document goes on elsewhere. Pieces that are ``together`` make one stream, others begin a window each. Every
    token is a target exactly once.
    """
    inputs = [np.concatenate([[bos], piece.tokens]) for piece in pieces]
    targets = [np.concatenate([piece.tokens, [IGNORED if piece.more else bos]]) for piece in pieces]
    if pieces[0].together:
        inputs, targets = [np.concatenate(inputs)], [np.concatenate(targets)]
    width = min(context, max(map(len, inputs)))
    return _cut(inputs, width, bos), _cut(targets, width, IGNORED)


def _cut(streams: Sequence[np.ndarray], width: int, filler: int) -> Tensor:
    """Streams of numbers → windows int64 [N, width], the last of each stream filled up."""
    filled = [np.pad(stream, (0, -len(stream) % width), constant_values=filler) for stream in streams]
    return torch.from_numpy(np.concatenate(filled).astype(np.int64)).view(-1, width)


__all__ = ["IGNORED", "Batch", "BitsPerByte", "OmniBase", "Piece", "windows"]
