"""Checkpoint sets: everything a run needs to go on, or a model to be rebuilt, in one folder that is whole or not there.

``step-00012000/`` holds ``model.safetensors`` (weights), ``train.pt`` (optimizers, counters and random states;
tensors and plain data only) and ``manifest.json`` (size and sha256 of both, and of itself). A set is written under a
hidden name, synced to the disk and renamed, so a kill at any moment leaves the previous set in place. Damage is found
by the hashes, named, and the newest whole set is used; a run whose sets are all damaged is an error and never starts
again at step 0.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lalia import __version__
from lalia.runfolder import (
    CONFIG,
    REPLACED,
    TABLES,
    WEIGHTS,
    CheckpointError,
    HashingFile,
    RunFolder,
    RunLocked,
    git_commit,
    point,
    pointed,
    step_name,
    step_of,
    sync_folder,
    temporary,
    write_atomic,
    write_failed,
)
from lalia.safeload import (
    DamagedCheckpoint,
    LoadReport,
    UnsafePickle,
    WeightsMismatch,
    bytes_of,
    check_plain,
    pack_safetensors,
    partial_load,
    plain,
    read_pickle,
    read_safetensors,
    read_tensors,
)

if TYPE_CHECKING:
    from lalia.system import System

__all__ = [
    "CheckpointError", "CheckpointSet", "DamagedCheckpoint", "LoadReport", "RunFolder", "RunLocked", "UnsafePickle",
    "WeightsMismatch", "best_set", "latest_set", "load", "load_weights", "open_set", "partial_load", "prune",
    "save_set", "save_weights",
]  # fmt: skip

log = logging.getLogger(__name__)

FORMAT = 1
MODEL, STATE, MANIFEST = "model.safetensors", "train.pt", "manifest.json"
_RESERVED = ("format", "step", "best", "lalia", "git", "time", "files", "sha256")
#: sets that this process wrote or verified: path → (modification time, size) of its files, so that pruning hashes once
_verified: dict[Path, list[tuple[int, int]]] = {}


@dataclass(frozen=True)
class CheckpointSet:
    """One verified set. ``meta`` is its manifest: step, epoch, system, metrics, git, lalia, time, best, files."""

    path: Path
    step: int
    meta: dict[str, Any]

    def model(self) -> dict[str, Tensor]:
        """Weights by name, on the CPU."""
        return read_safetensors(self.path / MODEL)

    def state(self) -> dict[str, Any]:
        """Optimizers, counters and random states as they were given to :func:`save_set`, tensors on the CPU."""
        return read_pickle(self.path / STATE)


# --- writing --------------------------------------------------------------------------------------------------------
def save_set(
    run: str | os.PathLike[str],
    step: int,
    model: Mapping[str, Tensor],
    state: Mapping[str, Any],
    meta: Mapping[str, Any] | None = None,
    best: bool = False,
) -> Path:
    """Write one complete set and point ``latest`` (and ``best`` when told) at it. Returns its folder.

    ``model``: name → tensor, any device. ``state``: nested dicts, lists and tuples of tensors, numbers, strings and
    None; anything else is a TypeError that says where it is. ``meta``: JSON-able facts (epoch, system, metrics).
    Raises CheckpointError, with what was there before untouched, when the set cannot be written.
    """
    folder = Path(run)
    clash = [key for key in meta or {} if key in _RESERVED]
    if clash:
        raise ValueError(f"meta may not hold {', '.join(clash)}: the manifest writes these itself")
    check_plain(state, "state")
    facts = {"format": FORMAT, "step": int(step), "best": best, "lalia": __version__, "git": _code_commit()}
    facts.update(plain(meta or {}), time=time.time())
    final, draft = folder / step_name(step), temporary(folder / step_name(step))
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        files = {MODEL: _write_model(draft / MODEL, model), STATE: _write_state(draft / STATE, state)}
        _write_synced(draft / MANIFEST, _render(dict(facts, files=files)))
        sync_folder(draft)
        _publish(draft, final)
        if best:
            point(folder, "best", final.name)
        point(folder, "latest", final.name)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)  # before the free space is measured
        raise write_failed(folder, error, bytes_of(model) + bytes_of(state)) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    _verified[final.resolve()] = _stamp(final)
    return final


def save_weights(run: str | os.PathLike[str], step: int, model: Mapping[str, Tensor]) -> Path:
    """Leave the weights alone in ``weights/step-00001000.safetensors``; they are never pruned."""
    path = Path(run) / WEIGHTS / f"{step_name(step)}.safetensors"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, pack_safetensors(model))
    except OSError as error:
        raise write_failed(path.parent, error, bytes_of(model)) from error
    return path


@functools.lru_cache(maxsize=1)
def _code_commit() -> str:
    """The commit of the code that this process runs, asked for once."""
    return git_commit()


def _write_model(path: Path, model: Mapping[str, Tensor]) -> dict[str, Any]:
    return _write_synced(path, pack_safetensors(model))


def _write_state(path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    with HashingFile(path) as file:
        try:
            torch.save(dict(state), file)  # type: ignore[arg-type]  # it only needs write and flush
        except RuntimeError as error:
            if file.failure is not None:
                raise file.failure from error
            raise
        return file.finish()


def _write_synced(path: Path, data: bytes) -> dict[str, Any]:
    with HashingFile(path) as file:
        file.write(data)
        return file.finish()


def _publish(draft: Path, final: Path) -> None:
    """Rename the finished set into place. A set of the same step steps aside first and comes back if that fails."""
    aside = final.parent / (REPLACED + final.name)
    if final.exists():
        if aside.exists():
            shutil.rmtree(aside)
        os.rename(final, aside)
    try:
        os.rename(draft, final)
    except BaseException:
        if aside.exists():
            os.rename(aside, final)
        raise
    sync_folder(final.parent)
    if aside.exists():
        shutil.rmtree(aside)


def _render(manifest: dict[str, Any]) -> bytes:
    """The manifest's bytes, which end with the sha256 of what stands before."""
    body = json.dumps(manifest, indent=1)
    return json.dumps(dict(manifest, sha256=hashlib.sha256(body.encode()).hexdigest()), indent=1).encode() + b"\n"


# --- reading --------------------------------------------------------------------------------------------------------
def open_set(path: str | os.PathLike[str]) -> CheckpointSet:
    """Read the manifest and hash every file once. DamagedCheckpoint names the file and what is wrong with it."""
    folder = Path(path)
    manifest = _read_manifest(folder)
    for name in (MODEL, STATE):
        expected = manifest["files"][name]
        if not (folder / name).is_file():
            raise DamagedCheckpoint(f"{folder / name} is missing")
        size = (folder / name).stat().st_size
        if size != expected["size"]:
            raise DamagedCheckpoint(f"{folder / name} has {size:,} bytes instead of {expected['size']:,}")
        if _sha256(folder / name) != expected["sha256"]:
            raise DamagedCheckpoint(f"{folder / name} was altered: its sha256 is not the one in {MANIFEST}")
    _verified[folder.resolve()] = _stamp(folder)
    return CheckpointSet(folder, manifest["step"], manifest)


def latest_set(run: str | os.PathLike[str], repair: bool = False) -> CheckpointSet | None:
    """The newest complete set, None when there is no set at all. Damaged ones are named in the log.

    ``repair`` (only for the process that holds the lock) swings ``latest`` and ``best`` to where a save that was
    killed after its rename would have put them. DamagedCheckpoint when there are sets and none is whole.
    """
    reasons: list[str] = []
    for step, folder in _candidates(Path(run)):
        try:
            found = open_set(folder)
        except DamagedCheckpoint as error:
            log.warning("checkpoint of step %d is damaged and not used: %s", step, error)
            reasons.append(str(error))
            continue
        if reasons:
            log.warning("using the checkpoint of step %d instead", found.step)
        if repair:
            _repair(Path(run), found)
        return found
    if reasons:
        raise DamagedCheckpoint(
            f"every checkpoint in {run} is damaged: {'; '.join(reasons)}."
            " Restore one from a copy, or choose a new run folder to begin again"
        )
    return None


def best_set(run: str | os.PathLike[str]) -> CheckpointSet | None:
    """The set that ``best`` points to; None, with a warning when it is damaged, when it cannot be used."""
    name = pointed(Path(run), "best")
    if not name:
        return None
    try:
        return open_set(Path(run) / name)
    except DamagedCheckpoint as error:
        log.warning("the best checkpoint is damaged and not used: %s", error)
        return None


def _candidates(run: Path) -> Iterator[tuple[int, Path]]:
    """(step, folder) of every set, newest first. A set that was being replaced counts while its place is empty."""
    found: dict[int, Path] = {}
    for entry in run.iterdir() if run.is_dir() else []:
        step = step_of(entry.name)
        aside = step_of(entry.name[len(REPLACED) :]) if entry.name.startswith(REPLACED) else None
        if step is not None and entry.is_dir():
            found[step] = entry
        elif aside is not None:
            found.setdefault(aside, entry)
    yield from sorted(found.items(), reverse=True)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
        manifest = json.loads(raw)
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        if _render(body) != raw:
            raise DamagedCheckpoint(f"{path} was altered: it does not match its own sha256")
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, DamagedCheckpoint):
            raise
        raise DamagedCheckpoint(f"{path} is not a manifest: {error}") from error
    if manifest["format"] > FORMAT:
        raise CheckpointError(f"{path} was written by Lalia {manifest['lalia']}, newer than this one ({__version__})")
    return manifest


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _stamp(folder: Path) -> list[tuple[int, int]]:
    files = [folder / name for name in (MODEL, STATE, MANIFEST)]
    return [(file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.is_file()]


def _repair(run: Path, newest: CheckpointSet) -> None:
    if pointed(run, "latest") != newest.path.name:
        point(run, "latest", newest.path.name)
    if newest.meta["best"] and (step_of(pointed(run, "best")) or 0) < newest.step:
        point(run, "best", newest.path.name)


# --- tidying --------------------------------------------------------------------------------------------------------
def prune(run: str | os.PathLike[str], keep: int) -> list[Path]:
    """Remove all but the ``keep`` newest complete sets, by number of the step. Returns what was removed.

    The best set and step 0 stay besides. A damaged set does not count as kept. ``keep`` of 0 or below keeps everything.
    """
    folder = Path(run)
    spared = pointed(folder, "best")
    kept, removed = 0, []
    for step, path in list(_candidates(folder)) if keep > 0 else []:
        if kept < keep:
            kept += _is_whole(path)
        elif step > 0 and path.name != spared:
            doomed = temporary(path)  # hidden first: a kill half-way through the removal leaves no half set
            os.rename(path, doomed)
            shutil.rmtree(doomed)
            _verified.pop(path.resolve(), None)
            removed.append(path)
    return removed


def _is_whole(path: Path) -> bool:
    stamp = _stamp(path)
    if len(stamp) == 3 and _verified.get(path.resolve()) == stamp:
        return True
    try:
        open_set(path)
    except DamagedCheckpoint as error:
        log.warning("a damaged checkpoint is not counted among those kept: %s", error)
        return False
    return True


# --- models from folders --------------------------------------------------------------------------------------------
def load(folder: str | os.PathLike[str], device: str = "cpu", which: str = "best") -> System:
    """Rebuild a system from a run folder (or one of its ``step-…`` folders) alone, in evaluation mode on ``device``.

    ``which``: ``best`` (the newest set when there is no best), ``latest``, or a set's name. Every weight must fit:
    WeightsMismatch lists the names that do not. FileNotFoundError names what the folder lacks.
    """
    from lalia.config import load_run_config
    from lalia.system import system_class

    run, chosen = _find_set(Path(folder), which)
    for name in (CONFIG, TABLES):
        if not (run / name).is_file():
            raise FileNotFoundError(f"{run / name} is missing: a model cannot be rebuilt without it")
    config = load_run_config(run / CONFIG, [])
    system = system_class(config.system)(config, RunFolder(run).read_tables())
    try:
        partial_load(system, chosen.model())
    except WeightsMismatch as error:
        raise WeightsMismatch(f"{chosen.path}: {error}", error.report) from error
    return system.to(device).eval()


def load_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Weights by name on the CPU, from a run folder, a set, a ``.safetensors`` or a ``.pth`` (weights only)."""
    source = Path(path)
    if source.is_dir() or (source.is_file() and step_of(pointed(source.parent, source.name)) is not None):
        return _find_set(source, "best")[1].model()
    return read_tensors(source)


def _find_set(folder: Path, which: str) -> tuple[Path, CheckpointSet]:
    """(run folder, set) for a run folder, a ``step-…`` folder, or a ``best``/``latest`` pointer."""
    if folder.name in ("best", "latest") and pointed(folder.parent, folder.name):
        return folder.parent, open_set(folder.parent / pointed(folder.parent, folder.name))
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a run folder: it does not exist")
    if step_of(folder.name) is not None and (folder / MANIFEST).exists():
        return folder.parent, open_set(folder)
    names = [path.name for _, path in _candidates(folder)]
    if which not in ("best", "latest"):
        if which not in names:
            raise FileNotFoundError(f"{folder} has no set {which!r}; it has {', '.join(names) or 'none'}")
        return folder, open_set(folder / which)
    chosen = (best_set(folder) if which == "best" else None) or latest_set(folder)
    if chosen is None:
        raise FileNotFoundError(f"{folder} holds no checkpoint yet (no step-… folder)")
    return folder, chosen
