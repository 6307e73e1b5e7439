"""Configuration: YAML or JSON files and ``a.b=value`` overrides become dataclasses. The one file that knows OmegaConf.

A file is data: no interpolation, no ``_target_``, no aliases. Every key must be a field of the configuration class;
everything else is an error that names the file, the line, the key and its nearest match. A field of type ``str`` keeps
its text as written: ``00123`` stays ``00123``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import tempfile
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, Union, cast

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lalia.configfile import TAG, ConfigError, Dumper, nearest, pairs, parse_yaml, read, shown, where
from lalia.sections import RunConfig

__all__ = ["ConfigError", "config_class", "difference", "flatten", "load", "load_run_config", "nearest", "save"]
__all__ += ["to_dict", "to_yaml"]

T = TypeVar("T")


def load(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Build ``cls`` (a :class:`lalia.sections.Section`) from its defaults, then a file, then the overrides.

    ``overrides`` are ``dotted.key=text``; the text is read by the field's type, lists and mappings as YAML: ``[1, 2]``.
    Raises :class:`ConfigError` for a missing file, broken or duplicate YAML keys, an unknown key, a wrong type, or a
    cross-check of ``__post_init__`` that fails.
    """
    target = OmegaConf.structured(cls)
    root = read(Path(path)) if path is not None else None
    if root is not None:
        _apply_section(target, cls, root, "", str(path))
    for item in overrides:
        _apply_override(target, cls, item)
    return cast(T, _build(target, "", str(path) if path is not None else "configuration"))


def load_run_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Load the configuration of whichever system the key ``system`` (in the file or an override) names."""
    root = read(Path(path)) if path is not None else None
    given = list(pairs(root, "", str(path))) if root is not None else []
    names = [str(value.value) for key, value in given if key.value == "system"]
    names += [text for key, _, text in (item.partition("=") for item in overrides) if key == "system"]
    if not names or not names[-1]:
        raise ConfigError(f"{path or 'configuration'}: the key 'system' is missing; write for example 'system: vits2'")
    return load(config_class(names[-1]), path, overrides)


def config_class(system: str) -> type[RunConfig]:
    """The ``Config`` of a system, from ``lalia.systems.<name>.config`` where there is one: that imports no torch."""
    module = f"lalia.systems.{system.replace('-', '_')}.config"
    if re.fullmatch(r"[a-z][a-z0-9_-]*", system) and _has_module(module):
        return cast("type[RunConfig]", importlib.import_module(module).Config)
    from lalia.system import system_class  # pulls torch

    try:
        return system_class(system).Config
    except ValueError as error:
        raise ConfigError(f"system: {error}") from error


def to_dict(config: Any) -> Any:
    """Dataclasses (and lists and dicts of them) as plain JSON-able values; enums by name."""
    if is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in fields(config)}
    if isinstance(config, Mapping):
        return {str(k): to_dict(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(v) for v in config]
    if isinstance(config, Enum):
        return config.name
    return str(config) if isinstance(config, Path) else config


def to_yaml(config: Any) -> str:
    """The resolved, complete configuration as YAML that :func:`load` reads back to an equal object."""
    dumped = yaml.dump(to_dict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    return cast(str, dumped)


def save(config: Any, path: str | Path) -> None:
    """Write :func:`to_yaml` atomically (temporary file, fsync, rename); the folder is made if it is absent."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(to_yaml(config))
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def flatten(config: Any) -> dict[str, Any]:
    """Dotted key → leaf value; lists and empty mappings are leaves, enums are names."""
    return dict(_leaves(to_dict(config), ""))


def difference(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted key → (value in a, value in b) where two configurations (objects or dicts) differ; absent is None."""
    left, right = flatten(a), flatten(b)
    keys = [*left, *(k for k in right if k not in left)]
    return {k: (left.get(k), right.get(k)) for k in keys if left.get(k) != right.get(k)}


def _leaves(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and (value or not prefix):
        for key, child in value.items():
            yield from _leaves(child, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value


# --- types ----------------------------------------------------------------------------------------------------------
@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return {name: hint for name, hint in typing.get_type_hints(cls).items() if name in {f.name for f in fields(cls)}}


def _unwrap(hint: Any) -> tuple[Any, bool]:
    """``X | None`` → (X, True); anything else → (itself, False)."""
    if typing.get_origin(hint) in (Union, types.UnionType) and type(None) in typing.get_args(hint):
        kept = tuple(a for a in typing.get_args(hint) if a is not type(None))
        return (kept[0] if len(kept) == 1 else Union[kept]), True  # noqa: UP007 - built from a tuple at run time
    return hint, False


def _section(hint: Any) -> type | None:
    bare = _unwrap(hint)[0]
    return bare if isinstance(bare, type) and is_dataclass(bare) else None


def _describe(hint: Any) -> str:
    bare, optional = _unwrap(hint)
    if isinstance(bare, type) and issubclass(bare, Enum):
        text = f"one of {', '.join(member.name for member in bare)}"
    elif _section(bare):
        text = f"a section with the keys {', '.join(_hints(bare))}"
    else:
        plain = isinstance(bare, type) and not typing.get_args(bare)
        text = bare.__name__ if plain else str(bare).replace("typing.", "")
    return f"{text} or null" if optional else text


def _child_hint(hint: Any, key: str, prefix: str, place: str) -> Any:
    """Type of ``key`` inside a section or a ``dict[str, X]``; :class:`ConfigError` when there can be no such key."""
    section = _section(hint)
    if section is not None:
        known = _hints(section)
        if key in known:
            return known[key]
        dotted = f"{prefix}.{key}" if prefix else key
        reason = "; YAML is data here, nothing is instantiated" if key == "_target_" else nearest(key, known)
        inside = f"section {prefix!r}" if prefix else "the top level"
        raise ConfigError(f"{place}: unknown key {dotted!r}{reason} (keys of {inside}: {', '.join(known)})")
    bare = _unwrap(hint)[0]
    if typing.get_origin(bare) is dict or bare in (dict, Any):
        return (typing.get_args(bare) or (str, Any))[1]
    raise ConfigError(f"{place}: {prefix!r} is {_describe(hint)}, not a section, so it has no key {key!r}")


# --- values ---------------------------------------------------------------------------------------------------------
def _apply_section(target: DictConfig, cls: type, node: yaml.Node, prefix: str, origin: str) -> None:
    for key, value in pairs(node, prefix, origin):
        hint = _child_hint(cls, key.value, prefix, where(origin, key))
        _assign(target, key.value, hint, value, f"{prefix}.{key.value}" if prefix else key.value, origin)


def _apply_override(target: DictConfig, cls: type, item: str) -> None:
    key, equals, text = item.partition("=")
    origin = f"override {item!r}"
    if not equals or not key:
        raise ConfigError(f"{origin}: write it as key=value, for example train.steps=100")
    hint: Any = cls
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if depth:
            target = _enter(target, parts[depth - 1], hint)
        hint = _child_hint(hint, part, ".".join(parts[:depth]), origin)
    bare, optional = _unwrap(hint)
    if bare is str and not (optional and text in ("null", "~")):
        node: yaml.Node = yaml.ScalarNode(TAG + "str", text)
    else:
        node = parse_yaml(text, origin) or yaml.ScalarNode(TAG + "null", "")
    _assign(target, parts[-1], hint, node, key, origin)


def _enter(target: DictConfig, key: str, hint: Any) -> DictConfig:
    """The child container, made from its defaults where it is null or, in a dict, absent."""
    if target.get(key) is None:
        section = _section(hint)
        target[key] = OmegaConf.structured(section) if section else {}
    return cast(DictConfig, target[key])


def _assign(target: DictConfig, key: str, hint: Any, node: yaml.Node, dotted: str, origin: str) -> None:
    section = _section(hint)
    if section is not None and isinstance(node, yaml.MappingNode):
        _apply_section(_enter(target, key, hint), section, node, dotted, origin)
        return
    if section is not None and node.tag == TAG + "null" and not _unwrap(hint)[1]:
        return  # a heading whose lines are all commented out keeps the defaults
    value = _value(node, hint, dotted, origin)
    try:
        OmegaConf.update(target, key, value, merge=False)
    except (OmegaConfBaseException, ValueError) as error:
        raise _wrong_type(node, hint, dotted, origin) from error


def _wrong_type(node: yaml.Node, hint: Any, dotted: str, origin: str) -> ConfigError:
    bare = _unwrap(hint)[0]
    advice = ""
    if isinstance(node, yaml.ScalarNode) and isinstance(bare, type) and issubclass(bare, Enum):
        advice = nearest(node.value, [member.name for member in bare])
    if isinstance(node, yaml.ScalarNode) and typing.get_origin(bare) is list:
        advice = f"; write [{node.value}]"
    several = isinstance(node, yaml.SequenceNode)
    given = f"[{', '.join(shown(child) for child in node.value)}]" if several else shown(node)
    return ConfigError(f"{where(origin, node)}: {dotted} expects {_describe(hint)}, got {given}{advice}")


def _value(node: yaml.Node, hint: Any, dotted: str, origin: str) -> Any:
    """A node as a Python value (or a structured node for a section), read in the light of the type it is meant for."""
    bare, _ = _unwrap(hint)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, hint, dotted, origin)
    section, arguments = _section(bare), typing.get_args(bare)
    if isinstance(node, yaml.SequenceNode) and (typing.get_origin(bare) or bare) in (list, Any):
        element = arguments[0] if arguments else Any
        return [_value(child, element, f"{dotted}[{i}]", origin) for i, child in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode) and section is not None:
        child = OmegaConf.structured(section)
        _apply_section(child, section, node, dotted, origin)
        return child
    if isinstance(node, yaml.MappingNode) and (typing.get_origin(bare) or bare) in (dict, Any):
        element = arguments[1] if arguments else Any
        return {k.value: _value(v, element, f"{dotted}.{k.value}", origin) for k, v in pairs(node, dotted, origin)}
    raise _wrong_type(node, hint, dotted, origin)


def _scalar(node: yaml.ScalarNode, hint: Any, dotted: str, origin: str) -> Any:
    bare, optional = _unwrap(hint)
    text, tag = node.value, node.tag.removeprefix(TAG)
    if "${" in text:
        raise ConfigError(f"{where(origin, node)}: {dotted}: interpolation ({text!r}) is not supported")
    if tag == "null":
        if bare is str and not optional and text == "":
            return ""
        if not optional and bare is not Any:
            raise _wrong_type(node, hint, dotted, origin)
        return None
    if bare is str or tag == "str":
        return text
    if tag == "bool":
        return text.lower() == "true"
    if tag == "int":
        return int(text, 16) if text.lower().startswith("0x") else int(text)
    if tag == "float":
        return float(re.sub(r"\.(inf|nan)$", r"\1", text.lower()))
    raise ConfigError(f"{where(origin, node)}: {dotted}: the YAML tag {node.tag!r} is not supported")


# --- objects --------------------------------------------------------------------------------------------------------
def _build(node: DictConfig, prefix: str, origin: str) -> Any:
    """Structured node → dataclass, inner sections first so that a failing cross-check is named by its own section."""
    for key in map(str, node):
        dotted = f"{prefix}.{key}" if prefix else key
        if OmegaConf.is_missing(node, key):
            raise ConfigError(f"{origin}: {dotted} has no default and must be given")
        _build_children(node[key], dotted, origin)
    try:
        return OmegaConf.to_object(node)
    except (OmegaConfBaseException, ValueError) as error:
        section = f"section {prefix!r}" if prefix else "top level"
        raise ConfigError(f"{origin}: {section}: {error}") from error


def _build_children(child: Any, dotted: str, origin: str) -> None:
    if isinstance(child, DictConfig):
        _build(child, dotted, origin)
    elif isinstance(child, ListConfig):
        for index, item in enumerate(child):
            _build_children(item, f"{dotted}[{index}]", origin)


def _has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        return False
