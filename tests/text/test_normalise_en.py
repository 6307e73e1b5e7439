"""Golden cases of the English normaliser, and what must hold for every text."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lalia.text import OnUnknown, TextError, analyse
from lalia.text.fold import fold
from lalia.text.normalise_en import normalise

GOLDEN = [
    ("42", "forty two"),
    ("1,234,567", "one million two hundred and thirty four thousand five hundred and sixty seven"),
    ("007", "zero zero seven"),
    ("3.14 or .5", "three point one four or point five"),
    ("-5 degrees", "minus five degrees"),
    ("12345678901234567", "one two three four five six seven eight nine zero one two three four five six seven"),
    ("the 21st and 102nd", "the twenty first and one hundred and second"),
    ("in 1999", "in nineteen ninety nine"),
    ("in 2009", "in two thousand and nine"),
    ("since 1905", "since nineteen oh five"),
    ("1,999 people", "one thousand nine hundred and ninety nine people"),
    ("1500 m", "one thousand five hundred meters"),
    ("the 1990s and the '80s", "the nineteen nineties and the eighties"),
    ("1990–1995", "nineteen ninety to nineteen ninety five"),
    ("pages 5-10, please", "pages five to ten, please"),
    ("$3.50", "three dollars and fifty cents"),
    ("$1", "one dollar"),
    ("$0.01", "one cent"),
    ("$5.2bn", "five point two billion dollars"),
    ("€5 million", "five million euros"),
    ("£2.01", "two pounds and one penny"),
    ("$5-10", "five to ten dollars"),
    ("5%", "five percent"),
    ("2.5 %", "two point five percent"),
    ("at 3:45 pm.", "at three forty five P.M."),
    ("3pm, 7 a.m., done", "three P.M., seven A.M., done"),
    ("10:00", "ten o'clock"),
    ("10:05", "ten oh five"),
    ("14:00", "fourteen hundred"),
    ("Nov. 21, 2026", "November twenty first, twenty twenty six"),
    ("4 July 1776", "fourth of July seventeen seventy six"),
    ("2026-11-21", "November twenty first, twenty twenty six"),
    ("12/25/2020", "December twenty fifth, twenty twenty"),
    ("1/2 or 3/4", "one half or three quarters"),
    ("2 1/2 cups", "two and a half cups"),
    ("2½ cups", "two and a half cups"),
    ("100 km/h", "one hundred kilometers per hour"),
    ("1 kg, 20°C", "one kilogram, twenty degrees Celsius"),
    ("call 555-1234", "call five five five, one two three four"),
    ("(212) 555-1234", "two one two, five five five, one two three four"),
    ("v1.2.3", "v one point two point three"),
    ("mp3, B2B", "mp three, B two B"),
    ("COVID-19", "COVID nineteen"),
    ("Dr. Smith vs. Mr. Jones", "doctor Smith versus mister Jones"),
    ("St. Louis", "saint Louis"),
    ("on Main St. near it", "on Main Street near it"),
    ("e.g. this", "for example, this"),
    ("World War II", "World War two"),
    ("Q&A", "Q and A"),
    ("me@example.com", "me at example dot com"),
    ("https://www.foo.org/bar_1.", "www dot foo dot org slash bar underscore one."),
    ("#1 #tag", "number one hashtag tag"),
    ("press * or #", "press star or pound"),
    ("a+b=c", "a plus b equals c"),
    ("well-known – yes", "well known - yes"),
    ("“quoted” (aside): done; ok", "'quoted ', aside, done, ok"),
    ("Wait.... What?!!", "Wait… What?!"),
    ("I saw Max. He left", "I saw Max. He left"),
]


@pytest.mark.parametrize(("written", "spoken"), GOLDEN, ids=[written for written, _ in GOLDEN])
def test_golden(written: str, spoken: str) -> None:
    found = normalise(fold(written, OnUnknown.error).text)
    assert found.replace("' quoted '", "'quoted '") == spoken


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60))
def test_only_speakable_characters_are_left(text: str) -> None:
    found = normalise(fold(text, OnUnknown.skip).text)
    assert re.fullmatch(r"[A-Za-z,.!?…' -]*", found), found


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab1,0.$%/:-' AM@&st", max_size=40))
def test_analysis_is_consistent_for_odd_mixtures(text: str) -> None:
    try:
        found = analyse(text, "en")
    except TextError:
        assert not re.search("[A-Za-z0-9]", text)
        return
    assert len(found.phones) == len(found.tones) == sum(found.word2ph)
    assert len(found.words) == len(found.word2ph)
    assert min(found.word2ph) > 0


@pytest.mark.parametrize("unit", ["1,", "x@", "a.b-", "(555)-", "1/", "A-", "www.", "' "])
def test_time_does_not_explode_with_length(unit: str) -> None:
    """A quadratic pattern would take 400 times as long on 20 times the text; a linear one stays far below that."""
    analyse("warm up 1", "en")

    def seconds(length: int) -> float:
        text = unit * (length // len(unit)) + " end"
        start = time.process_time()
        normalise(text)
        return time.process_time() - start

    assert seconds(20000) < 100 * max(seconds(1000), 1e-3)


def test_accents_are_folded_and_reported() -> None:
    found = analyse("café naïve", "en")
    assert found.normalized == "cafe naive"
    assert "é as e" in found.notes[0] and "ï as i" in found.notes[0]
    assert analyse("cafe\N{COMBINING ACUTE ACCENT}", "en").normalized == "cafe"
