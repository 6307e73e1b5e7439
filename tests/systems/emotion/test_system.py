"""The system through the floor: learning, stretches, resuming, loading, labels, and what goes wrong."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import make_dialogues, tiny_emotion_config, train_tiny_emotion

from lalia import checkpoint, run_setup
from lalia.config import ConfigError
from lalia.data import BadRow, Corpus, ManifestError, Row
from lalia.dialogues import group_rows
from lalia.loader import Loader
from lalia.logs import read_metrics
from lalia.nn.ccc import ccc
from lalia.system import Clock, RecognizesEmotion, System
from lalia.systems.emotion.config import Config, Decay, SamplingConfig
from lalia.systems.emotion.system import EmotionSystem
from lalia.train import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the dialogues and their functionals, computed once for all tests of this file."""
    made = tmp_path_factory.mktemp("emotion")
    build(made)
    return made


def build(folder: Path, **overrides: Any) -> tuple[EmotionSystem, Corpus]:
    config = tiny_emotion_config(folder, **overrides)
    rows = Corpus.read(config["data"].train)
    torch.manual_seed(0)
    system = EmotionSystem(config, EmotionSystem.make_tables(config, rows))  # type: ignore[arg-type]
    system.load_external()
    return system, rows


def one_batch(system: EmotionSystem, rows: Corpus) -> Any:
    loader = Loader(system, rows, system.config.data, seed=0)
    return next(loader.batches(0))


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.latest_set(checkpoint.RunFolder(run))
    assert found is not None
    return found.model()


# --- learning ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["none", "ema", "mamba"])
def test_learns_two_dialogues_by_heart(folder: Path, tmp_path: Path, kind: str) -> None:
    rows = [row for dialogue in group_rows(Corpus.read([folder / "dialogues" / "all.jsonl"])) for row in dialogue][:9]
    from lalia.data import write_manifest

    manifest = tmp_path / "two.jsonl"
    write_manifest(manifest, rows)
    settings = {"data.train": f"[{manifest}]", "data.valid": f"[{manifest}]", "model.state.kind": kind, "model.width": 24}
    run = train_tiny_emotion(
        folder, f"heart-{kind}", **settings, **{"train.epochs": 80, "train.eval_epochs": 80, "data.batch_size": 9}
    )
    values = [float(r["ccc/mean"]) for r in read_metrics(run / "metrics.csv") if r["split"] == "eval"]
    assert values[-1] > 0.9


def test_one_optimizer_step_for_every_stretch_of_turns(folder: Path) -> None:
    system, rows = build(folder, **{"data.batch_size": 4, "model.state.tbptt": 2})
    batch = one_batch(system, rows)
    assert batch.grid.shape == (4, 5) and sorted(batch.grid[batch.grid >= 0].tolist()) == list(range(18))
    turns = [losses for _, losses in system.turns(batch, Clock())]
    assert len(turns) == 3 and all(set(losses) == {"loss_ccc", "loss_mse"} for losses in turns)


def test_turns_of_a_batch_are_in_time_order_and_speakers_are_told_apart(folder: Path) -> None:
    system, rows = build(folder, **{"data.batch_size": 4})
    batch = one_batch(system, rows)
    for number, names in enumerate(batch.names):
        found = [batch.rows[i] for i in batch.grid[number].tolist() if i >= 0]
        assert len({row.dialogue for row in found}) == 1 and [row.turn for row in found] == list(range(len(found)))
        assert [names[p] for p in batch.party[number, : len(found)].tolist()] == [row.speaker for row in found]


def test_a_stretch_learns_only_from_its_own_turns_but_knows_the_past(folder: Path) -> None:
    """Truncated back-propagation: the second stretch's gradient does not reach what was heard in the first."""
    system, rows = build(folder, **{"data.batch_size": 4, "model.state.tbptt": 3})
    batch = one_batch(system, rows)
    leaf = batch.prosody.requires_grad_(True)
    first = set(batch.grid[:, :3].flatten().tolist()) - {-1}
    for number, (_, losses) in enumerate(system.turns(batch, Clock())):
        (gradient,) = torch.autograd.grad(sum(losses.values()), leaf, retain_graph=True)  # type: ignore[arg-type]
        touched = set(gradient.abs().sum(1).nonzero()[:, 0].tolist())
        assert touched <= first if number == 0 else touched and not touched & first


def test_validation_ccc_is_that_of_the_whole_set_and_batches_do_not_change_it(folder: Path, tmp_path: Path) -> None:
    system, rows = build(folder)
    found = group_rows(rows)
    said = [e.values["arousal"] for answers in system.recognize_emotion(found) for e in answers]
    pairs = torch.tensor([said, [row.labels["arousal"] for d in found for row in d]], dtype=torch.float64).T
    expected = float(ccc(pairs[:, :1], pairs[:, 1:]))
    from lalia.logs import Logs

    for size in (1, 3, 4):
        system.config.data.batch_size = size
        loader = Loader(system, rows, system.config.data, seed=0, training=False)
        with Logs(tmp_path / str(size)) as logs:
            figures = run_setup.validate(system, loader, system.config, {"loss_ccc": 1.0, "loss_mse": 0.5}, logs, 0)
        assert figures["ccc/arousal"] == pytest.approx(expected, abs=1e-4)
        assert figures["ccc/mean"] == pytest.approx((figures["ccc/valence"] + figures["ccc/arousal"]) / 2)
    assert system.meter is None


def test_epoch_lines_and_outputs_are_those_of_the_seed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train_tiny_emotion(folder, "outputs", **{"train.epochs": 2})
    text = capsys.readouterr().out
    assert text.count("Train Loss: ") == 2 and text.count("Val CCC-V: ") == 2
    line = next(line for line in text.splitlines() if "Val CCC-V" in line)
    assert "CCC-A: " in line and "CCC-Avg: " in line
    for name in (
        "config.yaml",
        "train.rank0.log",
        "metrics.csv",
        "loss_curve.png",
        "metrics_curve.png",
        "best",
        "latest",
        "tables.json",
    ):
        assert (run / name).exists(), name


def test_early_stop_ends_after_so_many_evaluations_without_a_better_one(folder: Path) -> None:
    run = train_tiny_emotion(folder, "patience", **{"train.epochs": 50, "train.patience": 2, "optimizers.main.lr": 1e-9})
    evaluated = [row for row in read_metrics(run / "metrics.csv") if row["split"] == "eval"]
    assert 3 <= len(evaluated) < 50


# --- exact resume, loading ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["ema", "mamba"])
def test_resumed_run_equals_the_uninterrupted_one(folder: Path, kind: str) -> None:
    settings = {
        "model.state.kind": kind, "model.autoregressive": True, "ccc_memory": 0.5, "model.dropout": 0.3,
        "data.batch_size": 1, "train.epochs": 0, "sampling.steps": 5,
    }  # fmt: skip
    whole = train_tiny_emotion(folder, f"whole-{kind}", **settings, **{"train.steps": 7})
    for steps in (2, 5, 7):
        parts = train_tiny_emotion(folder, f"parts-{kind}", **settings, **{"train.steps": steps})
    first, second = weights_of(whole), weights_of(parts)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_loaded_system_answers_as_the_saved_one_without_data_or_sources(folder: Path, tmp_path: Path) -> None:
    settings = {"model.speech.kind": "wavlm", "model.speech.wavlm.source": "tiny", "model.speaker.source": "tiny"}
    run = train_tiny_emotion(folder, "loaded", **settings)
    rows = group_rows(Corpus.read([folder / "dialogues" / "all.jsonl"]))[:2]
    system = checkpoint.load(run)
    assert isinstance(system, RecognizesEmotion) and isinstance(system, System)
    expected = system.recognize_emotion(rows)
    moved = tmp_path / "moved"
    shutil.copytree(run, moved, symlinks=True)
    text = (moved / "config.yaml").read_text().replace("source: tiny", "source: nowhere/at-all")
    (moved / "config.yaml").write_text(text)
    again = checkpoint.load(moved)
    for before, after in zip(sum(expected, []), sum(again.recognize_emotion(rows), []), strict=True):  # type: ignore[attr-defined]
        assert before.id == after.id and after.values == pytest.approx(before.values, abs=1e-5)


# --- labels -------------------------------------------------------------------------------------------------------------
def rewritten(folder: Path, out: Path, change: Any) -> Path:
    from lalia.data import write_manifest

    rows = [row for d in group_rows(Corpus.read([folder / "dialogues" / "all.jsonl"])) for row in d]
    for index, row in enumerate(rows):
        change(index, row)
    write_manifest(out, rows)
    return out


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


# --- features -------------------------------------------------------------------------------------------------------------
def test_statistics_are_of_the_training_rows_alone(folder: Path, tmp_path: Path) -> None:
    from lalia.data import write_manifest
    from lalia.features import egemaps_of

    rows = list(Corpus.read([folder / "dialogues" / "all.jsonl"]))
    write_manifest(tmp_path / "few.jsonl", rows[:5])
    config = tiny_emotion_config(folder, **{"data.train": f"[{tmp_path / 'few.jsonl'}]"})
    tables = EmotionSystem.make_tables(config, Corpus.read(config["data"].train))
    values = torch.stack([egemaps_of(row) for row in rows[:5]]).double()
    assert tables["prosody"]["turns"] == 5
    assert torch.allclose(torch.tensor(tables["prosody"]["mean"], dtype=torch.float64), values.mean(0))
    assert (tmp_path / "features" / "egemaps").is_dir()


def test_pooled_features_are_kept_and_give_the_same_answers(folder: Path, tmp_path: Path) -> None:
    make_dialogues(tmp_path / "dialogues", dialogues=2, turns=3)
    settings = {"model.speech.kind": "wavlm", "model.speech.wavlm.source": "tiny", "model.speaker.source": "tiny"}
    system, rows = build(tmp_path, **settings)
    system.train()
    first = one_batch(system, rows)
    assert not first.speech_known.any() and len(first.wave) == int(first.wave_lengths.sum()) > 0
    chosen = torch.arange(len(first.ids))
    fresh = system.hear(first, chosen)
    second = one_batch(system, rows)
    assert second.speech_known.all() and second.voice_known.all() and not len(second.wave)
    assert torch.allclose(system.hear(second, chosen), fresh, atol=1e-5)
    assert any((tmp_path / "dialogues" / "features").glob("speech-*/*.pt"))
    off, _ = build(tmp_path, **settings, **{"data.features": "none"})
    assert not one_batch(off, rows).speech_known.any()


def test_memory_that_runs_out_in_the_backward_pass_is_answered_with_smaller_parts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer throws the error into the generator; the same stretch comes again, and the weights end as if nothing was."""
    settings = {"model.speech.kind": "wavlm", "model.speech.wavlm.source": "tiny", "model.speech.tuned": True, "train.steps": 2}
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda hidden, *_, **__: hidden)  # drawn anew when computed again
    calm = train_tiny_emotion(folder, "calm", **settings)
    backward, failures = torch.Tensor.backward, iter([True])

    def failing(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if next(failures, False):
            raise torch.OutOfMemoryError("out of memory")
        backward(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", failing)
    tight = train_tiny_emotion(folder, "tight", **settings)
    first, second = weights_of(calm), weights_of(tight)
    assert all(torch.allclose(first[k], second[k], atol=1e-4) for k in first)
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(torch.OutOfMemoryError, match="data.batch_size"):
        train_tiny_emotion(folder, "full", **settings)


# --- scheduled sampling ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("decay", list(Decay))
def test_the_share_of_true_labels_falls_from_start_to_end(decay: Decay) -> None:
    sampling = SamplingConfig(decay=decay, start=0.9, end=0.1, steps=100)
    values = [sampling.probability(step) for step in range(0, 301, 10)]
    assert values == sorted(values, reverse=True)
    assert values[0] == pytest.approx(0.9, abs=0.01) and values[-1] == pytest.approx(0.1, abs=0.01)


def test_labels_are_shown_in_training_by_the_schedule_and_never_in_validation(folder: Path) -> None:
    system, rows = build(folder, **{"model.autoregressive": True, "sampling.start": 0.5, "sampling.end": 0.5, "data.batch_size": 4})
    batch = one_batch(system, rows)
    shares = []
    for step in range(40):
        torch.manual_seed(step)
        shown = system._shown_labels(batch, batch.grid, Clock(step=step))
        assert shown is not None and shown[batch.grid < 0].isnan().all()
        shares.append(float(shown[batch.grid >= 0].isfinite().float().mean()))
    assert sum(shares) / len(shares) == pytest.approx(0.5, abs=0.08)
    assert system._shown_labels(batch, batch.grid, Clock(training=False)) is None


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
