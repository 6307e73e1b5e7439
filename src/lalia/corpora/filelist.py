"""Pipe-separated lists of the VITS family (source ``list``): ``wav|speaker|language|text[|phones|tones|word2ph]``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lalia.corpora._common import Options, PrepareResult, Rejected, broken, lines, path_id, select
from lalia.data import Row

LANGUAGES = {"ZH": "zh", "EN": "en", "JP": "ja", "JA": "ja"}


@dataclass
class FilelistOptions(Options):
    """``root`` is the folder the paths are relative to; empty = the list's own folder, else the working directory."""

    root: str = ""


def prepare_filelist(options: FilelistOptions) -> PrepareResult:
    """Lists with 2 (``wav|text``), 3 (``wav|speaker|text``), 4 or 7 fields.

    The cleaned fields of a 7-field list are kept as lists in ``extra["phones"]``, ``["tones"]`` and ``["word2ph"]``.
    """
    found: list[Row | Rejected] = []
    for path in options.files("list"):
        found.extend(_rows(path, options))
    return select(found, options)


def _rows(path: Path, options: FilelistOptions) -> Iterator[Row | Rejected]:
    for number, line in lines(path):
        if line is None:
            yield broken(path, number, "not UTF-8")
            continue
        try:
            yield _row(line, path, options)
        except ValueError as error:
            yield broken(path, number, str(error))


def _row(line: str, path: Path, options: FilelistOptions) -> Row:
    """A row from one line; ValueError with the reason when it is none."""
    cells = [cell.strip() for cell in line.split("|")]
    if len(cells) not in (2, 3, 4, 7):
        raise ValueError(f"{len(cells)} fields, expected 2, 3, 4 or 7: {line[:80]}")
    speaker = cells[1] if len(cells) > 2 else ""
    language = cells[2] if len(cells) > 3 else ""
    audio = _locate(cells[0], path, options.root)
    return Row(
        path_id(Path(cells[0]), Path(Path(cells[0]).anchor)),
        str(audio),
        text=cells[1 if len(cells) == 2 else 2 if len(cells) == 3 else 3],
        speaker=speaker or options.speaker or "speaker",
        language=LANGUAGES.get(language.upper(), language.lower()) or options.language or "en",
        extra=_cleaned(cells[4:]) if len(cells) == 7 else {},
    )


def _cleaned(cells: list[str]) -> dict[str, Any]:
    """The phones, tones and phones per word of a 7-field line; ValueError when their numbers disagree."""
    phones, tones, counts = (cell.split() for cell in cells)
    word2ph = [int(count) for count in counts]
    if not len(phones) == len(tones) == sum(word2ph):
        raise ValueError(f"{len(phones)} phones, {len(tones)} tones and word2ph for {sum(word2ph)} phones")
    return {"phones": phones, "tones": [int(tone) for tone in tones], "word2ph": word2ph}


def _locate(name: str, path: Path, root: str) -> Path:
    beside = Path(root or path.parent) / name
    return beside if root or beside.is_file() or not Path(name).is_file() else Path(name)
