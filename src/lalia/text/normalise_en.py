"""English text → words as they are spoken: figures, money, dates, times, units, abbreviations, addresses, signs.

The rules are applied in order, each a pattern and what replaces it; every pattern starts at a fixed boundary so that
the time stays linear in the length of the text. Acronyms and unusual words are left for the pronunciation step, which
knows the dictionary.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from lalia.text import numbers_en as say
from lalia.text import words_en as table

_N = say.NUMBER
_START = r"(?<![\w.,])(?<!\d)"
_MONTH = "|".join((*table.MONTHS, *sorted(table.MONTH_SHORT, key=len, reverse=True)))

_UNIT = "|".join(re.escape(unit) for unit in sorted(table.UNITS, key=len, reverse=True))
_NO_TIME = r"(?!\d|[:.]\d|\s?[AaPp]\.?[Mm]\b)"
_YEAR = r"(?:,? (?P<y>\d{4})(?!\d))?"
_LARGE = r"(?:(?P<scale>(?: ?(?:thousand|million|billion|trillion))|bn|tn|[kKmMBbT])\b)?"
_AREA = r"(?:\+\d{1,3}[ -]?)?(?:\(\d{3}\) ?|\d{3}-)"
_PATH = r"(?:/[\w./-]{0,200})?(?![\w-])"
_LABEL = r"[a-zA-Z0-9-]{1,63}"
_DOMAINS = "com|org|net|edu|gov|io|ai|dev|info|co|uk|de|fr|jp|cn|eu"


def _address(match: re.Match[str]) -> str:
    body = re.sub(r"^https?://", "", match[0])
    stop = body[-1] if body[-1] in ".,!?:" else ""
    body = body[: len(body) - len(stop)]
    pieces = re.findall(r"[A-Za-z]+|\d+|.", body.rstrip("/"))
    return (
        " ".join(table.SIGN_WORDS.get(piece, say.digits(piece) if piece.isdigit() else piece) for piece in pieces)
        + stop
    )


def _abbreviation(match: re.Match[str]) -> str:
    word, stop, after = match["word"], match["stop"] or "", match.string[match.end() : match.end() + 2]
    key = word.lower()
    follows = re.match(r" [A-Z0-9]", after) is not None
    if not stop and key not in table.BARE:
        return match[0]
    ends = stop and match.end() >= len(match.string.rstrip(" \"'"))
    if key in table.CAPITAL and not (word[0].isupper() and follows):
        return ("Street" + "." * bool(ends)) if word == "St" else match[0]
    return table.ABBREVIATIONS[key] + ("." if ends or (key == "etc" and follows) else "")


def _day_words(day: str) -> str:
    return say.ordinal(int(day))


def _iso_date(match: re.Match[str]) -> str:
    month, day = int(match["m"]), int(match["d"])
    if not (1 <= month <= 12 and 1 <= day <= 31):
        return match[0]
    return f"{table.MONTHS[month - 1]} {say.ordinal(day)}, {say.year(int(match['y']))}"


def _slash_date(match: re.Match[str]) -> str:
    """American order (month first); day first when only that can be."""
    month, day = int(match["a"]), int(match["b"])
    if month > 12:
        month, day = day, month
    if not (1 <= month <= 12 and 1 <= day <= 31):
        return match[0]
    return f"{table.MONTHS[month - 1]} {say.ordinal(day)}, {say.year(int(match['y']))}"


def _month(name: str) -> str:
    return table.MONTH_SHORT.get(name, name)


def _month_day(match: re.Match[str]) -> str:
    tail = f", {say.year(int(match['y']))}" if match["y"] else ""
    return f"{_month(match['m'])} {_day_words(match['d'])}{tail}"


def _day_month(match: re.Match[str]) -> str:
    tail = f" {say.year(int(match['y']))}" if match["y"] else ""
    return f"{_day_words(match['d'])} of {_month(match['m'])}{tail}"


def _half_day(mark: str | None) -> str:
    return f" {mark[0].upper()}.M." if mark else ""


def _time(match: re.Match[str]) -> str:
    hour, minute, mark = int(match["h"]), int(match["m"]), match["half"]
    if hour > 24 or minute > 59:
        return match[0]
    if minute == 0:
        words = say.cardinal(hour) + ("" if mark else " hundred" if hour > 12 else " o'clock")
    else:
        words = f"{say.cardinal(hour)} {'oh ' if minute < 10 else ''}{say.cardinal(minute)}"
    seconds = f" and {say.cardinal(int(match['s']))} seconds" if match["s"] else ""
    return words + seconds + _half_day(mark)


def _money(match: re.Match[str]) -> str:
    main, small = table.MONEY[match["sign"]]
    figures, scale = match["n"], match["scale"]
    if scale:
        return f"{say.number(figures)} {table.SCALE.get(scale, scale.strip())} {main if main == 'yen' else main + 's'}"
    whole, _, part = figures.partition(".")
    if len(part) != 2:
        return f"{say.number(figures)} {main if say.is_one(figures) or main == 'yen' else main + 's'}"
    cents = int(part)
    coins = f"{say.cardinal(cents)} {small if cents == 1 else 'pence' if small == 'penny' else small + 's'}"
    if whole.strip("0,") == "":
        return coins
    notes = f"{say.number(whole)} {main if whole == '1' or main == 'yen' else main + 's'}"
    return f"{notes} and {coins}" if cents else notes


def _unit(match: re.Match[str]) -> str:
    singular, plural = table.UNITS[match["u"]]
    return f"{say.number(match['n'])} {singular if say.is_one(match['n']) else plural}"


def _ordinal(match: re.Match[str]) -> str:
    return say.ordinal(int(match["n"].replace(",", "")))


def _decade(match: re.Match[str]) -> str:
    return say.decade(int(match["n"]))


def _fraction(match: re.Match[str]) -> str:
    words = say.fraction(int(match["a"]), int(match["b"]))
    if not match["w"]:
        return words
    short = re.sub("^one (?=half|quarter)", "a ", words)
    return f"{say.cardinal(int(match['w']))} and {short}"


def _phone(match: re.Match[str]) -> str:
    groups = re.findall(r"\d+", match[0])
    return ("plus " if match[0].startswith("+") else "") + ", ".join(say.digits(group) for group in groups)


def _version(match: re.Match[str]) -> str:
    return " point ".join(say.number(part) for part in match[0].split("."))


def _range(match: re.Match[str]) -> str:
    return f"{say.integer_or_year(match['a'])} to {say.integer_or_year(match['b'])}"


def _roman(match: re.Match[str]) -> str:
    values = {"I": 1, "V": 5, "X": 10}
    figures = [values[letter] for letter in match["r"]]
    total = sum(-one if one < two else one for one, two in zip(figures, [*figures[1:], 0], strict=True))
    return f"{match['w']} {say.cardinal(total)}"


Rule = tuple[re.Pattern[str], "str | Callable[[re.Match[str]], str]"]
_HALF = r"(?:\s?(?P<half>[AaPp])\.?[Mm]\b\.?)"


def _rules() -> list[Rule]:
    def plain_number(match: re.Match[str]) -> str:
        return f" {say.integer_or_year(match[0])} "

    rules: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
        (r"(?<![\w.+@-])(?:https?://|www\.)[^\s<>\"']+", _address),
        (r"(?<![\w.+@-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,5}", _address),
        (rf"(?<![\w.@-]){_LABEL}(?:\.{_LABEL}){{0,3}}\.(?:{_DOMAINS}){_PATH}", _address),
        (r"(?<=[A-Za-z])(?=\d)", " "),
        (r"\be\.\s?g\.(?:,)?", "for example,"),
        (r"\bi\.\s?e\.(?:,)?", "that is,"),
        (r"\b[Nn]os?\.\s?(?=\d)", "number "),
        (rf"{_START}(?P<y>\d{{4}})-(?P<m>\d\d)-(?P<d>\d\d)(?!\d)", _iso_date),
        (rf"{_START}(?P<a>\d\d?)/(?P<b>\d\d?)/(?P<y>\d{{4}})(?!\d)", _slash_date),
        (rf"\b(?P<m>{_MONTH})\.? (?P<d>\d\d?)(?:st|nd|rd|th)?{_NO_TIME}{_YEAR}", _month_day),
        (rf"{_START}(?P<d>\d\d?)(?:st|nd|rd|th)? (?:of )?(?P<m>{_MONTH})\b\.?{_YEAR}", _day_month),
        (rf"(?<!\d )\b(?P<word>{'|'.join(table.ABBREVIATIONS)})\b(?P<stop>\.)?(?!')", _abbreviation),
        (rf"{_START}(?P<h>\d\d?):(?P<m>\d\d)(?::(?P<s>\d\d))?(?![\d:]){_HALF}?", _time),
        (rf"{_START}(?P<h>\d\d?){_HALF}", lambda m: say.cardinal(int(m["h"])) + _half_day(m["half"])),
        (r"(?<![\w.])(?P<half>[AaPp])\.\s?[Mm]\.?(?!\w)", lambda m: _half_day(m["half"]).strip()),
        (rf"(?P<sign>[$€£¥])(?P<a>{_N})\s?[–-]\s?(?P=sign)?(?=\d)", lambda m: f"{say.number(m['a'])} to {m['sign']}"),
        (rf"(?P<sign>[$€£¥])\s?(?P<n>{_N}){_LARGE}", _money),
        (rf"{_START}(?:{_AREA})?\d{{3}}-\d{{4}}(?!\d)", _phone),
        (r"(?<![\w)])-(?=\.?\d)", "minus "),
        (r"(?<!\d)(?P<n>\d{1,3}(?:,\d{3})+|\d+)(?:st|nd|rd|th)\b", _ordinal),
        (r"(?<![\w])'?(?P<n>(?:1\d|20)?\d0)'?s\b", _decade),
        (rf"(?<!\d)(?P<n>{_N})\s?%", lambda m: f"{say.number(m['n'])} percent"),
        (rf"(?<![\w.,])(?P<n>{_N})\s?(?P<u>{_UNIT})(?![\w'/])", _unit),
        (r"(?<![\d/.])(?:(?P<w>\d{1,9}) )?(?P<a>\d{1,4})/(?P<b>\d{1,4})(?![\d/])", _fraction),
        (r"(?<![\d.])\d+(?:\.\d+){2,}(?!\d)", _version),
        (r"(?<![\d.,-])(?P<a>\d+)\s?[–-]\s?(?P<b>\d+)(?![\d-]|[.,]\d)", _range),
        (r"\b(?P<w>War|Chapter|Part|Volume|Act|Section|Phase|Type|Class|Level|Title|Book) (?P<r>[IVX]{1,5})\b", _roman),
        (r"(?<=\d) ?\* ?(?=\d)", " times "),
        (r"#(?=\d)", "number "),
        (r"#(?=\w)", "hashtag "),
        (r"~ ?(?=\d)", "about "),
        (r"(?<=[A-Za-z])\.(?=\d)", " "),
        (r"(?<!\d)\.(?=\d)", " point "),
        (r"(?<=[A-Za-z\d])-(?=[A-Za-z\d])", " "),
        (rf"(?<!\d){_N}", plain_number),
    ]
    return [(re.compile(pattern, re.IGNORECASE if "word>" in pattern else 0), change) for pattern, change in rules]


_SIGNS: list[tuple[str, str]] = [
    (r"\s*&\s*", " and "),
    (r"@", " at "),
    (r"\+", " plus "),
    (r"=", " equals "),
    (r"%", " percent "),
    (r"°", " degrees "),
    (r"<", " less than "),
    (r">", " greater than "),
    (r"\\", " backslash "),
    (r"€", " euros "),
    (r"£", " pounds "),
    (r"¥", " yen "),
    (r"¢", " cents "),
    (r"\$", " dollar "),
    (r"(?<!\S)#(?=[\s.,!?]|$)", " pound "),  # the key of a telephone
    (r"#", " hash "),
    (r"(?<!\S)\*(?=[\s.,!?]|$)", " star "),
    (r"[*^~_/]", " "),
    (r"`", "'"),
    (r"\"", " ' "),
    (r"[|()\[\]{}:;]", ", "),
    (r"(?<=\w)-(?=\w)", " "),
    (r"\s*(?:–|--+)\s*", " - "),
    (r"\.{2,}", "…"),
    (r"([,!?…-])(?:\s*\1)+|(')'+", r"\1\2"),
    (r"\s+([,.!?…])", r"\1"),
    (r",+(?=[.!?…])", ""),
    (r"(?<=[!?…]),+|(?<=[a-z]\.),+", ""),
    (r"\s+", " "),
]
_COMPILED_RULES = _rules()
_COMPILED_SIGNS = [(re.compile(pattern), change) for pattern, change in _SIGNS]


def normalise(text: str) -> str:
    """Folded English text (see :mod:`lalia.text.fold`) → letters, apostrophes and ``, . ! ? … -`` only (and REPLACED).

    ``"Dr. Smith paid $3.50"`` → ``"doctor Smith paid three dollars and fifty cents"``. Acronyms with stops come out as
    ``U.S.A.``, a.m. and p.m. as ``A.M.`` and ``P.M.``; the case of the words is kept.
    """
    for pattern, change in _COMPILED_RULES:
        text = pattern.sub(change, text)
    for pattern, change in _COMPILED_SIGNS:
        text = pattern.sub(change, text)
    return text.strip().lstrip(",").strip()
