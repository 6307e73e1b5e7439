"""What surrounds the training loop: building a run, its first weights, validation, and the guards that stop it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lalia import checkpoint, dist, optim
from lalia import config as configuration
from lalia.allocator import keep_freed_memory
from lalia.checkpoint import RunFolder
from lalia.config import ConfigError
from lalia.data import Corpus
from lalia.loader import Loader, usable, write_dataset_report
from lalia.logs import Logs
from lalia.runfolder import pointed, write_atomic
from lalia.sections import OnNonfinite, Precision, RunConfig, TrainConfig
from lalia.system import Clock, System, system_class

log = logging.getLogger("lalia.train")

#: changing one of these in a run that has begun would make its weights meaningless
FIXED_SECTIONS = ("system", "audio.", "model.", "discriminator.", "labels.", "data.add_blank", "data.languages")
SDP_BACKENDS = {
    "flash": torch.backends.cuda.enable_flash_sdp,
    "efficient": torch.backends.cuda.enable_mem_efficient_sdp,
    "math": torch.backends.cuda.enable_math_sdp,
    "cudnn": torch.backends.cuda.enable_cudnn_sdp,
}


class NonFiniteLoss(RuntimeError):
    """A loss or a gradient norm was NaN or infinite and the run stopped; the message names the dump and the way on."""


@dataclass
class Setup:
    """All that the loop works on."""

    world: dist.World
    system: System
    optimizers: dict[str, Optimizer]
    train_loader: Loader
    valid_loader: Loader | None
    ema: optim.Ema | None


def seed_step(clock: Clock, rank: int) -> None:
    """Set every random state from (seed, step, rank), so that a step is the same whenever it is done."""
    digest = hashlib.blake2b(f"{clock.seed}|{clock.step}|{rank}".encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "little") >> 1
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def audio_seconds(system: System, batch: Any) -> float:
    """Seconds of speech in a batch that says so, or has a spectrogram's ``frame_lengths``; 0 for other batches."""
    if hasattr(batch, "audio_seconds"):
        return float(batch.audio_seconds)
    audio = getattr(system.config, "audio", None)
    if audio is None or not hasattr(batch, "frame_lengths"):
        return 0.0
    return float(batch.frame_lengths.sum()) * audio.hop / audio.sample_rate


# --- building -------------------------------------------------------------------------------------------------------
def prepare_run(config: RunConfig, run: RunFolder, world: dist.World, source: str | Path | None) -> Setup:
    """Data, tables, networks and optimizers of a run; config.yaml, tables.json and dataset_report.json are written by rank 0."""
    torch_settings(config.train)
    check_unchanged(config, run.path)
    cls = system_class(config.system)
    data = config["data"]
    rows = read_rows(data.train, "data.train", data.max_bad_fraction)
    tables = shared_tables(run, lambda: cls.make_tables(config, rows), world, config.dist.eval_timeout_seconds)
    torch.manual_seed(config.train.seed)
    with dist.rank_zero_first("networks"):  # external models are fetched once, not by every rank at the same time
        system = cls(config, tables).to(world.device)
    system.autocast_dtype = autocast_dtype(config.train.precision, world.device)
    optim.freeze(system, config.train.freeze)
    kept, rejected = usable(system, rows, data)
    if world.is_main:
        run.write_config(configuration.to_yaml(config), source)
        run.record_git()
        write_dataset_report(run.path / "dataset_report.json", kept, rejected)
    seed, pin = config.train.seed, world.device.type == "cuda"
    bad_log = BadRows(run.path, world.rank)
    loader = Loader(system, kept, data, seed, world.rank, world.size, pin, on_bad=bad_log)
    valid = None
    if data.valid and world.is_main:
        held, _ = usable(system, read_rows(data.valid, "data.valid", data.max_bad_fraction), data)
        valid = Loader(system, held, data, seed, pin=pin, training=False, on_bad=bad_log)
    ema = optim.Ema(system, config.train.ema) if config.train.ema else None
    return Setup(world, system, optim.build(system, config), loader, valid, ema)


def read_rows(paths: list[str], key: str, max_bad_fraction: float) -> Corpus:
    """The manifests of ``key``; ConfigError when the list is empty."""
    if not paths:
        raise ConfigError(f"{key} is empty: name at least one manifest, e.g. {key}=[data/train.jsonl] (see `lalia prepare`)")
    return Corpus.read(paths, max_bad_fraction)


def shared_tables(run: RunFolder, make: Any, world: dist.World, timeout: float) -> dict[str, Any]:
    """Tables of this run: those its checkpoints go with, else made by rank 0 now. The training data may grow, ids never move.

    The other ranks wait ``timeout`` seconds at most: some tables need every recording to be heard.
    """
    if world.is_main and not ((run.path / "tables.json").is_file() and has_sets(run.path)):
        run.write_tables(make())
    dist.wait_for_main("tables", timeout)
    return run.read_tables()


def has_sets(run: Path) -> bool:
    """Whether training has begun in this folder, be its checkpoints whole or damaged."""
    return any(run.glob("step-*"))


def check_unchanged(config: RunConfig, run: Path) -> None:
    """ConfigError when a run that has checkpoints is continued with another network or another sound."""
    stored = run / "config.yaml"
    if not stored.is_file() or not has_sets(run):
        return
    changed = configuration.difference(configuration.load_run_config(stored), config)
    fatal = [key for key in changed if key.startswith(FIXED_SECTIONS)]
    if fatal:
        lines = "; ".join(f"{key}: {changed[key][0]} → {changed[key][1]}" for key in fatal[:5])
        raise ConfigError(
            f"{run} was trained with another model ({lines}). Use another run folder; train.init_from={run} starts from its weights"
        )


def torch_settings(config: TrainConfig) -> None:
    """Threads, TF32, matmul precision and attention backends, as configured and really in force; and the memory allocator."""
    keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.set_float32_matmul_precision(config.matmul_precision)
    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    torch.backends.cudnn.allow_tf32 = config.tf32
    if config.sdp_backends:
        unknown = [name for name in config.sdp_backends if name not in SDP_BACKENDS]
        if unknown:
            raise ConfigError(f"train.sdp_backends: unknown {', '.join(unknown)}; known: {', '.join(SDP_BACKENDS)}")
        for name, enable in SDP_BACKENDS.items():
            enable(name in config.sdp_backends)


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """bf16, or None for float32; ``auto`` is bf16 only on CUDA devices that have it."""
    if precision is Precision.auto:
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else None
    return torch.bfloat16 if precision is Precision.bf16 else None


def initial_weights(config: RunConfig, system: System) -> None:
    """Weights of external models, then those of ``train.init_from``: networks that it lacks start fresh, and the log says which
    keys matched."""
    with dist.rank_zero_first("external"):
        system.load_external()
    if not config.train.init_from:
        return
    tensors = checkpoint.load_weights(config.train.init_from)
    given, wanted = ({key.split(".", 1)[0] for key in keys} for keys in (tensors, system.state_dict()))
    if not given & wanted:
        names = ", ".join(sorted(wanted))
        raise ConfigError(f"train.init_from={config.train.init_from} has none of {names}: these are weights of something else")
    try:
        report = checkpoint.partial_load(system, tensors, allow=[f"{name}.*" for name in given ^ wanted])
    except checkpoint.WeightsMismatch as error:
        advice = "Networks of one name must have the same sizes: take the sizes and external models of that run's config.yaml"
        raise checkpoint.WeightsMismatch(f"train.init_from={config.train.init_from}: {error}\n{advice}", error.report) from error
    if wanted - given:
        log.warning("%s has no %s: these start fresh", config.train.init_from, ", ".join(sorted(wanted - given)))
    log.info("weights from %s: %s", config.train.init_from, report.text())


# --- losses ---------------------------------------------------------------------------------------------------------
def turn_figures(turn: str, losses: dict[str, Tensor], weights: dict[str, float]) -> dict[str, Tensor]:
    """``loss/<turn>/<name>`` of each loss and ``loss/<turn>/total`` = Σ weight · loss. A loss without a weight is a ValueError.

    A weight of 0 leaves the loss out altogether; a total without any loss has no graph.
    """
    unknown = [name for name in losses if name not in weights]
    if unknown:
        raise ValueError(f"losses without a weight in the configuration: {', '.join(unknown)}")
    figures = {f"loss/{turn}/{name.removeprefix('loss_')}": value for name, value in losses.items()}
    parts = [weights[name] * value.float() for name, value in losses.items() if weights[name] != 0]
    return {**figures, f"loss/{turn}/total": torch.stack(parts).sum() if parts else torch.zeros(())}


def backward(total: Tensor) -> torch.OutOfMemoryError | None:
    """Back-propagate ``total``; the error when memory runs out, without its traceback, whose frames would keep the graph alive."""
    try:
        total.backward()
    except torch.OutOfMemoryError as error:
        return error.with_traceback(None)
    return None


# --- validation -----------------------------------------------------------------------------------------------------
@torch.no_grad()
def validate(
    system: System, loader: Loader, config: RunConfig, weights: dict[str, float], logs: Logs, step: int
) -> dict[str, float]:
    """Mean losses over the first validation batches by the same turns as in training, without stepping; pictures of the first.

    A system with a :class:`~lalia.system.Meter` adds figures over all these batches together.
    """
    system.eval()
    system.meter = meter = system.new_meter()
    device = next(system.parameters()).device
    sums: dict[str, list[float]] = {}
    clock = Clock(config.train.seed, step, 0, config.train.steps, training=False)
    limit = config.train.valid_batches
    for index, batch in enumerate(loader.batches(0)):
        if limit and index >= limit:
            break
        batch = batch.to(device)
        for turn, losses in system.turns(batch, clock):
            for name, value in turn_figures(turn, losses, weights).items():
                sums.setdefault(name, []).append(float(value))
        if index == 0:
            logs.media(step, system.media(batch, clock))
    loader.close()
    system.meter = None
    system.train()
    means = {name: math.fsum(values) / len(values) for name, values in sums.items()}
    return means | (meter.figures() if meter is not None else {})


def epoch_lines(system: System, loss: float, metrics: dict[str, float]) -> list[str]:
    """``Train Loss: …``, and ``Val …`` with the headline figures where they were measured; nothing for a system without headline
    figures, whose turns may be of several networks that work against each other."""
    if not system.headline:
        return []
    shown = [f"{label}: {metrics[name]:.3f}" for label, name in system.headline.items() if name in metrics]
    return [f"Train Loss: {loss:.4f}", *([f"Val {', '.join(shown)}"] if shown else [])]


# --- guards ---------------------------------------------------------------------------------------------------------
class BadRows:
    """Rows that failed while training: appended to ``bad_rows.rankN.jsonl`` as they are met."""

    def __init__(self, run: Path, rank: int) -> None:
        self.path = run / f"bad_rows.rank{rank}.jsonl"

    def __call__(self, row: str, reason: str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"id": row, "reason": reason}, ensure_ascii=False) + "\n")


class Interrupt:
    """Ctrl-C and SIGTERM ask the loop to save and end; a second Ctrl-C ends at once. Only in the main thread."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        log.warning("asked to stop: finishing this step, then saving (once more ends at once)")


class NonFinite:
    """Looks at each turn's loss and gradient norm before the step; dumps what was at hand when they are not finite."""

    def __init__(self, config: TrainConfig, run: Path, world: dist.World) -> None:
        self.config, self.run, self.world = config, run, world
        self.consecutive: dict[str, int] = {}

    def check(
        self, turn: str, total: Tensor, norm: Tensor, losses: dict[str, Tensor], ids: list[str], clock: Clock
    ) -> bool:
        """True when the optimizer may step. All ranks decide alike: the averaged loss and gradients carry a NaN to each."""
        value = total.detach() if self.world.size == 1 else dist.average(total.detach())
        if bool(torch.isfinite(value.to(norm.device)) & torch.isfinite(norm)):
            self.consecutive[turn] = 0
            return True
        self.consecutive[turn] = self.consecutive.get(turn, 0) + 1
        path = self._dump(turn, value, norm, losses, ids, clock)
        if self.config.on_nonfinite is OnNonfinite.stop or self.consecutive[turn] >= self.config.max_nonfinite:
            raise NonFiniteLoss(
                f"step {clock.step}, turn {turn!r}: loss {float(value)}, gradient norm {float(norm)}; the batch is in {path}. "
                "The last checkpoint is unharmed: start again with a lower optimizers.<name>.lr, optimizers.<name>.clip, "
                "or train.on_nonfinite=skip to pass over such batches"
            )
        log.warning("step %d: turn %r skipped, loss %s, norm %s (%s)", clock.step, turn, float(value), float(norm), path)
        return False

    def _dump(
        self, turn: str, value: Tensor, norm: Tensor, losses: dict[str, Tensor], ids: list[str], clock: Clock
    ) -> Path:
        path = self.run / "nonfinite" / f"step-{clock.step:08d}-{turn}.rank{self.world.rank}.json"
        path.parent.mkdir(exist_ok=True)
        facts = {
            "step": clock.step,
            "epoch": clock.epoch,
            "turn": turn,
            "total": str(float(value)),
            "gradient_norm": str(float(norm)),
            "losses": {name: str(float(loss)) for name, loss in losses.items()},
            "rows": ids,
            "last_checkpoint": pointed(self.run, "latest") or None,
        }
        write_atomic(path, json.dumps(facts, ensure_ascii=False, indent=1))
        return path
