"""``emotion``, ``evaluate``, ``features`` and ``crossval`` on a tiny run of the real system."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runner import lalia
from factories import make_dialogues, tiny_emotion_config, train_tiny_emotion
from typer.testing import CliRunner

from lalia.cli import app
from lalia.config import save
from lalia.data import Corpus, write_manifest
from lalia.dialogues import dialogues


def people(manifest: Path, name: str) -> Path:
    """The same dialogues held by other people in another session."""
    rows = list(Corpus.read([manifest]))
    for row in rows:
        row.id, row.speaker, row.dialogue = name + row.id, name + row.speaker, name + row.dialogue
        row.extra["session"] = name
    write_manifest(manifest, rows)
    return manifest


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny_emotion(tmp_path_factory.mktemp("emotion"))


@pytest.fixture(scope="module")
def held_out(run: Path) -> Path:
    return people(make_dialogues(run.parent / "test", 3, 5, seed=5), "t")


def test_evaluate_audits_and_measures(run: Path, held_out: Path, tmp_path: Path) -> None:
    done = lalia("evaluate", run, "--data", held_out, "-o", tmp_path)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["mark"] == "" and set(found["leaks"]) == {"train", "valid"} and len(found["turns"]) == 14
    leaky = lalia("evaluate", run, "--data", run.parent / "dialogues" / "all.jsonl", "-o", tmp_path)
    assert leaky.exit_code == 1 and "not independent" in leaky.output


def test_live_answers_equal_those_for_the_files(run: Path, held_out: Path, tmp_path: Path) -> None:
    assert lalia("emotion", run, held_out, "-o", tmp_path / "x.jsonl").exit_code == 0
    offline = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    corpus = Corpus.read([held_out])
    lines = [
        line for turns in dialogues(corpus) for line in [*(f"{corpus[i].audio}\t{corpus[i].speaker}" for i in turns), ""]
    ]
    live = CliRunner().invoke(app, ["emotion", str(run), "--online"], input="\n".join(lines) + "\n")
    answers = [json.loads(line) for line in live.stdout.splitlines()]
    assert live.exit_code == 0 and len(answers) == len(offline) == 14
    for one, other in zip(answers, offline, strict=True):
        assert one["valence"] == pytest.approx(other["valence"], abs=1e-5)
        assert one["arousal"] == pytest.approx(other["arousal"], abs=1e-5)


def test_training_finds_the_features_of_the_command(tmp_path: Path) -> None:
    manifest = make_dialogues(tmp_path / "dialogues", 3, 3)
    assert "8 computed" in lalia("features", "egemaps", manifest, "--workers", 0).output
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "dialogues" / "features" / "egemaps").glob("*.pt")}
    save(tiny_emotion_config(tmp_path), tmp_path / "tiny.yaml")
    done = lalia("train", tmp_path / "tiny.yaml", "-m", tmp_path / "run")
    assert done.exit_code == 0 and "emotion" in done.output.split("to use it:")[1] and len(before) == 8
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_crossval_trains_judges_and_pools(tmp_path: Path) -> None:
    parts = [people(make_dialogues(tmp_path / f"s{n}", 2, 4, seed=n), f"p{n}") for n in range(3)]
    for fold in range(3):
        for offset, part in enumerate(("test", "valid", "train")):
            write_manifest(tmp_path / "folds" / f"fold{fold + 1}" / f"{part}.jsonl", Corpus.read([parts[(fold + offset) % 3]]))
    save(tiny_emotion_config(tmp_path, **{"data.train": "[]", "data.valid": "[]"}), tmp_path / "tiny.yaml")
    done = lalia("crossval", tmp_path / "tiny.yaml", tmp_path / "folds", "-m", tmp_path / "runs")
    assert done.exit_code == 0, done.output
    figures = {f["name"]: f for f in json.loads((tmp_path / "runs" / "crossval.json").read_text())["figures"]}
    assert figures["pooled.mean"]["n"] == 21 and figures["fold_mean.mean"]["n"] == 3
    assert len(list((tmp_path / "folds" / "features" / "egemaps").glob("*.pt"))) == 21
    again = lalia("crossval", tmp_path / "tiny.yaml", tmp_path / "folds", "-m", tmp_path / "runs")
    assert again.exit_code == 0 and again.output.count("trained before") == 3
