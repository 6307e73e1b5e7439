"""O-16: questions on labelled speech, kept apart from evaluation; and the questions of AudioBench-mini."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import write_wav

from lalia import audio
from lalia.corpora import prepare
from lalia.corpora._common import CorpusError
from lalia.corpora._questions import VOICES, Questioner, length_ranges, plain, word_ranges, words_of
from lalia.corpora.instructions import MINI, overlap_of, sound
from lalia.data import Row, read_manifest, write_manifest

WORDS = [
    "alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet", "kilo", "lima", "mike", "november",
    "oscar", "papa",
]  # fmt: skip
LANGUAGES, SPEAKERS = ("en", "fr", "it", "es"), ("ann", "bob", "eve", "dan")
GENDERS = ["ann=woman", "bob=man", "eve=woman", "dan=man"]


def text(number: int, name: str) -> str:
    """Texts of 2 … 11 words; the last tells the clip."""
    words = [WORDS[(number * 7 + 3 * place + number // 16) % 16] for place in range(1 + number % 10)]
    return " ".join([*words, f"{name}{number}"])


def clips(count: int, name: str, folder: Path | None = None) -> list[Row]:
    rows = []
    for number in range(count):
        seconds = 0.5 + 0.2 * (number % 17)
        path = folder / f"{name}{number}.wav" if folder else Path(f"{name}{number}.wav")
        if folder:
            write_wav(path, seconds, 4000, seed=number)
        who = number % 4
        rows.append(Row(f"{name}{number}", str(path), 0.0, seconds, text(number, name), SPEAKERS[who], LANGUAGES[who]))
    return rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    for name, count in (("train", 60), ("valid", 10), ("test", 50)):
        rows = clips(count, name, folder / "audio")
        if name == "train":
            rows[0].text = "ALPHA, Test0!"  # said in the test part too
            rows[1].audio = str(folder / "audio" / "test3.wav")  # a recording of the test part under another id
        write_manifest(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made")
    prepare("instructions", out, base=[str(base)], genders=GENDERS, progress=False, questions=80, max_bad_fraction=0.5)
    return out


def rows_of(path: Path) -> list[Row]:
    return list(read_manifest(path))


def test_nothing_of_the_evaluation_is_in_training(made: Path) -> None:
    train, mini = rows_of(made / "train.jsonl"), rows_of(made / MINI)
    assert len(train) > 300 and len(mini) == 80
    assert overlap_of(train, mini) == {"clip ids": 0, "recordings": 0, "texts": 0}
    used = {name for row in train for name in row.extra["clips"]}
    assert "train2" in used and not {"train0", "train1"} & used
    facts = json.loads((made / "report.json").read_text())["facts"]
    assert facts["kept_out_of_training"] == {"texts": 1, "recordings": 1}
    assert facts["overlap"] == {"clip ids": 0, "recordings": 0, "texts": 0}


def test_the_check_sees_an_overlap() -> None:
    first, second = clips(2, "a")
    first.extra, second.extra = {"clips": ["a0"]}, {"clips": ["a1"]}
    assert overlap_of([first], [second]) == {"clip ids": 0, "recordings": 0, "texts": 0}
    second.text = first.text.upper() + "!"
    assert overlap_of([first], [second])["texts"] == 1
    second.extra["others"] = [{"audio": "a0.wav", "start": 0.0, "duration": 0.0}]
    second.extra["clips"].append("a0")
    assert overlap_of([first], [second]) == {"clip ids": 1, "recordings": 1, "texts": 1}


def test_the_same_again_gives_the_same_bytes(base: Path, made: Path, tmp_path: Path) -> None:
    prepare("instructions", tmp_path, base=[str(base)], genders=GENDERS, progress=False, questions=80, max_bad_fraction=0.5)
    for name in (MINI, "train.jsonl", "test.jsonl"):
        mine, theirs = (
            [{k: v for k, v in json.loads(line).items() if k != "audio"} for line in (folder / name).read_text().splitlines()]
            for folder in (tmp_path, made)
        )
        for row in [*mine, *theirs]:
            row["extra"].pop("others", None)  # paths relative to another folder
        assert mine == theirs
    first = sorted((made / "audio").iterdir())
    assert first and all((tmp_path / "audio" / path.name).read_bytes() == path.read_bytes() for path in first)


def truth(row: Row, clip: dict[str, Row]) -> str:
    """The right option from the labels of the clips, worked out anew."""
    own = [clip.get(name) for name in row.extra["clips"]]
    first = own[0]
    if row.task == "sound":
        made = row.extra["clips"][0].split("-")
        return "a person speaking" if first else "a tone" if made[2] == "tone" else made[2]
    assert first is not None
    if row.task in ("said", "first", "last"):
        words = [word.lower() for word in words_of(first.text)]
        return {"said": first.text, "first": words[0], "last": words[-1]}[row.task]
    if row.task == "language":
        return {"en": "English", "fr": "French", "it": "Italian", "es": "Spanish"}[first.language]
    if row.task == "speaker":
        return first.speaker
    sex = ["woman" if c and c.speaker in ("ann", "eve") else "man" for c in own]
    if row.task == "voices":
        return VOICES[[("woman", "woman"), ("man", "man"), ("woman", "man"), ("man", "woman")].index((sex[0], sex[1]))]
    if row.task == "odd":
        speakers = [c.speaker if c else "" for c in own]
        return ("the first", "the second", "the third", "the fourth")[[speakers.count(s) for s in speakers].index(1)]
    return ""


def test_the_right_answer_is_right_and_the_letters_are_even(base: Path, made: Path) -> None:
    clip = {row.id: row for row in rows_of(base / "test.jsonl")}
    mini = rows_of(made / MINI)
    checked = 0
    for row in mini:
        options, right = row.extra["options"], row.extra["right"]
        assert len(set(options)) == 4
        answer = truth(row, clip)
        checked += bool(answer)
        assert not answer or options[right] == answer, row
    assert checked >= 60
    assert set(Counter(row.extra["right"] for row in mini).values()) == {20}
    kinds = Counter(row.task for row in mini)
    assert len(kinds) == 10 and set(kinds.values()) == {8}


def test_ranges_hold_the_value(made: Path, base: Path) -> None:
    clip = {row.id: row for row in rows_of(base / "test.jsonl")}
    for row in rows_of(made / MINI):
        if row.task not in ("words", "length"):
            continue
        own, name = clip[row.extra["clips"][0]], row.extra["options"][row.extra["right"]]
        value = len(words_of(own.text)) if row.task == "words" else own.duration
        numbers = [float(part) for part in name.replace("s", "").split() if part.replace(".", "").isdigit()]
        low, high = (0, numbers[0]) if "under" in name else (numbers[0], 99) if "over" in name or "more" in name else (
            numbers[0], numbers[-1])  # fmt: skip
        assert low <= value <= high, (name, value)


def test_the_text_alone_tells_nothing() -> None:
    """Guessing the commonest right option for each set of options is no better than chance on questions not seen before."""
    rows = [row for row in clips(400, "t")]
    for row in rows:
        row.extra = {"gender": "woman" if row.speaker in ("ann", "eve") else "man"}
        words = row.text.split()
        row.text = " ".join([*(["please"] if int(row.id[1:]) % 2 else []), *words[1:]])  # half begin alike
    ranges = length_ranges([r.duration for r in rows]), word_ranges([len(words_of(r.text)) for r in rows])
    maker = Questioner(rows, {}, *ranges, seed=1)
    for kind in ("first", "words", "length", "language", "voices", "odd"):
        items = []
        for _ in range(240):
            maker.used.clear()
            items.append(maker.draw(kind, True))
        liked = Counter(item.answer for item in items[:120])
        hits = sum(max(item.options, key=lambda o: liked[o]) == item.answer for item in items[120:])
        assert hits / 120 < 0.25 + 4 * (0.25 * 0.75 / 120) ** 0.5, kind


def test_texts_that_stand_together_are_of_like_length_one_without_words_too() -> None:
    rows = [row for row in clips(60, "t")]
    for number, row in enumerate(rows):
        row.text, row.language = " ".join(f"w{number}" for _ in range(number % 12)) or "…", "en"
    maker = Questioner(rows, {}, *(length_ranges([1, 2, 3, 4]), word_ranges([1, 2, 3, 4])), seed=1)
    for words in (0, 3, 11):
        counts = {len(words_of(row.text)) for row in maker._pool("English", words)}
        assert counts == {n for n in range(12) if abs(n - words) <= 0.34 * max(n, words)}
    assert len(maker._pool("English", None)) == 60


def test_made_sounds_are_what_they_are_called() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        quiet, noise, tone = (sound(kind, 1.0, rng) for kind in ("silence", "noise", "a tone"))
        assert len(quiet) == 16000 and np.abs(quiet).max() < 1e-3 < 0.01 < np.abs(noise).max() <= 0.5
        spectra = [np.abs(np.fft.rfft(wave * np.hanning(16000))) ** 2 for wave in (noise, tone)]
        noisy, pure = (np.sort(s)[-8:].sum() / s.sum() for s in spectra)
        assert pure > 0.95 > noisy


def test_weights_mix_and_several_recordings_lie_beside_the_first(base: Path, tmp_path: Path) -> None:
    weights = ["said=0", "same=3", "speech=1"] + [f"{kind}=0" for kind in (
        "words", "first", "last", "language", "speaker", "sound", "length", "gender", "voices", "odd")]  # fmt: skip
    prepare("instructions", tmp_path, base=[str(base)], weights=weights, count=60, progress=False, max_bad_fraction=0.5)
    train = rows_of(tmp_path / "train.jsonl")
    kinds = Counter(row.task for row in train)
    assert set(kinds) == {"same", "speech"} and kinds["same"] > 1.5 * kinds["speech"]
    for row in train:
        said = row.extra["messages"][-1]["text"]
        others = row.extra.get("others", [])
        assert all((Path(row.audio).parent / other["audio"]).is_file() for other in others)
        if row.task == "speech":
            assert (said == "yes") == (not row.extra["clips"][0].startswith("made"))
            assert audio.info(row.audio).seconds > 0.4


def test_text_only_instructions_are_mixed_in_but_not_those_of_the_evaluation(base: Path, tmp_path: Path) -> None:
    held = rows_of(base / "test.jsonl")[7].text
    lines: list[Any] = [
        {"instruction": "Add.", "input": "1 and 1", "output": "2"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"question": "Say it.", "answer": held},
        {"question": "No answer?"},
    ]
    path = tmp_path / "more.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\nnot json\n")
    report = prepare("instructions", tmp_path / "out", base=[str(base)], mix=[str(path)], progress=False, max_bad_fraction=0.5)
    texts = [row for row in rows_of(tmp_path / "out" / "train.jsonl") if row.task == "text"]
    assert [row.extra["messages"][0]["text"] for row in texts] == ["Add.\n1 and 1", "Hi"]
    assert report.rejected == {"broken line": 2}
    assert report.facts["kept_out_of_training"]["text-only with a text of the evaluation"] == 1
    assert not any(plain(held) in plain(row.extra["messages"][-1]["text"]) for row in texts)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "needs --base"),
        ({"base": ["nowhere"]}, "no such manifest or folder"),
        ({"base": ["x"], "weights": ["sad=1"]}, "no kind 'sad'"),
        ({"base": ["x"], "weights": ["said=much"]}, "needs a number"),
        ({"base": ["x"], "choice_share": 2.0}, "choice_share"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=said):
        prepare("instructions", tmp_path, progress=False, **options)
