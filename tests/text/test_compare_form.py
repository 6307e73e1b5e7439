"""Reference and hypothesis meet in one form."""

from __future__ import annotations

import pytest

from lalia.text import comparison_form


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("It's $3.50.", "it's three dollars and fifty cents"),
        ("OK, Dr. Smith!", "okay doctor smith"),
        ("Press 1 now...", "press one now"),
        ("at 3 p.m.", "At three PM"),
        ("the U.S. Army", "the US army"),
        ("well-known", "Well known"),
        ("“Don’t call”", "don't call"),
        ("café", "cafe"),
    ],
)
def test_same_speech_same_form(one: str, two: str) -> None:
    assert comparison_form(one, "en") == comparison_form(two, "en")


def test_different_words_stay_different() -> None:
    assert comparison_form("do not go", "en") != comparison_form("don't go", "en")
    assert comparison_form("", "en") == ""
    assert comparison_form("?!", "en") == ""


def test_form_is_stable() -> None:
    text = "On Nov. 21, 2026 at 10:05 Mr. Max said: 'I'm 5 ft tall & it cost 50%!'"
    once = comparison_form(text, "en")
    assert comparison_form(once, "en") == once
    date = "on november twenty first twenty twenty six at ten oh five"
    rest = "mr max said i'm five feet tall and it cost fifty percent"
    assert once == f"{date} {rest}"


def test_characters_stand_apart_where_there_are_no_spaces() -> None:
    assert comparison_form("你好，世界。", "zh") == "你 好 世 界"
