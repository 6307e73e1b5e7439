"""Features of recordings that are computed once and kept: functionals, pooled frozen encoders, voices.

They lie in ``features/`` beside the first training manifest unless ``data.features`` says otherwise, one folder a kind, so that
another run on the same data finds them. A changed recording, extractor or encoder makes them stale, and they are computed anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lalia import egemaps
from lalia.data import Corpus, ManifestError, Row
from lalia.features import FeatureStore, egemaps_of, egemaps_store, extract
from lalia.loader import effective_workers
from lalia.pretrained import describe
from lalia.sections import ExternalModel
from lalia.systems.emotion.config import Config

log = logging.getLogger(__name__)

OFF = "none"
RECENT_BYTES = 64 * 2**20


class Stores:
    """The feature folders of a run; every ``get`` is None and every ``put`` nothing where they are off. A folder that cannot be
    written is still read."""

    def __init__(self, config: Config, tables: Mapping[str, Any]) -> None:
        folder = feature_folder(config)
        self.stores: dict[str, FeatureStore] = {}
        self.unwritable: set[str] = set()
        self.recent = Recent(("egemaps", "voice") if config.model.speech.tuned else ("egemaps", "voice", "speech"))
        if folder is None:
            return
        self.stores["egemaps"] = egemaps_store(folder / "egemaps")
        if tables.get("speech") and not config.model.speech.tuned:
            self.stores["speech"] = _store(folder, "speech", [tables["speech"], *_weights(config, config.model.speech.source)])
        if config.model.speaker.source:
            self.stores["voice"] = _store(folder, "voice", _weights(config, config.model.speaker))

    def get(self, kind: str, row: Row) -> Tensor | None:
        """What is known of a recording; None when it has to be heard."""
        recent, store = self.recent.get(kind, row), self.stores.get(kind)
        if recent is not None or store is None or not row.audio:
            return recent
        return store.get(row)

    def put(self, kind: str, row: Row, value: Tensor, keep: bool) -> None:
        """``keep``: in the folder, for other runs; else in memory, for who asks about the same recording again."""
        if not keep:
            self.recent.put(kind, row, value)
            return
        store = self.stores.get(kind)
        if store is None or not row.audio or kind in self.unwritable:
            return
        try:
            store.put(row, value)
        except OSError as error:
            log.warning("%s features are not kept: %s", kind, error)
            self.unwritable.add(kind)


class Recent:
    """Features of the recordings that were heard last, in memory: an evaluation asks about each one several times."""

    def __init__(self, kinds: Sequence[str], limit: int = RECENT_BYTES) -> None:
        self.kinds, self.limit, self.size = kinds, limit, 0
        self.values: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()

    def get(self, kind: str, row: Row) -> Tensor | None:
        return self.values.get(_origin(kind, row)) if self.values else None

    def put(self, kind: str, row: Row, value: Tensor) -> None:
        origin = _origin(kind, row)
        if kind not in self.kinds or origin in self.values:
            return
        self.values[origin] = value.detach().cpu().clone()
        self.size += value.nbytes
        while self.size > self.limit:
            self.size -= self.values.popitem(last=False)[1].nbytes


def _origin(kind: str, row: Row) -> tuple[Any, ...]:
    """What a feature was computed from; a file that is not there has no state, and will be told as missing when it is read."""
    state = os.stat(row.audio) if os.path.isfile(row.audio) else None
    return kind, row.audio, row.start, row.duration, *((state.st_size, state.st_mtime_ns) if state else ())


def _weights(config: Config, source: ExternalModel) -> list[str]:
    """Names of the weights that an encoder starts from: those of its source, and of ``train.init_from``, which come after them."""
    return [describe(source), *([config.train.init_from] if config.train.init_from else [])]


def _store(folder: Path, kind: str, origin: Any) -> FeatureStore:
    """A folder for each encoder, so that two runs with unlike encoders do not overwrite each other's."""
    version = hashlib.blake2b(json.dumps(origin, sort_keys=True).encode(), digest_size=6).hexdigest()
    return FeatureStore(folder / f"{kind}-{version}", kind, version)


def feature_folder(config: Config) -> Path | None:
    """Where features are kept; None when they are not."""
    if config.data.features == OFF or not (config.data.features or config.data.train):
        return None
    return Path(config.data.features) if config.data.features else Path(config.data.train[0]).parent / "features"


def prosody_statistics(rows: Corpus, config: Config) -> dict[str, Any]:
    """Mean and deviation of each functional over the training rows, and nothing else: {"mean", "std", "turns", "version"}.

    Computes what the feature folder lacks, in several processes. Rows that fail are warned of here and rejected with their reason
    later. ManifestError when fewer than two can be used.
    """
    folder = feature_folder(config)
    usable = [row for row in rows if row.audio]
    store = egemaps_store(folder / "egemaps") if folder is not None else None
    if store is not None and _can_write(store.folder):
        workers = effective_workers(config.data.workers) if len(usable) > 64 else 0
        failures = extract(usable, store, egemaps_of, workers, progress=len(usable) > 64)
        for row_id, reason in failures.failed:
            log.warning("no functionals of row %s: %s", row_id, reason)
        found = [value.numpy() for row in usable if (value := store.get(row)) is not None]
    else:
        found = _computed(usable, store)
    if len(found) < 2:
        counts = f"{len(found)} of {len(usable)} training recordings"
        raise ManifestError(f"functionals could be computed of {counts}: too few to normalise")
    values = np.stack(found).astype(np.float64)
    return {
        "mean": values.mean(0).tolist(),
        "std": values.std(0).tolist(),
        "turns": len(found),
        "version": egemaps.VERSION,
    }


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as error:
        log.warning("egemaps features are not kept: %s", error)
        return False


def _computed(rows: Sequence[Row], store: FeatureStore | None) -> list[np.ndarray]:
    found = []
    for row in rows:
        kept = store.get(row) if store is not None else None
        try:
            value = kept if kept is not None else egemaps_of(row)
        except (ValueError, OSError) as error:
            log.warning("no functionals of row %s: %s", row.id, error)
            continue
        if bool(torch.isfinite(value).all()):
            found.append(value.numpy())
    return found
