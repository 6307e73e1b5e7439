"""From a corpus to batches: which rows can be used, and a loader that gives the same batches when it is asked again.

Every random choice of ``system.prepare`` is a function of (seed, epoch, row id), and the plan of an epoch is a function
of (seed, epoch), so a run that starts again in the middle of an epoch sees what it would have seen.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import random
import re
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from lalia import audio
from lalia.batching import excluded, padding_waste, plan_epoch
from lalia.data import BadRow, Corpus, ManifestError, Rejected, Row, write_json
from lalia.sections import DataConfig
from lalia.system import Clock, System

log = logging.getLogger(__name__)

#: Larger corpora come from ``prepare``, which has opened every file; opening them all again would take minutes a start.
HEADER_CHECK_ROWS = 100_000


def effective_workers(wanted: int, cores: int | None = None) -> int:
    """Loader processes: 0 when 0 is asked for, else at least 1 and at most cores - 1."""
    cores = cores if cores is not None else os.cpu_count() or 1
    return 0 if wanted == 0 else max(1, min(wanted, cores - 1))


# --- which rows can be used ---
def usable(system: System, corpus: Corpus, config: DataConfig) -> tuple[Corpus, list[Rejected]]:
    """The rows this system can train on, with durations from the headers where the manifest gives none, and the rest.

    Rejected are: missing or unreadable audio, outside ``min_seconds`` … ``max_seconds``, what ``system.reject`` names,
    and clips outside fixed bucket boundaries. Broken manifest lines (``corpus.rejected``) are listed and counted too.
    ManifestError, with the count of each reason, when more than ``max_bad_fraction`` is rejected or nothing is left.
    """
    seconds = corpus.durations().copy()
    lengths = np.zeros(len(corpus))
    reasons: dict[int, str] = {}
    headers = len(corpus) <= HEADER_CHECK_ROWS
    for index, row in enumerate(corpus):
        reason = measure(row, headers) or limits(row, config) or system.reject(row)
        seconds[index] = row.duration
        if reason:
            reasons[index] = reason
        else:
            lengths[index] = system.length(row)
    for index, reason in excluded(lengths, config).items():
        reasons.setdefault(index, reason)
    ids = corpus.table["id"]
    rejected = [*corpus.rejected, *((ids[i].as_py(), reasons[i]) for i in sorted(reasons))]
    check_fraction(rejected, len(corpus) + len(corpus.rejected), config.max_bad_fraction)
    keep = np.setdiff1d(np.arange(len(corpus)), np.fromiter(reasons, dtype=np.int64, count=len(reasons)))
    return corpus.with_durations(seconds).subset(keep), rejected


def measure(row: Row, header: bool = True) -> str:
    """Fill in ``row.duration`` from the file's header when it is 0; returns why the audio cannot be used, or ''.

    ``header`` False opens the file only when the duration is needed; missing and empty files are found all the same.
    """
    if not row.audio:
        return ""
    if not os.path.isfile(row.audio):
        return f"missing audio: {row.audio}"
    if os.path.getsize(row.audio) == 0:
        return f"empty audio file: {row.audio}"
    if row.duration > 0 and not header:
        return ""
    try:
        seconds = audio.info(row.audio).seconds
    except audio.AudioError as error:
        return f"unreadable audio: {error}"
    if row.start >= seconds or row.start + row.duration > seconds + audio.END_TOLERANCE:
        return f"past the end: {row.start:g} s + {row.duration:g} s of {row.audio}, which has {seconds:g} s"
    row.duration = row.duration or seconds - row.start
    return ""


def limits(row: Row, config: DataConfig) -> str:
    """Why the row is outside ``min_seconds`` … ``max_seconds``, or ''. Rows without audio have no limit."""
    if not row.audio:
        return ""
    if row.duration < config.min_seconds:
        return f"too short: {row.duration:.3f} s, data.min_seconds is {config.min_seconds:g}"
    if 0 < config.max_seconds < row.duration:
        return f"too long: {row.duration:.3f} s, data.max_seconds is {config.max_seconds:g}"
    return ""


def reason_counts(rejected: Sequence[Rejected]) -> dict[str, int]:
    """Kind of reason → count, the commonest first. The kind is what stands before the colon, without its figures."""
    kinds = Counter(re.sub(r"\d+([.,]\d+)*", "N", reason.split(":")[0]) for _, reason in rejected)
    return dict(kinds.most_common())


def check_fraction(rejected: Sequence[Rejected], total: int, limit: float) -> None:
    """ManifestError when more than ``limit`` of ``total`` rows, or all of them, are rejected; one warning otherwise."""
    if not rejected and total:
        return
    kinds = ", ".join(f"{count} × {kind}" for kind, count in reason_counts(rejected).items())
    first = f"; the first: {rejected[0][0]}: {rejected[0][1]}" if rejected else ""
    if len(rejected) >= total:
        raise ManifestError(f"no usable row of {total} ({kinds or 'no rows at all'}){first}")
    if len(rejected) > limit * total:
        share = f"{len(rejected)} of {total} rows cannot be used, above max_bad_fraction {limit:g}"
        raise ManifestError(f"{share} ({kinds}){first}")
    log.warning("%d of %d rows are left out (%s)%s", len(rejected), total, kinds, first)


def dataset_report(corpus: Corpus, rejected: Sequence[Rejected]) -> dict[str, Any]:
    """What is used and what is not: rows, hours in all, by speaker and by language, reasons, every rejected row."""
    seconds = corpus.durations()
    return {
        "rows": len(corpus) + len(rejected),
        "usable": len(corpus),
        "hours": round(float(seconds.sum()) / 3600, 4),
        "hours_by_speaker": _hours(corpus.column("speaker"), seconds),
        "hours_by_language": _hours(corpus.column("language"), seconds),
        "reasons": reason_counts(rejected),
        "rejected": [{"row": row, "reason": reason} for row, reason in rejected],
    }


def write_dataset_report(path: str | Path, corpus: Corpus, rejected: Sequence[Rejected]) -> None:
    """:func:`dataset_report` as ``dataset_report.json``, atomically."""
    write_json(path, dataset_report(corpus, rejected))


def _hours(names: Sequence[str], seconds: np.ndarray) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for name, value in zip(names, seconds, strict=True):
        total[name or "(none)"] += float(value) / 3600
    return {name: round(hours, 4) for name, hours in sorted(total.items(), key=lambda item: -item[1])}


# --- the loader ---
@dataclass(frozen=True)
class _Task:
    """One batch to be made: indices into the corpus and the clock of its step."""

    rows: tuple[int, ...]
    clock: Clock


@dataclass
class _Made:
    """A collated batch (None when every row was bad) and the rows that could not be prepared."""

    batch: Any
    bad: list[Rejected] = field(default_factory=list)

    def pin_memory(self) -> _Made:
        return _Made(self.batch.pin_memory() if self.batch is not None else None, self.bad)


class _Batches(Dataset[_Made]):
    """Makes one batch from a task; this object is what a worker process holds."""

    def __init__(self, system: System, corpus: Corpus) -> None:
        self.system = system
        self.corpus = corpus

    def __getstate__(self) -> dict[str, Any]:
        """For processes that are spawned (Windows, macOS): rows need the system's settings and tables, never its networks,
        and networks with weight norm cannot be pickled at all."""
        bare = copy.copy(self.system)
        bare._modules, bare._parameters, bare._buffers = {}, {}, {}
        return {"system": bare, "corpus": self.corpus}

    def __getitem__(self, task: _Task) -> _Made:
        state = None if get_worker_info() else _random_state()
        try:
            return self._make(task)
        finally:
            if state is not None:
                _restore_random(state)

    def _make(self, task: _Task) -> _Made:
        examples, bad = [], list[Rejected]()
        for index in task.rows:
            row = self.corpus[index]
            _seed_row(task.clock, row.id)
            try:
                examples.append(self.system.prepare(row, task.clock))
            except BadRow as error:
                bad.append((row.id, str(error)))
            except audio.AudioError as error:
                bad.append((row.id, f"unreadable audio: {error}"))
            except Exception as error:
                raise RuntimeError(f"row {row.id!r} could not be prepared: {type(error).__name__}: {error}") from error
        return _Made(self.system.collate(examples) if examples else None, bad)


class _Tasks(Sampler[_Task]):
    """The tasks still to be done in this epoch. The loader keeps its workers and changes this list."""

    def __init__(self) -> None:
        self.tasks: list[_Task] = []

    def __iter__(self) -> Iterator[_Task]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)


class Loader:
    """Batches of one rank, epoch by epoch.

    ``config.workers`` processes (capped, see :func:`effective_workers`) prepare and collate; with 0 the calling process
    does, and its random state is left as it was. ``pin`` acts with CUDA only. Rows that fail in ``prepare`` are handed
    to ``on_bad(row id, reason)`` and missing from their batch; a batch of which nothing is left is replaced by the next
    one of the plan, so that every rank still has the same number of batches. ManifestError when they exceed
    ``max_bad_fraction``.
    """

    def __init__(
        self,
        system: System,
        corpus: Corpus,
        config: DataConfig,
        seed: int,
        rank: int = 0,
        world: int = 1,
        pin: bool = False,
        *,
        training: bool = True,
        on_bad: Callable[[str, str], None] | None = None,
    ) -> None:
        self.corpus, self.config, self.seed, self.rank, self.world = corpus, config, seed, rank, world
        self.training, self.on_bad = training, on_bad
        lengths = np.array([system.length(row) for row in corpus], dtype=np.float64)
        #: rows that share a batch, in their order; what the plan puts into batches
        self.units = system.sequences(corpus) or [[index] for index in range(len(corpus))]
        self.lengths = np.array([lengths[unit].sum() for unit in self.units])
        self.seconds_per_unit = seconds_per_unit(corpus.durations(), self.lengths)
        self.bad: dict[str, str] = {}
        self._dataset, self._tasks = _Batches(system, corpus), _Tasks()
        self._pin = pin and torch.cuda.is_available()
        self._loader: DataLoader[_Made] | None = None
        self._planned: tuple[int, list[list[int]]] = (-1, [])
        self._waste: tuple[int, float] = (-1, 0.0)

    def plan(self, epoch: int) -> list[list[int]]:
        """Indices into ``units`` of every batch of this rank, see :func:`lalia.batching.plan_epoch`."""
        if self._planned[0] != epoch:
            plan = plan_epoch(
                self.lengths,
                self.config,
                seconds_per_unit=self.seconds_per_unit,
                seed=self.seed,
                epoch=epoch,
                rank=self.rank,
                world=self.world,
            )
            self._planned = (epoch, plan)
        return self._planned[1]

    def count(self, epoch: int) -> int:
        """Batches of this rank in ``epoch``; the same on every rank."""
        return len(self.plan(epoch))

    def waste(self, epoch: int) -> float:
        """Share of padding in this rank's batches of ``epoch``."""
        if self._waste[0] != epoch:  # asked for at every step, and a pass over the whole corpus
            self._waste = (epoch, padding_waste(self.lengths, self.plan(epoch)))
        return self._waste[1]

    def batches(self, epoch: int, start: int = 0, clock_step: int = 0) -> Iterator[Any]:
        """Collated batches from plan position ``start``; nothing before it is decoded.

        ``clock_step`` is the training step of the batch at ``start``; it rises by one with each batch.
        """
        plan = self.plan(epoch)
        clocks = [Clock(self.seed, clock_step + i, epoch, 0, self.training) for i in range(len(plan) - start)]
        self._tasks.tasks = [self._task(batch, c) for batch, c in zip(plan[start:], clocks, strict=True)]
        for position, made in enumerate(self._processes(), start=start):
            self._record(made.bad)
            yield made.batch if made.batch is not None else self._next_good(plan, position, clocks[position - start])

    def close(self) -> None:
        """End the worker processes; they start again when batches are asked for."""
        running, self._loader = getattr(self._loader, "_iterator", None), None
        if running is not None:
            running._shutdown_workers()  # at once; left to the garbage collector it takes 5 s after an error

    def _task(self, batch: Sequence[int], clock: Clock) -> _Task:
        return _Task(tuple(row for unit in batch for row in self.units[unit]), clock)

    def _processes(self) -> DataLoader[_Made]:
        if self._loader is None:
            workers = effective_workers(self.config.workers)
            several: dict[str, Any] = {}
            if workers:
                context = "fork" if sys.platform == "linux" else "spawn"
                several = dict(prefetch_factor=max(1, self.config.prefetch), persistent_workers=True)
                several |= dict(multiprocessing_context=context, worker_init_fn=_start_worker)
            self._loader = DataLoader(
                self._dataset,
                batch_size=None,  # one item of the data set is a whole batch
                sampler=self._tasks,
                num_workers=workers,
                collate_fn=_unchanged,
                pin_memory=self._pin,
                generator=torch.Generator().manual_seed(self.seed),  # or iterating would draw from the global generator
                **several,
            )
        return self._loader

    def _record(self, bad: Sequence[Rejected]) -> None:
        for row, reason in bad:
            if row in self.bad:
                continue
            self.bad[row] = reason
            log.warning("row %s is left out of its batch: %s", row, reason)
            if self.on_bad:
                self.on_bad(row, reason)
        if bad and len(self.bad) > self.config.max_bad_fraction * len(self.corpus):
            check_fraction(list(self.bad.items()), len(self.corpus), self.config.max_bad_fraction)

    def _next_good(self, plan: list[list[int]], position: int, clock: Clock) -> Any:
        for step in range(1, len(plan)):
            made = self._dataset[self._task(plan[(position + step) % len(plan)], clock)]
            self._record(made.bad)
            if made.batch is not None:
                return made.batch
        raise ManifestError(f"no row of the epoch could be prepared; the last: {list(self.bad.items())[-1]}")


def seconds_per_unit(seconds: np.ndarray, lengths: np.ndarray) -> float:
    """Seconds in one unit of a system's ``length``, as the ratio of the sums; 1 where rows have no duration."""
    total, units = float(np.sum(seconds)), float(np.sum(lengths))
    return total / units if total > 0 and units > 0 else 1.0


def _unchanged(made: Any) -> Any:
    return made


def _start_worker(worker: int) -> None:
    """Ctrl-C and SIGTERM are the trainer's to handle, also where they reach all processes at once, as from torchrun and batch
    systems: it saves and ends its workers. A second SIGTERM, such as that for a worker that hangs, works as usual."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))
    torch.set_num_threads(1)


def _seed_row(clock: Clock, row_id: str) -> None:
    """Seed Python, numpy and torch (CPU only) from (seed, epoch, row id), whatever process and batch the row is in."""
    digest = hashlib.blake2b(f"{clock.seed}|{clock.epoch}|{row_id}".encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "little")
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.random.default_generator.manual_seed(value % 2**63)


def _random_state() -> tuple[Any, Any, torch.Tensor]:
    return random.getstate(), np.random.get_state(), torch.random.get_rng_state()


def _restore_random(state: tuple[Any, Any, torch.Tensor]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.random.set_rng_state(state[2])
