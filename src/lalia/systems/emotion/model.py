"""The network: encoders → fusion (FiLM) → state over the turns → head.

    hidden_t  = FiLM(speech_t ; prosody_t, speaker_t)        prosody itself where there is no speech encoder
    context_t = state of the dialogue and/or of the speaker, updated by hidden_t (and by earlier answers)
    answer_t  = head(hidden_t, context_t)

State is data: ``init(dialogues, parties) -> DialogueState`` and ``step(state, hidden, …) -> (state, answer)``; ``run`` does several
turns at once with the same result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lalia.systems.emotion import state as states
from lalia.systems.emotion.config import ModelConfig, SpeechConfig, StateKind, StateScope
from lalia.systems.emotion.encoders import SpeechEncoder
from lalia.systems.emotion.fusion import Film, ProsodyEncoder
from lalia.systems.emotion.state import State, Streams, make_updater

FUNCTIONALS = 88
VOICE = 192


@dataclass(frozen=True)
class DialogueState:
    """What B dialogues of at most P speakers have left behind.

    ``memory``: scope → updater state, B rows for ``dialogue``, B · P rows for ``speaker`` (dialogue by dialogue).
    ``answers`` [B, P + 1, D]: the last answer about each speaker and, at the end, about whoever spoke last; ``heard`` [B, P + 1]:
    whether there is one.
    """

    memory: dict[str, State]
    answers: Tensor
    heard: Tensor

    @property
    def parties(self) -> int:
        return self.heard.shape[1] - 1

    def detach(self) -> DialogueState:
        """The same values without their graph, for the next stretch of truncated back-propagation."""
        memory = {scope: states.detach(value) for scope, value in self.memory.items()}
        return DialogueState(memory, self.answers.detach(), self.heard)


def _speech_encoder(config: SpeechConfig, description: Mapping[str, Any]) -> SpeechEncoder:
    return SpeechEncoder(
        description, tuned=config.tuned, freeze_extractor=config.freeze_extractor, micro_seconds=config.micro_seconds
    )


class EmotionModel(nn.Module):
    """Networks of ``emotion`` for D dimensions. ``tables`` holds statistics and the architecture of the external encoders."""

    def __init__(self, config: ModelConfig, dimensions: int, tables: Mapping[str, Any]) -> None:
        super().__init__()
        self.config, self.dimensions = config, dimensions
        width = config.width
        self.speech = _speech_encoder(config.speech, tables["speech"]) if tables.get("speech") else None
        self.project = nn.Sequential(nn.LayerNorm(self.speech.width), nn.Linear(self.speech.width, width)) if self.speech else None
        statistics = tables.get("prosody")
        self.prosody = (
            ProsodyEncoder(statistics["mean"], statistics["std"], width, config.dropout)
            if statistics
            else None
        )
        voice = VOICE if config.speaker.source else 0
        condition = voice + (width if self.speech is not None and self.prosody is not None else 0)
        self.film = Film(width, condition) if condition else None
        self.after = nn.Sequential(nn.LayerNorm(width), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(width, width))
        scopes = self._scopes()
        self.updaters = nn.ModuleDict({scope: make_updater(width, config.state) for scope in scopes})
        self.feedback = nn.Linear(2 * (dimensions + 1), width) if config.autoregressive else None
        total = width * (1 + len(scopes))
        self.head = nn.Sequential(
            nn.LayerNorm(total), nn.Linear(total, width), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(width, dimensions)
        )

    @property
    def answer_bias(self) -> nn.Parameter:
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        return last.bias

    def _scopes(self) -> list[str]:
        if self.config.state.kind is StateKind.none:
            return []
        scope = self.config.state.scope
        return ["dialogue", "speaker"] if scope is StateScope.both else [scope.value]

    # --- one turn by itself -----------------------------------------------------------------------------------------
    def encode(self, prosody: Tensor | None, speech: Tensor | None, voice: Tensor | None) -> Tensor:
        """What is heard in N turns, without their context: ``prosody [N, 88]``, pooled ``speech [N, layers, width]``, ``voice
        [N, 192]`` → [N, W]."""
        heard = self.prosody(prosody) if self.prosody is not None else None
        if self.speech is not None and self.project is not None:
            hidden, conditions = self.project(self.speech(speech)), [heard, voice]
        else:
            assert heard is not None
            hidden, conditions = heard, [voice]
        given = [item for item in conditions if item is not None]
        if self.film is not None:
            hidden = self.film(hidden, torch.cat(given, -1))
        return self.after(hidden)

    # --- turns in their dialogue ------------------------------------------------------------------------------------
    def init(self, dialogues: int, parties: int) -> DialogueState:
        """The state at the beginning of so many dialogues."""
        rows = {"dialogue": dialogues, "speaker": dialogues * parties}
        memory = {scope: updater.init(rows[scope]) for scope, updater in self.updaters.items()}  # type: ignore[operator]
        blank = self.answer_bias.new_zeros(dialogues, parties + 1, self.dimensions)
        return DialogueState(memory, blank, blank.new_zeros(dialogues, parties + 1, dtype=torch.bool))

    def welcome(self, state: DialogueState) -> DialogueState:
        """One more speaker, in a state of a single dialogue (a live one, whose speakers are not known beforehand)."""
        fresh = self.init(1, 1)
        memory = dict(state.memory)
        if "speaker" in memory:
            memory["speaker"] = states.join(memory["speaker"], fresh.memory["speaker"])
        answers = torch.cat([state.answers[:, :-1], fresh.answers[:, :1], state.answers[:, -1:]], 1)
        heard = torch.cat([state.heard[:, :-1], fresh.heard[:, :1], state.heard[:, -1:]], 1)
        return DialogueState(memory, answers, heard)

    def step(
        self, state: DialogueState, hidden: Tensor, party: Tensor, valid: Tensor | None = None, label: Tensor | None = None
    ) -> tuple[DialogueState, Tensor]:
        """One turn of each dialogue.

        Args:
            hidden: [B, W] from :meth:`encode`; party: int64 [B], who speaks, below ``state.parties``.
            valid: bool [B]; a dialogue that has no turn here keeps its state.
            label: [B, D]; where finite, it is remembered instead of the answer (teacher forcing).

        Returns:
            The state after the turn, and answers [B, D].
        """
        valid = torch.ones_like(party, dtype=torch.bool) if valid is None else valid
        turn = hidden if self.feedback is None else hidden + self.feedback(self._recall(state, party))
        here = valid.nonzero()[:, 0]
        contexts, memory = [], {}
        for scope, updater in self.updaters.items():
            streams = here if scope == "dialogue" else here * state.parties + party[here]
            before = state.memory[scope]
            rows, context = updater.step(states.rows_of(before, streams), turn[here])  # type: ignore[operator]
            memory[scope] = states.with_rows(before, streams, rows)
            contexts.append(turn.new_zeros(turn.shape[0], context.shape[-1]).index_copy(0, here, context))
        answer = self.head(torch.cat([turn, *contexts], -1))
        return self._remember(replace(state, memory=memory), answer, party, valid, label), answer

    def run(
        self, state: DialogueState, hidden: Tensor, party: Tensor, valid: Tensor, labels: Tensor | None = None
    ) -> tuple[DialogueState, Tensor]:
        """T turns of each dialogue at once: ``hidden [B, T, W]``, ``party`` and ``valid [B, T]`` (valid turns first), ``labels
        [B, T, D]`` as in :meth:`step` → (state after them, answers [B, T, D], of which those of no turn mean nothing)."""
        if self.feedback is not None:
            answers = []
            for turn in range(hidden.shape[1]):
                label = labels[:, turn] if labels is not None else None
                state, answer = self.step(state, hidden[:, turn], party[:, turn], valid[:, turn], label)
                answers.append(answer)
            return state, torch.stack(answers, 1)
        memory, contexts = {}, []
        number = torch.arange(hidden.shape[0], device=hidden.device)[:, None].expand_as(party)
        for scope, updater in self.updaters.items():
            of_speaker = scope == "speaker"
            rows = hidden.shape[0] * (state.parties if of_speaker else 1)
            streams = Streams(number * state.parties + party if of_speaker else number, valid, rows)
            memory[scope], context = updater.scan(state.memory[scope], streams.gather(hidden), streams.lengths)  # type: ignore[operator]
            contexts.append(streams.scatter(context))
        return replace(state, memory=memory), self.head(torch.cat([hidden, *contexts], -1))

    def _recall(self, state: DialogueState, party: Tensor) -> Tensor:
        """Earlier answers, [B, 2 (D + 1)]: about this speaker, about whoever spoke before, each with whether there is one."""
        row = torch.arange(len(party), device=party.device)
        own = torch.cat([state.answers[row, party], state.heard[row, party][:, None]], -1)
        last = torch.cat([state.answers[:, -1], state.heard[:, -1:]], -1)
        return torch.cat([own, last], -1)

    def _remember(
        self, state: DialogueState, answer: Tensor, party: Tensor, valid: Tensor, label: Tensor | None
    ) -> DialogueState:
        """Answers are remembered without their graph: an input like any other, as labels are."""
        if self.feedback is None:
            return state
        said = answer.detach()
        if label is not None:
            said = torch.where(label.isfinite(), label.to(said.dtype), said)
        slots = torch.arange(state.parties + 1, device=party.device)
        written = valid[:, None] & ((slots == party[:, None]) | (slots == state.parties))
        answers = torch.where(written[..., None], said[:, None].to(state.answers.dtype), state.answers)
        return replace(state, answers=answers, heard=state.heard | written)
