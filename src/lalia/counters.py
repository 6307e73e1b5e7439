"""What a run counts: where it stands, and sums of its figures between two log lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Counters:
    """Where the run stands; saved in every checkpoint."""

    step: int = 0
    epoch: int = 0
    position: int = 0  # batches done in this epoch
    seconds: float = 0.0  # wall-clock training seconds over all starts
    audio_seconds: float = 0.0
    best: float | None = None
    best_step: int = -1
    evaluated_at: int = -1  # step of the newest evaluation
    stale: int = 0  # evaluations since the best one
    skipped: int = 0
    epoch_loss: float = 0.0  # sum over the turns of this epoch, and their number
    epoch_turns: int = 0
    interrupted = False  # no annotation: not a field, not saved. True when Ctrl-C or SIGTERM ended this start


@dataclass
class Window:
    """Sums since the last log line, kept on the device so that a step waits for nothing."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            value = value.detach().float() if isinstance(value, Tensor) else torch.tensor(float(value))
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Means of what was added, and an empty window again."""
        result = {name: float(value) / self.counts[name] for name, value in self.sums.items()}
        self.sums, self.counts = {}, {}
        return result

    def empty_into(self, counters: Counters) -> None:
        """Hand the one figure of an epoch's window to the counters, so that it survives a restart."""
        for name, value in self.sums.items():
            counters.epoch_loss += float(value)
            counters.epoch_turns += self.counts[name]
        self.sums, self.counts = {}, {}
