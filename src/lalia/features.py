"""Features that are computed once: one tensors-only ``.pt`` for each utterance, recomputed when its recording changes.

A file holds the tensor and what it was computed from. Extraction runs in several processes, goes on where it was stopped, and
lists what failed in ``failures.jsonl`` beside the features.
"""

from __future__ import annotations

import hashlib
import io
import logging
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from lalia import audio
from lalia.data import BadRow, Corpus, ManifestError, Rejected, Row, write_rejected
from lalia.runfolder import write_atomic
from lalia.safeload import DamagedCheckpoint, read_pickle

log = logging.getLogger(__name__)

FAILURES = "failures.jsonl"
NAME_LENGTH = 80
SAME_SECONDS = 1e-3  # manifests round durations
EGEMAPS_RATE = 16000  # Hz; spectral functionals depend on it: one rate for all recordings and for live turns
CHUNK = 8  # rows a worker is given at once
#: A row that raises one of these is named and counted; anything else is a fault of the program and ends it.
ROW_ERRORS = (ValueError, OSError)
Compute = Callable[[Row], Tensor]


class FeatureError(ValueError):
    """Features that cannot be computed or stored; names the row or folder."""


class FeatureStore:
    """A folder of features of one ``kind``. ``version`` changes whenever the values of the same recording would."""

    def __init__(self, folder: str | Path, kind: str, version: str) -> None:
        self.folder, self.kind, self.version = Path(folder), kind, version

    def path(self, row: Row) -> Path:
        """Where the row's features are or would be: its id where that is a safe name, else unlike that of any other id."""
        return self.folder / f"{file_name(row.id)}.pt"

    def get(self, row: Row) -> Tensor | None:
        """The stored tensor; None when there is none, it is damaged, or it was computed from something else.

        UnsafePickle when the file would run code.
        """
        path = self.path(row)
        if not path.is_file() or not os.path.isfile(row.audio):
            return None
        try:
            stored = read_pickle(path)
        except DamagedCheckpoint as error:
            log.warning("%s; it will be computed anew", error)
            return None
        return stored["value"] if self.fits(stored, row) else None

    def put(self, row: Row, value: Tensor) -> None:
        """Store ``value`` (any shape), whole or not at all. BadRow for a row without audio, AudioError for one without a length."""
        record = {**self.record(row), "value": value.detach().cpu().clone()}
        buffer = io.BytesIO()
        torch.save(record, buffer)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path(row), buffer.getvalue())

    def record(self, row: Row) -> dict[str, Any]:
        """What a row's features are computed from: JSON data for :meth:`fits`. BadRow for a row without audio, AudioError for one
        without a length."""
        if not row.audio:
            raise BadRow(f"{row.id}: features are kept for recordings, and this row has none")
        seconds = audio.info(row.audio).seconds - row.start
        return {
            **self._origin(row),
            "seconds": row.duration or seconds,
            "to_end": row.duration == 0 or abs(row.duration - seconds) < SAME_SECONDS,
        }

    def _origin(self, row: Row) -> dict[str, Any]:
        state = os.stat(row.audio)
        return {
            "kind": self.kind,
            "version": self.version,
            "size": state.st_size,
            "mtime_ns": state.st_mtime_ns,
            "start": float(row.start),
        }

    def fits(self, stored: Any, row: Row) -> bool:
        """Whether ``stored`` was computed from this row. A duration of 0 means what the file's header will say."""
        if not isinstance(stored, dict) or any(stored.get(key) != value for key, value in self._origin(row).items()):
            return False
        return bool(stored["to_end"]) if row.duration == 0 else abs(float(stored["seconds"]) - row.duration) < SAME_SECONDS


def file_name(identifier: str) -> str:
    """A file name for any row id: the id itself when that is safe, else a readable part of it and a hash."""
    safe = re.sub(r"[^\w.-]+", "_", identifier).lstrip(".")[:NAME_LENGTH]
    return safe if safe == identifier else f"{safe}-{hashlib.blake2b(identifier.encode(), digest_size=4).hexdigest()}"


# --- extraction -----------------------------------------------------------------------------------------------------
@dataclass
class Failures:
    """What an extraction did: rows ``computed`` now, ``kept`` from before, and ``failed`` as (row id, reason)."""

    computed: int = 0
    kept: int = 0
    failed: list[Rejected] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.failed)

    def __iter__(self) -> Iterator[Rejected]:
        return iter(self.failed)

    @property
    def fraction(self) -> float:
        """Share of all rows that failed."""
        return len(self.failed) / max(1, self.computed + self.kept + len(self.failed))

    def text(self) -> str:
        return f"{self.computed} computed, {self.kept} there before, {len(self.failed)} failed"


def extract(rows: Sequence[Row], store: FeatureStore, compute: Compute, workers: int = 0, progress: bool = True) -> Failures:
    """Fill ``store`` with ``compute(row)`` of every row that it lacks.

    Args:
        compute: a function at the top of a module (it is sent to other processes). A ValueError or OSError of a row is a failure
            of that row; anything else ends the extraction, and what was stored stays.
        workers: processes; 0 computes in this one.

    Returns: the counts and the failures, which are also in ``failures.jsonl`` of the store's folder while there are any.
    """
    result = Failures()
    missing = [row for row in rows if not _is_stored(store, row, result)]
    done = _computed(missing, store, compute, min(workers, len(missing)))
    shown = track(done, f"{store.kind} features", len(missing), console=Console(stderr=True), disable=not progress)
    for row, reason in shown:
        if reason:
            result.failed.append((row, reason))
        else:
            result.computed += 1
    order = {row.id: index for index, row in enumerate(rows)}
    result.failed.sort(key=lambda failure: order[failure[0]])
    _write_failures(store.folder / FAILURES, result.failed)
    return result


def _is_stored(store: FeatureStore, row: Row, result: Failures) -> bool:
    found = store.get(row) is not None
    result.kept += found
    return found


def _computed(rows: Sequence[Row], store: FeatureStore, compute: Compute, workers: int) -> Iterator[Rejected]:
    """(row id, why it failed or '') in the order in which they are done."""
    if workers < 1:
        yield from (_one(row, store, compute) for row in rows)
        return
    size = max(1, min(CHUNK, -(-len(rows) // workers)))
    parts = [rows[first : first + size] for first in range(0, len(rows), size)]
    # forking would copy the locks of threads that are running here
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _one_thread) as pool:
        try:
            running = {pool.submit(_several, part, store, compute) for part in parts}
            while running:
                yield from _collect(running)
        except BrokenProcessPool as error:
            raise FeatureError("a worker process died (memory?): start again with fewer workers; what is done stays") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _collect(running: set[Future[list[Rejected]]]) -> Iterator[Rejected]:
    done, _ = wait(running, return_when="FIRST_COMPLETED")
    for future in done:
        running.discard(future)
        yield from future.result()


def _one_thread() -> None:
    torch.set_num_threads(1)


def _several(rows: Sequence[Row], store: FeatureStore, compute: Compute) -> list[Rejected]:
    return [_one(row, store, compute) for row in rows]


def _one(row: Row, store: FeatureStore, compute: Compute) -> Rejected:
    try:
        value = compute(row)
        if not bool(torch.isfinite(value).all()):
            raise FeatureError("a feature is not finite")
        store.put(row, value)
    except ROW_ERRORS as error:
        return row.id, str(error) or type(error).__name__
    return row.id, ""


def _write_failures(path: Path, failed: Sequence[Rejected]) -> None:
    if failed:
        write_rejected(path, failed)
    else:
        path.unlink(missing_ok=True)


# --- what is extracted ----------------------------------------------------------------------------------------------
def recordings(manifests: Sequence[str | Path]) -> list[Row]:
    """Every recording of the manifests once: a row may stand in several (folds), but then as the same recording."""
    found: dict[str, Row] = {}
    for path in manifests:
        for row in Corpus.read([path]):
            known = found.setdefault(row.id, row)
            if (known.audio, known.start, known.duration) != (row.audio, row.start, row.duration):
                raise ManifestError(f"row id {row.id!r} is one recording in one manifest and another in {path}")
    return list(found.values())


def egemaps_store(folder: str | Path) -> FeatureStore:
    """The store of :func:`egemaps_of` in ``folder``."""
    from lalia import egemaps

    return FeatureStore(folder, "egemaps", f"{egemaps.VERSION}@{EGEMAPS_RATE}")


def egemaps_of(row: Row) -> Tensor:
    """The 88 eGeMAPS functionals (Eyben et al. 2016) of a row's recording at 16 kHz, float32 [88]. AudioError, BadRow."""
    from lalia import egemaps

    if not row.audio:
        raise BadRow(f"{row.id}: the row names no audio")
    wave, rate = audio.read(row.audio, EGEMAPS_RATE, row.start, row.duration)
    return torch.from_numpy(egemaps.functionals(wave, rate))
