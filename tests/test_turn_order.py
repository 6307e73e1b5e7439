"""Which rows are one dialogue, and in which order."""

from __future__ import annotations

import pytest

from lalia.data import Corpus, ManifestError, Row
from lalia.dialogues import dialogues, group_rows


def row(name: str, dialogue: str, turn: int) -> Row:
    return Row(name, dialogue=dialogue, turn=turn)


def test_turns_are_in_time_order_whatever_the_order_of_the_manifest() -> None:
    rows = [row("b2", "b", 2), row("a1", "a", 1), row("b0", "b", 0), row("a0", "a", 0), row("alone", "", -1), row("b1", "b", 1)]
    found = dialogues(Corpus.from_rows(rows))
    assert [[rows[i].id for i in turns] for turns in found] == [["b0", "b1", "b2"], ["a0", "a1"], ["alone"]]
    assert [[r.id for r in turns] for turns in group_rows(rows)] == [["b0", "b1", "b2"], ["a0", "a1"], ["alone"]]
    assert group_rows([]) == []


def test_rows_without_a_dialogue_are_never_put_together() -> None:
    assert dialogues(Corpus.from_rows([row("x", "", -1), row("y", "", -1)])) == [[0], [1]]


def test_a_gap_is_allowed_and_a_dialogue_of_one_turn_needs_no_number() -> None:
    assert dialogues(Corpus.from_rows([row("x", "d", 7), row("y", "d", 3)])) == [[1, 0]]
    assert dialogues(Corpus.from_rows([row("x", "d", -1)])) == [[0]]


@pytest.mark.parametrize(("turns", "said"), [([0, 1, 1], "two rows with turn 1"), ([-1, 0], "no 'turn'")])
def test_an_order_that_cannot_be_known_is_an_error(turns: list[int], said: str) -> None:
    with pytest.raises(ManifestError, match=said):
        dialogues(Corpus.from_rows([row(f"r{i}", "d", turn) for i, turn in enumerate(turns)]))
