"""LJSpeech (Ito 2017, public domain) and corpora in its layout: ``metadata.csv`` and ``wavs/``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lalia.corpora._common import CorpusError, Options, PrepareResult, Rejected, broken, lines, select
from lalia.data import Row


def prepare_ljspeech(options: Options) -> PrepareResult:
    """``id|text|normalised text`` lines. The normalised text is used; a different raw one is ``extra["raw_text"]``."""
    found: list[Row | Rejected] = []
    for root in options.folders("ljspeech"):
        if not (root / "metadata.csv").is_file():
            raise CorpusError(f"{root} holds no metadata.csv: not an LJSpeech folder")
        found.extend(_rows(root, options))
    return select(found, options)


def _rows(root: Path, options: Options) -> Iterator[Row | Rejected]:
    table = root / "metadata.csv"
    for number, line in lines(table):
        cells = [cell.strip() for cell in (line or "").split("|")]
        if line is None or len(cells) not in (2, 3) or not cells[0]:
            problem = "not UTF-8" if line is None else f"expected id|text|normalised, got {line[:80]}"
            yield broken(table, number, problem)
            continue
        raw, text = cells[1], cells[-1] or cells[1]
        yield Row(
            cells[0],
            str(root / "wavs" / f"{cells[0]}.wav"),
            text=text,
            speaker=options.speaker or "ljspeech",
            language=options.language or "en",
            extra={"raw_text": raw} if raw != text else {},
        )
