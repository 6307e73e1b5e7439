"""The configuration sections that every system shares. Plain dataclasses with no heavy import.

A system's own ``Config`` (``systems/<name>/config.py``) derives from :class:`RunConfig` and adds ``model``, ``weights``,
``optimizers`` and its own ``data`` fields. YAML files hold only what differs from the defaults written here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any


class Section:
    """Base of every configuration dataclass: attribute and mapping access to the same fields.

    ``"lr" in section``, ``section["lr"]``, ``section.keys()``, ``dict(section)`` and ``f(**section)`` all work.
    """

    def keys(self) -> list[str]:
        return [f.name for f in fields(self)]  # type: ignore[arg-type]

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys():
            raise KeyError(f"{type(self).__name__} has no key {key!r}; it has {', '.join(self.keys())}")
        return getattr(self, key)


class Precision(Enum):
    """Arithmetic of the forward pass. STFT, KL and splines stay in float32 whatever is chosen."""

    auto = "auto"  # bf16 on CUDA devices that have it, fp32 elsewhere
    fp32 = "fp32"
    bf16 = "bf16"


class OnNonfinite(Enum):
    """What a NaN or infinite loss does: end the run with a dump, or skip the turn and count."""

    stop = "stop"
    skip = "skip"


class ScheduleKind(Enum):
    """Learning-rate schedules, each a pure function of (step, epoch)."""

    exponential = "exponential"  # lr · decay^epoch after the warm-up (the VITS family)
    cosine = "cosine"  # cosine from lr to lr · final over total_steps
    linear = "linear"  # constant, then linear to lr · final over the last cooldown share of total_steps
    constant = "constant"


class OptimizerKind(Enum):
    """The rule of an optimizer's steps."""

    adamw = "adamw"
    muon = "muon"  # Muon for the matrices that a network marks, AdamW for all else


@dataclass
class OptimizerConfig(Section):
    """AdamW or Muon with a schedule and a gradient-norm limit; one per optimizer name that the system's turns yield.

    Under ``kind: muon``, ``lr`` is Muon's (0.02 is usual). Embeddings and scalars that a network marks follow its own settings, at
    multiples of ``lr``; parameters without a mark (a projector, adapters) are AdamW's, at ``adamw_lr``.
    """

    kind: OptimizerKind = OptimizerKind.adamw
    lr: float = 2e-4
    momentum: float = 0.95  # muon
    adamw_lr: float = 3e-4  # muon: rate of the parameters without a mark
    betas: list[float] = field(default_factory=lambda: [0.8, 0.99])
    eps: float = 1e-9
    weight_decay: float = 0.01
    schedule: ScheduleKind = ScheduleKind.exponential
    decay: float = 0.999875  # exponential: factor per epoch
    warmup_steps: int = 0
    warmup_epochs: int = 0
    final: float = 0.0  # cosine and linear: last learning rate as a share of lr
    cooldown: float = 0.4  # linear: share of the run that falls
    clip: float = 0.0  # limit of the global gradient norm; 0 = measure only

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.adamw_lr <= 0:
            raise ValueError(f"lr and adamw_lr must be above 0, got {self.lr} and {self.adamw_lr}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if self.clip < 0:
            raise ValueError(f"clip must be 0 (off) or above, got {self.clip}")


class BatchPlan(Enum):
    """How clips of similar length are put together."""

    sorted = "sorted"  # jittered length sort under the budget: least padding
    buckets = "buckets"  # fixed boundaries (the seed's), or equal-cost quantiles when no boundaries are given


@dataclass
class DataConfig(Section):
    """Manifests and batches. A batch is limited by ``batch_size`` clips and, if above 0, ``batch_seconds`` padded seconds."""

    train: list[str] = field(default_factory=list)  # JSONL manifests, relative to the working directory
    valid: list[str] = field(default_factory=list)
    batch_size: int = 16
    batch_seconds: float = 0.0  # padded audio-seconds a batch may hold; 0 = no limit
    plan: BatchPlan = BatchPlan.sorted
    jitter: float = 0.003  # sorted: relative noise on the length before sorting, mixes batches; 0 = the same ones each epoch
    boundaries: list[float] = field(default_factory=list)  # buckets: lengths in frames; empty = auto quantiles
    bucket_count: int = 8  # buckets: number of auto quantiles
    drop_last: bool = False
    min_seconds: float = 0.0  # shorter clips are rejected, with a reason, in the data report
    max_seconds: float = 0.0  # longer clips likewise; 0 = no limit
    max_bad_fraction: float = 0.1  # above this share of unusable rows the run does not start
    workers: int = 1  # loader processes; capped at cores - 1 (at least 1); 0 loads in the training process
    prefetch: int = 4

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"data.batch_size must be at least 1, got {self.batch_size}")
        if sorted(self.boundaries) != list(self.boundaries):
            raise ValueError(f"data.boundaries must rise, got {self.boundaries}")
        if self.workers < 0:
            raise ValueError(f"data.workers must be 0 or above, got {self.workers}")


@dataclass
class TrainConfig(Section):
    """Length, rhythm and safety of a run. Whichever of ``epochs``, ``steps`` and ``minutes`` comes first ends it (0 = no limit)."""

    epochs: int = 0
    steps: int = 0
    minutes: float = 0.0  # wall-clock limit of this process; a run that is started again gets the minutes anew
    seed: int = 42
    precision: Precision = Precision.auto
    device: str = "auto"  # auto = cuda, then mps, then cpu
    threads: int = 0  # torch CPU threads; 0 leaves torch's choice
    log_every: int = 200
    eval_every: int = 1000
    eval_epochs: int = 0  # also evaluate at the end of every so many epochs; 0 = off
    patience: int = 0  # end the run after so many evaluations without a better one; 0 = never
    save_every: int = 1000
    save_minutes: float = 0.0  # also save when so many minutes have passed since the last save; 0 = off
    valid_batches: int = 8  # validation batches per evaluation; 0 = all
    keep: int = 8  # complete checkpoint sets kept; 0 or below keeps all; best is kept besides
    weights_every: int = 0  # every so many steps also leave weights alone, in weights/; 0 = off
    init_from: str = ""  # run folder, step folder, .safetensors or .pth to start the weights from (not a resume)
    skip_optimizer: bool = False  # resume weights but start the optimizers afresh; the schedule stays where it is
    freeze: list[str] = field(default_factory=list)  # parameter-name patterns (fnmatch) that do not learn
    accumulate: int = 1  # micro-batches per optimizer step; only for systems with one turn
    on_nonfinite: OnNonfinite = OnNonfinite.stop
    max_nonfinite: int = 20  # skip: consecutive skipped turns before the run stops
    ema: float = 0.0  # decay of an exponential moving average of the weights; 0 = off
    tf32: bool = True
    matmul_precision: str = "high"
    sdp_backends: list[str] = field(default_factory=list)  # e.g. [flash, efficient, math]; empty = torch's choice
    wandb: bool = False  # also tell Weights & Biases (extra wandb) figures, pictures and sounds
    wandb_project: str = ""  # empty = lalia-<system>


@dataclass
class DistConfig(Section):
    """torch.distributed. The environment (torchrun) wins over these; world size 1 makes no process group."""

    master_addr: str = "127.0.0.1"
    master_port: int = 29500
    world_size: int = 1
    rank: int = 0
    local_rank: int = 0
    backend: str = "auto"  # nccl on Linux with CUDA, gloo elsewhere
    timeout_seconds: float = 300.0  # limit of one collective in training
    eval_timeout_seconds: float = 7200.0  # limit of the wait for rank 0 while it evaluates and saves
    bucket_mb: int = 512  # flat gradient buckets


@dataclass
class ExternalModel(Section):
    """A model that Lalia did not train: local folder, hub id, ``wheel:<name>``, ``tiny`` (small, random), or empty (none)."""

    source: str = ""
    revision: str = ""


@dataclass
class RunConfig(Section):
    """What every system's configuration has. ``system`` is the name in the table of ``lalia.system``."""

    system: str = ""
    train: TrainConfig = field(default_factory=TrainConfig)
    dist: DistConfig = field(default_factory=DistConfig)
