"""Configuration of ``emotion``. The defaults are the full size, for a GPU; YAML files say only what differs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from lalia import sections
from lalia.nn.ssm import ScanBackend
from lalia.sections import ExternalModel, OptimizerConfig, ScheduleKind, Section


class SpeechKind(Enum):
    none = "none"  # prosody alone
    wavlm = "wavlm"
    whisper = "whisper"  # the encoder of a Whisper


class StateKind(Enum):
    """What a turn is told of the turns before it."""

    none = "none"  # nothing: each turn for itself
    ema = "ema"  # s = α s + (1 − α) u
    mamba = "mamba"  # selective state space


class StateScope(Enum):
    """Whose turns share a state."""

    speaker = "speaker"  # one for each speaker of a dialogue
    dialogue = "dialogue"  # one for all
    both = "both"


class Decay(Enum):
    """How the share of true previous labels falls in training (Bengio et al. 2015)."""

    linear = "linear"
    exponential = "exponential"
    sigmoid = "sigmoid"


@dataclass
class LabelConfig(Section):
    """Which labels are learnt, and the scale they are given on. Inside the model they are (label − low) / (high − low)."""

    dimensions: list[str] = field(default_factory=lambda: ["valence", "arousal"])
    low: float = 1.0
    high: float = 5.0

    def __post_init__(self) -> None:
        if not self.dimensions or len(set(self.dimensions)) != len(self.dimensions):
            raise ValueError(f"labels.dimensions must name different labels, got {self.dimensions}")
        if not self.low < self.high:
            raise ValueError(f"labels.low ({self.low}) must be below labels.high ({self.high})")


@dataclass
class DataConfig(sections.DataConfig):
    """A batch holds ``batch_size`` turns without state, ``batch_size`` whole dialogues with."""

    batch_size: int = 8
    max_seconds: float = 0.0
    workers: int = 1
    features: str = ""  # folder of features computed once; empty = `features` beside the first training manifest; none = off


@dataclass
class SpeechConfig(Section):
    """The speech encoder: mean over time of every hidden layer, summed by learnt weights."""

    kind: SpeechKind = SpeechKind.wavlm
    wavlm: ExternalModel = field(default_factory=lambda: ExternalModel(source="microsoft/wavlm-base-plus"))
    whisper: ExternalModel = field(default_factory=lambda: ExternalModel(source="openai/whisper-base"))
    tuned: bool = False  # False: the encoder is frozen, only the layer weights learn
    freeze_extractor: bool = True  # tuned: leave WavLM's convolutions as they are
    trim: bool = True  # Whisper: the clip's own length instead of 30 s of silence; faster, other hidden states
    window_seconds: float = 30.0  # longer turns are encoded in windows of this length and averaged
    micro_seconds: float = 0.0  # padded seconds encoded at once; 0 = all of a step. Halved when memory runs out

    @property
    def source(self) -> ExternalModel:
        """The external model of the chosen kind; none for ``none``."""
        return ExternalModel() if self.kind is SpeechKind.none else self[self.kind.value]

    @property
    def unused(self) -> list[str]:
        """The models of the kinds that were not chosen."""
        return [kind.value for kind in SpeechKind if kind not in (SpeechKind.none, self.kind)]


@dataclass
class StateConfig(Section):
    """What is kept from turn to turn, for whom, and how far gradients go back."""

    kind: StateKind = StateKind.none
    scope: StateScope = StateScope.both
    tbptt: int = 16  # turns that gradients flow back through; the state itself goes on through the dialogue
    alpha_low: float = 0.3  # ema: the channels' decays α start between these two
    alpha_high: float = 0.95
    mamba_state: int = 16
    mamba_kernel: int = 4
    mamba_expand: int = 2
    mamba_layers: int = 1
    mamba_backend: ScanBackend = ScanBackend.auto

    def __post_init__(self) -> None:
        if self.tbptt < 1:
            raise ValueError(f"model.state.tbptt must be at least 1 turn, got {self.tbptt}")
        if not 0 < self.alpha_low <= self.alpha_high < 1:
            raise ValueError(f"need 0 < alpha_low <= alpha_high < 1, got {self.alpha_low} and {self.alpha_high}")


@dataclass
class SamplingConfig(Section):
    """Scheduled sampling: the probability that training feeds back the true previous label, from ``start`` to ``end``.

    ``start`` = ``end`` = 1 is teacher forcing throughout; 0 never shows a label.
    """

    decay: Decay = Decay.linear
    start: float = 1.0
    end: float = 0.0
    steps: int = 1000  # until ``end`` is reached (linear), or nearly so

    def __post_init__(self) -> None:
        if not 0 <= self.end <= self.start <= 1:
            raise ValueError(f"need 0 <= end <= start <= 1, got {self.end} and {self.start}")
        if self.steps < 1:
            raise ValueError(f"sampling.steps must be at least 1, got {self.steps}")

    def probability(self, step: int) -> float:
        """Share of true labels at training step ``step``: a pure function of it."""
        done = min(1.0, step / self.steps)
        if self.decay is Decay.linear:
            left = 1 - done
        elif self.decay is Decay.exponential:
            left = math.exp(-5 * step / self.steps)
        else:
            left = 1 / (1 + math.exp(12 * (done - 0.5)))
        return self.end + (self.start - self.end) * left


@dataclass
class ModelConfig(Section):
    """Encoders, their fusion, the state, and the head."""

    width: int = 256
    dropout: float = 0.2
    prosody: bool = True  # eGeMAPS, 88 functionals
    speech: SpeechConfig = field(default_factory=SpeechConfig)
    speaker: ExternalModel = field(default_factory=ExternalModel)  # ECAPA-TDNN, frozen; e.g. speechbrain/spkrec-ecapa-voxceleb
    state: StateConfig = field(default_factory=StateConfig)
    autoregressive: bool = False  # a turn is also told what was answered for the turns before it

    def __post_init__(self) -> None:
        if not self.prosody and self.speech.kind is SpeechKind.none:
            raise ValueError("model.prosody and model.speech.kind are both off: the model would hear nothing")
        if self.autoregressive and self.state.kind is StateKind.none:
            raise ValueError("model.autoregressive needs a state: set model.state.kind to ema or mamba")


@dataclass
class Weights(Section):
    loss_ccc: float = 1.0  # 1 − CCC, mean over the dimensions
    loss_mse: float = 0.5


@dataclass
class Optimizers(Section):
    main: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            lr=3e-4, betas=[0.9, 0.98], eps=1e-8, weight_decay=0.01, schedule=ScheduleKind.constant, warmup_steps=50, clip=1.0
        )
    )


@dataclass
class TrainConfig(sections.TrainConfig):
    epochs: int = 50
    eval_every: int = 0
    eval_epochs: int = 1
    save_every: int = 500
    valid_batches: int = 0
    keep: int = 2
    log_every: int = 50


@dataclass
class Config(sections.RunConfig):
    """Everything that an ``emotion`` run is made of, and the checks that concern two sections at once."""

    system: str = "emotion"
    labels: LabelConfig = field(default_factory=LabelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    weights: Weights = field(default_factory=Weights)
    optimizers: Optimizers = field(default_factory=Optimizers)
    train: TrainConfig = field(default_factory=TrainConfig)
    ccc_memory: float = 0.0  # earlier batches count in the CCC of the loss with this decay; 0 = the present one alone

    def __post_init__(self) -> None:
        if not 0 <= self.ccc_memory < 1:
            raise ValueError(f"ccc_memory must be in [0, 1), got {self.ccc_memory}")
        if self.train.accumulate != 1:
            raise ValueError("train.accumulate: raise data.batch_size instead; model.speech.micro_seconds bounds the memory")
        if self.model.state.kind is not StateKind.none and self.data.boundaries:
            raise ValueError("data.boundaries are lengths of clips, but with a state a batch is of dialogues: leave them empty")

    @property
    def stateful(self) -> bool:
        return self.model.state.kind is not StateKind.none
