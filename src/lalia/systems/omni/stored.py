"""What the frozen encoder said of recordings once and for all: the shards of ``lalia features whisper`` that a run reads."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lalia.cache import ShardStore, whisper_store, whisper_widths

log = logging.getLogger(__name__)

OFF = "none"


def feature_store(data: Any, listener: Mapping[str, Any] | None) -> ShardStore | None:
    """The shards that ``lalia features whisper`` filled for this encoder; None when there are none or they are switched off.

    ``data``: a configuration with ``features`` and ``train``. ``listener``: the encoder's description, None for another kind.
    """
    if data.features == OFF or not (data.features or data.train) or listener is None:
        return None
    folder = Path(data.features) if data.features else Path(data.train[0]).parent / "features"
    store = whisper_store(folder, listener)
    if len(store):
        log.info("%d recordings are heard already: %s", len(store), store.folder)
        return store
    log.info("no features in %s: the encoder runs at every step; `lalia features whisper` would run it once", store.folder)
    return None


def refuse_other_features(folder: str, listener: Mapping[str, Any] | None) -> None:
    """ValueError where ``data.features`` names a folder in which another encoder, or this one with other settings, was heard and
    this one was not: training would go on, but hear every recording anew at every step."""
    if folder in ("", OFF) or listener is None or len(whisper_store(folder, listener)):
        return
    others = whisper_widths(folder)
    if others:
        layers = f"layers={listener['layers']} {listener['numbers']}, trim={str(listener['trim']).lower()}"
        raise ValueError(
            f"data.features: {folder} holds what another encoder, or this one with other settings, heard ({', '.join(others)});"
            f" this run listens with {listener['source']}, {listener['config']['d_model']} wide, {layers}. Set"
            " listen.whisper.source, listen.layers and listen.trim as they were then, or hear again (`lalia features whisper"
            f" MANIFEST --whisper … -o {folder}`), or leave stored features alone with data.features={OFF}"
        )
