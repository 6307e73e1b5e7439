"""Features of recordings that are computed once and kept: functionals, pooled frozen encoders, voices.

They lie in ``features/`` beside the first training manifest unless ``data.features`` says otherwise, one folder a kind, so that
another run on the same data finds them. A changed recording, extractor or encoder makes them stale, and they are computed anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
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
from lalia.systems.emotion.config import Config

log = logging.getLogger(__name__)

OFF = "none"


class Stores:
    """The feature folders of a run; every ``get`` is None and every ``put`` nothing where they are off or cannot be written."""

    def __init__(self, config: Config, tables: Mapping[str, Any]) -> None:
        folder = feature_folder(config)
        self.stores: dict[str, FeatureStore] = {}
        if folder is None:
            return
        self.stores["egemaps"] = egemaps_store(folder / "egemaps")
        if tables.get("speech") and not config.model.speech.tuned:
            self.stores["speech"] = _store(folder, "speech", [tables["speech"], describe(config.model.speech.source)])
        if config.model.speaker.source:
            self.stores["voice"] = _store(folder, "voice", [describe(config.model.speaker)])

    def get(self, kind: str, row: Row) -> Tensor | None:
        store = self.stores.get(kind)
        return store.get(row) if store is not None and row.audio else None

    def put(self, kind: str, row: Row, value: Tensor) -> None:
        store = self.stores.get(kind)
        if store is None or not row.audio:
            return
        try:
            store.put(row, value)
        except OSError as error:
            log.warning("%s features are not kept: %s", kind, error)
            del self.stores[kind]


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
    if folder is not None:
        store = egemaps_store(folder / "egemaps")
        workers = effective_workers(config.data.workers) if len(usable) > 64 else 0
        failures = extract(usable, store, egemaps_of, workers, progress=len(usable) > 64)
        for row_id, reason in failures.failed:
            log.warning("no functionals of row %s: %s", row_id, reason)
        found = [value.numpy() for row in usable if (value := store.get(row)) is not None]
    else:
        found = _computed(usable)
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


def _computed(rows: Sequence[Row]) -> list[np.ndarray]:
    found = []
    for row in rows:
        try:
            value = egemaps_of(row)
        except (ValueError, OSError) as error:
            log.warning("no functionals of row %s: %s", row.id, error)
            continue
        if bool(torch.isfinite(value).all()):
            found.append(value.numpy())
    return found
