"""What is in both parts: by name, counted, and said."""

from __future__ import annotations

from pathlib import Path

import pytest

from lalia.data import Corpus, Row
from lalia.leaks import audit, clean_rows


def row(identifier: str, speaker: str = "", session: str = "", dialogue: str = "", text: str = "", scripted: bool = False) -> Row:
    return Row(identifier, text=text, speaker=speaker, dialogue=dialogue, extra={"session": session, "scripted": scripted})


TRAIN = [row("a", "ann", "1", "d1", "I'm on MY way!", True), row("b", "bob", "1", "d1", "Free words.")]


@pytest.mark.parametrize(
    ("other", "kind", "names"),
    [
        (row("c", "ann", "2", "d2"), "speakers", ["ann"]),
        (row("c", "cid", "1", "d2"), "sessions", ["1"]),
        (row("c", "cid", "2", "d1"), "dialogues", ["d1"]),
        (row("a", "cid", "2", "d2"), "ids", ["a"]),
    ],
)
def test_each_kind_is_found_named_and_fatal(other: Row, kind: str, names: list[str]) -> None:
    leaks = audit(Corpus.from_rows(TRAIN), Corpus.from_rows([other]))
    found = {name: getattr(leaks, name) for name in ("speakers", "sessions", "dialogues", "ids", "sentences")}
    assert {name: value for name, value in found.items() if value} == {kind: names}
    assert leaks.fatal and leaks.to_dict()["fatal"] and repr(names[0]) in leaks.text()


def test_one_name_in_other_letters_is_one_person() -> None:
    leaks = audit(TRAIN, [row("c", " ANN", "", "D1"), row("e", "anna")])
    assert leaks.speakers == [" ANN"] and leaks.dialogues == ["D1"] and leaks.fatal


def test_a_recording_with_another_id_is_found_through_links_and_by_its_stretch(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.wav").write_bytes(b"")
    (tmp_path / "folder").symlink_to(tmp_path / "real")
    (tmp_path / "file.wav").symlink_to(tmp_path / "real" / "a.wav")
    train = [Row("one", str(tmp_path / "real" / "a.wav"), start=1.0, duration=2.0)]
    linked = [Row("two", str(tmp_path / "folder" / "a.wav")), Row("three", str(tmp_path / "file.wav"), start=2.5, duration=9.0)]
    leaks = audit(train, [*linked, Row("next", str(tmp_path / "file.wav"), start=3.0, duration=1.0)])
    assert leaks.recordings == ["three", "two"] and leaks.fatal and "'three', 'two'" in leaks.text()
    same = audit(train, train)
    assert same.ids == ["one"] and not same.recordings


def test_nothing_in_common_is_clean_and_says_so() -> None:
    leaks = audit(TRAIN, [row("c", "cid", "2", "d2", "Other words", True)])
    assert not leaks.fatal and not leaks.sentences
    assert leaks.text() == "no known speaker, session, dialogue or row is in both parts"


def test_empty_names_match_nothing_and_unknown_speakers_are_counted() -> None:
    leaks = audit([row("a"), row("b", "bob")], [row("c"), row("d"), row("e", "eve")])
    assert not leaks.fatal and (leaks.unknown_speakers, leaks.unknown_in_training, leaks.test_rows) == (2, 1, 3)
    assert "2 of 3 test rows have no known speaker" in leaks.text() and "1 training rows" in leaks.text()


def test_scripted_sentences_are_compared_by_their_words_and_are_not_fatal() -> None:
    test = [
        row("c", "cid", "2", "d2", "im on my way", True),
        row("d", "cid", "2", "d2", "Im on my way.", False),
        row("e", "cid", "2", "d2", "Free words.", True),
        row("f", "cid", "2", "d2", "", True),
    ]
    leaks = audit(TRAIN, test)
    assert leaks.sentences == ["im on my way"] and leaks.sentence_rows == 1 and not leaks.fatal
    assert "1 scripted sentences, said in 1 of 4 test rows" in leaks.text()
    assert clean_rows(TRAIN, test) == [1, 2, 3]
    assert clean_rows(Corpus.from_rows(TRAIN), Corpus.from_rows(test)) == [1, 2, 3]


def test_two_people_of_one_name_count_as_one_and_the_text_says_how_to_tell_them_apart() -> None:
    leaks = audit([row("a", "Kim")], [row("b", "Kim")])
    assert leaks.speakers == ["Kim"] and "corpus-session-name" in leaks.text()


def test_a_long_list_is_shortened_in_the_text_alone() -> None:
    people = [row(f"r{i}", f"p{i:02d}") for i in range(30)]
    leaks = audit(people, [row(f"t{i}", f"p{i:02d}") for i in range(30)])
    assert len(leaks.to_dict()["speakers"]) == 30 and "and 22 more" in leaks.text()
