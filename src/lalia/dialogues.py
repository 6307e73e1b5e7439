"""Rows that belong together in time: the turns of a dialogue, in the order in which they were spoken."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from lalia.data import Corpus, ManifestError, Row


def dialogues(corpus: Corpus) -> list[list[int]]:
    """Row indices of each dialogue in time order, dialogues in the order of their first rows.

    A row without ``dialogue`` is one by itself. The order is that of ``turn`` (0, 1, 2 … over all speakers of a dialogue), not of
    the manifest. ManifestError when two turns of a dialogue have one number, or a number is missing in a dialogue of several turns.
    """
    found: dict[Any, list[tuple[int, int]]] = defaultdict(list)
    for index, (name, turn) in enumerate(zip(corpus.column("dialogue"), corpus.column("turn"), strict=True)):
        found[name or index].append((turn, index))
    return [_ordered(name, turns) for name, turns in found.items()]


def group_rows(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows → dialogues, as :func:`dialogues` does it."""
    listed = list(rows)
    return [[listed[i] for i in turns] for turns in dialogues(Corpus.from_rows(listed))] if listed else []


def _ordered(name: Any, turns: Sequence[tuple[int, int]]) -> list[int]:
    ordered = sorted(turns)
    if len(ordered) > 1 and ordered[0][0] < 0:
        raise ManifestError(f"dialogue {name!r}: a row has no 'turn'; turns are numbered 0, 1, 2 … in time over all speakers")
    for (turn, _), (following, _) in zip(ordered[:-1], ordered[1:], strict=True):
        if turn == following:
            raise ManifestError(f"dialogue {name!r} has two rows with turn {turn}: number them in true time order")
    return [index for _, index in ordered]
