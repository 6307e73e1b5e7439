"""Figures, pictures and sounds of a run at Weights & Biases, where ``train.wandb`` asks for it. Off, nothing here is used.

The key is wandb's own business (``wandb login``, ``WANDB_API_KEY``): it is not written here. ``WANDB_MODE=offline`` keeps
everything in the run folder; so does Lalia's own ``--offline``.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lalia.config import flatten
from lalia.pretrained.sources import forbidden, redact
from lalia.runfolder import write_atomic
from lalia.sections import RunConfig, TrainConfig

if TYPE_CHECKING:
    from lalia.system import Media

log = logging.getLogger(__name__)

STORED = "wandb.json"
ONLINE = ("", "online", "shared")
STEP = "step"


class WandbError(ValueError):
    """Weights & Biases was asked for and cannot be had: says why and what would do."""


def require(config: TrainConfig) -> None:
    """WandbError when ``train.wandb`` asks for a package that is not installed. Before a run does anything else."""
    spec = importlib.util.find_spec("wandb") if config.wandb else None
    if config.wandb and (spec is None or spec.origin is None):  # a folder wandb/ of earlier runs is found too, and is no package
        raise WandbError("train.wandb=true needs the package wandb: pip install 'lalia[wandb]' (or train.wandb=false)")


def begin(config: RunConfig, run: Path) -> WandbRun | None:
    """The run at Weights & Biases that belongs to the folder ``run``, new or gone on with; None where nobody asked for one."""
    return WandbRun(config, run) if config.train.wandb else None


def identity(run: Path, project: str) -> str:
    """The id of this folder's run in ``project``, the same at every start; kept in ``wandb.json``."""
    path = run / STORED
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if stored.get("project") != project:
        stored = {"project": project, "id": secrets.token_hex(5)}
        write_atomic(path, json.dumps(stored))
    return stored["id"]


class WandbRun:
    """One run of rank 0. Steps are a figure of their own (``step``): after a kill some are told twice, which wandb's own counter
    would refuse. WandbError when wandb does not begin."""

    def __init__(self, config: RunConfig, run: Path) -> None:
        self.wandb: Any = importlib.import_module("wandb")
        project = config.train.wandb_project or f"lalia-{config.system}"
        # with a network or without: WANDB_MODE says, unless Lalia may not use the network at all
        mode = {"mode": "offline"} if forbidden() and os.environ.get("WANDB_MODE", "") in ONLINE else {}
        try:
            self.run = self.wandb.init(
                project=project,
                id=identity(run, project),
                name=run.resolve().name,
                resume="allow",
                dir=str(run),
                config={key: _public(value) for key, value in flatten(config).items()},
                save_code=False,
                settings=self.wandb.Settings(console="off"),
                **mode,
            )
        except self.wandb.Error as error:
            advice = "`wandb login`, WANDB_MODE=offline to keep it in the run folder, or train.wandb=false"
            raise WandbError(f"train.wandb: {redact(str(error))}; {advice}") from None
        self.run.define_metric("*", step_metric=STEP)
        log.info("wandb: project %s, run %s", project, self.run.id)

    def scalars(self, step: int, values: Mapping[str, float], split: str, epoch: int) -> None:
        """Figures of a step; those of validation under ``eval/``."""
        self.run.log({**_named(values, split), "epoch": epoch, STEP: step})

    def media(self, step: int, media: Media, split: str) -> None:
        """Pictures, sounds and texts, see :class:`lalia.system.Media`."""
        told: dict[str, Any] = {name: self.wandb.Image(image) for name, image in media.images.items()}
        told |= {name: self.wandb.Audio(wave, sample_rate=rate) for name, (wave, rate) in media.audio.items()}
        told |= {name: self.wandb.Table(columns=["text"], data=[[text]]) for name, text in media.texts.items()}
        if told:
            self.run.log({**_named(told, split), STEP: step})

    def finish(self, failed: bool = False) -> None:
        """Send what is left and end; ``failed`` marks the run as crashed."""
        self.run.finish(exit_code=int(failed))


def _named(values: Mapping[str, Any], split: str) -> dict[str, Any]:
    return {name if split == "train" else f"{split}/{name}": value for name, value in values.items()}


def _public(value: Any) -> Any:
    """A setting without tokens or passwords in it."""
    if isinstance(value, list):
        return [_public(item) for item in value]
    return redact(value) if isinstance(value, str) else value
