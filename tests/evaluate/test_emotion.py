from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emotion_fake import DIMENSIONS, Fake, chance, make_rows

from lalia.data import Corpus, ManifestError, Row, write_manifest
from lalia.evaluate.agreement import Agreement, Pair
from lalia.evaluate.emotion import SPEAKER_DEPENDENT, UNAUDITED, LeakError, NonFiniteAnswer, RunData, evaluate_emotion
from lalia.evaluate.emotion_pictures import binned
from lalia.evaluate.emotion_report import figure_lines, write_emotion_report
from lalia.evaluate.emotion_results import EmotionEvaluation, figure_name
from lalia.sections import RunConfig


def plain_ccc(predicted: Sequence[float], truth: Sequence[float]) -> float:
    """Lin 1989, from its definition."""
    a, b = np.asarray(predicted), np.asarray(truth)
    covariance = ((a - a.mean()) * (b - b.mean())).mean()
    return float(2 * covariance / (a.var() + b.var() + (a.mean() - b.mean()) ** 2))


def random_pairs(dialogues: int, turns: int, seed: int = 0) -> list[Pair]:
    random = np.random.default_rng(seed)
    pairs = []
    for number in range(dialogues):
        for _ in range(turns):
            truth = random.uniform(1, 5, 2)
            said = 0.6 * truth + random.normal(1, 0.7, 2)
            pairs.append(Pair(f"d{number}", dict(zip(DIMENSIONS, said, strict=True)), dict(zip(DIMENSIONS, truth, strict=True))))
    return pairs


# --- agreement ------------------------------------------------------------------------------------------------------
def test_figures_are_those_of_the_definitions_over_the_whole_set() -> None:
    pairs = random_pairs(7, 9)
    found = {f.name: f for f in Agreement(DIMENSIONS, pairs).figures()}
    for name in DIMENSIONS:
        said, true = np.array([(p.predicted[name], p.truth[name]) for p in pairs]).T
        assert found[f"ccc.{name}"].value == pytest.approx(plain_ccc(said, true), abs=1e-6)
        assert found[f"pearson.{name}"].value == pytest.approx(np.corrcoef(said, true)[0, 1])
        assert found[f"rmse.{name}"].value == pytest.approx(np.sqrt(((said - true) ** 2).mean()))
        assert found[f"ccc.{name}"].low < found[f"ccc.{name}"].value < found[f"ccc.{name}"].high
    assert found["ccc.mean"].value == pytest.approx((found["ccc.valence"].value + found["ccc.arousal"].value) / 2)
    by_dialogue = [Agreement(DIMENSIONS, [p for p in pairs if p.dialogue == f"d{n}"]).values("ccc")[0] for n in range(7)]
    assert abs(np.mean(by_dialogue) - found["ccc.valence"].value) > 1e-3  # the mean of parts is something else


def test_a_draw_of_dialogues_is_the_set_of_their_turns() -> None:
    pairs = random_pairs(5, 6)
    drawn = np.array([[0, 0, 3, 4, 1], [2, 2, 2, 2, 2]])
    values = Agreement(DIMENSIONS, pairs).values("ccc", drawn)
    for row, chosen in zip(values, drawn, strict=True):
        repeated = [p for number in chosen for p in pairs if p.dialogue == f"d{number}"]
        for index, name in enumerate(DIMENSIONS):
            expected = plain_ccc([p.predicted[name] for p in repeated], [p.truth[name] for p in repeated])
            assert row[index] == pytest.approx(expected, abs=1e-6)


def test_constant_predictions_missing_labels_and_single_dialogues() -> None:
    flat = [Pair(f"d{n}", {"valence": 3.0, "arousal": 3.0}, {"valence": 1.0 + n}) for n in range(4)]
    found = {f.name: f for f in Agreement(DIMENSIONS, flat).figures()}
    assert found["ccc.valence"].value == 0 and found["ccc.valence"].n == 4
    assert "ccc.arousal" not in found and found["ccc.mean"].value == 0
    assert np.isnan(found["pearson.valence"].value) and "interval is too narrow" in found["ccc.mean"].note
    alone = Agreement(DIMENSIONS, random_pairs(1, 9)).mean_figure()
    assert np.isnan(alone.low) and "one dialogue" in alone.note


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """Coverage of 60 sets of 25 dialogues against the figure of a very large set."""
    whole = Agreement(["valence"], [valence_alone(p) for p in random_pairs(4000, 4, 99)]).mean()
    hits = 0
    for seed in range(60):
        figure = Agreement(["valence"], [valence_alone(p) for p in random_pairs(25, 4, seed)]).mean_figure()
        hits += figure.low <= whole <= figure.high
    assert hits >= 50


def valence_alone(pair: Pair) -> Pair:
    return Pair(pair.dialogue, {"valence": pair.predicted["valence"]}, {"valence": pair.truth["valence"]})


# --- the evaluation -------------------------------------------------------------------------------------------------
@pytest.fixture
def data(tmp_path: Path) -> RunData:
    rows = [make_rows(tmp_path / "audio", part) for part in ("train", "valid")]
    return RunData(*(Corpus.from_rows(part) for part in rows))


def run(system: Fake, rows: Sequence[Row], data: RunData, out: Path, **options: Any) -> EmotionEvaluation:
    return evaluate_emotion(system, Corpus.from_rows(rows), data, out=out, progress=False, **options)


def test_the_figures_of_a_known_system(data: RunData, tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "audio", "test", 6, 6)
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    system = Fake(noise=0.5)
    result = run(system, shuffled, data, tmp_path / "out", label="step 7")
    for name in DIMENSIONS:
        said = [3 + 0.8 * (row.labels[name] - 3) + 0.5 * chance(row.id + name) for row in rows]
        assert result.figure(f"ccc.{name}").value == pytest.approx(plain_ccc(said, [row.labels[name] for row in rows]), abs=1e-6)  # type: ignore[union-attr]
    assert all(ids == sorted(ids) for call in system.calls for ids in call["ids"])  # turns come in time order
    assert result.mark == "" and result.corpus_rows == 36 and result.parameters == 8
    assert not any(f.name.endswith((".all", ".labels")) for f in result.figures)


def test_eval_json_is_strict_and_reads_back(data: RunData, tmp_path: Path) -> None:
    result = run(Fake(), make_rows(tmp_path / "audio", "test", 1, 3), data, tmp_path)
    text = (tmp_path / "eval.json").read_text()
    assert "NaN" not in text and json.loads(text)["schema"] == "emotion-1"
    assert EmotionEvaluation.load(tmp_path / "eval.json").to_dict() == result.to_dict()
    (tmp_path / "eval.json").write_text(text.replace("emotion-1", "emotion-9"))
    with pytest.raises(ValueError, match="emotion-9"):
        EmotionEvaluation.load(tmp_path / "eval.json")


@pytest.mark.parametrize("crossing", ["speaker", "session", "dialogue", "row", "valid"])
def test_leaks_are_refused_and_marked_when_allowed(crossing: str, data: RunData, tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "audio", "test", 3, 4)
    if crossing == "speaker":
        rows[0] = replace(rows[0], speaker="train-a")
    elif crossing == "session":
        rows[0] = replace(rows[0], extra={**rows[0].extra, "session": "train"})
    elif crossing == "dialogue":
        rows[:4] = [replace(row, dialogue="train-d0") for row in rows[:4]]
    elif crossing == "row":
        rows[0] = replace(rows[0], id="train-d0-00")
    else:
        rows[0] = replace(rows[0], speaker="valid-a")
    system = Fake()
    with pytest.raises(LeakError, match="not independent(.|\n)*--allow-leaks"):
        run(system, rows, data, tmp_path)
    assert not system.calls and not (tmp_path / "eval.json").exists()
    allowed = run(system, rows, data, tmp_path, allow_leaks=True)
    assert allowed.mark == SPEAKER_DEPENDENT and all(SPEAKER_DEPENDENT in f.note for f in allowed.figures)
    assert SPEAKER_DEPENDENT in figure_lines(allowed)


def test_without_training_manifests_nothing_is_proved(tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "audio", "test", 2, 3)
    with pytest.raises(LeakError, match="nothing can be proved"):
        run(Fake(), rows, RunData(), tmp_path)
    assert run(Fake(), rows, RunData(), tmp_path, allow_leaks=True).mark == UNAUDITED


def test_manifests_of_the_run_are_found_or_asked_for(tmp_path: Path) -> None:
    manifest = tmp_path / "train.jsonl"
    write_manifest(manifest, make_rows(tmp_path / "audio", "train", 1, 2))

    class Config(RunConfig):
        def __getitem__(self, key: str) -> Any:
            return type("Data", (), {"train": [str(tmp_path / "gone.jsonl")], "valid": [str(tmp_path / "valid.jsonl")]})()

    with pytest.raises(ManifestError, match=r"gone.jsonl.*--train"):
        RunData.of(Config())
    assert len(RunData.of(Config(), [manifest]).train or []) == 2
    assert RunData.of(Config(), [manifest]).valid is None
    write_manifest(tmp_path / "valid.jsonl", make_rows(tmp_path / "audio", "valid", 1, 3))
    assert len(RunData.of(Config(), [manifest]).valid or []) == 3, "what chose the checkpoint is audited where it is found"
    assert RunData.of(Config(), tolerant=True).train is None


def test_the_headline_leaves_out_scripted_sentences_of_the_training(tmp_path: Path) -> None:
    train = make_rows(tmp_path / "audio", "train", 1, 3)
    train = [replace(row, text="I am here.", extra={**row.extra, "scripted": True}) for row in train]
    rows = make_rows(tmp_path / "audio", "test", 4, 5)
    heard = [replace(row, text="i am HERE", extra={**row.extra, "scripted": True}) for row in rows[:7]]
    result = run(Fake(noise=0.7), [*heard, *rows[7:]], RunData(Corpus.from_rows(train)), tmp_path)
    headline, every = result.figure("ccc.valence"), result.figure("ccc.valence.all")
    assert headline is not None and every is not None and headline.n == 13 and every.n == 20
    assert headline.value != every.value and "ALL turns" in every.note and "not in training" in headline.note
    only = run(Fake(noise=0.7), heard, RunData(Corpus.from_rows(train)), tmp_path)
    assert only.figure("ccc.valence").n == 7 and "also trained on" in " ".join(only.notes)  # type: ignore[union-attr]


def test_personalisation_is_measured_on_the_same_turns_for_every_k(data: RunData, tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "audio", "test", 4, 30)
    rows[3] = replace(rows[3], labels={})  # its speaker's first ten labelled turns reach one further
    result = run(Fake(bias=1.5), rows, data, tmp_path)
    assert result.few_shot["shots"] == [0, 1, 3, 5, 10]
    assert result.few_shot["turns"] == 4 * 2 * 5 - 1 and result.few_shot["speakers"] == 8
    found = [result.figure(f"ccc.mean.k{k}") for k in (0, 1, 3, 5, 10)]
    assert {f.n for f in found if f} == {39}
    values = [f.value for f in found if f]
    assert values == sorted(values) and values[-1] > values[0] + 0.1
    gain = result.figure("ccc_gain.mean.k10")
    assert gain is not None and gain.value == pytest.approx(values[-1] - values[0]) and gain.low > 0
    short = run(Fake(bias=1.5), make_rows(tmp_path / "audio", "short", 6, 12), data, tmp_path)
    assert short.few_shot["shots"] == [0, 1, 3] and short.few_shot["turns"] == 36
    none = run(Fake(), make_rows(tmp_path / "audio", "few", 2, 3), data, tmp_path)
    assert none.few_shot == {} and any("Too few labelled turns" in note for note in none.notes)


def test_teacher_forcing_is_shown_with_its_gap(data: RunData, tmp_path: Path) -> None:
    system = Fake(noise=1.0, autoregressive=1)
    result = run(system, make_rows(tmp_path / "audio", "test", 5, 6), data, tmp_path, few_shot=False)
    own, forced, gap = (result.figure(n) for n in ("ccc.mean", "ccc.mean.labels", "ccc_gap.mean"))
    assert own and forced and gap and gap.value == pytest.approx(forced.value - own.value) and gap.low > 0
    assert "no use" in forced.note and {call["feedback"] for call in system.calls} == {"own", "labels"}
    assert not run(Fake(), make_rows(tmp_path / "audio", "test", 2, 3), data, tmp_path).figure("ccc_gap.mean")


def test_what_cannot_be_heard_is_named_and_the_rest_is_measured(data: RunData, tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "audio", "test", 9, 4)
    rows[1] = replace(rows[1], audio=str(tmp_path / "gone.wav"))
    rows[5] = replace(rows[5], extra={**rows[5].extra, "broken": True})
    result = run(Fake(), rows, data, tmp_path)
    assert set(result.skipped) == {rows[1].id, *(row.id for row in rows[4:8])}
    assert "gone.wav" in result.skipped[rows[1].id] and "cannot be heard" in result.skipped[rows[4].id]
    assert len(result.turns) == 36 - 5


def test_bad_answers_and_bad_input_are_errors(data: RunData, tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "audio", "test", 2, 3)
    with pytest.raises(NonFiniteAnswer, match="test-d0-00 is not finite"):
        run(Fake(gain=float("nan")), rows, data, tmp_path)
    with pytest.raises(ValueError, match="no turn of the test set has a label"):
        run(Fake(), [replace(row, labels={}) for row in rows], data, tmp_path)
    with pytest.raises(ManifestError, match="two rows with turn 0"):
        run(Fake(), [replace(row, turn=0) for row in rows], data, tmp_path)
    with pytest.raises(ValueError, match="cannot recognise emotion"):
        evaluate_emotion(object(), Corpus.from_rows(rows), data, out=tmp_path)


def test_labels_outside_the_scale_are_clipped_and_counted(data: RunData, tmp_path: Path) -> None:
    system = Fake()
    system.config.labels = type("Scale", (), {"low": 1.0, "high": 5.0})()  # type: ignore[attr-defined]
    rows = make_rows(tmp_path / "audio", "test", 2, 3)
    rows[0] = replace(rows[0], labels={"valence": 5.5, "arousal": 0.5})
    result = run(system, rows, data, tmp_path)
    assert result.turns[0].truth == {"valence": 5.0, "arousal": 1.0}
    assert any("1 turns have a label outside 1 … 5" in note for note in result.notes)


# --- pictures and page ----------------------------------------------------------------------------------------------
def test_bins_hold_equally_many_and_keep_ties_together() -> None:
    by, values = np.arange(100.0), np.arange(100.0) * 2
    across, up = binned(by, values, 10)
    assert np.allclose(up, 2 * across) and len(across) == 10 and across[0] == pytest.approx(4.5)
    tied, _ = binned(np.array([1.0] * 50 + [2.0] * 30), np.zeros(80), 10)
    assert list(tied) == [1.0, 2.0]
    assert len(binned(np.zeros(0), np.zeros(0))[0]) == 0


def test_report_holds_every_figure_and_needs_nothing_else(data: RunData, tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "audio", "test", 6, 12)
    rows[0] = replace(rows[0], audio=str(tmp_path / "<gone>.wav"), speaker="train-a")
    result = run(Fake(noise=0.5, bias=1.0, autoregressive=1), rows, data, tmp_path, allow_leaks=True, label="step 7")
    page = write_emotion_report(tmp_path / "report.html", result).read_text()
    for figure in result.figures:
        assert figure_name(figure) in page and f">{figure.value:.3f}<" in page
    assert not re.search(r"(?:src|href)=[\"'](?!data:)|https?://|@import|url\(|<script", page)
    assert SPEAKER_DEPENDENT in page and "&lt;gone&gt;" in page and "data:image/png" in page
    assert f"<dt>System</dt><dd>{result.system}</dd>" in page and "<dt>Operating system</dt>" in page
    assert "Personalisation" in page and "Own answers and true labels" in page and "train-a" in page
