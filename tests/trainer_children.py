"""Small ``vits2`` runs for the trainer's tests, and the processes that are killed while they train."""

from __future__ import annotations

import hashlib
import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from factories import tiny_vits2_config
from torch import Tensor

from lalia import checkpoint
from lalia import train as trainer
from lalia.logs import Logs
from lalia.sections import RunConfig
from lalia.system import Media
from lalia.systems.vits2.system import Vits2

#: 62.5 frames a second of 8 kHz audio, two clips a batch: four steps an epoch, about 30 ms each
MINI = {
    "audio.sample_rate": 8000,
    "audio.n_fft": 256,
    "audio.hop": 128,
    "audio.win": 256,
    "data.batch_size": 2,
    "data.segment_frames": 8,
    "model.window": 2,
    "model.istft.channels": 16,
    "train.eval_every": 0,
    "train.save_every": 0,
    "train.log_every": 100,
}
FOUR = {"discriminator.wavlm": True, "discriminator.wavlm_channels": 4}

torch.set_num_threads(1)  # threads that wait for each other cost more than networks of this size

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["trainer_warm"])


def mini_config(folder: Path, **overrides: Any) -> RunConfig:
    """``overrides`` as in :func:`factories.tiny_vits2_config`. Nothing is validated unless ``train.eval_every`` is given."""
    quiet = {} if "train.eval_every" in overrides else {"data.valid": "[]"}
    return tiny_vits2_config(folder, **{**MINI, **quiet, **overrides})


def no_pictures() -> None:
    """Drawing takes longer than everything else together; what is drawn has tests of its own."""
    Vits2.media = lambda self, batch, clock: Media()  # type: ignore[method-assign]
    Logs.curves = lambda self: []  # type: ignore[method-assign]


def sets(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in run.glob("step-*"))


def fingerprint(run: Path, name: str = "latest") -> dict[str, str]:
    """sha256 of every tensor of a set, weights and optimizer state, and the counters that are not times."""
    found = checkpoint.open_set((run / name).resolve())
    state = found.state()
    hashes = {key: digest(value) for key, value in found.model().items()}
    hashes |= {f"raw/{key}": digest(value) for key, value in state.get("raw", {}).items()}
    for optimizer, parameters in state["optimizers"].items():
        hashes |= {f"{optimizer}/{p}/{key}": digest(value) for p, entry in parameters.items() for key, value in entry.items()}
    return hashes | {k: repr(v) for k, v in state["counters"].items() if k != "seconds"}


def digest(value: Tensor) -> str:
    flat = value.detach().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()


# --- children -------------------------------------------------------------------------------------------------------
def stall(module: str, name: str, marker: str, after: int) -> None:
    """Let ``module.name`` say in the file ``marker`` that it is about to begin for the ``after``-th time, and wait to be killed."""
    owner = importlib.import_module(module)
    real, calls = getattr(owner, name), [0]

    def stalled(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == after:
            Path(marker).touch()
            time.sleep(60)
        return real(*arguments, **options)

    setattr(owner, name, stalled)


def train_in_child(config: RunConfig, run: str, patch: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    """The program of a child: train, with what it says going to ``<run>.log``."""
    file = os.open(f"{run}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    no_pictures()
    if patch is not None:
        patch(*arguments)
    try:
        trainer.train(config, run)
    except (RuntimeError, ValueError) as error:
        print(type(error).__name__, error)
        sys.exit(3)


def server_path() -> AbstractContextManager[Any]:
    """To be entered where a child is started: the server, which starts with the first one, must find what it preloads."""
    return mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))


@contextmanager
def child(config: RunConfig, run: Path, patch: Callable[..., None] | None = None, *arguments: Any) -> Iterator[BaseProcess]:
    """A process that trains; whatever happens, it is gone at the end of the block."""
    process = FORK.Process(target=train_in_child, args=(config, str(run), patch, arguments))
    with server_path():
        process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def wait_for(condition: Callable[[], bool], process: BaseProcess, seconds: float = 150.0) -> bool:
    """True when ``condition`` came true, False when the process ended first."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if not process.is_alive():
            return condition()
        time.sleep(0.005)
    raise TimeoutError(f"nothing happened for {seconds} s")


def run_to_end(config: RunConfig, run: Path) -> int:
    with child(config, run) as process:
        process.join(120)
        return process.exitcode if process.exitcode is not None else -1
