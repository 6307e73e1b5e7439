"""``doctor config``: files and models that a configuration names, parameters of each network, memory of a step."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lalia import pretrained
from lalia.data import Corpus, ManifestError
from lalia.doctor.dataset import build
from lalia.doctor.report import Report
from lalia.loader import Loader, usable
from lalia.sections import DataConfig, ExternalModel, RunConfig
from lalia.system import Clock, System

SAMPLE = 2  # clips on which activations are measured


@dataclass
class Named:
    """A file or model that the configuration names."""

    key: str
    source: str
    found: bool
    note: str = ""


@dataclass
class ConfigReport(Report):
    """``memory_mb``: weights, gradients, optimizer, activations and their sum for the largest batch, float32."""

    system: str = ""
    device: str = ""
    named: list[Named] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)
    trainable: int = 0
    memory_mb: dict[str, float] = field(default_factory=dict)
    activations_from: str = ""


def doctor_config(config: RunConfig) -> ConfigReport:
    """Check what a run of this configuration would need. Nothing is downloaded."""
    settings: DataConfig = config["data"]
    report = ConfigReport(system=config.system, device=_device(config.train.device))
    report.named = [*_files(config, settings), *_models(config, "")]
    report.problems += [f"{n.key}: {n.note or 'not found'}: {n.source}" for n in report.named if not n.found]
    if not settings.train:
        report.problems.append("data.train is empty: name at least one manifest")
    if report.problems:
        report.warnings.append("parameters and memory are not counted until the problems are solved")
        return report
    try:
        corpus = Corpus.read(settings.train, settings.max_bad_fraction)
        system = build(config, corpus)
        kept, _ = usable(system, corpus, settings)
    except ManifestError as error:
        report.problems.append(str(error))
        return report
    _memory(report, system, kept, settings)
    return report


def _device(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _files(config: RunConfig, settings: DataConfig) -> Iterator[Named]:
    for key in ("train", "valid"):
        for path in settings[key]:
            yield Named(f"data.{key}", path, os.path.isfile(path))
    if config.train.init_from:
        yield Named("train.init_from", config.train.init_from, Path(config.train.init_from).exists())


def _models(section: Any, prefix: str) -> Iterator[Named]:
    """Every :class:`ExternalModel` in the tree but those that a section lists as ``unused``.

    A model of a hub counts as found when it is in the cache.
    """
    unused = getattr(section, "unused", ())
    for item in dataclasses.fields(section):
        if item.name in unused:
            continue
        value, key = getattr(section, item.name), f"{prefix}{item.name}"
        if isinstance(value, ExternalModel):
            if value.source:
                yield _model(key, value)
        elif dataclasses.is_dataclass(value):
            yield from _models(value, f"{key}.")


def _model(key: str, model: ExternalModel) -> Named:
    try:
        pretrained.resolve(model.source, key.rsplit(".", 1)[-1], offline=True, revision=model.revision)
    except pretrained.PretrainedError as error:
        return Named(key, model.source, False, str(error))
    return Named(key, pretrained.describe(model), True)


def _memory(report: ConfigReport, system: System, kept: Corpus, settings: DataConfig) -> None:
    report.parameters = {name: _count(net) for name, net in system.named_children()}
    report.trainable = sum(p.numel() for p in system.parameters() if p.requires_grad)
    loader = Loader(system, kept, dataclasses.replace(settings, workers=0), seed=0)
    plan = loader.plan(0)
    units = max(plan, key=lambda batch: loader.lengths[batch].max() * len(batch))
    largest = [row for unit in units for row in loader.units[unit]]
    longest = sorted(units, key=lambda unit: -loader.lengths[unit])[:SAMPLE]
    rows = [row for unit in longest for row in loader.units[unit]]
    sample = activation_bytes(system, system.collate([system.prepare(kept[i], Clock()) for i in rows]))
    megabytes = {
        "weights": 4 * sum(p.numel() for p in system.parameters()) / 1e6,
        "gradients": 4 * report.trainable / 1e6,
        "optimizer": 8 * report.trainable / 1e6,
        "activations": sample / len(rows) * len(largest) / 1e6,
    }
    report.memory_mb = {name: round(value, 1) for name, value in megabytes.items()}
    report.memory_mb["in all"] = round(sum(megabytes.values()), 1)
    report.activations_from = f"{len(rows)} clips, scaled to the largest batch of {len(largest)}"


def _count(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def activation_bytes(system: System, batch: Any) -> int:
    """Bytes that autograd keeps for the backward passes of all turns of one batch, parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in system.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = max(storage.nbytes(), kept.get(storage.data_ptr(), 0))
        return tensor

    system.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graphs = [losses for _, losses in system.turns(batch, Clock())]
    del graphs  # held until here: freed storages would be counted again at the same address
    return sum(kept.values())
