"""The system through the floor: learning, stretches, resuming, loading, scheduled sampling."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from emotion_systems import build, one_batch, weights_of
from factories import train_tiny_emotion

from lalia import checkpoint, run_setup
from lalia.data import Corpus
from lalia.dialogues import group_rows
from lalia.loader import Loader
from lalia.logs import read_metrics
from lalia.nn.ccc import Moments
from lalia.system import Clock, RecognizesEmotion, System
from lalia.systems.emotion.config import Decay, SamplingConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the dialogues and their functionals, computed once for all tests of this file."""
    made = tmp_path_factory.mktemp("emotion")
    build(made)
    return made


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
    whole = Moments(1)
    whole.add(pairs[:, :1], pairs[:, 1:])
    expected = float(whole.ccc())
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
