"""Configuration of ``omni-smoke`` and ``omni-base``, and the sections that later stages share.

The defaults are the full size, for a GPU; YAML files say only what differs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lalia import sections
from lalia.sections import ExternalModel, OptimizerConfig, OptimizerKind, ScheduleKind, Section
from lalia.smoke import Checks

if TYPE_CHECKING:
    from lalia.nn.gpt import GptConfig

#: lowest size of a BPE vocabulary: every byte, the document mark, and at least one merge
LEAST_BPE = 258


@dataclass
class ModelConfig(Section):
    """The GPT. ``depth`` is the one dial: width, heads and vocabulary padding follow from it (:class:`lalia.nn.gpt.GptConfig`)."""

    depth: int = 12
    context: int = 2048  # tokens that attention can reach in an all-L layer, and the length of a training window
    aspect: int = 64  # width = ceil(aspect · depth / head_width) · head_width
    head_width: int = 128
    window: str = "SSSL"  # pattern over the layers: S short windows, L the whole context; the last layer is always L
    softcap: float = 15.0
    base: float = 1e5  # of the rotary embedding
    value_embeddings: bool = True
    smear: bool = True
    kv_heads: int = 0  # heads of keys and values; 0 = as many as of queries

    def __post_init__(self) -> None:
        if self.depth < 1 or self.context < 2:
            raise ValueError(f"model.depth must be at least 1 and model.context at least 2, got {self.depth} and {self.context}")
        if set(self.window) - set("SL") or not self.window:
            raise ValueError(f"model.window is a pattern of S and L such as SSSL, got {self.window!r}")

    def gpt(self, vocab: int) -> GptConfig:
        """The network's own configuration for a vocabulary of ``vocab`` tokens."""
        from lalia.nn.gpt import GptConfig  # pulls torch

        return GptConfig(vocab=vocab, **dict(self))


@dataclass
class TokenizerConfig(Section):
    """``kind``: ``byte`` (256 + the document mark), ``bpe`` (trained from the training rows), or a folder with tokenizer.json."""

    kind: str = "byte"
    size: int = 8192  # bpe: tokens in all
    megabytes: float = 32.0  # bpe: text it is trained on at most, taken evenly from all rows

    def __post_init__(self) -> None:
        if self.size < LEAST_BPE:
            raise ValueError(f"tokenizer.size is at least {LEAST_BPE} (256 bytes, the document mark, one merge), got {self.size}")
        if self.megabytes <= 0:
            raise ValueError(f"tokenizer.megabytes must be above 0, got {self.megabytes}")


@dataclass
class TextDataConfig(sections.DataConfig):
    """A batch is ``batch_size`` rows of text, packed into windows of ``model.context`` tokens."""

    batch_size: int = 32
    min_seconds: float = 0.0
    max_seconds: float = 0.0


@dataclass
class SampleConfig(Section):
    """Text that is written to the log at each evaluation."""

    prompts: list[str] = field(default_factory=lambda: ["The "])
    tokens: int = 120
    temperature: float = 0.8
    top_k: int = 50


@dataclass
class Weights(Section):
    loss_next: float = 1.0  # cross-entropy of the next token, nats


@dataclass
class BaseTrainConfig(sections.TrainConfig):
    steps: int = 20_000
    eval_every: int = 1000
    save_every: int = 1000
    valid_batches: int = 0  # bits per byte are over the whole held-out part
    keep: int = 2
    log_every: int = 50


@dataclass
class Optimizers(Section):
    """``main`` is the only turn's."""

    main: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            kind=OptimizerKind.muon,
            lr=0.02,
            betas=[0.8, 0.95],
            eps=1e-10,
            weight_decay=0.0,
            schedule=ScheduleKind.linear,
            cooldown=0.5,
            final=0.05,
            clip=0.0,
        )
    )


@dataclass
class Config(sections.RunConfig):
    """``omni-base``: a GPT that reads text."""

    system: str = "omni-base"
    data: TextDataConfig = field(default_factory=TextDataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    weights: Weights = field(default_factory=Weights)
    optimizers: Optimizers = field(default_factory=Optimizers)
    train: BaseTrainConfig = field(default_factory=BaseTrainConfig)


@dataclass
class SmokeDataConfig(sections.DataConfig):
    """``shuffled``: each step hears the recordings in another order than it reads the captions (the control)."""

    batch_size: int = 5
    workers: int = 0
    max_seconds: float = 30.0
    shuffled: bool = False


@dataclass
class ListenConfig(Section):
    """The frozen encoder and the projector of the smoke run."""

    whisper: ExternalModel = field(default_factory=lambda: ExternalModel(source="openai/whisper-base"))
    stack: int = 8  # encoder frames (20 ms) in one soft token
    hidden: int = 512  # of the projector


@dataclass
class SmokeTrainConfig(sections.TrainConfig):
    steps: int = 50
    log_every: int = 1
    eval_every: int = 0
    save_every: int = 0
    keep: int = 1


@dataclass
class SmokeConfig(sections.RunConfig):
    """``omni-smoke``: does everything between a wav and a loss work at all?"""

    system: str = "omni-smoke"
    data: SmokeDataConfig = field(default_factory=SmokeDataConfig)
    model: ModelConfig = field(default_factory=lambda: ModelConfig(depth=6))
    listen: ListenConfig = field(default_factory=ListenConfig)
    weights: Weights = field(default_factory=Weights)
    optimizers: Optimizers = field(default_factory=Optimizers)
    train: SmokeTrainConfig = field(default_factory=SmokeTrainConfig)
    checks: Checks = field(default_factory=lambda: Checks(initial=math.log(257), control="data.shuffled=true", margin=0.04))
