"""LibriSpeech (Panayotov et al. 2015, CC-BY-4.0): ``subset/speaker/chapter/speaker-chapter.trans.txt`` and flac."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lalia.corpora._common import CorpusError, Options, PrepareResult, Rejected, broken, lines, select
from lalia.data import Row

SUBSETS = {"train": "train", "dev": "valid", "test": "test"}  # first part of a subset's name → split


def prepare_librispeech(options: Options) -> PrepareResult:
    """One or more subset folders, or their parent. With several kinds (train, dev, test) the official split counts.

    The transcripts are in capitals, which would read as abbreviations; they are put into lower case.
    """
    found: list[Row | Rejected] = []
    official: dict[str, str] = {}
    for root in options.folders("librispeech"):
        transcripts = sorted(root.rglob("*.trans.txt"))
        if not transcripts:
            raise CorpusError(f"{root} holds no *.trans.txt: not a LibriSpeech folder")
        for transcript in transcripts:
            items = list(_rows(transcript, options))
            split = SUBSETS.get(transcript.parents[2].name.split("-")[0])
            official.update({item.id: split for item in items if split})
            found.extend(items)
    result = select(found, options)
    if len(set(official.values())) > 1:
        result.official = official
    return result


def _rows(transcript: Path, options: Options) -> Iterator[Row | Rejected]:
    speaker = transcript.parents[1].name
    for number, line in lines(transcript):
        identifier, _, text = (line or "").partition(" ")
        if line is None or not text.strip():
            problem = "not UTF-8" if line is None else f"expected `id TEXT`, got {line[:80]}"
            yield broken(transcript, number, problem)
            continue
        audio = transcript.parent / f"{identifier}.flac"
        yield Row(identifier, str(audio), text=text.lower(), speaker=speaker, language=options.language or "en")
