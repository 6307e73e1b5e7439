"""Configuration files as YAML node trees with line numbers, JSON included. :mod:`lalia.config` gives them their types.

Scalars follow the YAML 1.2 core schema, so that ``no``, ``on``, ``12:30`` and ``00123`` are text, as they look.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import yaml

SUFFIXES = (".yaml", ".yml", ".json")
TAG = "tag:yaml.org,2002:"
STAR = "put quotes around text that begins with '*'"
CORE_SCHEMA = {  # scalar tag → (pattern, possible first characters)
    "null": (r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    "bool": (r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    "int": (r"^(?:[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    "float": (
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)"
        r"|[-+]?\.[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
}


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file or override, the key, and what would be right."""


class Loader(yaml.SafeLoader):
    """YAML composer with the core schema; aliases are refused (a configuration is data, not a graph)."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"aliases are not supported; {STAR}", mark)
        return super().compose_node(parent, index)


class Dumper(yaml.SafeDumper):
    """Writes what :class:`Loader` reads back as the same values."""

    yaml_implicit_resolvers: dict[str, Any] = {}


for _tag, (_pattern, _first) in CORE_SCHEMA.items():
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(TAG + _tag, re.compile(_pattern), _first)


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` with the most similar known name, or ``""`` when none is similar."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def read(path: Path) -> yaml.Node | None:
    """The file as a YAML node tree (JSON too), or None when it is empty."""
    if path.is_dir():
        inside = path / "config.yaml"
        hint = f"; did you mean {str(inside)!r}?" if inside.exists() else ""
        raise ConfigError(f"{path} is a folder, not a file{hint}")
    if not path.exists():
        raise ConfigError(_missing(path))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    root = _parse_json(text, str(path)) if path.suffix.lower() == ".json" else parse_yaml(text, str(path))
    if root is not None and not isinstance(root, yaml.MappingNode) and root.tag != TAG + "null":
        raise ConfigError(f"{path}: expected a mapping of keys to values at the top, got {shown(root)}")
    return root if isinstance(root, yaml.MappingNode) else None


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return f"no such file: {path} (the folder {path.parent} does not exist either)"
    beside = sorted(p.name for p in path.parent.iterdir() if p.suffix.lower() in SUFFIXES)
    here = f"; configurations there: {', '.join(beside[:10])}" if beside else ""
    return f"no such file: {path}{nearest(path.name, beside)}{here}"


def parse_yaml(text: str, origin: str) -> yaml.Node | None:
    """Text as a node tree, None when it is empty; :class:`ConfigError` with origin and line when it is broken."""
    try:
        return cast("yaml.Node | None", yaml.compose(text, Loader=Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark and not origin.startswith("override ") else ""
        quotes = f"; {STAR}" if mark and "*" in text and STAR not in (error.problem or "") else ""
        raise ConfigError(f"{origin}{line}: broken YAML: {error.problem or error.context}{quotes}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: broken YAML: {error}") from error


def _parse_json(text: str, origin: str) -> yaml.Node | None:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [k for k, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"{origin}: the key {name!r} is given twice")
        return dict(pairs)

    if not text.strip():
        return None
    try:
        value = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{origin}:{error.lineno}: broken JSON: {error.msg}") from error
    representer = yaml.representer.SafeRepresenter()
    representer.ignore_aliases = lambda data: True  # type: ignore[method-assign]
    return cast(yaml.Node, representer.represent_data(value))


def pairs(node: yaml.Node, prefix: str, origin: str) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    """Key and value nodes of a mapping; keys are scalars and unique."""
    seen: dict[str, str] = {}
    for key, value in node.value:
        place = where(origin, key)
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{place}: a key must be plain text{f' (in section {prefix!r})' if prefix else ''}")
        dotted = f"{prefix}.{key.value}" if prefix else key.value
        if key.value in seen:
            raise ConfigError(f"{place}: the key {dotted!r} is given twice (first at {seen[key.value]})")
        seen[key.value] = place
        yield key, value


def where(origin: str, node: yaml.Node) -> str:
    """``file:line`` of a node, or just the origin where lines mean nothing (overrides, JSON)."""
    known = node.start_mark is not None and not origin.startswith("override ")
    return f"{origin}:{node.start_mark.line + 1}" if known else origin


def shown(node: yaml.Node) -> str:
    """A node in the words of an error message."""
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value) if node.tag != TAG + "null" else "null"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
