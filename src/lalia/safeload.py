"""Weights from files that somebody else made, without ever running what is inside them.

A ``.pth`` is a pickle, and a pickle is a program. Everything is read with ``weights_only=True``; what asks for more
is refused with the names it asks for.
"""

from __future__ import annotations

import json
import math
import pickle
import pickletools
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

ALIASES = "lalia.aliases"  # metadata key: JSON object, name → name of the tensor it shares memory with
#: what reading a damaged file can raise inside torch and the unpickler
_BROKEN = (
    RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, ValueError, KeyError, IndexError, TypeError,
    AttributeError, AssertionError, struct.error, NotImplementedError,
)  # fmt: skip
#: globals that weights_only reading knows anyway; only used to sort the names of a refused file
_HARMLESS = ("torch._utils", "torch.storage", "torch.nn.parameter", "collections", "_codecs", "torch._tensor")


class UnsafePickle(ValueError):
    """The file wants to run code. ``names`` are the Python objects it asks for."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.names = list(names)
        super().__init__(
            f"{path} is a pickle that asks for {', '.join(self.names)}; loading it would run code, so it was not."
            " If you trust its source, open it there with the program that wrote it and save plain tensors:"
            " safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
        )


class DamagedCheckpoint(ValueError):
    """A file is truncated, altered or unreadable."""


class WeightsMismatch(ValueError):
    """Weights that do not fit the network. ``report`` says which."""

    def __init__(self, message: str, report: LoadReport) -> None:
        self.report = report
        super().__init__(message)


def bytes_of(value: Any) -> int:
    """Bytes of all tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(bytes_of(item) for item in value.values())
    return sum(bytes_of(item) for item in value) if isinstance(value, (list, tuple)) else 0


def check_plain(value: Any, where: str) -> None:
    """Refuse what ``weights_only`` loading would refuse later, when it is too late."""
    if type(value) is dict or type(value).__name__ == "OrderedDict":
        for key, item in value.items():
            if type(key) not in (str, int, float, bool):
                raise TypeError(f"{where} has a key of type {type(key).__name__}; use strings or numbers")
            check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            check_plain(item, f"{where}[{index}]")
    elif not isinstance(value, Tensor) and type(value) not in (int, float, bool, str, type(None)):
        raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds tensors, numbers, strings and None")


def plain(value: Any) -> Any:
    """``value`` as JSON data: tensors and numpy scalars become numbers, a number that is not finite None."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (bool, str, type(None))):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


def pack_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Safetensors bytes of a state dict: any device, any strides; tensors that are the same memory are stored once.

    Views that overlap without being the same are stored as copies.
    """
    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach()
        place = (str(value.device), value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and place in first:
            aliases[name] = first[place]
            continue
        first[place] = name
        stored[name] = value.cpu().contiguous()
    users = Counter(value.untyped_storage().data_ptr() for value in stored.values())
    for name, value in stored.items():
        if users[value.untyped_storage().data_ptr()] > 1:
            stored[name] = value.clone()
    return safetensors_bytes(stored, metadata={ALIASES: json.dumps(aliases)} if aliases else None)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` file on the CPU; names that shared memory when saved share it again."""
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
            aliases = json.loads((file.metadata() or {}).get(ALIASES, "{}"))
        tensors.update({name: tensors[source] for name, source in aliases.items()})
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path} cannot be read as safetensors: {error}") from error
    return tensors


def read_pickle(path: Path) -> Any:
    """``torch.load`` on the CPU, weights only. UnsafePickle names what it refuses, DamagedCheckpoint what broke."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if _is_torchscript(path):
        raise UnsafePickle(path, ["a TorchScript program"])
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _BROKEN as error:
        wanted = _wanted_globals(path) if isinstance(error, pickle.UnpicklingError) else []
        if wanted:
            raise UnsafePickle(path, wanted) from None
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise DamagedCheckpoint(f"{path} is truncated or damaged: {reason}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Named tensors of one ``.safetensors``, ``.pth``, ``.pt``, ``.bin`` or ``.ckpt`` file.

    A training checkpoint that wraps its weights (``model`` in the VITS family, ``state_dict`` in Lightning) is
    unwrapped.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    content = read_pickle(path)
    for key in ("model", "state_dict", "weights"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        found = ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{path} holds no named tensors; found: {found}")
    return tensors


@dataclass
class LoadReport:
    """What became of each name. ``mismatched`` lists ``name: file shape → network shape``."""

    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)

    def text(self, limit: int = 20) -> str:
        """One line of counts, then up to ``limit`` names of each kind that did not match."""
        counts = [f"{len(self.matched)} matched", f"{len(self.missing)} missing", f"{len(self.unexpected)} unexpected"]
        lines = [", ".join([*counts, f"{len(self.mismatched)} of another shape"])]
        for title in ("missing", "unexpected", "mismatched"):
            names: list[str] = getattr(self, title)
            more = [f"… and {len(names) - limit} more"] if len(names) > limit else []
            lines += [f"  {title}: {name}" for name in names[:limit] + more]
        return "\n".join(lines)


def partial_load(module: nn.Module, tensors: Mapping[str, Tensor], allow: Sequence[str] = ()) -> LoadReport:
    """Copy the tensors that fit into ``module``, in place.

    ``allow`` holds fnmatch patterns of names that may be missing, unexpected or of another shape (a discriminator
    that starts afresh: ``duration_discriminator.*``). Any other difference is a WeightsMismatch, raised before
    anything is copied.
    """
    own = module.state_dict()
    report = LoadReport(
        missing=[name for name in own if name not in tensors],
        unexpected=[name for name in tensors if name not in own],
    )
    wrong = [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
    report.mismatched = [f"{n}: {list(tensors[n].shape)} → {list(own[n].shape)}" for n in wrong]
    report.matched = [name for name in own if name in tensors and name not in set(wrong)]
    refused = [n for n in report.missing + report.unexpected + wrong if not any(fnmatchcase(n, p) for p in allow)]
    if refused:
        hint = _prefix_hint(own, tensors) if report.unexpected else ""
        raise WeightsMismatch(f"the weights do not fit the network{hint}: {report.text()}", report)
    module.load_state_dict({name: tensors[name] for name in report.matched}, strict=False)
    return report


def _prefix_hint(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    for prefix in ("module.", "_orig_mod.", "model."):
        if any(name.startswith(prefix) and name[len(prefix) :] in own for name in tensors):
            return f" (the file's names carry the prefix {prefix!r} of a wrapper)"
    return ""


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(("/constants.pkl", "/code/__torch__.py")) for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def _wanted_globals(path: Path) -> list[str]:
    """What the pickles in a file ask for beyond what plain tensors need, read from the opcodes and never run."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                streams = [archive.read(n) for n in archive.namelist() if n.endswith(".pkl")]
        else:
            streams = [path.read_bytes()]
    except (zipfile.BadZipFile, OSError):
        return []
    names = {name for stream in streams for name in _globals_in(stream)}
    storages = {n for n in names if n.startswith("torch.") and n.endswith("Storage")}
    return sorted(n for n in names - storages if not n.startswith(_HARMLESS))


def _globals_in(stream: bytes) -> Iterator[str]:
    """``module.name`` of every global in concatenated pickles, up to the first byte that is not a pickle."""
    while stream:
        words: list[str] = []  # STACK_GLOBAL takes the last two strings pushed or fetched from the memo
        memo: dict[int, str] = {}
        end = 0
        try:
            for opcode, argument, position in pickletools.genops(stream):
                end = (position or 0) + 1
                if opcode.name in ("GLOBAL", "INST"):
                    yield str(argument).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL" and len(words) > 1:
                    yield f"{words[-2]}.{words[-1]}"
                elif opcode.name in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"):
                    memo[len(memo) if opcode.name == "MEMOIZE" else int(str(argument))] = words[-1] if words else "?"
                elif opcode.name in ("BINGET", "LONG_BINGET", "GET"):
                    words.append(memo.get(int(str(argument)), "?"))
                elif isinstance(argument, str):
                    words.append(argument)
        except (ValueError, EOFError, IndexError, UnicodeDecodeError, struct.error, KeyError):
            return
        stream = stream[end:]
