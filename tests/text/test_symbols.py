"""The symbol table keeps its numbers; blanks and word2ph agree and leave their arguments alone."""

from __future__ import annotations

import json
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lalia.text import LANGUAGES, PUNCTUATION, SymbolTable, TextError, blank_word2ph, intersperse


def test_fixed_numbers() -> None:
    table = SymbolTable.from_languages(["en"])
    assert table.symbols[:2] == ["_", "UNK"]
    assert table.encode(["_", "UNK", ",", "AA"]) == [0, 1, 2, 2 + len(PUNCTUATION)]
    assert table.language_ids == {"zh": 0, "ja": 1, "en": 2}
    assert [table.tone_offset(name) for name in ("zh", "ja", "en")] == [0, 6, 8]
    assert table.tone_count == 12


def test_more_languages_keep_the_ids_of_fewer() -> None:
    small, large = SymbolTable.from_languages(["en"]), SymbolTable.from_languages(["ja", "zh", "en"])
    assert large.symbols[: len(small)] == small.symbols
    assert len(large) == 2 + len(PUNCTUATION) + sum(len(symbols) for _, _, symbols in LANGUAGES.values())


def test_no_symbol_belongs_to_two_languages() -> None:
    for (_, _, one), (_, _, two) in combinations(LANGUAGES.values(), 2):
        assert not set(one) & set(two)


def test_round_trip_through_json() -> None:
    table = SymbolTable.from_languages(["en", "zh"])
    again = SymbolTable.from_dict(json.loads(json.dumps(table.to_dict())))
    assert again.symbols == table.symbols and again.languages == table.languages
    with pytest.raises(TextError, match="'languages'"):
        SymbolTable.from_dict({"symbols": table.symbols})


def test_encode_names_what_it_lacks() -> None:
    with pytest.raises(TextError, match="'QQ', 'ja:a'"):
        SymbolTable.from_languages(["en"]).encode(["AA", "ja:a", "QQ"])


def test_wrong_language_and_tone() -> None:
    with pytest.raises(TextError, match="'xx'"):
        SymbolTable.from_languages(["xx"])
    table = SymbolTable.from_languages(["en"])
    assert table.encode_tones([0, 3], "en") == [8, 11]
    with pytest.raises(TextError, match="got 4"):
        table.encode_tones([4], "en")


def test_damaged_table_is_refused() -> None:
    with pytest.raises(TextError, match="once"):
        SymbolTable(["_", "UNK", "AA", "AA"], ["en"])
    with pytest.raises(TextError, match="begins"):
        SymbolTable(["AA", "UNK"], ["en"])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30))
def test_blanks_and_word2ph_agree(word2ph: list[int]) -> None:
    ids = list(range(1, sum(word2ph) + 1))
    before = list(word2ph)
    spread = intersperse(ids)
    assert len(spread) == 2 * len(ids) + 1 == sum(blank_word2ph(word2ph))
    assert spread[1::2] == ids and set(spread[::2]) == {0}
    assert blank_word2ph(word2ph) == blank_word2ph(word2ph)
    assert word2ph == before
