"""``omni-chat``: an aligned run that follows instructions. LoRA on the language model and the projector learn; the encoder and the
language model's own weights stay as they are.

Lifecycle. The first start copies configuration, tables and weights of the ``omni-align`` run named by ``align``; from then on the
run folder stands alone.
"""

from __future__ import annotations

import json
import logging
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from lalia import checkpoint, dist
from lalia import config as configuration
from lalia.data import BadRow, Row
from lalia.runfolder import CONFIG, RunFolder
from lalia.system import Clock, Message, Question, System, system_class
from lalia.systems.omni import config_chat as settings
from lalia.systems.omni import conversation
from lalia.systems.omni.chat_data import FRAMES_PER_SECOND, RATE, Batch, Example, collate, read_example, seconds_of
from lalia.systems.omni.chat_decode import pieces, replies
from lalia.systems.omni.conversation import ConversationError
from lalia.systems.omni.lora import add_lora, lora_parameters, merge, renamed
from lalia.systems.omni.mcq import Prompt, answer_scores, stack_soft
from lalia.systems.omni.stored import feature_store, refuse_other_features

log = logging.getLogger(__name__)

TRANSCRIBE = "What is said?"
TRANSCRIBE_TOKENS = 400
#: recordings transcribed, and questions scored, together
TOGETHER = 8
#: of the earlier run: where its data lay and how it was trained says nothing about its networks
UNUSED = ("data.", "train.", "dist.")
LETTERS_PER_TOKEN = 4  # about, of English in a language model's vocabulary
SAMPLES_LEAST = 400  # 25 ms: one frame of the encoder


class OmniChat(System):
    """See the module. ``align`` is the earlier stage with its ``listener``, ``projector``, ``language`` and ``tokenizer``."""

    Config = settings.Config
    best_metric = "loss/main/text"
    config: settings.Config
    align: Any
    tokenizer: Any

    def __init__(self, config: settings.Config, tables: Mapping[str, Any]) -> None:
        super().__init__(config, tables)
        stored = tables["align"]
        self.align = system_class(stored["system"])(rebuilt_config(stored), stored["tables"])
        self.wrapped = add_lora(self.align.language, config.model.lora)
        self.align.requires_grad_(False)
        for parameter in self._learning():
            parameter.requires_grad_(True)
        # loader processes have these, but no networks
        self.tokenizer = self.align.tokenizer
        self.context, self.stack = int(self.align.language.context), int(self.align.projector.stack)
        self.format = conversation.format_of(self.tokenizer)
        self.store = feature_store(config.data, stored["tables"].get("listener"))
        self._heard: OrderedDict[str, Tensor] = OrderedDict()

    def _learning(self) -> list[nn.Parameter]:
        projector = list(self.align.projector.parameters()) if self.config.model.projector else []
        return [*lora_parameters(self.align.language), *projector]

    @property
    def language(self) -> Any:
        return self.align.language

    @classmethod
    def make_tables(cls, config: Any, rows: Any) -> dict[str, Any]:
        """Configuration and tables of the aligned run. ValueError when ``align`` names none."""
        if not config.align:
            raise ValueError("align is empty: name the run folder of `lalia train` with system omni-align, e.g. align=runs/align")
        run = Path(config.align)
        if not (run / CONFIG).is_file():
            raise ValueError(f"align: {run} is no run folder (it has no {CONFIG}); train omni-align first")
        earlier = configuration.load_run_config(run / CONFIG)
        if earlier.system == config.system:
            raise ValueError(f"align: {run} is a run of {earlier.system} itself; to go on from it use train.init_from={run}")
        missing = [name for name in ("listener", "projector") if name not in _modules(run)]
        if missing:
            raise ValueError(f"align: {run} is a run of {earlier.system}, which has no {' and no '.join(missing)}")
        stored = {"config": configuration.flatten(earlier), "tables": RunFolder(run).read_tables()}
        refuse_other_features(config.data.features, stored["tables"].get("listener"))
        return {"align": {"system": earlier.system, **stored}}

    def load_external(self) -> None:
        """Weights of the aligned run, those of its encoder included; they are in the checkpoints from now on."""
        weights = checkpoint.load_weights(self.config.align)
        names = [f"language.{name}" for name in self.wrapped]
        report = checkpoint.partial_load(self.align, renamed(weights, names), allow=["language.*.lora_*"])
        fresh = len(report.missing)
        log.info("weights from %s: %d tensors; %d of adapters start fresh", self.config.align, len(report.matched), fresh)

    def for_inference(self) -> None:
        self.eval()
        merge(self.language)

    def train(self, mode: bool = True) -> OmniChat:
        """The encoder stays in evaluation mode: it does not learn."""
        super().train(mode)
        self.align.listener.eval()
        return self

    # --- data -------------------------------------------------------------------------------------------------------
    def reject(self, row: Row) -> str:
        if "messages" not in row.extra:
            return "no instruction: the row has no extra.messages (see `lalia prepare instructions`)"
        return ""

    def length(self, row: Row) -> float:
        """Seconds of sound and what the text would take of them, so that batches are of like length."""
        letters = sum(len(str(message.get("text", ""))) for message in row.extra["messages"])
        sounds = row.duration + sum(float(other["duration"]) for other in row.extra.get("others", []))
        return sounds + letters / LETTERS_PER_TOKEN * self.stack / FRAMES_PER_SECOND

    def prepare(self, row: Row, clock: Clock) -> Example:
        example = read_example(row, self.tokenizer, self.config.model, self.store)
        size = len(example.opening) + len(example.tokens) + sum(self._soft_count(seconds_of(clip)) for clip in example.clips)
        if size > self.context:
            raise BadRow(f"too long: about {size} tokens with the audio, the model's context is {self.context}")
        return example

    def collate(self, examples: Sequence[Example]) -> Batch:
        return collate(examples)

    def _soft_count(self, seconds: float) -> int:
        """Soft tokens of a recording, at the encoder's 50 frames a second."""
        return math.ceil(seconds * FRAMES_PER_SECOND / self.stack)

    # --- hearing ----------------------------------------------------------------------------------------------------
    def features(self, wave: Tensor, key: str = "") -> Tensor:
        """What the frozen encoder says of one recording [S] at 16 kHz: [T, D]. Kept under ``key``, so that a recording of many
        questions is encoded once; always by itself, so that the result does not depend on what it came with."""
        if key in self._heard:
            self._heard.move_to_end(key)
            return self._heard[key].to(wave.device)
        with torch.no_grad():
            lengths = torch.tensor([len(wave)], device=wave.device)
            found = self.align.listener.features(wave[None], lengths)[0]
        limit = self.config.data.features_mb * 2**20
        if key and found.numel() * found.element_size() <= limit:
            self._heard[key] = found.cpu()
            while sum(v.numel() * v.element_size() for v in self._heard.values()) > limit:
                self._heard.popitem(last=False)
        return found

    def soft_tokens(self, clips: Sequence[Sequence[Tensor]], openings: Sequence[Sequence[int]] = ()) -> list[Tensor | None]:
        """Features [T, D] of each row's recordings → their soft tokens [P, W] one after the other, BOS's embedding between two, and
        before them the embeddings of each row's opening."""
        flat = [clip for row in clips for clip in row]
        if not flat:
            return [None] * len(clips)
        lengths = torch.tensor([len(clip) for clip in flat], device=flat[0].device)
        projected, counts = self.align.projector(pad_sequence(flat, batch_first=True), lengths)
        parts = iter([value[:count] for value, count in zip(projected, counts.tolist(), strict=True)])
        between = self._embedded([self.tokenizer.bos], projected)
        rows: list[Tensor | None] = []
        for row, opening in zip(clips, openings or [[]] * len(clips), strict=True):
            pieces_of_row = [self._embedded(opening, projected)] if row and opening else []
            for number, _ in enumerate(row):
                pieces_of_row += [between, next(parts)] if number else [next(parts)]
            rows.append(torch.cat(pieces_of_row) if pieces_of_row else None)
        return rows

    def _embedded(self, tokens: Sequence[int], like: Tensor) -> Tensor:
        return self.language.embed(torch.tensor([tokens], device=like.device))[0].to(like.dtype)

    # --- learning ---------------------------------------------------------------------------------------------------
    def optimizers(self) -> dict[str, list[nn.Parameter]]:
        return {"main": self._learning()}

    def losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Cross-entropy of the assistant's tokens; everything else is only read."""
        clips = self._clips(batch)
        with self.autocast():
            prefix = stack_soft(self.soft_tokens(clips, batch.openings), self.language.width, batch.tokens.device)
            wanted = batch.learnt[:, 1:]
            logits = self.language(batch.tokens[:, :-1], (batch.lengths - 1).clamp_min(1), *prefix, wanted)
        total = functional.cross_entropy(logits.float(), batch.tokens[:, 1:][wanted], reduction="sum")
        return {"loss_text": total / dist.average(wanted.sum()).clamp_min(1)}

    def _clips(self, batch: Batch) -> list[list[Tensor]]:
        """Features [T, D] of each row's recordings, stored or heard now."""
        waves, heard = batch.wave.split(batch.wave_lengths.tolist()), batch.heard.split(batch.heard_lengths.tolist())
        every = iter(
            self.align.listener.mix(stored.float()) if len(stored) else self.features(wave, key)
            for wave, stored, key in zip(waves, heard, batch.keys, strict=True)
        )
        return [[next(every) for _ in range(count)] for count in batch.clips]

    # --- capabilities -----------------------------------------------------------------------------------------------
    @torch.no_grad()
    def prompt(self, messages: Sequence[Message], heard: dict[int, Tensor] | None = None) -> Prompt:
        """A conversation that waits for the assistant → tokens and soft tokens.

        Args:
            heard: features by ``id`` of a wave, filled and used within one call of a caller that keeps the waves alive.

        Raises:
            ConversationError: roles, recordings or length do not suit the model.
        """
        conversation.check(messages, self.config.model.max_audios)
        if messages[-1].role != "user":
            raise ConversationError("the last message must be the user's: that is what is answered")
        encoded = conversation.encode(messages, self.tokenizer, reply=True)
        heard = {} if heard is None else heard
        waves = [wave for message in messages for wave in message.audio]
        for wave in waves:
            if id(wave) not in heard:
                heard[id(wave)] = self.features(self._checked(wave))
        with self.autocast():
            soft = self.soft_tokens([[heard[id(wave)] for wave in waves]], [encoded.opening])[0]
        prompt = Prompt(encoded.tokens, soft)
        if prompt.size >= self.language.context:
            audio = prompt.size - len(prompt.tokens)
            raise ConversationError(
                f"the conversation has {len(prompt.tokens)} text and {audio} audio tokens; the model's context is "
                f"{self.language.context}, the reply included: shorten the text, the recording, or begin anew"
            )
        return prompt

    def _checked(self, wave: np.ndarray) -> Tensor:
        seconds = len(wave) / RATE
        if wave.ndim != 1 or len(wave) < SAMPLES_LEAST:
            least = SAMPLES_LEAST / RATE
            raise ConversationError(f"a recording of {seconds:.3f} s is too short to hear; give at least {least:g} s")
        if seconds > self.config.model.max_audio_seconds:
            limit = self.config.model.max_audio_seconds
            raise ConversationError(f"a recording of {seconds:.1f} s; this model takes {limit:g} s (model.max_audio_seconds)")
        if not np.isfinite(wave).all():
            raise ConversationError("a recording holds samples that are no numbers")
        return torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32)).to(next(self.parameters()).device)

    def reply(
        self, messages: Sequence[Message], *, max_tokens: int = 256, temperature: float = 0.0, top_k: int = 0, seed: int = 0
    ) -> Iterator[str]:
        """Pieces of text as they are decoded. ConversationError at once, before the first piece, for what cannot be put."""
        prompt = self.prompt(messages)
        return pieces(self.language, self.tokenizer, prompt, max_tokens, temperature, top_k, seed, self.autocast)

    def count_tokens(self, messages: Sequence[Message], reply: str = "") -> tuple[int, int]:
        """Positions that ``messages`` take in the context, audio included, and tokens of ``reply``."""
        return self.prompt(messages).size, len(self._answer_tokens(reply))

    def transcribe(self, waves: Sequence[np.ndarray], language: str = "") -> list[str]:
        """What is said in each recording. ``language`` is not needed: the model was asked in one way for all."""
        texts: list[str] = []
        for first in range(0, len(waves), TOGETHER):
            asked = [Message("user", TRANSCRIBE, [wave]) for wave in waves[first : first + TOGETHER]]
            prompts = [self.prompt([message]) for message in asked]
            texts += replies(self.language, self.tokenizer, prompts, TRANSCRIBE_TOKENS, self.autocast)
        return texts

    def score_answers(self, questions: Sequence[Question]) -> list[list[float]]:
        """Length-normalised log-probability of each answer of each question."""
        heard: dict[int, Tensor] = {}
        prompts = [self.prompt(question.messages, heard) for question in questions]
        answers = [[self._answer_tokens(text) for text in question.answers] for question in questions]
        with self.autocast():
            return answer_scores(self.language, prompts, answers)

    def _answer_tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(conversation.harmless(text, self.format))


def rebuilt_config(stored: Mapping[str, Any]) -> Any:
    """The earlier run's configuration from its flattened form in the tables."""
    given = {key: value for key, value in stored["config"].items() if value is not None and not key.startswith(UNUSED)}
    overrides = [f"{key}={_as_text(value)}" for key, value in given.items()]
    return configuration.load_run_config(None, overrides)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _modules(run: Path) -> set[str]:
    """Names of the networks in a run's weights."""
    return {key.split(".", 1)[0] for key in cast(dict[str, Tensor], checkpoint.load_weights(run))}
