"""The run folder on disk: one owner at a time, files that are either old or new but never half, and where the code
came from.

Layout: ``config.yaml``, ``tables.json``, ``githash``, ``lock``, ``step-00012000/`` (see :mod:`lalia.checkpoint`),
``weights/``, ``best`` and ``latest``. Names that start with ``.tmp-`` belong to a write in progress;
:meth:`RunFolder.lock` removes those that a killed process left behind.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

log = logging.getLogger(__name__)

CONFIG, TABLES, GITHASH, LOCK, WEIGHTS = "config.yaml", "tables.json", "githash", "lock", "weights"
TEMPORARY = ".tmp-"  # prefix of everything that is not finished
REPLACED = ".old-"  # prefix of a set that is being replaced; put back when the replacement did not arrive
STEP_NAME = re.compile(r"step-(\d+)")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_SYMLINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EACCES}


class RunLocked(RuntimeError):
    """Another process is training in this folder."""


class CheckpointError(RuntimeError):
    """A set could not be written (disk full, read-only …). What was there before is untouched."""


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """12000 for ``step-00012000``, None for any other name."""
    match = STEP_NAME.fullmatch(name)
    return int(match.group(1)) if match else None


def temporary(path: Path) -> Path:
    """A hidden name beside ``path`` for something that will become ``path`` by a rename."""
    return path.parent / f"{TEMPORARY}{path.name}-{os.getpid()}"


def sync_folder(folder: Path) -> None:
    """Make the names inside ``folder`` survive a power cut. Windows has no such call."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class HashingFile:
    """A new file that hashes what passes through and is on the disk when closed.

    ``failure`` keeps the first write error: ``torch.save`` turns it into an unrelated RuntimeError on its way out.
    """

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115  closed by close()
        self._hash = hashlib.sha256()
        self.size = 0
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            written = self._file.write(data)
        except OSError as error:
            self.failure = error
            raise
        self._hash.update(data)
        self.size += written
        return written

    def flush(self) -> None:
        self._file.flush()

    def finish(self) -> dict[str, Any]:
        """Flush to the disk and return ``{"sha256": hex, "size": bytes}``."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"sha256": self._hash.hexdigest(), "size": self.size}

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:  # the buffered rest does not fit either; the first failure is the one to report
            self.failure = self.failure or error

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def write_failed(folder: Path, error: OSError, needed: int) -> CheckpointError:
    """The error to raise for a failed write of about ``needed`` bytes into ``folder``."""
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    what = "the disk is full" if error.errno in _FULL else (error.strerror or str(error))
    return CheckpointError(
        f"could not save into {folder}: {what}; about {needed:,} bytes are needed and {free:,} are free."
        " The sets saved before are untouched"
    )


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a whole file so that a reader, or a kill at any moment, sees the old content or the new one."""
    draft = temporary(path)
    try:
        with HashingFile(draft) as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.finish()
        os.replace(draft, path)
        sync_folder(path.parent)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def point(run: Path, name: str, target: str) -> None:
    """Swing ``run/name`` to the set ``target`` in one step: a symlink, or a text file where those are not allowed.

    On Windows always a text file: a link to a folder may be made there, but not replaced in one step.
    """
    if sys.platform == "win32":
        write_atomic(run / name, target + "\n")
        return
    draft = temporary(run / name)
    draft.unlink(missing_ok=True)
    try:
        os.symlink(target, draft, target_is_directory=True)
    except NotImplementedError:
        write_atomic(run / name, target + "\n")
        return
    except OSError as error:
        if error.errno not in _NO_SYMLINKS:
            raise
        write_atomic(run / name, target + "\n")
        return
    try:
        os.replace(draft, run / name)
        sync_folder(run)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def pointed(run: Path, name: str) -> str:
    """Name of the set that ``best`` or ``latest`` points to; '' when there is none."""
    pointer = run / name
    if pointer.is_symlink():
        target = os.readlink(pointer)
    elif pointer.is_file():
        target = pointer.read_text(errors="replace").strip()
    else:
        return ""
    return target if step_of(target) is not None else ""


def sweep(run: Path) -> None:
    """Remove what killed writes left behind, and put back a set whose replacement never arrived. Only for the owner."""
    for folder in (run, run / WEIGHTS):
        for leftover in sorted(folder.glob(TEMPORARY + "*")) if folder.is_dir() else []:
            log.info("removing %s, left by an interrupted write", leftover)
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)
    for old in sorted(run.glob(REPLACED + "step-*")):
        if (run / old.name[len(REPLACED) :]).exists():
            shutil.rmtree(old)
        else:
            os.rename(old, run / old.name[len(REPLACED) :])


def git_commit(source: Path | None = None) -> str:
    """Full hash of the commit that the code (``source``, by default this package) is checked out at.

    '' outside a git work tree, when git is not installed, and when the code is not part of the work tree around it
    (a virtual environment inside somebody's repository).
    """
    source = source or Path(__file__).resolve().parent
    marker = Path(__file__).name if source == Path(__file__).resolve().parent else "."
    if not _git(source, "ls-files", "--error-unmatch", marker):
        return ""
    return _git(source, "rev-parse", "HEAD").strip()


def _git(source: Path, *arguments: str) -> str:
    command = ["git", "-C", str(source), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


class RunFolder(os.PathLike[str]):
    """A run folder that this process may own. As a context manager it creates, locks and, at the end, unlocks the
    folder.

    The lock is the operating system's, so that it goes with the process however it ends (``kill -9`` included).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock: BinaryIO | None = None

    def __fspath__(self) -> str:
        return str(self.path)

    def __enter__(self) -> RunFolder:
        self.create()
        self.lock()
        return self

    def __exit__(self, *error: object) -> None:
        self.unlock()

    def create(self) -> RunFolder:
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"{self.path} is a file; a run needs a folder of its own")
        self.path.mkdir(parents=True, exist_ok=True)
        return self

    def lock(self) -> None:
        """Own the folder until :meth:`unlock` or the end of the process; RunLocked when another process does."""
        if self._lock is not None:
            return
        file = open(self.path / LOCK, "a+b")  # noqa: SIM115  open for as long as the lock is held
        try:
            _lock_file(file)
        except BlockingIOError:
            file.seek(0)
            owner = _owner(file.read())
            file.close()
            raise RunLocked(
                f"{self.path} is in use by {owner}. Wait for it, stop it, or choose another run folder;"
                " the lock goes with that process, so there is no file to delete"
            ) from None
        self._lock = file
        if hasattr(os, "register_at_fork"):
            # A forked loader process outlives a killed trainer by some seconds and must not hold the lock for it.
            os.register_at_fork(after_in_child=self._forget)
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}).encode())
        file.flush()
        sweep(self.path)

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.truncate(0)
            self._forget()

    def _forget(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_config(self, text: str, source: str | Path | None = None) -> None:
        """Store the resolved configuration, and a copy of the file it came from as ``config.source.yaml``.

        A different configuration that was there stays as ``config.previous.yaml``, and the log says so. The file the
        user named is only read.
        """
        path = self.path / CONFIG
        before = path.read_text(encoding="utf-8") if path.is_file() else text
        if before != text:
            write_atomic(self.path / "config.previous.yaml", before)
            log.warning("%s changed since this run was started: %s", path, _changed_lines(before, text))
        write_atomic(path, text)
        if source is not None:
            write_atomic(self.path / "config.source.yaml", Path(source).read_bytes())

    def write_tables(self, tables: Mapping[str, Any]) -> None:
        write_atomic(self.path / TABLES, json.dumps(tables, ensure_ascii=False, indent=1) + "\n")

    def read_tables(self) -> dict[str, Any]:
        """The tables of this run; FileNotFoundError or ValueError that names the file."""
        path = self.path / TABLES
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: a model cannot be rebuilt without its speakers and symbols")
        try:
            tables = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if not isinstance(tables, dict):
            raise ValueError(f"{path} must hold a JSON object, got {type(tables).__name__}")
        return tables

    def record_git(self, source: Path | None = None) -> str:
        """Write the code's commit to ``githash``; warn when the run was started from another. Returns it, or ''."""
        commit = git_commit(source)
        path = self.path / GITHASH
        before = path.read_text(errors="replace").strip() if path.is_file() else ""
        if commit and before and commit != before:
            log.warning("this run was started from commit %s, the code is now at %s", before, commit)
        if commit and commit != before:
            write_atomic(path, commit + "\n")
        return commit


def _changed_lines(before: str, after: str) -> str:
    kept = set(before.splitlines())
    changed = [line.strip() for line in after.splitlines() if line not in kept]
    return "; ".join(changed[:6]) + (" …" if len(changed) > 6 else "")


def _owner(data: bytes) -> str:
    try:
        owner = json.loads(data)
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (ValueError, KeyError, TypeError):  # it has just taken the lock and not yet written its name
        return "another process"


def _lock_file(file: BinaryIO) -> None:
    """Take the lock or raise BlockingIOError; a file system without locks is said in the log and used without."""
    try:
        if sys.platform == "win32":
            file.seek(1 << 30)  # Windows locks are mandatory: keep the bytes that name the owner readable
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK):
            raise BlockingIOError(error.errno, "locked") from error
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        log.warning("this file system has no locks (%s): let one process at a time train here", error.strerror)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
