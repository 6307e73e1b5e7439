"""O-17: four-way questions, scored without a liking for letters, under four conditions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from factories import write_wav

from lalia.data import Corpus, Row
from lalia.evaluate import audiobench as bench
from lalia.system import Question

OPTIONS = ["red", "green", "blue", "white"]


def corpus(folder: Path, count: int = 200, kinds: int = 4, files: int = 12) -> Corpus:
    rows = []
    for number in range(files):
        write_wav(folder / f"{number}.wav", 0.3 + 0.02 * number, 16000, seed=number)
    for number in range(count):
        right = (number // kinds) % 4
        options = list(np.random.default_rng(number).permutation(OPTIONS))
        extra = {"question": f"Question {number}?", "options": options, "right": right}
        rows.append(Row(f"q{number}", str(folder / f"{number % files}.wav"), task=f"kind{number % kinds}", extra=extra))
    return Corpus.from_rows(rows)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return corpus(tmp_path_factory.mktemp("bench"))


class Random:
    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)

    def score_answers(self, questions: Sequence[Question]) -> list[list[float]]:
        return [list(self.rng.standard_normal(len(question.answers))) for question in questions]


class Reader:
    """Never listens: a score for each answer from the text alone, with a strong liking for the letter A."""

    def score_answers(self, questions: Sequence[Question]) -> list[list[float]]:
        found = []
        for question in questions:
            text = question.messages[-1].text
            shown = dict(line.split(". ", 1) for line in text.splitlines() if line[1:3] == ". ")
            meant = [shown.get(answer, answer) for answer in question.answers]
            found.append([self.taste(text.splitlines()[0], word) + 50.0 * (answer == "A") for word, answer in
                          zip(meant, question.answers, strict=True)])  # fmt: skip
        return found

    def taste(self, question: str, word: str) -> float:
        return float(sum(map(ord, question + word)) % 17)


class Listener(Reader):
    """Knows the right answer of each question by its recording."""

    def __init__(self, asked: Sequence[bench.Asked]) -> None:
        self.known = {(q.question, q.waves[0].tobytes()): q.options[q.right] for q in asked}
        self.right = ""

    def score_answers(self, questions: Sequence[Question]) -> list[list[float]]:
        found = []
        for question in questions:
            message = question.messages[-1]
            self.right = self.known.get((message.text.splitlines()[0], message.audio[0].tobytes()), "")
            found += super().score_answers([question])
        return found

    def taste(self, question: str, word: str) -> float:
        return 20.0 * (word == self.right) + super().taste(question, word)


def test_a_random_model_is_at_chance_within_its_interval(questions: Corpus) -> None:
    inside = 0
    for seed in range(5):
        found = bench.evaluate_audiobench(Random(seed), questions)
        for style in bench.STYLES:
            for accuracy in found.scores[style].values():
                inside += accuracy.low <= bench.CHANCE <= accuracy.high
                assert 0.10 < accuracy.value < 0.42 and accuracy.count == 200
    assert inside >= 34  # of 40 intervals of 95 %


def test_one_that_only_reads_scores_the_same_under_all_conditions(questions: Corpus) -> None:
    found = bench.evaluate_audiobench(Reader(), questions)
    for style in bench.STYLES:
        assert len({accuracy.right for accuracy in found.scores[style].values()}) == 1
        assert not found.listens(style)
    assert found.letters == {"A": 800, "B": 0, "C": 0, "D": 0}  # likes A every time, and it helps nothing
    assert found.scores["letters"]["real"] == found.scores["texts"]["real"]


def test_one_that_listens_is_right_and_falls_without_the_recording(questions: Corpus, tmp_path: Path) -> None:
    asked, skipped = bench.read_questions(questions)
    assert not skipped
    found = bench.evaluate_audiobench(Listener(asked), questions, out=tmp_path)
    reader = bench.evaluate_audiobench(Reader(), questions)
    for style in bench.STYLES:
        scores = found.scores[style]
        assert scores["real"].value == 1.0 and found.listens(style)
        assert scores["silent"] == scores["shuffled"] == reader.scores[style]["real"]
    stored = json.loads((tmp_path / "eval.json").read_text())
    assert stored["schema"] == bench.SCHEMA and stored["listens"] == {"letters": True, "texts": True}
    assert [answer["letters"]["real"] for answer in stored["answers"]] == [answer["right"] for answer in stored["answers"]]
    page = bench.write_bench_report(tmp_path / "report.html", found).read_text()
    assert "100.0 %" in page and "kind3" in page and "listens" in page
    assert any("listens" in line for line in bench.figure_lines(found))


def test_every_option_stands_once_at_every_letter() -> None:
    asked = bench.Asked("q", "k", "Which?", OPTIONS, 2, [])
    turns = [q.messages[0].text.splitlines()[1:] for q in bench._with_letters(asked, [])]
    for place, letter in enumerate("ABCD"):
        assert sorted(turn[place] for turn in turns) == sorted(f"{letter}. {option}" for option in OPTIONS)
    scores = np.full((4, 4), -9.0)
    for turn in range(4):
        scores[turn, (2 - turn) % 4] = 0.0  # the letter of option 2 at each turn
    assert bench._rotated(scores, None) == 2


def test_conditions_are_what_they_say(questions: Corpus) -> None:
    asked, _ = bench.read_questions(questions)
    real = bench.recordings(asked, "real")
    for condition in ("silent", "shuffled"):
        found = bench.recordings(asked, condition)
        assert {len(wave) for waves in found for wave in waves} == {int(np.median([len(w[0]) for w in real]))}
    assert all(not wave.any() for waves in bench.recordings(asked, "silent") for wave in waves)
    shuffled = bench.recordings(asked, "shuffled")[11][0]
    assert np.isin(shuffled, real[11][0]).all() and not np.array_equal(shuffled, real[11][0][: len(shuffled)])
    other = bench.recordings(asked, "other")
    assert sorted(id(w[0]) for w in other) == sorted(id(w[0]) for w in real)
    assert all(a is not b for a, b in zip(other, real, strict=True))
    places = bench.elsewhere(["a", "b", "a", "a", "c"])
    assert all(place != index for index, place in enumerate(places)) and {places[0], places[2], places[3]} == {0, 2, 3}


def test_wilson_is_wilson() -> None:
    found = bench.wilson(80, 200)
    assert (found.low, found.high) == pytest.approx((0.33459, 0.46916), abs=2e-5)
    assert bench.wilson(0, 10).low == pytest.approx(0.0) and bench.wilson(10, 10).high == pytest.approx(1.0)
    assert np.isnan(bench.wilson(0, 0).value)


def test_what_is_no_question_is_told(tmp_path: Path) -> None:
    good = corpus(tmp_path, 4)
    assert bench.is_benchmark(good)
    rows = [*good, Row("plain", str(tmp_path / "0.wav")), Row("gone", str(tmp_path / "gone.wav"), extra=dict(good[0].extra))]
    rows.append(Row("three", str(tmp_path / "0.wav"), extra={"question": "?", "options": ["a", "b", "c"], "right": 0}))
    mixed = Corpus.from_rows(rows)
    assert not bench.is_benchmark(mixed)
    found = bench.evaluate_audiobench(Random(), mixed, styles=["texts"])
    assert found.questions == 4 and set(found.skipped) == {"plain", "gone", "three"}
    with pytest.raises(ValueError, match="styles are letters, texts"):
        bench.evaluate_audiobench(Random(), good, styles=["words"])
    with pytest.raises(ValueError, match="no question of 1 can be asked"):
        bench.evaluate_audiobench(Random(), Corpus.from_rows([Row("plain", str(tmp_path / "0.wav"))]))
