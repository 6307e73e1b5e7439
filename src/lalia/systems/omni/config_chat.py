"""Configuration of ``omni-chat``: instructions on top of an aligned run, by LoRA. No heavy import."""

from __future__ import annotations

from dataclasses import dataclass, field

from lalia import sections
from lalia.sections import OptimizerConfig, ScheduleKind, Section


@dataclass
class LoraConfig(Section):
    """Low-rank adapters on the language model."""

    rank: int = 16
    alpha: int = 32  # the adapter is scaled by alpha / rank
    dropout: float = 0.0
    targets: list[str] = field(default_factory=list)  # last names of layers; empty = every linear layer of the blocks

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank must be at least 1, got {self.rank}")
        if self.alpha <= 0:
            raise ValueError(f"lora.alpha must be above 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must be in [0, 1), got {self.dropout}")


@dataclass
class ModelConfig(Section):
    """What learns, and what a conversation may hold."""

    lora: LoraConfig = field(default_factory=LoraConfig)
    projector: bool = True  # the projector goes on learning
    max_audios: int = 4  # recordings in one conversation
    max_audio_seconds: float = 30.0  # of one recording

    def __post_init__(self) -> None:
        if self.max_audios < 1 or self.max_audio_seconds <= 0:
            raise ValueError("model.max_audios and model.max_audio_seconds must be above 0")


@dataclass
class DataConfig(sections.DataConfig):
    """Instructions as ``lalia prepare instructions`` writes them."""

    batch_size: int = 8
    max_seconds: float = 30.0
    features: str = ""  # folder filled by `lalia features whisper`; empty = `features` beside the first manifest; none = off
    features_mb: int = 1024  # without them: what the encoder said of a recording is kept in memory up to this size; 0 = never


@dataclass
class Weights(Section):
    loss_text: float = 1.0  # cross-entropy of the assistant's tokens


@dataclass
class Optimizers(Section):
    main: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            lr=2e-4, betas=[0.9, 0.99], eps=1e-8, weight_decay=0.0, schedule=ScheduleKind.constant, warmup_steps=20, clip=1.0
        )
    )


@dataclass
class TrainConfig(sections.TrainConfig):
    epochs: int = 3
    eval_every: int = 200
    save_every: int = 200
    log_every: int = 20
    valid_batches: int = 0
    keep: int = 2


@dataclass
class Config(sections.RunConfig):
    """Everything that an ``omni-chat`` run is made of. ``align``: the run folder of ``omni-align`` that it starts from."""

    system: str = "omni-chat"
    align: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    weights: Weights = field(default_factory=Weights)
    optimizers: Optimizers = field(default_factory=Optimizers)
    train: TrainConfig = field(default_factory=TrainConfig)
