"""English words for figures. num2words does the counting; here its style is made that of running speech."""

from __future__ import annotations

import re
from functools import lru_cache

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LONGEST = 15  # more digits than this without commas are read one by one
#: a number as written: thousands commas, decimals
NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"


@lru_cache(maxsize=4096)
def _spoken(value: int, kind: str) -> str:
    from num2words import num2words  # lazily: it loads every language it knows

    return str(num2words(value, lang="en", to=kind)).replace(",", "").replace("-", " ")


def cardinal(value: int) -> str:
    """42 → "forty two"."""
    return _spoken(value, "cardinal")


def ordinal(value: int) -> str:
    """21 → "twenty first"."""
    return _spoken(value, "ordinal")


def year(value: int) -> str:
    """1999 → "nineteen ninety nine", 2009 → "two thousand and nine"."""
    return _spoken(value, "year")


def decade(value: int) -> str:
    """1990 → "nineteen nineties", 90 → "nineties", 2000 → "two thousands"."""
    words = year(value) if value > 99 else cardinal(value)
    return words[:-1] + "ies" if words.endswith("y") else words + "s"


def digits(figures: str) -> str:
    """ "007" → "zero zero seven"; what is not a digit is left out."""
    return " ".join(DIGITS[int(figure)] for figure in figures if figure.isdigit())


def number(figures: str) -> str:
    """A number as written (``1,234.50``) → words; figures with a leading zero and very long ones are read digit by
    digit.
    """
    whole, _, fraction = figures.replace(",", "").partition(".")
    listed = len(whole) > LONGEST or (len(whole) > 1 and whole.startswith("0"))
    words = digits(whole) if listed else cardinal(int(whole or "0"))
    return f"{words} point {digits(fraction)}" if fraction else words


def is_one(figures: str) -> bool:
    return figures in ("1", "1.0")


def fraction(above: int, below: int) -> str:
    """(3, 4) → "three quarters"; a denominator of 0, 1 or above 100 is read "over"."""
    if not 2 <= below <= 100:
        return f"{cardinal(above)} over {cardinal(below)}"
    name = {2: "half", 4: "quarter"}.get(below) or ordinal(below)
    plural = "halves" if name == "half" else name + "s"
    return f"{cardinal(above)} {name if above == 1 else plural}"


def integer_or_year(figures: str) -> str:
    """Four plain figures from 1100 to 2099 are read as a year, everything else as a number."""
    if re.fullmatch(r"1[1-9]\d\d|20\d\d", figures):
        return year(int(figures))
    return number(figures)
