"""Debian packages as a source of data: fetched and unpacked, never installed, without root."""

from __future__ import annotations

import hashlib
import logging
import subprocess
from pathlib import Path

from lalia.corpora._common import CorpusUnavailable

log = logging.getLogger(__name__)

DOWNLOAD_SECONDS = 600


def fetch(name: str, work: Path, sha256: str, version: str, advice: str, root: str = "root") -> dict[str, str]:
    """Package ``name`` unpacked under ``work/<root>``; its file name and sha256. A package that is there already is used again.

    ``sha256`` and ``version`` are those of the package that was tested; another one is used with a warning.
    Raises CorpusUnavailable, which ends in ``advice``, when it cannot be had.
    """
    try:
        stored = _stored(name, work)
        if stored is None:
            _download(name, work)
            stored = _stored(name, work)
        if stored is None:
            raise CorpusUnavailable(f"apt-get download {name} left no package in {work}")
        digest = hashlib.sha256(stored.read_bytes()).hexdigest()
        if digest != sha256:
            log.warning("%s (sha256 %s) is not the %s %s that was tested", stored.name, digest, name, version)
        (work / root).mkdir(parents=True, exist_ok=True)
        _run(["dpkg-deb", "-x", stored.name, root], work)
    except CorpusUnavailable as error:
        raise CorpusUnavailable(f"{error}; {advice}") from error
    return {"file": stored.name, "sha256": digest, "tested": str(digest == sha256).lower()}


def _stored(name: str, work: Path) -> Path | None:
    return next(iter(sorted(work.glob(f"{name}_*.deb"), reverse=True)), None)


def _download(name: str, work: Path) -> None:
    """By the machine's package lists; where those are missing or old, by fresh lists under ``work`` (no root)."""
    try:
        _run(["apt-get", "download", name], work)
        return
    except CorpusUnavailable as error:
        log.info("%s; trying with fresh package lists in %s", error, work)
    for folder in ("lists/partial", "cache/archives/partial"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    private = ["-o", f"Dir::State::Lists={work.resolve() / 'lists'}", "-o", f"Dir::Cache={work.resolve() / 'cache'}"]
    if not any(p.is_file() for p in (work / "lists").iterdir()):
        _run(["apt-get", *private, "update"], work)
    _run(["apt-get", *private, "download", name], work)


def _run(command: list[str], work: Path) -> None:
    try:
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
    except FileNotFoundError as error:
        raise CorpusUnavailable(f"{command[0]} is not on this machine") from error
    except subprocess.TimeoutExpired as error:
        raise CorpusUnavailable(f"`{' '.join(command)}` took over {DOWNLOAD_SECONDS} s") from error
    if done.returncode:
        complaint = next((x for x in done.stderr.splitlines() if x.startswith(("E:", "dpkg"))), done.stderr.strip())
        raise CorpusUnavailable(f"`{' '.join(command)}` failed: {complaint}")
