"""Speaker encoders: ECAPA-TDNN from SpeechBrain's published folder, or small and random (``tiny``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lalia.nn.ecapa import Ecapa
from lalia.pretrained.models import TINY_SEED
from lalia.pretrained.sources import SINGLE_FILES, PretrainedError, resolve
from lalia.safeload import DamagedCheckpoint, UnsafePickle, WeightsMismatch, partial_load, read_tensors
from lalia.sections import ExternalModel

KIND = "speaker"
TINY_SHAPE: dict[str, Any] = {"channels": [16, 16, 16, 16, 48], "mels": 80, "attention": 8, "squeezed": 8, "scale": 4}


def describe_ecapa(config: ExternalModel, offline: bool = False) -> dict[str, Any]:
    """Keyword arguments of :class:`lalia.nn.ecapa.Ecapa` that build the network of ``config``, without its weights: JSON
    data for a run folder. PretrainedError when the model cannot be had."""
    folder = resolve(config.source, KIND, offline, config.revision)
    return dict(TINY_SHAPE) if folder is None else _shape(_read(folder), folder)


def load_ecapa(config: ExternalModel, offline: bool = False) -> Ecapa:
    """The network with its weights, frozen, in evaluation mode, float32: ``embed(wave [B, S] at 16 kHz, lengths [B]) ->
    [B, 192]``.

    The source is a folder or hub repository with SpeechBrain's ``embedding_model.ckpt``; its architecture is read from
    the shapes, every name and shape must fit, and only tensors are read from the file. PretrainedError otherwise.
    ``mean_var_norm_emb.ckpt`` is not used, as it is not by SpeechBrain's ``encode_batch`` unless asked.
    """
    folder = resolve(config.source, KIND, offline, config.revision)
    if folder is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(TINY_SEED)
            network = Ecapa(**TINY_SHAPE)
    else:
        weights = _read(folder)
        network = Ecapa(**_shape(weights, folder))
        try:
            partial_load(network, weights)
        except WeightsMismatch as error:
            raise PretrainedError(f"{folder / SINGLE_FILES[KIND]}: {error}") from error
    return network.requires_grad_(False)


def _read(folder: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(folder / SINGLE_FILES[KIND])
    except (UnsafePickle, DamagedCheckpoint, ValueError) as error:
        raise PretrainedError(str(error)) from error


def _shape(weights: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
    """The architecture that the shapes of the weights imply. Dilations leave no trace in them; they are the paper's."""
    count = 0
    try:
        first = weights["blocks.0.conv.conv.weight"]
        blocks: list[Tensor] = []
        while f"blocks.{count + 1}.tdnn2.conv.conv.weight" in weights:
            count += 1
            blocks.append(weights[f"blocks.{count}.tdnn2.conv.conv.weight"])
        inner = [weights[f"blocks.{i + 1}.res2net_block.blocks.0.conv.conv.weight"] for i in range(count)]
        last, attention = weights["mfa.conv.conv.weight"], weights["asp.conv.conv.weight"]
        squeezed, final = weights["blocks.1.se_block.conv1.conv.weight"], weights["fc.conv.weight"]
    except KeyError as error:
        raise PretrainedError(f"{folder / SINGLE_FILES[KIND]} is no ECAPA-TDNN of SpeechBrain's: it has no {error}") from error
    return {
        "channels": [len(first), *map(len, blocks), len(last)],
        "kernels": [first.shape[2], *(part.shape[2] for part in inner), last.shape[2]],
        "dilations": [1, *range(2, count + 2), 1],
        "mels": first.shape[1],
        "attention": attention.shape[1],
        "squeezed": len(squeezed),
        "scale": len(blocks[0]) // len(inner[0]),
        "width": len(final),
    }
