"""What a system can do for its user, each ability a small protocol with its requests and answers.

Command line, harness and server ask ``isinstance(system, Speaks)``, never for a name. :mod:`lalia.system` names all of this too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np


@dataclass
class SpeakRequest:
    """Text to be spoken. ``length_scale`` above 1 is slower; ``sdp_ratio`` mixes stochastic (1) and deterministic (0) durations."""

    text: str
    speaker: str = ""  # '' = the first speaker of the run
    language: str = "en"
    noise_scale: float = 0.667
    noise_scale_w: float = 0.8
    length_scale: float = 1.0
    sdp_ratio: float = 0.2
    seed: int = 0
    max_seconds: float = 60.0  # per sentence
    pause: float = 0.25  # seconds of silence between sentences
    reference: str = ""  # recording of the voice, for models with a reference encoder


@dataclass
class Speech:
    """``wave`` float32 [S] in [-1, 1] at ``sample_rate`` Hz; ``notes`` name what was replaced or cut."""

    wave: np.ndarray
    sample_rate: int
    notes: list[str] = field(default_factory=list)


@runtime_checkable
class Speaks(Protocol):
    def speak(self, requests: Sequence[SpeakRequest]) -> list[Speech]: ...

    def speak_stream(self, request: SpeakRequest, chunk_frames: int = 64) -> Iterator[np.ndarray]: ...


@runtime_checkable
class Resynthesizes(Protocol):
    def resynthesize(self, rows: Sequence[Any]) -> list[Speech]:
        """Recording → latent → recording: what the decoder alone can do, without text."""
        ...


@runtime_checkable
class Aligns(Protocol):
    def alignment(self, row: Any) -> np.ndarray:
        """Which token of a row's text is said at which frame of its recording: 0/1 float32 [T, L]."""
        ...


@dataclass
class Emotion:
    """What a turn sounds like. ``values``: dimension → value in the units of the labels the run was trained on.

    ``calibration``: the turn's own labels were used to adapt to the speaker, so it must not be scored.
    """

    id: str
    speaker: str
    values: dict[str, float]
    calibration: bool = False


class EmotionSession(Protocol):
    """One live dialogue. What a turn is told depends on it and the turns before, and is what :meth:`recognize_emotion` says."""

    def turn(
        self, wave: np.ndarray, sample_rate: int, speaker: str = "", id: str = "", labels: Mapping[str, float] | None = None
    ) -> Emotion:
        """``wave`` float32 [S] in [-1, 1]. ``labels``, where known, calibrate the speaker's later turns, never this one."""
        ...


@runtime_checkable
class RecognizesEmotion(Protocol):
    """Systems that say what a turn of a dialogue sounds like, in named dimensions."""

    dimensions: list[str]

    def recognize_emotion(
        self, dialogues: Sequence[Sequence[Any]], *, calibrate: int = 0, feedback: str = "own"
    ) -> list[list[Emotion]]:
        """Rows of each dialogue in time order → one :class:`Emotion` a row.

        Args:
            calibrate: adapt to a speaker by their first so many labelled turns of the dialogue.
            feedback: what a model that hears its previous answer is given: ``own``, or ``labels`` (teacher forcing, which no use
                of the model can have; it shows the gap).
        """
        ...

    def listen(self) -> EmotionSession: ...


@dataclass
class Message:
    """One message of a conversation. ``role``: system, user or assistant; ``audio``: recordings, float32 [S] at 16 kHz each."""

    role: str
    text: str = ""
    audio: list[np.ndarray] = field(default_factory=list)


@dataclass
class Question:
    """A conversation that ends with the user's question, and answers of which one is right."""

    messages: list[Message]
    answers: list[str]


@runtime_checkable
class ScoresAnswers(Protocol):
    """Systems that say how probable given answers are."""

    def score_answers(self, questions: Sequence[Question]) -> list[list[float]]:
        """Length-normalised log-probability of each answer, by question; higher is more probable. ValueError for what the model
        cannot be asked."""
        ...


@runtime_checkable
class Replies(Protocol):
    """Systems that answer a conversation with text."""

    def reply(
        self, messages: Sequence[Message], *, max_tokens: int = 256, temperature: float = 0.0, top_k: int = 0, seed: int = 0
    ) -> Iterator[str]:
        """Pieces of the answer as they are decoded; closing the iterator stops the decoding.

        ``temperature`` 0 takes the likeliest token, ``top_k`` draws from so many (0 = all). ValueError at the first piece for what
        the model cannot answer: a conversation longer than its context, too many recordings.
        """
        ...


@runtime_checkable
class CountsTokens(Protocol):
    """Systems that reply and can say how long a conversation is for them."""

    def count_tokens(self, messages: Sequence[Message], reply: str = "") -> tuple[int, int]:
        """Positions that ``messages`` take in the context (audio included), and tokens of ``reply``."""
        ...


@runtime_checkable
class Transcribes(Protocol):
    def transcribe(self, waves: Sequence[np.ndarray], language: str = "") -> list[str]:
        """What is said in recordings float32 [S] at 16 kHz. ``language`` '' = the model's own choice; ValueError if unknown."""
        ...


@runtime_checkable
class MeasuresAlignment(Protocol):
    """Systems that can say how well what they hear agrees with the words of its text, without decoding any."""

    def measure(self, rows: Sequence[Any], folder: str | Path) -> dict[str, float]:
        """Rows of speech with text → figures by name (``retrieval@k`` with its ``…_chance``, ``cka`` with ``cka_shuffled``, the
        number of ``pairs``), and ``alignment.json`` and ``alignment.png`` in ``folder``. ValueError for too few rows or one that
        cannot be used."""
        ...
