"""Shared timing: two callables interleaved in one process (A B B A …), compared by the median of paired ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from lalia.allocator import keep_freed_memory


def tune_allocator() -> bool:
    """Stop glibc from giving each large tensor back to the kernel, for both sides alike; False where there is no glibc.

    Otherwise a call that allocates large temporaries is timed with the page faults of fresh memory.
    """
    return keep_freed_memory()


def seconds(call: Callable[[], Any]) -> float:
    """CPU seconds of one call, on one thread the same as wall-clock seconds on an idle machine, and no worse on a busy one."""
    start = time.process_time()
    call()
    return time.process_time() - start


def interleave(
    a: Callable[[], Any], b: Callable[[], Any], repeats: int, warmup: int = 1
) -> tuple[float, float, float, float, float]:
    """Time ``a`` (ours) and ``b`` (theirs) in pairs; which of the two goes first alternates from pair to pair.

    Pairs are compared with each other, so that a machine that is shared or changes its clock disturbs both alike.

    Returns ``(ratio, p10, p90, seconds_a, seconds_b)``: the median of b/a over the pairs (above 1 means that ``a`` is
    faster), its 10th and 90th percentile, and the median seconds of each. ``warmup`` calls of each are not counted.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    for _ in range(warmup):
        a()
        b()
    times_a: list[float] = []
    times_b: list[float] = []
    for index in range(repeats):
        if index % 2:
            times_b.append(seconds(b))
            times_a.append(seconds(a))
        else:
            times_a.append(seconds(a))
            times_b.append(seconds(b))
    ratios = np.array(times_b) / np.array(times_a)
    p10, p90 = np.percentile(ratios, [10, 90])
    return float(np.median(ratios)), float(p10), float(p90), statistics.median(times_a), statistics.median(times_b)
