"""Where the seconds of a call go: wraps bound methods with stopwatches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stopwatch:
    """CPU seconds per part. ``watch(module, "forward", "decoder")`` times every call of that method inside ``watching()``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._watched: list[tuple[Any, str, str]] = []

    def watch(self, owner: Any, method: str, part: str) -> None:
        self._watched.append((owner, method, part))

    @contextmanager
    def watching(self) -> Iterator[dict[str, float]]:
        """Wrap the methods for the time of the block; yields the seconds per part, from zero."""
        self.seconds = {part: 0.0 for _, _, part in self._watched}
        for owner, method, part in self._watched:
            owner.__dict__[method] = self._timed(getattr(owner, method), part)
        try:
            yield self.seconds
        finally:
            for owner, method, _ in self._watched:
                del owner.__dict__[method]

    def _timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*values: Any, **named: Any) -> Any:
            start = time.process_time()
            try:
                return call(*values, **named)
            finally:
                self.seconds[part] += time.process_time() - start

        return timed


def shares(seconds: dict[str, float], total: float) -> str:
    """``flow 31 %, decoder 50 %, …, rest 4 %`` of ``total`` seconds, the greatest first."""
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    parts = [f"{name} {100 * value / total:.0f} %" for name, value in ordered]
    return ", ".join([*parts, f"rest {100 * (1 - sum(seconds.values()) / total):.0f} %"])
