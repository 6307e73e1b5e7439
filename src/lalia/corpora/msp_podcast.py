"""MSP-Podcast (Lotfian and Busso 2019): natural speech from podcasts, rated 1…7, with its own train, validation and test parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lalia.corpora._common import CorpusError, PrepareResult, Rejected, broken, select
from lalia.corpora._emotion import DIMENSIONS, EmotionOptions, Scale, note_text
from lalia.corpora._labels import Line, read_table
from lalia.corpora.folds import official_fold
from lalia.data import Row

TABLE = "labels_consensus.csv"
COLUMNS = {
    "file": ("filename", "file_name", "file"),
    "emotion": ("emoclass",),
    "arousal": ("emoact",),
    "valence": ("emoval",),
    "dominance": ("emodom",),
    "speaker": ("spkrid", "speakerid", "speaker"),
    "gender": ("gender",),
    "part": ("split_set", "split"),
}
PARTS = {"train": "train", "development": "valid", "validation": "valid", "test1": "test", "test": "test"}
UNKNOWN = ("", "unknown", "nan", "none", "na")


@dataclass
class MspPodcastOptions(EmotionOptions):
    """``inputs``: the folder with Labels, Audios and Transcripts."""


def prepare_msp_podcast(options: MspPodcastOptions) -> PrepareResult:
    """Rows with the official parts: Train, Development → valid, Test1 → test, Test2 and Test3 → test2, test3.

    A speaker called Unknown is no speaker: different people must not become one. Labels stay in the corpus' units, 1…7. Turns of
    one podcast are not consecutive, so that rows belong to no dialogue; ``extra.podcast`` tells the recording.
    """
    scale = Scale(1.0, 7.0)
    parts: dict[str, str] = {}
    found: list[Row | Rejected] = []
    for root in options.folders("msp_podcast"):
        found.extend(_rows(root, scale, parts))
    result = select(found, options)
    scale.report(result)
    note_text(result, "clips have no known speaker", [row.id for row in result.rows if not row.speaker])
    if result.rows:
        result.folds = official_fold(result.rows, parts, options.allow_leaks)
    return result


def _rows(root: Path, scale: Scale, parts: dict[str, str]) -> Iterator[Row | Rejected]:
    path = next((p for p in (root / "Labels" / TABLE, root / TABLE) if p.is_file()), None)
    if path is None:
        raise CorpusError(f"{root} holds no Labels/{TABLE} of MSP-Podcast")
    rejected: list[Rejected] = []
    table = read_table(path, COLUMNS, ("file", "arousal", "valence", "part"), rejected)
    yield from rejected
    for line in table:
        part = line.cells["part"].replace(" ", "").replace("_", "").lower()
        if part not in PARTS and not part.removeprefix("test").isdigit():
            yield broken(path, line.number, f"no part {line.cells['part']!r}: Train, Development, Test1, Test2 …")
            continue
        row = _row(root, line, scale)
        parts[row.id] = PARTS.get(part, part)
        yield row


def _row(root: Path, line: Line, scale: Scale) -> Row:
    cells = line.cells
    identifier = cells["file"].removesuffix(".wav")
    extra: dict[str, Any] = {"scripted": False}
    extra.update({name: cells[name] for name in ("emotion", "gender") if cells.get(name)})
    podcast = identifier.rsplit("_", 1)[0]
    if podcast != identifier:
        extra["podcast"] = podcast
    speaker = cells.get("speaker", "")
    transcript = root / "Transcripts" / f"{identifier}.txt"
    return Row(
        identifier,
        str(root / "Audios" / f"{identifier}.wav"),
        text=transcript.read_text("utf-8-sig", errors="replace") if transcript.is_file() else "",
        speaker="" if speaker.lower() in UNKNOWN else speaker,
        language="en",
        labels=scale.labels(identifier, {name: cells.get(name) for name in DIMENSIONS}),
        extra=extra,
    )
