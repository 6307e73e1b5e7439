"""AudioBench-mini: four-way questions about recordings, and the ablation that shows whether a model listens.

Every question is asked under four conditions: the ``real`` recording; ``silent``; ``shuffled``, its samples in random order; and
``other``, the recording of another question of the same kind. Silent and shuffled recordings are all of one length, so that the
length tells nothing either. A model that reads only the text scores the same under all four; one that listens falls to chance
(25 %) without the real recording.

Answers are chosen by log-probability in two ways. ``letters``: the options stand below the question and the letters are compared;
each question is asked four times, every option once at every letter, and the scores of an option are averaged, so that a liking
for a letter counts for nothing. ``texts``: no options are shown, the length-normalised log-probability of each option's words is
compared.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lalia import audio
from lalia.data import BadRow, Corpus, Row
from lalia.evaluate.page import page
from lalia.evaluate.results import write_json
from lalia.runfolder import write_atomic
from lalia.system import Message, Question, ScoresAnswers

SCHEMA = "audiobench-1"
RATE = 16000
CONDITIONS = ("real", "silent", "shuffled", "other")
STYLES = ("letters", "texts")
LETTERS = "ABCD"
CHANCE = 0.25
Z_95 = 1.959963984540054
#: questions put to the model in one call
TOGETHER = 4


@dataclass
class Asked:
    """One question: its recordings (float32 [S] at 16 kHz each), four options, the index of the right one."""

    id: str
    kind: str
    question: str
    options: list[str]
    right: int
    waves: list[np.ndarray]


@dataclass
class Accuracy:
    """Share of right answers with Wilson's 95 % interval (Wilson 1927)."""

    value: float
    low: float
    high: float
    right: int
    count: int


@dataclass
class BenchEvaluation:
    """``scores[style][condition]``, the same by kind, the answers of every question, and what was left out."""

    system: str
    scores: dict[str, dict[str, Accuracy]]
    kinds: dict[str, dict[str, dict[str, Accuracy]]]
    letters: dict[str, int]  # how often each letter was preferred before the rotation is averaged away, real recordings
    answers: list[dict[str, Any]]
    skipped: dict[str, str] = field(default_factory=dict)
    label: str = ""
    seed: int = 0
    questions: int = 0
    schema: str = SCHEMA

    def listens(self, style: str = "letters") -> bool:
        """Whether the interval with real recordings lies above those of all ablations."""
        found = self.scores[style]
        return all(found["real"].low > found[name].high for name in CONDITIONS if name != "real")

    def to_dict(self) -> dict[str, Any]:
        record = asdict(self)
        return {"schema": record.pop("schema"), **record, "listens": {style: self.listens(style) for style in self.scores}}


def wilson(right: int, count: int, z: float = Z_95) -> Accuracy:
    """Wilson's score interval; count 0 gives (nan, nan, nan)."""
    if not count:
        return Accuracy(math.nan, math.nan, math.nan, 0, 0)
    share = right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Accuracy(share, middle - half, middle + half, right, count)


def is_question(extra: Mapping[str, Any]) -> bool:
    """Whether the row with this ``extra`` is a four-way question as ``lalia prepare instructions`` writes them."""
    return {"question", "options", "right"} <= set(extra)


def is_benchmark(corpus: Corpus) -> bool:
    """Whether all rows are such questions."""
    return all(map(is_question, corpus.column("extra")))


def evaluate_audiobench(
    system: ScoresAnswers,
    corpus: Corpus,
    *,
    out: Path | None = None,
    styles: Sequence[str] = STYLES,
    seed: int = 0,
    label: str = "",
    name: str = "",
) -> BenchEvaluation:
    """Ask every question of ``corpus`` under every condition. ``out``: folder of ``eval.json``.

    Raises:
        ValueError: rows that are no four-way questions, an unknown style, or none of whose recordings can be read.
    """
    unknown = [style for style in styles if style not in STYLES]
    if unknown or not styles:
        raise ValueError(f"styles are {', '.join(STYLES)}, got {', '.join(styles) or 'none'}")
    asked, skipped = read_questions(corpus)
    if not asked:
        raise ValueError(f"no question of {len(corpus)} can be asked; the first: {next(iter(skipped.items()), '')}")
    heard = {condition: recordings(asked, condition, seed) for condition in CONDITIONS}
    chosen: dict[str, dict[str, list[int]]] = {style: {} for style in styles}
    letters = dict.fromkeys(LETTERS, 0)
    for style in styles:
        for condition in CONDITIONS:
            liked = letters if condition == "real" and style == "letters" else None
            chosen[style][condition] = _choose(system, asked, heard[condition], style, liked)
    evaluation = BenchEvaluation(
        system=name or type(system).__name__,
        scores={style: {c: _accuracy(asked, picked) for c, picked in found.items()} for style, found in chosen.items()},
        kinds={style: _by_kind(asked, found) for style, found in chosen.items()},
        letters=letters,
        answers=[_record(question, index, chosen) for index, question in enumerate(asked)],
        skipped=skipped,
        label=label,
        seed=seed,
        questions=len(asked),
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "eval.json", evaluation.to_dict())
    return evaluation


# --- questions ------------------------------------------------------------------------------------------------------
def read_questions(corpus: Corpus) -> tuple[list[Asked], dict[str, str]]:
    """Rows → questions with their recordings, and the reason for each row that cannot be asked."""
    asked: list[Asked] = []
    skipped = dict(corpus.rejected)
    for row in corpus:
        try:
            asked.append(_read(row))
        except (BadRow, audio.AudioError) as error:
            skipped[row.id] = str(error)
    return asked, skipped


def _read(row: Row) -> Asked:
    extra = row.extra
    if not is_question(extra):
        raise BadRow("no four-way question: the row needs extra.question, options and right (see `lalia prepare instructions`)")
    options, right = list(extra["options"]), extra["right"]
    if len(options) != len(LETTERS) or len(set(options)) != len(options) or right not in range(len(options)):
        raise BadRow(f"a question has four different options and the index of the right one, got {options} and {right}")
    folder = Path(row.audio).parent
    clips = [(row.audio, row.start, row.duration)]
    clips += [(str(folder / other["audio"]), other["start"], other["duration"]) for other in extra.get("others", [])]
    waves = [audio.read(path, RATE, start, duration)[0] for path, start, duration in clips]
    return Asked(row.id, row.task, extra["question"], options, int(right), waves)


def recordings(asked: Sequence[Asked], condition: str, seed: int = 0) -> list[list[np.ndarray]]:
    """What is played for each question under ``condition``; see the module. ValueError for an unknown one."""
    if condition == "real":
        return [question.waves for question in asked]
    length = int(np.median([len(wave) for question in asked for wave in question.waves]))
    if condition == "silent":
        silence = np.zeros(length, dtype=np.float32)
        return [[silence] * len(question.waves) for question in asked]
    if condition == "shuffled":
        rng = np.random.default_rng([seed, 1])
        return [[np.resize(rng.permutation(wave), length) for wave in question.waves] for question in asked]
    if condition != "other":
        raise ValueError(f"conditions are {', '.join(CONDITIONS)}, got {condition!r}")
    places = elsewhere([f"{question.kind}/{len(question.waves)}" for question in asked], seed)
    return [asked[place].waves for place in places]


def elsewhere(kinds: Sequence[str], seed: int = 0) -> list[int]:
    """For each question the index of another one, of the same kind where there is one, none given to itself."""
    rng = np.random.default_rng([seed, 2])
    groups = [np.flatnonzero([kind == name for kind in kinds]) for name in dict.fromkeys(kinds)]
    alone = [group for group in groups if len(group) == 1]
    groups = [group for group in groups if len(group) > 1] + ([np.concatenate(alone)] if alone else [])
    places = np.arange(len(kinds))
    for group in groups:
        order = rng.permutation(group)
        places[order] = np.roll(order, 1)
    return [int(place) for place in places]


# --- asking ---------------------------------------------------------------------------------------------------------
def _choose(
    system: ScoresAnswers, asked: Sequence[Asked], heard: Sequence[list[np.ndarray]], style: str, liked: dict[str, int] | None
) -> list[int]:
    """Index of the option that the model prefers, for each question."""
    ask, judge = (_with_letters, _rotated) if style == "letters" else (_with_texts, _plain)
    chosen: list[int] = []
    for first in range(0, len(asked), TOGETHER):
        group = list(zip(asked[first : first + TOGETHER], heard[first : first + TOGETHER], strict=True))
        put = [ask(question, waves) for question, waves in group]
        scores = iter(system.score_answers([question for several in put for question in several]))
        for several in put:
            chosen.append(judge(np.array([next(scores) for _ in several], dtype=np.float64), liked))
    return chosen


def _with_letters(question: Asked, waves: list[np.ndarray]) -> list[Question]:
    """The question four times, its options turned on by one place each time."""
    asked = []
    for turn in range(len(LETTERS)):
        turned = [question.options[(place + turn) % 4] for place in range(4)]
        shown = "\n".join([question.question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, turned, strict=True))])
        asked.append(Question([Message("user", shown, waves)], list(LETTERS)))
    return asked


def _rotated(scores: np.ndarray, liked: dict[str, int] | None) -> int:
    """Scores [4 turns, 4 letters] → option with the highest mean over the turns, of log-probabilities among the letters."""
    scores = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    if liked is not None:
        for letter in scores.argmax(1):
            liked[LETTERS[int(letter)]] += 1
    options = np.array([[scores[turn, (option - turn) % 4] for turn in range(4)] for option in range(4)])
    return int(options.mean(1).argmax())


def _with_texts(question: Asked, waves: list[np.ndarray]) -> list[Question]:
    return [Question([Message("user", question.question, waves)], list(question.options))]


def _plain(scores: np.ndarray, liked: dict[str, int] | None) -> int:
    return int(scores[0].argmax())


# --- results --------------------------------------------------------------------------------------------------------
def _accuracy(asked: Sequence[Asked], chosen: Sequence[int]) -> Accuracy:
    return wilson(sum(question.right == option for question, option in zip(asked, chosen, strict=True)), len(asked))


def _by_kind(asked: Sequence[Asked], found: dict[str, list[int]]) -> dict[str, dict[str, Accuracy]]:
    result: dict[str, dict[str, Accuracy]] = {}
    for kind in dict.fromkeys(question.kind for question in asked):
        there = [index for index, question in enumerate(asked) if question.kind == kind]
        result[kind] = {c: _accuracy([asked[i] for i in there], [chosen[i] for i in there]) for c, chosen in found.items()}
    return result


def _record(question: Asked, index: int, chosen: dict[str, dict[str, list[int]]]) -> dict[str, Any]:
    picked = {style: {c: LETTERS[found[index]] for c, found in by.items()} for style, by in chosen.items()}
    return {"id": question.id, "kind": question.kind, "right": LETTERS[question.right], **picked}


def figure_lines(evaluation: BenchEvaluation) -> list[str]:
    """A line for each style and condition, and one that says what they mean."""
    lines = []
    for style, found in evaluation.scores.items():
        for condition, a in found.items():
            lines.append(f"{'audiobench.' + style + '.' + condition:<34}{_percent(a)}  {a.right} of {a.count}")
        lines.append(f"{style}: {verdict(evaluation, style)}")
    return lines + ([f"{len(evaluation.skipped)} questions could not be asked"] if evaluation.skipped else [])


def verdict(evaluation: BenchEvaluation, style: str) -> str:
    """What the four accuracies say, in words."""
    real = evaluation.scores[style]["real"]
    if evaluation.listens(style):
        return "the model listens: with the real recordings it is better than with any other, intervals apart"
    if real.low > CHANCE:
        return "better than chance, but not clearly better than without the recordings"
    return "no better than chance (25 %)"


def _percent(a: Accuracy) -> str:
    return f"{100 * a.value:5.1f} %  ({100 * a.low:.1f} … {100 * a.high:.1f})"


def write_bench_report(path: str | Path, evaluation: BenchEvaluation) -> Path:
    """One self-contained page: accuracies by condition and by kind."""
    parts = [f"<h1>AudioBench-mini: {html.escape(evaluation.system)} {html.escape(evaluation.label)}</h1>"]
    parts.append(f"<p>{evaluation.questions} four-way questions; chance is 25 %; Wilson's 95 % intervals.</p>")
    head = "".join(f"<th>{condition}</th>" for condition in CONDITIONS)
    for style, found in evaluation.scores.items():
        rows: list[tuple[str, dict[str, Accuracy]]] = [("all", found), *evaluation.kinds[style].items()]
        body = "".join(_row(kind, by) for kind, by in rows)
        parts.append(f"<h2>{style}</h2><p>{html.escape(verdict(evaluation, style))}</p>")
        parts.append(f"<table><thead><tr><th>kind</th>{head}</tr></thead><tbody>{body}</tbody></table>")
    parts.append("".join(f"<p>left out: {html.escape(i)}: {html.escape(why)}</p>" for i, why in evaluation.skipped.items()))
    write_atomic(Path(path), page("AudioBench-mini", "\n".join(parts)))
    return Path(path)


def _row(kind: str, by: dict[str, Accuracy]) -> str:
    cells = "".join(f"<td>{_percent(by[condition])}</td>" for condition in CONDITIONS)
    return f"<tr><th>{html.escape(kind)}</th>{cells}</tr>"
