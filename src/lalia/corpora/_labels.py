"""Tables of labels: any of a few column names, comma, semicolon or tab, with or without a byte-order mark, any line ends."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lalia.corpora._common import CorpusError, Rejected, broken, lines

DELIMITERS = ",;\t"


class Line(NamedTuple):
    """One line of a table: its number and field → text. A field whose column the table lacks is absent."""

    number: int
    cells: dict[str, str]


def read_table(path: Path, aliases: Mapping[str, Sequence[str]], required: Sequence[str], rejected: list[Rejected]) -> list[Line]:
    """Lines of ``path`` by field. ``aliases``: field → titles that mean it, in small letters.

    Lines that are not UTF-8 or too short are added to ``rejected``.

    Raises:
        CorpusError: no header, or no column for a required field; names the columns that there are.
    """
    columns: dict[str, int] = {}
    found: list[Line] = []
    delimiter = ","
    for number, text in lines(path):
        if text is None:
            rejected.append(broken(path, number, "not UTF-8"))
            continue
        if not columns:
            delimiter = max(DELIMITERS, key=text.count)
            columns = _columns(path, _cells(text, delimiter), aliases, required)
            continue
        cells = _cells(text, delimiter)
        if len(cells) <= max(columns[name] for name in required):
            rejected.append(broken(path, number, f"{len(cells)} columns separated by {delimiter!r}: {text[:80]}"))
            continue
        found.append(Line(number, {name: cells[i] for name, i in columns.items() if i < len(cells)}))
    if not columns:
        raise CorpusError(f"{path}: an empty table")
    return found


def _cells(text: str, delimiter: str) -> list[str]:
    return [cell.strip() for cell in next(iter(csv.reader([text], delimiter=delimiter)))]


def _columns(path: Path, titles: Sequence[str], aliases: Mapping[str, Sequence[str]], required: Sequence[str]) -> dict[str, int]:
    lowered = [title.lower() for title in titles]
    columns: dict[str, int] = {}
    for name, known in aliases.items():
        position = next((lowered.index(title) for title in known if title in lowered), None)
        if position is not None:
            columns[name] = position
    missing = [name for name in required if name not in columns]
    if missing:
        wanted = "; ".join(f"{name} ({', '.join(aliases[name])})" for name in missing)
        raise CorpusError(f"{path}: no column for {wanted}; the columns are {', '.join(titles)}")
    return columns
