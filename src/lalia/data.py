"""Rows, manifests and the Arrow-backed corpus that every system trains from.

A manifest is JSONL: one row a line, audio paths relative to the manifest's folder. In memory a corpus is an Arrow
table, so that ten million rows cost their bytes and no Python objects; a :class:`Row` is made when it is asked for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional

from lalia.config import nearest

log = logging.getLogger(__name__)

#: (row id, or file:line where there is none; reason)
Rejected = tuple[str, str]


class BadRow(ValueError):
    """A row that cannot be used. The message is the reason, as it is written to reports."""


class ManifestError(ValueError):
    """A manifest, or a set of rows, that cannot be used. Names file, line and reason."""


@dataclass
class Row:
    """One utterance. ``audio`` is an absolute path, or '' for text-only rows; ``start`` and ``duration`` are seconds.

    ``duration`` 0 means "to the end of the file"; :func:`lalia.loader.usable` fills it in from the file's header.
    """

    id: str
    audio: str = ""
    start: float = 0.0
    duration: float = 0.0
    text: str = ""
    speaker: str = ""
    language: str = ""
    labels: dict[str, float] = field(default_factory=dict)
    dialogue: str = ""
    turn: int = -1
    task: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


#: labels and extra are JSON text: their keys differ from row to row. Large strings: no 2 GiB limit in ``take``.
SCHEMA = pa.schema(
    [
        ("id", pa.large_string()),
        ("audio", pa.large_string()),
        ("start", pa.float64()),
        ("duration", pa.float64()),
        ("text", pa.large_string()),
        ("speaker", pa.large_string()),
        ("language", pa.large_string()),
        ("labels", pa.large_string()),
        ("dialogue", pa.large_string()),
        ("turn", pa.int64()),
        ("task", pa.large_string()),
        ("extra", pa.large_string()),
    ]
)
FIELDS = tuple(SCHEMA.names)
ALIASES = {"audio_path": "audio"}  # the line format of the seeds
JSON_FIELDS = ("labels", "extra")
CHUNK = 65_536  # rows held as Python objects while a manifest is read


class Corpus(Sequence[Row]):
    """An immutable sequence of rows on an Arrow table. ``rejected`` holds what was left out on the way here."""

    def __init__(self, table: pa.Table, rejected: Sequence[Rejected] = ()) -> None:
        if table.schema.names != SCHEMA.names:
            raise ManifestError(f"a corpus has the columns {', '.join(FIELDS)}, got {', '.join(table.schema.names)}")
        self.table = table.cast(SCHEMA)
        self.rejected: list[Rejected] = list(rejected)

    @classmethod
    def from_rows(cls, rows: Iterable[Row], rejected: Sequence[Rejected] = ()) -> Corpus:
        """ManifestError on a duplicated id."""
        builder = _Builder()
        for row in rows:
            builder.add({f: getattr(row, f) for f in FIELDS})
        corpus = cls(builder.table(), rejected)
        repeated = np.flatnonzero(_repeats(corpus.table["id"]))
        if len(repeated):
            raise ManifestError(f"row id {corpus[int(repeated[0])].id!r} is there twice")
        return corpus

    @classmethod
    def read(cls, paths: Sequence[str | Path], max_bad_fraction: float = 0.1) -> Corpus:
        """Several manifests as one corpus; ids must differ between them too."""
        if not paths:
            raise ManifestError("no manifest was given (data.train and data.valid are lists of JSONL files)")
        return cls.concat([read_manifest(p, max_bad_fraction) for p in paths])

    @classmethod
    def concat(cls, corpora: Sequence[Corpus]) -> Corpus:
        """One after the other; ManifestError when an id occurs in two of them."""
        table = pa.concat_tables([c.table for c in corpora])
        repeated = np.flatnonzero(_repeats(table["id"]))
        if len(repeated):
            raise ManifestError(f"row id {table['id'][int(repeated[0])].as_py()!r} is in more than one manifest")
        return cls(table, [item for c in corpora for item in c.rejected])

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.subset(range(*index.indices(len(self))))
        position = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= position < len(self):
            raise IndexError(f"row {index} of a corpus of {len(self)}")
        return _to_row(self.table.slice(position, 1).to_pylist()[0])

    def __iter__(self) -> Iterator[Row]:
        for batch in self.table.to_batches(max_chunksize=4096):
            for record in batch.to_pylist():
                yield _to_row(record)

    def subset(self, indices: Sequence[int] | np.ndarray | range) -> Corpus:
        """The rows at ``indices``, in that order."""
        return Corpus(self.table.take(pa.array(np.asarray(indices, dtype=np.int64))), self.rejected)

    def durations(self) -> np.ndarray:
        """Seconds of every row, float64 [rows]; 0 where the manifest does not say."""
        return self.table["duration"].to_numpy()

    def with_durations(self, seconds: np.ndarray) -> Corpus:
        """The same rows with other durations, seconds [rows]."""
        column = pa.array(np.asarray(seconds, dtype=np.float64))
        table = self.table.set_column(FIELDS.index("duration"), SCHEMA.field("duration"), column)
        return Corpus(table, self.rejected)

    def column(self, name: str) -> list[Any]:
        """All values of one field as Python objects (``labels`` and ``extra`` as dicts)."""
        if name not in FIELDS:
            raise ManifestError(f"a row has no field {name!r}{nearest(name, FIELDS)}")
        values = self.table[name].to_pylist()
        return [json.loads(v) if v else {} for v in values] if name in JSON_FIELDS else values


class _Builder:
    """Collects records and turns every ``CHUNK`` of them into Arrow memory."""

    def __init__(self) -> None:
        self.batches: list[pa.RecordBatch] = []
        self.columns: dict[str, list[Any]] = {f: [] for f in FIELDS}

    def add(self, record: dict[str, Any]) -> None:
        for name, values in self.columns.items():
            value = record[name]
            if name in JSON_FIELDS:
                value = json.dumps(value, ensure_ascii=False) if value else ""
            values.append(value)
        if len(self.columns["id"]) >= CHUNK:
            self._flush()

    def _flush(self) -> None:
        self.batches.append(pa.RecordBatch.from_pydict(self.columns, schema=SCHEMA))
        self.columns = {f: [] for f in FIELDS}

    def table(self) -> pa.Table:
        if self.columns["id"]:
            self._flush()
        return pa.Table.from_batches(self.batches, schema=SCHEMA)


def _to_row(record: dict[str, Any]) -> Row:
    for name in JSON_FIELDS:
        record[name] = json.loads(record[name]) if record[name] else {}
    return Row(**record)


def _repeats(ids: pa.ChunkedArray) -> np.ndarray:
    """True where an id occurred before, bool [rows]. Dictionary codes count up in order of first appearance."""
    if len(ids) == 0:
        return np.zeros(0, dtype=bool)
    codes = ids.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
    highest_before = np.concatenate([[-1], np.maximum.accumulate(codes)[:-1]])
    return codes <= highest_before


# --- reading ---
def read_manifest(path: str | Path, max_bad_fraction: float = 0.1) -> Corpus:
    """JSONL → Corpus with absolute audio paths.

    Lines that are broken (no JSON, unknown key, wrong type, no id, duplicated id) are collected in ``corpus.rejected``
    as ("file:17", reason) and logged while they are at most ``max_bad_fraction`` of all; above, and when no row is
    left, ManifestError names the first of them. A row without ``id`` is named after its audio path, without the suffix.
    """
    path = Path(path)
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.jsonl")] if path.parent.is_dir() else []
        raise ManifestError(f"no manifest {path}{nearest(path.name, siblings)}")
    folder = os.path.abspath(path.parent)
    builder, lines, bad = _Builder(), _IntegerLog(), list[tuple[int, str]]()
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            line = (raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw).strip()
            if not line:
                continue
            try:
                builder.add(_parse(line, folder))
                lines.append(number)
            except BadRow as error:
                bad.append((number, str(error)))
    table, numbers = builder.table(), lines.array()
    repeated = _repeats(table["id"])
    for position in np.flatnonzero(repeated):
        bad.append((int(numbers[position]), f"duplicated id: {table['id'][int(position)].as_py()!r}"))
    if repeated.any():
        table = table.filter(pa.array(~repeated))
    return _tolerate(path, table, sorted(bad), max_bad_fraction)


class _IntegerLog:
    """A growing int64 array: line numbers of ten million rows in 80 MB."""

    def __init__(self) -> None:
        self.full: list[np.ndarray] = []
        self.tail: list[int] = []

    def append(self, value: int) -> None:
        self.tail.append(value)
        if len(self.tail) >= CHUNK:
            self.full.append(np.asarray(self.tail))
            self.tail = []

    def array(self) -> np.ndarray:
        return np.concatenate([*self.full, np.asarray(self.tail, dtype=np.int64)])


def _tolerate(path: Path, table: pa.Table, bad: list[tuple[int, str]], limit: float) -> Corpus:
    rejected = [(f"{path}:{number}", reason) for number, reason in bad]
    if table.num_rows == 0:
        first = f"; the first: {rejected[0][0]}: {rejected[0][1]}" if rejected else " (the file is empty)"
        raise ManifestError(f"{path}: no usable row in {len(bad)} lines{first}")
    total = table.num_rows + len(bad)
    if len(bad) > limit * total:
        shown = "; ".join(f"{where}: {reason}" for where, reason in rejected[:5])
        raise ManifestError(f"{len(bad)} of {total} lines are broken (max_bad_fraction {limit:g}): {shown}")
    for where, reason in rejected:
        log.warning("left out %s: %s", where, reason)
    return Corpus(table, rejected)


def _parse(line: bytes, folder: str) -> dict[str, Any]:
    """One line → a complete record in the types of SCHEMA; BadRow with the reason."""
    try:
        raw = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8: byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise BadRow(f"bad JSON: {error}") from error
    if not isinstance(raw, dict):
        raise BadRow(f"wrong type: a line is one JSON object, got {type(raw).__name__}")
    record: dict[str, Any] = dict(_DEFAULTS, labels={}, extra={})
    for given, value in raw.items():
        name = ALIASES.get(given, given)
        if name not in _DEFAULTS:
            raise BadRow(f"unknown key: {given!r}{nearest(given, [*FIELDS, *ALIASES])}")
        if given != name and name in raw:
            raise BadRow(f"unknown key: {given!r} beside {name!r}, which means the same")
        record[name] = _typed(name, value)
    if b"\\ud" in line.lower():
        _refuse_surrogates(record)
    record["id"] = record["id"] or _id_from_audio(record)
    if record["audio"]:
        record["audio"] = os.path.normpath(os.path.join(folder, record["audio"]))
    return record


_DEFAULTS: dict[str, Any] = {"id": "", **{f.name: f.default for f in fields(Row) if f.name != "id"}}


def _id_from_audio(record: dict[str, Any]) -> str:
    if not record["audio"]:
        raise BadRow("no id: a row has an id, or an audio path to name it after")
    stem = os.path.splitext(record["audio"])[0]
    return f"{stem}@{record['start']:g}" if record["start"] else stem


def _typed(name: str, value: Any) -> Any:
    if name in ("start", "duration"):
        return _number(name, value, least=0.0)
    if name == "turn":
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**63:
            raise BadRow(f"wrong type: 'turn' is a whole number, got {_shown(value)}")
        return value
    if name in JSON_FIELDS:
        if not isinstance(value, dict):
            raise BadRow(f"wrong type: {name!r} is an object, got {_shown(value)}")
        return {k: _number(f"labels.{k}", v) for k, v in value.items()} if name == "labels" else value
    if not isinstance(value, str):
        raise BadRow(f"wrong type: {name!r} is text, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    return f"{str(value)[:40]!r} ({type(value).__name__})"


def _number(name: str, value: Any, least: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadRow(f"wrong type: {name!r} is a number, got {_shown(value)}")
    try:
        number = float(value)
    except OverflowError as error:
        raise BadRow(f"wrong value: {name!r} is too large a number") from error
    if not math.isfinite(number) or number < least:
        raise BadRow(f"wrong value: {name!r} is {value}")
    return number


def _refuse_surrogates(record: dict[str, Any]) -> None:
    """A lone surrogate (an escape that JSON lets through) is no Unicode text and cannot be stored."""
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("bad JSON: half a surrogate pair is not text") from error


# --- writing ---
@contextlib.contextmanager
def _atomic(path: str | Path) -> Iterator[IO[str]]:
    """A text file that is there whole or not at all: temporary neighbour, fsync, rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_manifest(path: str | Path, rows: Iterable[Row]) -> None:
    """Rows → JSONL, atomically; audio paths relative to the manifest's folder, fields at their default left out."""
    folder = os.path.abspath(Path(path).parent)
    with _atomic(path) as file:
        for row in rows:
            record = {f: getattr(row, f) for f in FIELDS if f == "id" or getattr(row, f) != _blank(f)}
            if row.audio:
                record["audio"] = _relative(os.path.abspath(row.audio), folder)
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def _blank(name: str) -> Any:
    return {} if name in JSON_FIELDS else _DEFAULTS[name]


def _relative(audio: str, folder: str) -> str:
    if os.path.splitdrive(audio)[0] != os.path.splitdrive(folder)[0]:
        return audio  # another drive of Windows has no relative path
    return Path(os.path.relpath(audio, folder)).as_posix()


def write_rejected(path: str | Path, rejected: Iterable[Rejected]) -> None:
    """``rejected.jsonl``: one ``{"row", "reason"}`` a line, atomically. ``row`` is a row id or file:line."""
    with _atomic(path) as file:
        for row, reason in rejected:
            file.write(json.dumps({"row": row, "reason": reason}, ensure_ascii=False) + "\n")


def write_json(path: str | Path, value: Any) -> None:
    """A JSON report, atomically."""
    with _atomic(path) as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        file.write("\n")


def pad_stack(tensors: Sequence[Tensor], value: float = 0) -> tuple[Tensor, Tensor]:
    """Tensors [..., T_b], ragged in the last dimension only → (padded [B, ..., max T], lengths int64 [B])."""
    lengths = torch.tensor([t.shape[-1] for t in tensors], dtype=torch.long)
    longest = int(lengths.max())
    return torch.stack([functional.pad(t, (0, longest - t.shape[-1]), value=value) for t in tensors]), lengths
