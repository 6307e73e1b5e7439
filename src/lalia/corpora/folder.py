"""A folder of recordings, with the text beside each file or in one table."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lalia.corpora._common import (
    CorpusError,
    Options,
    PrepareResult,
    Reason,
    Rejected,
    audio_files,
    broken,
    lines,
    path_id,
    select,
)
from lalia.data import Row

SIDECARS = (".txt", ".lab")
TABLES = ("metadata.csv", "metadata.tsv", "transcripts.csv", "transcripts.tsv", "metadata.txt")
COLUMNS = {  # field of a row → names of its column
    "audio": ("audio", "file", "file_name", "filename", "path", "audio_path", "wav", "id"),
    "text": ("text", "sentence", "transcript", "transcription", "normalized"),
    "speaker": ("speaker", "spk", "speaker_id", "client_id"),
    "language": ("language", "lang", "locale"),
}
DELIMITERS = "|\t;,"


@dataclass
class FolderOptions(Options):
    """``metadata`` names the table; empty = the first of metadata.csv, metadata.tsv, transcripts.csv … there is."""

    metadata: str = ""


def prepare_folder(options: FolderOptions) -> PrepareResult:
    """Audio with sidecar ``.txt``/``.lab`` files, or listed in a table with the columns file, text, speaker, language.

    A table has a header line, or the columns ``file|text`` or ``file|speaker|text``. Without a speaker column, files in
    subfolders belong to the speaker named like the first subfolder, others to ``options.speaker``.
    """
    found: list[Row | Rejected] = []
    for root in options.folders("folder"):
        table = _table(root, options.metadata)
        found.extend(_listed(root, table, options) if table else _beside(root, options))
    return select(found, options)


def _table(root: Path, named: str) -> Path | None:
    if not named:
        return next((root / name for name in TABLES if (root / name).is_file()), None)
    path = next((p for p in (root / named, Path(named)) if p.is_file()), None)
    if path is None:
        raise CorpusError(f"no metadata table {named} in {root}")
    return path


def _beside(root: Path, options: Options) -> Iterator[Row | Rejected]:
    files = audio_files(root)
    stems = {path.with_suffix("") for path in files}
    for path in files:
        identifier = path_id(path, root)
        sidecar = next((path.with_suffix(s) for s in SIDECARS if path.with_suffix(s).is_file()), None)
        if sidecar is None:
            yield Rejected(identifier, str(path), Reason.no_transcript, f"no {' or '.join(SIDECARS)} beside it")
            continue
        texts = [text for _, text in lines(sidecar)]
        spoken = [text for text in texts if text is not None]
        if len(spoken) < len(texts):
            yield Rejected(identifier, str(path), Reason.no_transcript, f"{sidecar.name} is not UTF-8")
            continue
        speaker, language = _speaker(path, root, options), _language(options)
        yield Row(identifier, str(path), text=" ".join(spoken), speaker=speaker, language=language)
    orphans = (p for p in root.rglob("*") if p.suffix.lower() in SIDECARS and p.with_suffix("") not in stems)
    for sidecar in sorted(orphans):
        yield Rejected(path_id(sidecar, root), str(sidecar), Reason.missing_audio, "a transcript without audio")


def _listed(root: Path, table: Path, options: Options) -> Iterator[Row | Rejected]:
    columns: dict[str, int] = {}
    listed: set[Path] = set()
    delimiter = ""
    for number, line in lines(table):
        if line is None:
            yield broken(table, number, "not UTF-8")
            continue
        if not delimiter:
            delimiter = max(DELIMITERS, key=line.count)
        cells = [cell.strip() for cell in _cells(line, delimiter)]
        if not columns:
            columns, is_header = _columns(cells)
            if is_header:
                continue
        if len(cells) <= max(columns["audio"], columns["text"]):
            yield broken(table, number, f"{len(cells)} columns separated by {delimiter!r}: {line[:80]}")
            continue
        path = _locate(root, cells[columns["audio"]])
        listed.add(path)
        values = {name: cells[index] for name, index in columns.items() if index < len(cells)}
        yield Row(
            path_id(path, root) if path.is_relative_to(root) else path.stem,
            str(path),
            text=values["text"],
            speaker=values.get("speaker") or _speaker(path, root, options),
            language=values.get("language") or _language(options),
        )
    for path in audio_files(root):
        if path not in listed:
            yield Rejected(path_id(path, root), str(path), Reason.no_transcript, f"not listed in {table.name}")


def _cells(line: str, delimiter: str) -> list[str]:
    """Cells of one line; quotes mean something only in comma and semicolon files."""
    if delimiter in "|\t":
        return line.split(delimiter)
    return next(iter(csv.reader([line], delimiter=delimiter)))


def _columns(cells: list[str]) -> tuple[dict[str, int], bool]:
    """Field → position, and whether the cells are a header. ``file|text`` or ``file|speaker|text`` without one."""
    lowered = [cell.lower() for cell in cells]
    columns = {}
    for name, known in COLUMNS.items():
        position = next((lowered.index(title) for title in known if title in lowered), None)
        if position is not None:
            columns[name] = position
    if "audio" in columns and "text" in columns:
        return columns, True
    return ({"audio": 0, "text": 1} if len(cells) < 3 else {"audio": 0, "speaker": 1, "text": 2}), False


def _locate(root: Path, name: str) -> Path:
    """The file that a table means: with or without suffix, beside the table or in wavs/, wav/, audio/ or clips/."""
    for folder in ("", "wavs", "wav", "audio", "clips"):
        base = root / folder / name
        for path in (base, *(base.with_name(base.name + suffix) for suffix in (".wav", ".flac", ".mp3", ".ogg"))):
            if path.is_file():
                return path
    return root / name


def _speaker(path: Path, root: Path, options: Options) -> str:
    parts = path.relative_to(root).parts if path.is_relative_to(root) else ()
    if options.speaker or len(parts) < 2 or parts[0] in ("wavs", "wav", "audio", "clips"):
        return options.speaker or "speaker"
    return parts[0]


def _language(options: Options) -> str:
    return options.language or "en"
