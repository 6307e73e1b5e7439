"""Sentence splitting loses nothing and cuts where a reader would."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lalia.text import TextError, split_sentences

WORDS = st.sampled_from(
    [
        "Mr.",
        "e.g.",
        "3.14",
        "Hello",
        "there,",
        "world.",
        "What?",
        "ok!",
        "a" * 30,
        "…",
        "(yes.)",
        '"No."',
        "你好。",
        "\n\n",
    ]
)


def squeezed(text: str) -> str:
    return "".join(text.split())


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(max_size=300), st.lists(WORDS, max_size=60).map(" ".join)), st.integers(1, 60))
def test_nothing_is_lost_and_no_piece_is_too_long(text: str, max_chars: int) -> None:
    pieces = split_sentences(text, "en", max_chars)
    assert squeezed("".join(pieces)) == squeezed(text)
    assert all(0 < len(piece) <= max_chars and piece == piece.strip() for piece in pieces)


@settings(max_examples=100, deadline=None)
@given(st.lists(WORDS.filter(lambda word: len(word) < 25 and word.strip()), max_size=40), st.integers(25, 80))
def test_words_stay_whole(words: list[str], max_chars: int) -> None:
    pieces = split_sentences(" ".join(words), "en", max_chars)
    cjk = [word.replace("。", "") for word in words]
    assert " ".join(pieces).replace("。", "").split() == " ".join(cjk).split()


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Mr. Smith paid 3.50. He left.", ["Mr. Smith paid 3.50.", "He left."]),
        ("Fruit, e.g. apples. J. K. Rowling.", ["Fruit, e.g. apples.", "J. K. Rowling."]),
        ("We met at 3 p.m. on Jan. 3.", ["We met at 3 p.m. on Jan. 3."]),
        ('"Really?" she said. "Yes."', ['"Really?"', "she said.", '"Yes."']),
        ("Title\n\nBody", ["Title", "Body"]),
        ("", []),
        (" \n ", []),
    ],
)
def test_cuts(text: str, pieces: list[str]) -> None:
    assert split_sentences(text) == pieces


def test_long_sentence_is_cut_at_a_comma_then_at_a_space() -> None:
    assert split_sentences("one two three, four five six seven", max_chars=20) == [
        "one two three,",
        "four five six seven",
    ]
    assert split_sentences("one two three four five", max_chars=10) == ["one two", "three four", "five"]
    assert split_sentences("abcdefghij", max_chars=4) == ["abcd", "efgh", "ij"]


def test_max_chars_must_be_positive() -> None:
    with pytest.raises(TextError, match="at least 1"):
        split_sentences("hello", max_chars=0)
