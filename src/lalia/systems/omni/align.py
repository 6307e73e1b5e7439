"""``omni-align``: recordings become soft tokens that a frozen language model reads as if their text had been spoken to it.

Whisper and the language model are frozen; the projector (and the weights of the encoder's layers, where there are any) learns
from recordings with their texts. A row is: soft tokens, BOS, text, EOS. BOS stays between them and is not predicted itself;
every token after it is. For an instructed language model the recording is framed as what the user says (``frame``).

Legend: B rows, S samples at 16 kHz, T frames, C layers, D width of the encoder, P soft tokens, L tokens, W width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from lalia import audio, dist
from lalia.data import BadRow, Row
from lalia.system import Clock, Media, Message, System, TensorBatch
from lalia.systems.omni import config_align as settings
from lalia.systems.omni import conversation, measures
from lalia.systems.omni.certificate import IGNORED, Case, Certificate, GradientPathError, certify
from lalia.systems.omni.foundation import build_language, describe_base, load_base
from lalia.systems.omni.listen import RATE, Listener, describe_listener, frames_of
from lalia.systems.omni.projector import Projector
from lalia.systems.omni.sampling import greedy
from lalia.systems.omni.spelling import Spelling, candidates
from lalia.systems.omni.stored import feature_store, refuse_other_features
from lalia.systems.omni.tokenizers import plain, tokenizer_from_dict

log = logging.getLogger(__name__)

SCALE_TOKENS = 4096  # token embeddings whose size soft tokens are given


@dataclass
class Example:
    """A row: ``tokens`` of its text without marks, and either ``heard`` [T, C, D] from the shards or its ``wave`` [S]."""

    id: str
    text: str
    tokens: list[int]
    heard: Tensor | None
    wave: np.ndarray | None
    samples: int


@dataclass
class Batch(TensorBatch):
    """``tokens``, ``targets`` int64 [B, L] (−1 = nothing to say) with ``lengths`` [B]. ``heard`` [K, T, C, D] with
    ``heard_lengths`` [K] of the rows that are ``known`` bool [B]; ``waves`` [B - K, S] with ``wave_lengths`` of the others."""

    ids: list[str]
    texts: list[str]
    tokens: Tensor
    targets: Tensor
    lengths: Tensor
    known: Tensor
    heard: Tensor
    heard_lengths: Tensor
    waves: Tensor
    wave_lengths: Tensor
    audio_seconds: float = 0.0


class Agreement:
    """Pooled soft tokens and text embeddings of a whole validation set, and how far they agree."""

    def __init__(self) -> None:
        self.audio: list[Tensor] = []
        self.text: list[Tensor] = []
        self.names: list[str] = []

    def add(self, audio: Tensor, text: Tensor, names: Sequence[str]) -> None:
        self.audio.append(audio.detach().float().cpu())
        self.text.append(text.detach().float().cpu())
        self.names += names

    def figures(self) -> dict[str, float]:
        if not self.audio:
            return {}
        found = measures.agreement(torch.cat(self.audio), torch.cat(self.text), self.names)
        return {f"align/{name}": value for name, value in found.items()}


class OmniAlign(System):
    """See the module. ``listener``, ``projector``, ``language`` and ``tokenizer`` are what ``omni-chat`` goes on from."""

    Config = settings.Config
    best_metric = "loss/main/text"
    headline: ClassVar[dict[str, str]] = {
        "loss": "loss/main/text",
        "spelling": "loss/main/spelling",
        "R@1": "align/retrieval@1",
        "CKA": "align/cka",
    }
    config: settings.Config

    def __init__(self, config: settings.Config, tables: Mapping[str, Any]) -> None:
        super().__init__(config, tables)
        self.tokenizer = tokenizer_from_dict(tables["base"]["tokenizer"])
        self.language = build_language(tables["base"])
        self.listener = Listener(tables["listener"])
        hidden = config.projector.hidden or 2 * self.language.width
        self.projector = Projector(self.listener.width, self.language.width, config.projector.stack, hidden)
        self.context, self.stack = int(self.language.context), config.projector.stack  # loader processes have no networks
        self.opening, self.closing = frame_of(config.frame, self.tokenizer)
        self.spelling = Spelling(self.language.width) if config.weights.loss_spelling else None
        self.store = feature_store(config.data, tables["listener"])
        self.certificate: Certificate | None = None
        self.unspelled: Tensor | None = None  # share of the last batch's text that does not fit into its soft tokens
        self.train(self.training)

    @classmethod
    def make_tables(cls, config: Any, rows: Any) -> dict[str, Any]:
        """The language model's architecture and tokenizer, and the encoder's. BaseError for a random language model."""
        base = describe_base(config.base)
        heard = config.listen
        options = {"layers": heard.layers, "numbers": heard.numbers, "trim": heard.trim}
        listener = describe_listener(heard.whisper, **options)
        refuse_other_features(config.data.features, listener)
        return {"base": base, "listener": listener}

    def load_external(self) -> None:
        self.listener.load_external(self.config.listen.whisper)
        load_base(self.language, self.tables["base"])
        some = torch.linspace(0, self.tokenizer.size - 1, min(SCALE_TOKENS, self.tokenizer.size)).long()
        scale = self.projector.match(self.language.embed(some.unsqueeze(0).to(self.projector.scale.device)))
        log.info("soft tokens have the size of token embeddings: root mean square %.3g", scale)

    def train(self, mode: bool = True) -> OmniAlign:
        super().train(mode)
        self.language.eval()
        return self

    # --- data -------------------------------------------------------------------------------------------------------
    def reject(self, row: Row) -> str:
        return "no audio" if not row.audio else "" if row.text.strip() else "no text"

    def prepare(self, row: Row, clock: Clock) -> Example:
        tokens = self.tokenizer.encode(plain(row.text.strip(), self.tokenizer.marks))
        heard = self.store.get(row) if self.store is not None else None
        wave = audio.read(row.audio, RATE, row.start, row.duration)[0] if heard is None else None
        samples = len(wave) if wave is not None else round(row.duration * RATE)
        frames = len(heard) if heard is not None else frames_of(samples)
        if frames == 0:
            raise BadRow("the recording has no samples")
        text = len(self.opening) + len(self.closing) + len(tokens)
        if -(-frames // self.stack) + text > self.context:
            raise BadRow(
                f"too long: {-(-frames // self.stack)} soft tokens and {text} of text, the language model's context is"
                f" {self.context}; raise projector.stack or lower data.max_seconds"
            )
        return Example(row.id, row.text, tokens, heard, wave, samples)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """BOS, or the frame's close, stands between recording and text; each token's target is the next one, the last one's EOS."""
        told = [IGNORED] * (len(self.closing) - 1)
        tokens = [torch.tensor([*self.closing, *example.tokens]) for example in examples]
        targets = [torch.tensor([*told, *example.tokens, self.tokenizer.eos]) for example in examples]
        heard = [example.heard for example in examples if example.heard is not None]
        waves = [torch.from_numpy(example.wave) for example in examples if example.wave is not None]
        return Batch(
            ids=[example.id for example in examples],
            texts=[example.text for example in examples],
            tokens=pad_sequence(tokens, batch_first=True, padding_value=self.tokenizer.bos),
            targets=pad_sequence(targets, batch_first=True, padding_value=IGNORED),
            lengths=torch.tensor([len(row) for row in tokens]),
            known=torch.tensor([example.heard is not None for example in examples]),
            heard=pad_sequence(heard, batch_first=True) if heard else torch.zeros(0),
            heard_lengths=torch.tensor([len(one) for one in heard], dtype=torch.long),
            waves=pad_sequence(waves, batch_first=True) if waves else torch.zeros(0),
            wave_lengths=torch.tensor([len(wave) for wave in waves], dtype=torch.long),
            audio_seconds=sum(example.samples for example in examples) / RATE,
        )

    # --- hearing ----------------------------------------------------------------------------------------------------
    def soft_tokens(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The recordings of a batch → soft tokens [B, P, W] and their lengths [B]."""
        stored = iter([one[:n] for one, n in zip(batch.heard, batch.heard_lengths.tolist(), strict=True)])
        fresh = iter(self.listener.hear(batch.waves, batch.wave_lengths) if len(batch.waves) else [])
        heard = [next(stored) if known else next(fresh) for known in batch.known.tolist()]
        return self.project(heard)

    def project(self, heard: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Chosen layers [T_i, C, D] of each clip → soft tokens [B, P, W] and their lengths [B]."""
        frames = [self.listener.mix(one.float()) for one in heard]
        lengths = torch.tensor([len(one) for one in frames], device=frames[0].device)
        return self.projector(pad_sequence(frames, batch_first=True), lengths)

    def framed(self, soft: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Soft tokens [B, P, W] and their lengths [B] → the same after the frame's opening."""
        if not self.opening:
            return soft, counts
        opening = self.language.embed(torch.tensor([self.opening], device=soft.device)).to(soft.dtype)
        return torch.cat([opening.expand(len(soft), -1, -1), soft], dim=1), counts + len(self.opening)

    # --- learning ---------------------------------------------------------------------------------------------------
    def losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        with self.autocast():
            soft, counts = self.soft_tokens(batch)
        if isinstance(self.meter, Agreement):
            self.meter.add(*self._pooled(batch, soft, counts), batch.texts)
        if clock.training and self.certificate is None:  # also where spelling_steps come first: a bad base is not told after them
            self._certify(batch, soft, counts)
        found = {"loss_spelling": self._spelled(batch, soft, counts, clock)} if self.spelling is not None else {}
        if clock.training and clock.step < self.config.spelling_steps:
            return found
        return {"loss_text": self._read(batch, *self.framed(soft, counts)), **found}

    def _read(self, batch: Batch, prefix: Tensor, counts: Tensor) -> Tensor:
        """Cross-entropy of the text after the framed recording, nats a token."""
        wanted = batch.targets != IGNORED
        with self.autocast():
            logits = self.language(batch.tokens, batch.lengths, prefix, counts, wanted)
        total = F.cross_entropy(logits.float(), batch.targets[wanted], reduction="sum")
        return total / dist.average(wanted.sum()).clamp_min(1)

    def _spelled(self, batch: Batch, soft: Tensor, counts: Tensor, clock: Clock) -> Tensor:
        """CTC of the text's tokens among as many others, nats a token."""
        assert self.spelling is not None
        texts, lengths = batch.tokens[:, len(self.closing) :], batch.lengths - len(self.closing)
        generator = torch.Generator().manual_seed(clock.seed * 1_000_003 + clock.step)
        chosen, places = candidates(texts, lengths, self.tokenizer.size, generator)
        total, count = self.spelling(soft, counts, places, lengths, self.language.embed(chosen[None])[0])
        self.unspelled = 1 - count.detach() / lengths.sum().clamp_min(1)
        return total / dist.average(count).clamp_min(1)

    def scalars(self) -> dict[str, float | Tensor]:
        return {} if self.unspelled is None else {"spelling/left_out": self.unspelled}

    def _certify(self, batch: Batch, soft: Tensor, counts: Tensor) -> None:
        """Before the first step of this process: GradientPathError, with the reasons, when the projector could not learn."""
        case = Case(batch.tokens, batch.targets, batch.lengths, soft.detach(), counts)
        self.certificate = certify(_Framed(self), case, self.autocast_dtype)
        if not self.certificate.ok:
            raise GradientPathError(self.certificate.text())
        log.info("gradient path: %s", self.certificate.text())

    def _pooled(self, batch: Batch, prefix: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Mean soft token and mean token embedding of each row's text, [B, W] each."""
        text = self.language.embed(batch.tokens).float()
        inside = (torch.arange(text.shape[1], device=text.device) < batch.lengths.unsqueeze(1)).float()
        inside[:, : len(self.closing)] = 0  # BOS is no word
        words = torch.einsum("blw,bl->bw", text, inside) / inside.sum(1, keepdim=True).clamp_min(1)
        return prefix.float().sum(1) / counts.unsqueeze(1), words

    def new_meter(self) -> Agreement:
        return Agreement()

    @torch.no_grad()
    def media(self, batch: Batch, clock: Clock) -> Media:
        """Projected audio and text embeddings of the batch in two dimensions."""
        if len(batch.ids) < 3:
            return Media()
        audio_side, text_side = self._pooled(batch, *self.soft_tokens(batch))
        return Media(images={"alignment": measures.picture(audio_side, text_side)})

    # --- capabilities -----------------------------------------------------------------------------------------------
    @torch.no_grad()
    def measure(self, rows: Sequence[Row], folder: str | Path) -> dict[str, float]:
        """Retrieval@k and CKA of projected audio and text over ``rows``; ``alignment.json`` and ``.png`` in ``folder``. BadRow."""
        self.eval()
        seen, place = Agreement(), next(self.parameters()).device
        for first in range(0, len(rows), self.config.decode.together):
            some = [self.prepare(row, Clock(training=False)) for row in rows[first : first + self.config.decode.together]]
            batch = self.collate(some).to(place)
            with self.autocast():
                seen.add(*self._pooled(batch, *self.soft_tokens(batch)), batch.texts)
        return measures.write(folder, torch.cat(seen.audio), torch.cat(seen.text), seen.names)

    @torch.no_grad()
    def transcribe(self, waves: Sequence[np.ndarray], language: str = "") -> list[str]:
        """What is said in each recording, float32 [S] at 16 kHz: greedy, through the cache, several at once.

        ``language`` is not needed. ValueError names a recording without samples or too long for the language model's context.
        """
        self.eval()
        texts: list[str] = []
        for first in range(0, len(waves), self.config.decode.together):
            texts += self._transcribe(waves[first : first + self.config.decode.together], first)
        return texts

    def _transcribe(self, waves: Sequence[np.ndarray], first: int) -> list[str]:
        device = next(self.parameters()).device
        for number, wave in enumerate(waves, start=first + 1):
            soft = -(-frames_of(len(wave)) // self.stack)
            if not 0 < soft < self.context - len(self.opening) - len(self.closing):
                size = f"{len(wave) / RATE:g} s, {soft} soft tokens"
                raise ValueError(f"recording {number} has {size}; the language model's context is {self.context}")
        tensors = [torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32)) for wave in waves]
        lengths = torch.tensor([len(wave) for wave in waves], device=device)
        with self.autocast():
            heard = self.listener.hear(pad_sequence(tensors, batch_first=True).to(device), lengths)
            prefix, counts = self.framed(*self.project(heard))
            limit = self.config.decode.least + int(self.config.decode.tokens_per_second * int(lengths.max()) / RATE)
            closing = torch.tensor([self.closing], device=device).expand(len(waves), -1)
            most = min(limit, self.context - int(counts.max()) - len(self.closing))
            ends = {self.tokenizer.eos, self.tokenizer.bos}
            said = greedy(self.language, (closing, None, prefix, counts), ends, most, self.tokenizer.size)
            return [self.tokenizer.decode(ids).strip() for ids in said]


class _Framed(nn.Module):
    """The language model with the opening before every recording, so that a certificate is about the recordings alone."""

    def __init__(self, system: OmniAlign) -> None:
        super().__init__()
        self.language, self._framed = system.language, system.framed

    def forward(
        self, tokens: Tensor, lengths: Tensor | None, prefix: Tensor | None = None, prefix_lengths: Tensor | None = None
    ) -> Tensor:
        framed = (prefix, prefix_lengths) if prefix is None or prefix_lengths is None else self._framed(prefix, prefix_lengths)
        return self.language(tokens, lengths, *framed)


def frame_of(frame: settings.Frame, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens before a recording, and between it and its text. ValueError for ``chat`` without ChatML's marks."""
    chatml = conversation.format_of(tokenizer).chatml
    if frame is settings.Frame.chat and not chatml:
        raise ValueError("frame=chat: the language model's tokenizer has no ChatML marks (<|im_start|>); use frame=plain")
    if frame is settings.Frame.plain or not chatml:
        return [], [tokenizer.bos]
    heard = Message("user", audio=[np.zeros(0, dtype=np.float32)])
    encoded = conversation.encode([heard], tokenizer, reply=True)
    return encoded.opening, encoded.tokens
