"""Features of many recordings in a few files: WebDataset tar shards that are written once and read at random by key.

A shard is a plain tar of ``<key>.npy`` (float16) and ``<key>.json`` (row id, text, what it was computed from), so that ``tar``,
Python's tarfile and the webdataset library all read it. ``index.json`` beside the shards maps every key to its shard and the place
of the array in it. A shard counts only when the index names it with its size: what a killed process left behind is found at the
next start, removed, and computed again.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from lalia import audio
from lalia.data import Row, write_rejected
from lalia.features import FAILURES, ROW_ERRORS, Failures, FeatureError, FeatureStore
from lalia.runfolder import TEMPORARY, HashingFile, RunFolder, sync_folder, write_atomic

log = logging.getLogger(__name__)

INDEX = "index.json"
BLOCK = 512  # tar pads every member to this
KEY_LENGTH = 60
LOOKAHEAD = 512  # rows that are sorted by length together, so that a batch has little padding
RATE = 16_000

#: waves [N, S] at 16 kHz and lengths int64 [N] in samples → one feature tensor a row
Encode = Callable[[Tensor, Tensor], Sequence[Tensor]]


class CacheError(ValueError):
    """Shards that cannot be used; names the folder and the way out."""


def shard_key(identifier: str) -> str:
    """A WebDataset key for any row id: no dot (the key ends there), no slash; unlike that of any other id."""
    safe = re.sub(r"[^A-Za-z0-9_-]+", "_", identifier)[:KEY_LENGTH]
    if safe == identifier:
        return safe
    return f"{safe}-{hashlib.blake2b(identifier.encode(), digest_size=6).hexdigest()}"


class ShardStore(FeatureStore):
    """A folder of shards of one ``kind``; ``version`` changes whenever the values of the same recording would.

    Reading opens the shard anew each time, so a store may be used in forked and spawned processes and in threads.
    CacheError when the folder holds features of another kind or version.
    """

    def __init__(self, folder: str | Path, kind: str, version: str) -> None:
        super().__init__(folder, kind, version)
        self.shards: dict[str, int] = {}  # name → bytes
        self.entries: dict[str, dict[str, Any]] = {}  # key → {"shard", "offset", "bytes", what it was computed from}
        self._read_index()

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def bytes(self) -> int:
        """Size of all shards together."""
        return sum(self.shards.values())

    def get(self, row: Row) -> Tensor | None:
        """The stored tensor, float16; None when there is none or it was computed from something else.

        CacheError when the shard does not hold what the index says.
        """
        entry = self.entries.get(shard_key(row.id))
        if entry is None or not Path(row.audio).is_file() or not self.fits({**entry, **self._named()}, row):
            return None
        return torch.from_numpy(self.array(shard_key(row.id)))

    def array(self, key: str) -> np.ndarray:
        """The array of a key, whatever it was computed from. KeyError, CacheError."""
        entry = self.entries[key]
        path = self.folder / entry["shard"]
        try:
            with open(path, "rb") as file:
                file.seek(entry["offset"])
                return np.load(io.BytesIO(file.read(entry["bytes"])), allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise CacheError(f"{path} does not hold {key} ({error}): delete this shard and compute the features again") from error

    def put(self, row: Row, value: Tensor) -> None:
        """Not here: shards are written in one go, by :class:`ShardWriter`."""
        raise TypeError("shards are written by ShardWriter")

    def _named(self) -> dict[str, str]:
        return {"kind": self.kind, "version": self.version}

    def _read_index(self) -> None:
        path = self.folder / INDEX
        if not path.is_file():
            return
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            named = {key: stored[key] for key in ("kind", "version")}
            self.shards, self.entries = dict(stored["shards"]), dict(stored["entries"])
        except (ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{path} cannot be read ({error}): delete the folder and compute the features again") from error
        if named != self._named():
            held = f"{named['kind']} {named['version']}"
            raise CacheError(f"{self.folder} holds {held}, wanted {self.kind} {self.version}: use another folder")
        for name in [name for name, size in self.shards.items() if not _is_whole(self.folder / name, size)]:
            lost = [key for key, entry in self.entries.items() if entry["shard"] == name]
            log.warning("%s is missing or cut short: its %d features count as not computed", self.folder / name, len(lost))
            del self.shards[name]
            for key in lost:
                del self.entries[key]


def _is_whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


class ShardWriter:
    """Adds shards to a :class:`ShardStore`: a context manager, one process a folder at a time.

    A shard is written as it comes, under a temporary name; when it has ``shard_mb`` megabytes it is synced, renamed and entered
    into the index. Nothing but the index is held in memory. Leaving the block by an error gives up the unfinished shard only.
    RunLocked when another process writes there.
    """

    def __init__(self, store: ShardStore, shard_mb: float = 128.0) -> None:
        self.store, self.limit = store, round(shard_mb * 1e6)
        self._owned = RunFolder(store.folder)
        self._file: HashingFile | None = None
        self._path = Path()
        self._fresh: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> ShardWriter:
        self._owned.__enter__()  # which also removes drafts
        for path in sorted(self.store.folder.glob("*.tar")):
            if path.name not in self.store.shards:
                log.warning("%s is not in the index: removed, what it held is computed again", path)
                path.unlink()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
            elif self._file is not None:
                self._file.close()
                self._path.unlink(missing_ok=True)
        finally:
            self._owned.unlock()

    def add(self, row: Row, value: Tensor) -> None:
        """Store ``value`` (any shape) as float16. FeatureError when it is not finite in float16; BadRow, AudioError."""
        half = value.detach().cpu().to(torch.float16)
        if not bool(half.isfinite().all()):
            raise FeatureError("a feature is not finite in float16")
        origin = {key: item for key, item in self.store.record(row).items() if key not in ("kind", "version")}
        buffer = io.BytesIO()
        np.save(buffer, half.numpy(), allow_pickle=False)
        about = {"id": row.id, "text": row.text, "speaker": row.speaker, "language": row.language, **origin}
        key, file = shard_key(row.id), self._open()
        offset = _add_member(file, f"{key}.npy", buffer.getvalue())
        _add_member(file, f"{key}.json", json.dumps(about, ensure_ascii=False).encode())
        self._fresh[key] = {"shard": self._name(), "offset": offset, "bytes": len(buffer.getvalue()), **origin}
        if file.size >= self.limit:
            self.finish()

    def finish(self) -> None:
        """Complete the shard that is being written, if any, and enter it into the index."""
        if self._file is None:
            return
        self._file.write(bytes(2 * BLOCK))  # the end of a tar
        size = self._file.finish()["size"]
        self._file.close()
        self._file = None
        store = self.store
        self._path.rename(store.folder / self._name())
        store.shards[self._name()] = size
        store.entries |= self._fresh
        self._fresh = {}
        sync_folder(store.folder)
        index = {**store._named(), "shards": store.shards, "entries": store.entries}
        write_atomic(store.folder / INDEX, json.dumps(index, ensure_ascii=False))

    def _name(self) -> str:
        return self._path.name.removeprefix(TEMPORARY)

    def _open(self) -> HashingFile:
        if self._file is None:
            number = 1 + max((int(name[6:12]) for name in self.store.shards), default=-1)
            self._path = self.store.folder / f"{TEMPORARY}shard-{number:06d}.tar"
            self._file = HashingFile(self._path)
        return self._file


def _add_member(file: BinaryIO | HashingFile, name: str, data: bytes) -> int:
    """Append a tar member with fixed owner and time, so that equal features are equal bytes; returns where its data begins."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    header = info.tobuf(tarfile.USTAR_FORMAT)
    start = file.size if isinstance(file, HashingFile) else file.tell()
    file.write(header)
    file.write(data)
    file.write(bytes(-len(data) % BLOCK))
    return start + len(header)


def whisper_store(folder: str | Path, description: Mapping[str, Any]) -> ShardStore:
    """The shards under ``folder`` of what a :class:`lalia.pretrained.whisper.FrozenWhisper` of this description hears, [T, C, D].

    Each description has a folder of its own; where the encoder's weights lie does not matter to it.
    """
    heard = {key: value for key, value in description.items() if key not in ("source", "layers")}
    version = hashlib.blake2b(json.dumps(heard, sort_keys=True).encode(), digest_size=6).hexdigest()
    return ShardStore(Path(folder) / f"whisper-{version}", "whisper", version)


def whisper_widths(folder: str | Path) -> list[str]:
    """``whisper-… of width D`` for each filled folder that :func:`whisper_store` has made under ``folder``. CacheError."""
    found = []
    for path in sorted(Path(folder).glob("whisper-*")):
        store = ShardStore(path, "whisper", path.name.removeprefix("whisper-"))
        if len(store):
            found.append(f"{path.name} of width {store.array(next(iter(store.entries))).shape[-1]}")
    return found


# --- filling --------------------------------------------------------------------------------------------------------
def fill(
    rows: Iterable[Row],
    store: ShardStore,
    encode: Encode,
    *,
    batch_seconds: float = 60.0,
    shard_mb: float = 128.0,
    longest_seconds: float = 0.0,
    progress: bool = True,
) -> Failures:
    """Compute what ``store`` lacks of ``rows``, in batches of at most ``batch_seconds`` padded seconds (or one row).

    Memory holds one batch of waves and of features, and the index. A ValueError or OSError of a row is a failure of that row and
    stands in ``failures.jsonl`` of the folder; a batch that fails is tried row by row. Rows of more than ``longest_seconds``
    (0 = no limit) fail. What was done before a kill is kept, but for the shard that was being written.
    """
    result, missing = Failures(), list[Row]()
    for row in rows:
        if store.get(row) is None:
            missing.append(row)
        else:
            result.kept += 1
    groups = list(batches(missing, batch_seconds))
    shown = track(groups, f"{store.kind} features", console=Console(stderr=True), disable=not progress)
    with ShardWriter(store, shard_mb) as writer:
        for group in shown:
            result.failed += _write_group(group, writer, encode, longest_seconds)
    result.computed = len(missing) - len(result.failed)
    failures = store.folder / FAILURES
    if result.failed:
        write_rejected(failures, result.failed)
    else:
        failures.unlink(missing_ok=True)
    return result


def batches(rows: Sequence[Row], batch_seconds: float) -> Iterator[list[Row]]:
    """Rows of like length together: within each ``LOOKAHEAD`` rows the longest first, at most ``batch_seconds`` padded seconds.

    A row whose manifest does not say how long it is makes a batch by itself.
    """
    for first in range(0, len(rows), LOOKAHEAD):
        group: list[Row] = []
        for row in sorted(rows[first : first + LOOKAHEAD], key=lambda row: -row.duration):
            if group and (not row.duration or group[0].duration * (len(group) + 1) > batch_seconds):
                yield group
                group = []
            group.append(row)
        if group:
            yield group


def _write_group(group: Sequence[Row], writer: ShardWriter, encode: Encode, longest_seconds: float) -> list[tuple[str, str]]:
    """Read, encode and store a batch; (row id, reason) of those that failed."""
    waves: dict[str, Tensor] = {}
    failed: dict[str, str] = {}
    for row in group:
        try:
            waves[row.id] = _wave_of(row, longest_seconds)
        except ROW_ERRORS as error:
            failed[row.id] = str(error)
    values = _encoded(waves, encode, failed)
    for row in group:
        if row.id in values:
            try:
                writer.add(row, values[row.id])
            except FeatureError as error:
                failed[row.id] = str(error)
    return list(failed.items())


def _wave_of(row: Row, longest_seconds: float) -> Tensor:
    if not row.audio:
        raise FeatureError("the row names no audio")
    if 0 < longest_seconds < row.duration:
        raise FeatureError(f"{row.duration:.1f} s are more than the limit of {longest_seconds:g} s")
    wave, _ = audio.read(row.audio, RATE, row.start, row.duration)
    if len(wave) == 0:
        raise FeatureError("the recording has no samples")
    if 0 < longest_seconds < len(wave) / RATE:
        raise FeatureError(f"{len(wave) / RATE:.1f} s are more than the limit of {longest_seconds:g} s")
    return torch.from_numpy(wave)


def _encoded(waves: Mapping[str, Tensor], encode: Encode, failed: dict[str, str]) -> dict[str, Tensor]:
    """Features by row id. When a batch fails each row is tried by itself, and its reason goes to ``failed``."""
    if not waves:
        return {}
    lengths = torch.tensor([len(wave) for wave in waves.values()])
    try:
        batch = torch.nn.utils.rnn.pad_sequence(list(waves.values()), batch_first=True)
        return dict(zip(waves, encode(batch, lengths), strict=True))
    except (ValueError, torch.OutOfMemoryError) as error:
        if len(waves) == 1:
            failed[next(iter(waves))] = str(error)
            return {}
        log.warning("a batch of %d rows failed (%s): one at a time", len(waves), error)
    found: dict[str, Tensor] = {}
    for name, wave in waves.items():
        found |= _encoded({name: wave}, encode, failed)
    return found
