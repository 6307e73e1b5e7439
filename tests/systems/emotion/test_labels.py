"""Labels and their scale, and what goes wrong."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from emotion_systems import build, rewritten
from factories import tiny_emotion_config, train_tiny_emotion

from lalia.config import ConfigError
from lalia.data import BadRow, Corpus, ManifestError, Row
from lalia.logs import read_metrics
from lalia.system import Clock
from lalia.systems.emotion.config import Config
from lalia.systems.emotion.system import EmotionSystem
from lalia.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the dialogues and their functionals, computed once for all tests of this file."""
    made = tmp_path_factory.mktemp("emotion")
    build(made)
    return made


# --- labels -------------------------------------------------------------------------------------------------------------
def test_labels_outside_the_scale_are_clipped_and_counted(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def change(index: int, row: Row) -> None:
        row.labels["valence"] = {0: 0.5, 1: 5.5}.get(index, row.labels["valence"])

    manifest = rewritten(folder, tmp_path / "out.jsonl", change)
    config = tiny_emotion_config(folder, **{"data.train": f"[{manifest}]"})
    with caplog.at_level(logging.WARNING, "lalia"):
        tables = EmotionSystem.make_tables(config, Corpus.read([manifest]))
    assert tables["labels"]["clipped"] == {"valence": 2, "arousal": 0}
    assert "2 training labels are outside 1 … 5" in caplog.text
    system = EmotionSystem(config, tables)  # type: ignore[arg-type]
    assert system.prepare(Corpus.read([manifest])[0], Clock()).labels[0] == 0.0


def test_labels_on_another_scale_are_an_error_that_names_it(folder: Path, tmp_path: Path) -> None:
    def seven(index: int, row: Row) -> None:
        row.labels = {name: 1.5 * value - 0.5 for name, value in row.labels.items()}

    manifest = rewritten(folder, tmp_path / "seven.jsonl", seven)
    config = tiny_emotion_config(folder, **{"data.train": f"[{manifest}]"})
    with pytest.raises(ManifestError, match=r"outside 1 … 5 .*labels.high"):
        EmotionSystem.make_tables(config, Corpus.read([manifest]))


def test_a_dimension_without_any_label_is_an_error_that_names_what_there_is(folder: Path) -> None:
    with pytest.raises(ManifestError, match="no training row has the label 'dominance'; rows have arousal, valence"):
        build(folder, **{"labels.dimensions": "[valence, arousal, dominance]"})


def test_unlabelled_turns_are_context_with_a_state_and_rejected_without(folder: Path, tmp_path: Path) -> None:
    def some(index: int, row: Row) -> None:
        if index % 3 == 0:
            row.labels = {}

    manifest = rewritten(folder, tmp_path / "some.jsonl", some)
    paths = {"data.train": f"[{manifest}]", "data.valid": f"[{manifest}]"}
    with_state, rows = build(folder, **paths)
    assert not any(with_state.reject(row) for row in rows)
    stateless, _ = build(folder, **paths, **{"model.state.kind": "none"})
    assert sum(bool(stateless.reject(row)) for row in rows) == 6 and "no label" in stateless.reject(rows[0])
    run = train_tiny_emotion(folder, "some", **paths, **{"train.epochs": 2})
    assert all(math.isfinite(float(r["loss/main/total"])) for r in read_metrics(run / "metrics.csv") if r["loss/main/total"])


def test_labels_go_through_the_model_and_come_back_in_their_units(folder: Path) -> None:
    system, rows = build(folder)
    row = rows[0]
    assert system.prepare(row, Clock()).labels.tolist() == pytest.approx([(row.labels[n] - 1) / 4 for n in ("valence", "arousal")])
    with torch.no_grad():
        system.model.head[-1].weight.zero_()
        system.model.head[-1].bias.copy_(torch.tensor([0.25, 1.0]))
    assert system.recognize_emotion([[row]])[0][0].values == pytest.approx({"valence": 2.0, "arousal": 5.0})


# --- bad input ------------------------------------------------------------------------------------------------------------
def test_a_missing_wav_leaves_the_rest_of_the_dialogue(folder: Path, tmp_path: Path) -> None:
    def gone(index: int, row: Row) -> None:
        if row.id == "d0t2":
            row.audio = str(tmp_path / "gone.wav")

    manifest = rewritten(folder, tmp_path / "gone.jsonl", gone)
    run = train_tiny_emotion(folder, "gone", **{"data.train": f"[{manifest}]"})
    import json

    report = json.loads((run / "dataset_report.json").read_text())
    assert report["usable"] == 17 and [r["row"] for r in report["rejected"]] == ["d0t2"]


def test_a_dialogue_of_one_turn_silence_and_a_very_long_turn(folder: Path, tmp_path: Path) -> None:
    import numpy as np
    import soundfile
    from factories import make_wave

    soundfile.write(tmp_path / "silence.wav", np.zeros(8000), 16000)
    soundfile.write(tmp_path / "long.wav", np.tile(make_wave(4.0), 20), 16000)
    soundfile.write(tmp_path / "dot.wav", np.zeros(3), 16000)
    system, _ = build(folder, **{"model.speech.kind": "wavlm", "model.speech.wavlm.source": "tiny"})
    for name in ("silence", "long", "dot"):
        (answer,) = system.recognize_emotion([[Row(name, str(tmp_path / f"{name}.wav"))]])[0]
        assert all(math.isfinite(value) for value in answer.values.values())


def test_errors_name_the_row_and_the_way_out(folder: Path, tmp_path: Path) -> None:
    system, _ = build(folder)
    with pytest.raises(BadRow, match="row 'x'.*no audio"):
        system.recognize_emotion([[Row("x")]])
    with pytest.raises(BadRow, match="row 'x'"):
        system.recognize_emotion([[Row("x", str(tmp_path / "none.wav"))]])
    with pytest.raises(ValueError, match="autoregressive"):
        system.recognize_emotion([[Row("x")]], feedback="labels")
    with pytest.raises(ValueError, match="feedback is one of"):
        system.recognize_emotion([[Row("x")]], feedback="teacher")
    assert system.recognize_emotion([[]]) == [[]]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"model.prosody": False}, "hear nothing"),
        ({"model.autoregressive": True, "model.state.kind": "none"}, "needs a state"),
        ({"model.state.tbptt": 0}, "at least 1 turn"),
        ({"labels.low": 6}, "below labels.high"),
        ({"labels.dimensions": "[valence, valence]"}, "different labels"),
        ({"sampling.end": 1, "sampling.start": 0.5}, "end <= start"),
        ({"ccc_memory": 1}, "ccc_memory"),
        ({"data.boundaries": "[1, 2]"}, "data.boundaries"),
    ],
)
def test_configurations_that_cannot_work_are_refused(folder: Path, overrides: dict[str, Any], said: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=said):
        tiny_emotion_config(folder, **overrides)


def test_defaults_are_those_of_the_seed() -> None:
    config = Config()
    assert config.data.batch_size == 8 and config.train.epochs == 50 and config.labels.dimensions == ["valence", "arousal"]
    assert math.ceil(8031 / config.data.batch_size) == 1004
    assert config.train.eval_epochs == 1 and train is not None
