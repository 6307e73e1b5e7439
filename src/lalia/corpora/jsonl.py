"""Any JSONL manifest: Lalia's own, the seeds' ``{"audio_path", "text"}`` lines, NeMo's ``audio_filepath``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lalia.corpora._common import Options, PrepareResult, Rejected, broken, lines, select
from lalia.data import Row

NAMES = {  # field of a row → keys that mean it
    "id": ("id", "utt_id", "key"),
    "audio": ("audio", "audio_path", "audio_filepath", "wav", "path", "file"),
    "text": ("text", "transcript", "transcription", "sentence"),
    "speaker": ("speaker", "spk", "speaker_id"),
    "language": ("language", "lang"),
    "start": ("start", "offset"),
    "duration": ("duration",),
    "labels": ("labels",),
    "dialogue": ("dialogue",),
    "turn": ("turn",),
    "task": ("task",),
    "extra": ("extra",),
}
TYPES: dict[str, tuple[type, ...]] = {
    "start": (int, float), "duration": (int, float), "turn": (int,), "labels": (dict,), "extra": (dict,),
}  # fmt: skip


def prepare_jsonl(options: Options) -> PrepareResult:
    """Examine and split again the manifests in ``options.inputs``. Unknown keys are kept in ``extra``."""
    found: list[Row | Rejected] = []
    for manifest in options.files("jsonl"):
        found.extend(_rows(manifest, options))
    return select(found, options)


def _rows(manifest: Path, options: Options) -> Iterator[Row | Rejected]:
    for number, line in lines(manifest):
        if line is None:
            yield broken(manifest, number, "not UTF-8")
            continue
        try:
            record = json.loads(line)
            yield _row(record, manifest, options)
        except (ValueError, RecursionError) as error:
            yield broken(manifest, number, str(error))


def _row(record: Any, manifest: Path, options: Options) -> Row:
    """A row from one JSON object; ValueError with the reason when it is none."""
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    rest = dict(record)
    values: dict[str, Any] = {}
    for name, keys in NAMES.items():
        key = next((key for key in keys if key in rest), None)
        if key is not None:
            values[name] = _typed(key, rest.pop(key), TYPES.get(name, (str,)))
    if not values.get("audio"):
        raise ValueError(f"no audio: expected one of the keys {', '.join(NAMES['audio'])}")
    start = values.get("start", 0.0)
    values["id"] = values.get("id") or f"{Path(values['audio']).stem}{f'@{start:g}' if start else ''}"
    values["audio"] = str(manifest.parent / values["audio"])
    values["speaker"] = values.get("speaker") or options.speaker
    values["language"] = values.get("language") or options.language
    values["extra"] = {**rest, **values.get("extra", {})}
    return Row(**values)


def _typed(key: str, value: Any, types: tuple[type, ...]) -> Any:
    """``value`` of one of the types; whole numbers stand for text (speaker 7) and JSON's null for an empty value."""
    if value is None:
        return types[0]()
    if types == (str,) and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, types) or isinstance(value, bool):
        raise ValueError(f"{key!r} must be {types[0].__name__}, got {value!r}")
    return value
