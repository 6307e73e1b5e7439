"""The contract between a system and the floor, and the table name → class.

Lifecycle. ``System(config, tables)`` builds the networks from the resolved configuration and the tables (speakers, symbols …)
that :meth:`System.make_tables` took from the training rows once; both are stored in the run folder, so that
``checkpoint.load(folder)`` builds the same thing again from that folder alone.

Data.   ``prepare(row, clock) -> Example`` → ``collate(list[Example]) -> Batch`` → ``batch.to(device)``. Training and inference
        both go this way: a request becomes a :class:`lalia.data.Row`.
Turns.  ``turns(batch, clock)`` yields ``(optimizer name, {loss name: scalar})`` once per optimizer step. The trainer weighs the
        losses by ``config.weights``, back-propagates, averages gradients over the ranks, clips, steps, and resumes the
        generator, which therefore sees the updated parameters. Never hold an autocast context across a ``yield``.
        Losses are sums divided by :func:`lalia.dist.average` of their counts, so that averaged gradients of N ranks are the
        gradients of the concatenated batch. Every rank yields as often as the others.
        When a turn's back-propagation runs out of memory, the trainer throws that ``torch.OutOfMemoryError`` into the generator,
        which may yield the same turn again, computed in smaller parts.
Units.  A batch is made of rows. Where rows belong together (turns of a dialogue), :meth:`System.sequences` says which, and a
        whole sequence is in one batch: state that runs through it begins and ends inside one training step, so that nothing but
        weights and counters is carried from step to step.
Time.   Everything random or scheduled is a pure function of (seed, step, row): :class:`Clock` carries the first two.
Capabilities. Small protocols (:class:`Speaks` …) of :mod:`lalia.capabilities`, imported from here. Command line, harness and server
        ask for a capability, never for a name.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lalia.capabilities import Aligns as Aligns
from lalia.capabilities import CountsTokens as CountsTokens
from lalia.capabilities import Emotion as Emotion
from lalia.capabilities import EmotionSession as EmotionSession
from lalia.capabilities import MeasuresAlignment as MeasuresAlignment
from lalia.capabilities import Message as Message
from lalia.capabilities import Question as Question
from lalia.capabilities import RecognizesEmotion as RecognizesEmotion
from lalia.capabilities import Replies as Replies
from lalia.capabilities import Resynthesizes as Resynthesizes
from lalia.capabilities import ScoresAnswers as ScoresAnswers
from lalia.capabilities import SpeakRequest as SpeakRequest
from lalia.capabilities import Speaks as Speaks
from lalia.capabilities import Speech as Speech
from lalia.capabilities import Transcribes as Transcribes
from lalia.sections import RunConfig

#: name → "module:class". A new system costs one line here.
SYSTEMS: dict[str, str] = {
    "vits2": "lalia.systems.vits2.system:Vits2",
    "emotion": "lalia.systems.emotion.system:EmotionSystem",
    "omni-smoke": "lalia.systems.omni.smoke:OmniSmoke",
    "omni-base": "lalia.systems.omni.base:OmniBase",
    "omni-align": "lalia.systems.omni.align:OmniAlign",
    "omni-chat": "lalia.systems.omni.chat:OmniChat",
}

#: program → "module:function" that turns what it trained into a run folder
CONVERTERS: dict[str, str] = {
    "nanochat": "lalia.systems.omni.nanochat:convert",
}


@dataclass(frozen=True)
class Clock:
    """Where a run stands. ``step`` counts whole training steps (all turns of one batch) from 0, ``epoch`` from 0."""

    seed: int = 42
    step: int = 0
    epoch: int = 0
    total_steps: int = 0  # 0 = unknown
    training: bool = True


@dataclass
class Media:
    """For the logs. ``images``: name → uint8 [height, width, 3]; ``audio``: name → (float32 [S], sample rate in Hz); ``texts``."""

    images: dict[str, np.ndarray] = field(default_factory=dict)
    audio: dict[str, tuple[np.ndarray, int]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


class TensorBatch:
    """Base of batch dataclasses: ``to(device)`` moves every tensor field (and dicts of tensors), and keeps the rest."""

    ids: list[str]

    def to(self, device: torch.device | str) -> Any:
        moved = type(self).__new__(type(self))
        for item in fields(self):  # type: ignore[arg-type]
            setattr(moved, item.name, _move(getattr(self, item.name), device))
        return moved

    def pin_memory(self) -> Any:
        pinned = type(self).__new__(type(self))
        for item in fields(self):  # type: ignore[arg-type]
            setattr(pinned, item.name, _pin(getattr(self, item.name)))
        return pinned


def _move(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {k: _move(v, device) for k, v in value.items()}
    return value


def _pin(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.pin_memory()
    if isinstance(value, dict):
        return {k: _pin(v) for k, v in value.items()}
    return value


class Meter(Protocol):
    """Figures over a whole validation set that are no means over its batches. ``turns`` adds to it, in its own way."""

    def figures(self) -> dict[str, float]: ...


class System(nn.Module):
    """Base class of every system. Subclasses set ``Config`` and override the methods below; there are no other hooks."""

    Config: ClassVar[type[RunConfig]]
    #: metric name of ``validate`` whose value chooses the best checkpoint, and whether lower is better
    best_metric: ClassVar[str] = "loss/total"
    best_is_lower: ClassVar[bool] = True
    #: label → name of a validation metric, for the line that sums up an epoch
    headline: ClassVar[dict[str, str]] = {}

    def __init__(self, config: RunConfig, tables: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.tables = dict(tables)
        self.autocast_dtype: torch.dtype | None = None  # set by the trainer from train.precision
        self.meter: Meter | None = None  # while a validation pass runs: where ``turns`` adds what no mean of batches can give

    # --- data -------------------------------------------------------------------------------------------------------
    @classmethod
    def make_tables(cls, config: RunConfig, rows: Any) -> dict[str, Any]:
        """JSON-able tables that inference needs (speakers, symbols, label scale), from the training ``Corpus``."""
        return {}

    def reject(self, row: Any) -> str:
        """Why this row cannot be used by this system, or '' when it can. Cheap: reads the row, not the audio."""
        return ""

    def length(self, row: Any) -> float:
        """Length of a row in the unit of ``data.boundaries`` (frames for audio systems); only used to plan batches."""
        return float(row.duration)

    def prepare(self, row: Any, clock: Clock) -> Any:
        """Row → Example. Runs in loader processes; raises :class:`lalia.data.BadRow` with a reason when it cannot."""
        raise NotImplementedError

    def collate(self, examples: Sequence[Any]) -> Any:
        """Examples → a batch dataclass deriving from :class:`TensorBatch`, with ``ids``."""
        raise NotImplementedError

    def sequences(self, corpus: Any) -> list[list[int]] | None:
        """Indices of rows that must share a batch, in their order; None when each row is for itself."""
        return None

    # --- inference --------------------------------------------------------------------------------------------------
    def load_external(self) -> None:
        """Called once, at step 0 of a new run: fetch the weights of external models that checkpoints will hold from then on."""

    def for_inference(self) -> None:
        """Give up what only training needs (critics, parametrised norms) for speed and memory. Results stay, to rounding; the
        system can be neither trained nor saved afterwards."""
        self.eval()

    # --- learning ---------------------------------------------------------------------------------------------------
    def turns(self, batch: Any, clock: Clock) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """One optimizer step per yield. The default is a single turn named ``main`` from :meth:`losses`."""
        yield "main", self.losses(batch, clock)

    def losses(self, batch: Any, clock: Clock) -> dict[str, Tensor]:
        raise NotImplementedError

    def optimizers(self) -> dict[str, list[nn.Parameter]]:
        """Optimizer name → its parameters. Names match ``config.optimizers``; :func:`check_partition` proves the split."""
        return {"main": [p for p in self.parameters() if p.requires_grad]}

    def new_meter(self) -> Meter | None:
        """An empty accumulator of figures over a whole validation set (a CCC, an error rate), if the system has such."""
        return None

    def scalars(self) -> dict[str, float | Tensor]:
        """Extra figures of the last step for the logs (already detached)."""
        return {}

    def media(self, batch: Any, clock: Clock) -> Media:
        """Pictures and sounds for the logs, from one validation batch. Must not disturb the RNG or the parameters."""
        return Media()

    def autocast(self) -> torch.autocast:
        """Autocast context in the run's precision, for use inside one segment of :meth:`turns` (never across a yield)."""
        device = next(self.parameters()).device.type
        enabled = self.autocast_dtype is not None
        return torch.autocast(device, dtype=self.autocast_dtype or torch.bfloat16, enabled=enabled)

    @contextlib.contextmanager
    def frozen(self, *modules: nn.Module) -> Iterator[None]:
        """Build a graph through ``modules`` without gradients for their parameters (inputs still get theirs)."""
        changed = [p for m in modules for p in m.parameters() if p.requires_grad]
        for p in changed:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in changed:
                p.requires_grad_(True)


def check_partition(system: System, groups: Mapping[str, Sequence[nn.Parameter]]) -> None:
    """Assert that every trainable parameter is in exactly one optimizer; names the offenders otherwise."""
    owner: dict[int, str] = {}
    names = {id(p): n for n, p in system.named_parameters()}
    for group, parameters in groups.items():
        for p in parameters:
            if id(p) in owner:
                raise ValueError(f"parameter {names[id(p)]} is in two optimizers: {owner[id(p)]} and {group}")
            owner[id(p)] = group
    missing = [n for n, p in system.named_parameters() if p.requires_grad and id(p) not in owner]
    if missing:
        raise ValueError(f"{len(missing)} trainable parameters are in no optimizer: {', '.join(missing[:5])}")


def system_class(name: str) -> type[System]:
    """The class of a system by name; ValueError with the nearest name otherwise."""
    from lalia.config import nearest

    if name not in SYSTEMS:
        raise ValueError(f"unknown system {name!r}{nearest(name, SYSTEMS)}; known: {', '.join(SYSTEMS)}")
    return _named(SYSTEMS[name])


def converter(name: str) -> Any:
    """The function of :data:`CONVERTERS` that takes over models of the program ``name``."""
    return _named(CONVERTERS[name])


def _named(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


def loss_weights(config: RunConfig) -> dict[str, float]:
    """``config.weights`` as a plain dict; a loss that is not a field of it weighs nothing and is an error in the trainer."""
    weights = getattr(config, "weights", None)
    return {f.name: float(getattr(weights, f.name)) for f in fields(weights)} if is_dataclass(weights) else {}
