from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runner import lalia, refused
from emotion_fake import DIMENSIONS, Fake, make_rows

from lalia import crossval
from lalia.crossval import audit_folds, folds_of
from lalia.data import ManifestError, Row, write_manifest
from lalia.evaluate.emotion import SPEAKER_DEPENDENT, LeakError
from lalia.evaluate.emotion_results import EmotionEvaluation

FOLDS = 3


@dataclass
class Counters:
    step: int = 4
    interrupted: bool = False


def write_folds(folder: Path, change: Callable[[int, str, list[Row]], list[Row]] = lambda fold, part, rows: rows) -> Path:
    """Three sessions, each the test of one fold, the next one its validation, the third its training."""
    sessions = [make_rows(folder / "audio", f"s{n}", 4, 4 + 2 * n) for n in range(FOLDS)]
    for fold in range(FOLDS):
        for offset, part in enumerate(("test", "valid", "train")):
            rows = sessions[(fold + offset) % FOLDS]
            write_manifest(folder / f"fold{fold + 1}" / f"{part}.jsonl", change(fold, part, rows))
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text("system: emotion\nmodel: {speech: {kind: none}}\n")
    return path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Training and loading are played: what was asked for is noted, and each fold's system has a noise of its own."""
    calls: list[Any] = []

    def train(settings: Any, run: Path, source: Path) -> Counters:
        calls.append((settings, run))
        run.mkdir(parents=True, exist_ok=True)
        return Counters()

    monkeypatch.setattr(crossval, "train", train)
    monkeypatch.setattr(crossval.checkpoint, "load", lambda run, device, which: Fake(noise=0.3 * int(run.name[-1])))
    monkeypatch.setattr(crossval.checkpoint, "best_set", lambda run: None)
    monkeypatch.setattr(crossval.checkpoint, "latest_set", lambda run: None)
    return calls


def test_every_fold_is_trained_judged_and_pooled(config: Path, tmp_path: Path, trained: list[Any]) -> None:
    folder = write_folds(tmp_path / "data")
    done = lalia("crossval", config, folder, "-m", tmp_path / "runs", "train.epochs=3")
    assert done.exit_code == 0, done.output
    assert [run.name for _, run in trained] == ["fold1", "fold2", "fold3"]
    for number, (settings, _) in enumerate(trained, start=1):
        assert settings.data.train == [str(folder / f"fold{number}" / "train.jsonl")] and settings.train.epochs == 3
        assert settings.data.valid == [str(folder / f"fold{number}" / "valid.jsonl")]
        assert settings.data.features == str(folder / "features")
    found = json.loads((tmp_path / "runs" / "crossval.json").read_text())
    figures = {f["name"]: f for f in found["figures"]}
    by_fold = [EmotionEvaluation.load(tmp_path / "runs" / f"fold{n}" / "eval.json") for n in (1, 2, 3)]
    values = np.array([e.figure("ccc.valence").value for e in by_fold])  # type: ignore[union-attr]
    mean = figures["fold_mean.valence"]
    assert mean["value"] == pytest.approx(values.mean()) and mean["low"] is None and mean["n"] == FOLDS
    assert figures["fold_sd.valence"]["value"] == pytest.approx(values.std(ddof=1))
    assert "not the CCC of all" in mean["note"]
    pairs = np.array([(t.predicted["valence"], t.truth["valence"]) for e in by_fold for t in e.turns])
    said, true = pairs.T
    lin = 2 * np.cov(said, true, bias=True)[0, 1] / (said.var() + true.var() + (said.mean() - true.mean()) ** 2)
    pooled = figures["pooled.valence"]
    assert pooled["value"] == pytest.approx(lin, abs=1e-6) and pooled["low"] < lin < pooled["high"]
    assert pooled["n"] == len(pairs) == 72
    assert abs(pooled["value"] - mean["value"]) > 1e-4
    table = done.output
    assert "CCC-V" in table and "CCC-A" in table and "CCC-Avg" in table and f"{values[1]:.3f}" in table
    assert f"{values.mean():.3f} ± {values.std(ddof=1):.3f}" in table and f"{lin:.3f} (" in table
    page = (tmp_path / "runs" / "crossval.html").read_text()
    assert "pooled (95 %)" in page and not re.search(r"(?:src|href)=[\"'](?!data:)|https?://|<script", page)


def test_a_finished_fold_is_not_trained_again_unless_something_changed(config: Path, tmp_path: Path, trained: list[Any]) -> None:
    folder, run = write_folds(tmp_path / "data"), tmp_path / "runs"
    lalia("crossval", config, folder, "-m", run)
    (run / "fold2" / "finished.json").unlink()
    again = lalia("crossval", config, folder, "-m", run)
    assert again.exit_code == 0 and [r.name for _, r in trained[3:]] == ["fold2"] and "fold1: trained before" in again.output
    lalia("crossval", config, folder, "-m", run, "train.epochs=99")
    assert len(trained) == 7


def test_folds_that_were_made_anew_are_not_judged_with_runs_of_the_old_ones(
    config: Path, tmp_path: Path, trained: list[Any]
) -> None:
    folder, run = write_folds(tmp_path / "data"), tmp_path / "runs"
    lalia("crossval", config, folder, "-m", run)
    lines = (folder / "fold2" / "train.jsonl").read_text().splitlines()
    (folder / "fold2" / "train.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    said = refused("crossval", config, folder, "-m", run)
    assert "fold2" in said and "other manifests" in said and len(trained) == FOLDS


def test_a_stopped_fold_is_gone_on_with(
    config: Path, tmp_path: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run = write_folds(tmp_path / "data"), tmp_path / "runs"
    monkeypatch.setattr(crossval, "train", lambda *_: Counters(3, True))
    stopped = lalia("crossval", config, folder, "-m", run)
    assert stopped.exit_code == 130 and "stopped in fold1 at step 3" in stopped.output
    assert not (run / "crossval.json").exists() and not (run / "fold1" / "finished.json").exists()


def test_leaks_stop_everything_before_training(config: Path, tmp_path: Path, trained: list[Any]) -> None:
    def leak(fold: int, part: str, rows: list[Row]) -> list[Row]:
        return [replace(row, speaker="s1-a") for row in rows] if (fold, part) == (0, "test") else rows

    folder = write_folds(tmp_path / "data", leak)
    said = refused("crossval", config, folder, "-m", tmp_path / "runs")
    assert "fold1" in said and "'s1-a'" in said and "--allow-leaks" in said and not trained
    allowed = lalia("crossval", config, folder, "-m", tmp_path / "runs", "--allow-leaks")
    assert allowed.exit_code == 0 and SPEAKER_DEPENDENT in allowed.output and len(trained) == FOLDS
    figures = json.loads((tmp_path / "runs" / "crossval.json").read_text())["figures"]
    assert all(SPEAKER_DEPENDENT in f["note"] for f in figures)


def test_scripted_sentences_give_a_second_marked_table(config: Path, tmp_path: Path, trained: list[Any]) -> None:
    def scripted(fold: int, part: str, rows: list[Row]) -> list[Row]:
        read = {**rows[0].extra, "scripted": True}
        return [replace(row, text="The same.", extra=read) if row.turn == 0 else row for row in rows]

    done = lalia("crossval", config, write_folds(tmp_path / "data", scripted), "-m", tmp_path / "runs")
    assert done.exit_code == 0 and "ALL turns" in done.output
    figures = {f["name"]: f for f in json.loads((tmp_path / "runs" / "crossval.json").read_text())["figures"]}
    assert figures["pooled.mean"]["n"] == 60 and figures["pooled.mean.all"]["n"] == 72
    assert figures["fold_mean.mean.all"]["n"] == FOLDS
    assert figures["fold_mean.mean.all"]["value"] != figures["fold_mean.mean"]["value"]


def test_a_fold_without_known_sentences_counts_as_it_is_in_the_table_of_all_turns(
    config: Path, tmp_path: Path, trained: list[Any]
) -> None:
    def scripted(fold: int, part: str, rows: list[Row]) -> list[Row]:
        read = {**rows[0].extra, "scripted": True}
        return [replace(row, text="The same.", extra=read) if row.turn == 0 and fold == 0 else row for row in rows]

    done = lalia("crossval", config, write_folds(tmp_path / "data", scripted), "-m", tmp_path / "runs")
    assert done.exit_code == 0 and " – " not in done.output
    folds = json.loads((tmp_path / "runs" / "crossval.json").read_text())["folds"]
    second = {f["name"]: f["value"] for f in folds["fold2"]}
    assert second["ccc.mean.all"] == second["ccc.mean"]


def test_folds_must_be_whole_and_must_not_share_test_rows(tmp_path: Path) -> None:
    folder = write_folds(tmp_path / "data")
    (folder / "fold10").mkdir()
    with pytest.raises(ManifestError, match=r"fold10.train.jsonl"):
        folds_of(folder)
    write_folds(folder)
    (folder / "fold10").rmdir()
    assert [fold.name for fold in folds_of(folder)] == ["fold1", "fold2", "fold3"]
    assert set(audit_folds(folds_of(folder))["fold1"]) == {"train", "valid"}
    with pytest.raises(ManifestError, match="no folder"):
        folds_of(tmp_path / "absent")
    (folder / "fold2" / "test.jsonl").write_text((folder / "fold1" / "test.jsonl").read_text())
    with pytest.raises((ManifestError, LeakError), match="tested in fold1 and in fold2"):
        audit_folds(folds_of(folder))


def test_folds_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        for part in ("train", "valid", "test"):
            path = tmp_path / f"fold{number}" / f"{part}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.touch()
    assert [fold.name for fold in folds_of(tmp_path)] == ["fold1", "fold2", "fold10"]


def test_wrong_calls_are_refused(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folds(tmp_path / "data")
    refused("crossval", config, code=2)
    assert "those of each fold" in refused("crossval", config, folder, "data.train=[x.jsonl]")
    speech = tmp_path / "speech.yaml"
    speech.write_text("system: vits2\n")
    assert "'vits2' does not" in refused("crossval", speech, folder)
    assert "at least two" in refused("crossval", config, tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in refused("crossval", config, folder)


def test_the_fake_has_the_dimensions_of_the_configuration() -> None:
    assert Fake.dimensions == DIMENSIONS
