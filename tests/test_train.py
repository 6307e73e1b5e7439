"""The loop's guards and what a run leaves behind: Ctrl-C, locks, full disks, NaN, bad manifests, kept sets, figures."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from factories import make_corpus
from torch import Tensor
from trainer_children import FOUR, child, fingerprint, mini_config, run_to_end, sets, stall, wait_for

from lalia import checkpoint, logs, runfolder
from lalia import train as trainer
from lalia.config import ConfigError
from lalia.data import ManifestError
from lalia.run_setup import NonFinite, NonFiniteLoss, turn_figures
from lalia.runfolder import CheckpointError, RunLocked
from lalia.sections import OnNonfinite
from lalia.system import Clock, Media
from lalia.systems.vits2.system import Vits2


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs.Logs, "curves", lambda self: [])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose ``corpus`` the configurations of this file share."""
    folder = tmp_path_factory.mktemp("shared")
    make_corpus(folder / "corpus")
    return folder


# --- the end that somebody asks for ---------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_and_goes_on(number: int, corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    endless = mini_config(corpus, **{"train.steps": 10**6, "data.workers": int(number == signal.SIGINT)})
    with child(endless, run) as process:
        wait_for(lambda: sets(run) == [0], process)
        process.join(0.3)
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join(60)
        assert process.exitcode == 0
    said = (run / "train.rank0.log").read_text()
    assert "asked to stop" in said and "the same command goes on from there" in said
    stopped = sets(run)[-1]
    assert f"stopped at step {stopped} and saved" in said
    assert run_to_end(mini_config(corpus, **{"train.steps": stopped + 2}), run) == 0
    assert f"going on from step-{stopped:08d}" in (run / "train.rank0.log").read_text()
    assert sets(run)[-1] == stopped + 2


def test_stopping_by_hand_changes_no_bit(corpus: Path, tmp_path: Path) -> None:
    plan = {"train.steps": 5}
    trainer.train(mini_config(corpus, **plan), tmp_path / "whole")
    config = mini_config(corpus, **plan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "_finished", lambda self, interrupt: self.counters.step >= 3)
        trainer.train(config, tmp_path / "parts")
    trainer.train(config, tmp_path / "parts")
    assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")


def test_minutes_end_a_run(corpus: Path, tmp_path: Path) -> None:
    counters = trainer.train(mini_config(corpus, **{"train.steps": 0, "train.minutes": 1e-6}), tmp_path / "run")
    assert counters.step <= 1 and sets(tmp_path / "run")[-1] == counters.step


def test_second_run_into_a_folder_in_use(corpus: Path, tmp_path: Path) -> None:
    run, marker = tmp_path / "run", tmp_path / "marker"
    with child(mini_config(corpus), run, stall, "lalia.optim", "clip_gradients", str(marker), 1) as process:
        assert wait_for(marker.exists, process)
        with pytest.raises(RunLocked, match=rf"{run} is in use by process {process.pid}"):
            trainer.train(mini_config(corpus), run)
    trainer.train(mini_config(corpus, **{"train.steps": 1}), run)  # and free again once that process is gone
    assert sets(run) == [0, 1]


def test_orphaned_loader_does_not_hold_the_lock(corpus: Path, tmp_path: Path) -> None:
    run, marker = tmp_path / "run", tmp_path / "marker"
    config = mini_config(corpus, **{"data.workers": 1, "train.steps": 1})
    with child(config, run, stall, "lalia.optim", "clip_gradients", str(marker), 1) as process:
        assert wait_for(marker.exists, process)
    assert run_to_end(config, run) == 0


# --- disks ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("call", ["fsync", "write"])
def test_full_disk(call: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    trainer.train(mini_config(corpus, **{"train.steps": 1}), run)
    before = fingerprint(run)

    def full(*arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(CheckpointError) as caught:
        begin = trainer.Trainer.fit

        def fit(self: trainer.Trainer) -> Any:
            patch.setattr(os, "fsync", full) if call == "fsync" else patch.setattr(runfolder.HashingFile, "write", full)
            return begin(self)

        patch.setattr(trainer.Trainer, "fit", fit)
        trainer.train(mini_config(corpus, **{"train.steps": 2}), run)
    assert "the disk is full" in str(caught.value) and "The sets saved before are untouched" in str(caught.value)
    assert sets(run) == [0, 1] and fingerprint(run) == before and not list(run.glob(".tmp-*"))
    trainer.train(mini_config(corpus, **{"train.steps": 2}), run)
    assert sets(run) == [0, 1, 2]


# --- manifests ------------------------------------------------------------------------------------------------------
def manifest(corpus: Path, folder: Path, change: Any) -> Path:
    """The shared manifest with absolute paths, three times over, its lines changed by ``change(list) -> list``."""
    lines = []
    for copy in range(3):
        for line in (corpus / "corpus" / "all.jsonl").read_text().splitlines():
            row = json.loads(line)
            lines.append(json.dumps({**row, "id": f"{row['id']}-{copy}", "audio": str(corpus / "corpus" / row["audio"])}))
    path = folder / "changed.jsonl"
    path.write_text("\n".join(change(lines)) + "\n")
    return path


def test_broken_line_is_named(corpus: Path, tmp_path: Path) -> None:
    path = manifest(corpus, tmp_path, lambda lines: [*lines[:16], lines[16][:-9], *lines[17:]])
    wanted = {"data.train": f"[{path}]", "train.steps": 1}
    with pytest.raises(ManifestError, match=r"changed\.jsonl:17\b"):
        trainer.train(mini_config(corpus, **wanted, **{"data.max_bad_fraction": 0}), tmp_path / "strict")
    assert not sets(tmp_path / "strict")
    trainer.train(mini_config(corpus, **wanted), tmp_path / "run")  # one of 24 is below the limit: left out, and said
    report = json.loads((tmp_path / "run" / "dataset_report.json").read_text())
    assert report["usable"] == 23 and "17" in str(report["rejected"])


def test_zero_usable_rows(corpus: Path, tmp_path: Path) -> None:
    path = manifest(corpus, tmp_path, lambda lines: [line.replace(".wav", ".gone") for line in lines])
    with pytest.raises(ManifestError, match="no usable row of 24 .*missing audio"):
        trainer.train(mini_config(corpus, **{"data.train": f"[{path}]"}), tmp_path / "run")
    with pytest.raises(ConfigError, match="data.train is empty"):
        trainer.train(mini_config(corpus, **{"data.train": "[]"}), tmp_path / "run")


def test_text_that_cannot_be_spoken_is_in_the_report_before_the_first_step(corpus: Path, tmp_path: Path) -> None:
    path = manifest(corpus, tmp_path, lambda lines: [lines[0].replace("Alpha", "Ωmega ☃"), *lines[1:]])
    trainer.train(mini_config(corpus, **{"train.steps": 1, "data.train": f"[{path}]"}), tmp_path / "run")
    report = json.loads((tmp_path / "run" / "dataset_report.json").read_text())
    assert [row["row"] for row in report["rejected"]] == ["clip000-0"] and "Ω" in report["rejected"][0]["reason"]


def test_row_that_fails_while_training_is_written_down(corpus: Path, tmp_path: Path) -> None:
    sounds = tmp_path / "nan.wav"
    soundfile.write(sounds, np.full(16000, np.nan, np.float32), 8000, subtype="FLOAT")

    def spoil(lines: list[str]) -> list[str]:
        row = json.loads(lines[0])
        return [json.dumps({**row, "audio": str(sounds), "duration": 2.0}), *lines[1:]]

    once = {"train.steps": 0, "train.epochs": 1, "data.batch_size": 8}
    trainer.train(mini_config(corpus, **once, **{"data.train": f"[{manifest(corpus, tmp_path, spoil)}]"}), tmp_path / "run")
    bad = [json.loads(line) for line in (tmp_path / "run" / "bad_rows.rank0.jsonl").read_text().splitlines()]
    assert [row["id"] for row in bad] == ["clip000-0"] and "NaN" in bad[0]["reason"]


# --- NaN ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, set[int]]]:
    """``poison[turn]`` = steps at which the first loss of that turn becomes NaN."""
    when: dict[str, set[int]] = {}
    real = Vits2.turns

    def turns(self: Vits2, batch: Any, clock: Clock) -> Any:
        for name, losses in real(self, batch, clock):
            if clock.step in when.get(name, ()):
                first = next(iter(losses))
                losses = {**losses, first: losses[first] * float("nan")}
            yield name, losses

    monkeypatch.setattr(Vits2, "turns", turns)
    yield when


def test_nan_stops_with_a_dump(corpus: Path, tmp_path: Path, poison: dict[str, set[int]]) -> None:
    poison["dur"] = {2}
    config = mini_config(corpus, **{"train.steps": 4, "train.save_every": 1, **FOUR})
    with pytest.raises(NonFiniteLoss, match=r"step 2, turn 'dur': loss nan.*on_nonfinite=skip"):
        trainer.train(config, tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "nonfinite" / "step-00000002-dur.rank0.json").read_text())
    assert len(facts["rows"]) == 2 and all(name.startswith("clip") for name in facts["rows"])
    assert facts["turn"] == "dur" and facts["losses"]["loss_dur_disc"] == "nan"
    assert facts["last_checkpoint"] == "step-00000002" and sets(tmp_path / "run") == [0, 1, 2]
    poison.clear()
    trainer.train(config, tmp_path / "run")
    trainer.train(config, tmp_path / "never")
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "never")


def test_nan_in_one_clip_stops(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip whose features overflow: the row is among those that the dump names."""
    real = Vits2.collate

    def collate(self: Vits2, examples: Any) -> Any:
        batch = real(self, examples)
        if "clip005" in batch.ids:
            batch.wave[batch.ids.index("clip005")] = float("inf")
        return batch

    monkeypatch.setattr(Vits2, "collate", collate)
    with pytest.raises(NonFiniteLoss):
        trainer.train(mini_config(corpus, **{"train.steps": 8}), tmp_path / "run")
    (dump,) = (tmp_path / "run" / "nonfinite").iterdir()
    assert "clip005" in json.loads(dump.read_text())["rows"]


def test_skip_counts_and_goes_on(corpus: Path, tmp_path: Path, poison: dict[str, set[int]]) -> None:
    poison |= {"g": {0}, "d": {0, 1}}
    config = mini_config(corpus, **{"train.steps": 3, "train.save_every": 1, "train.on_nonfinite": "skip", "train.log_every": 1})
    assert trainer.train(config, tmp_path / "run").skipped == 3
    weights = [checkpoint.open_set(tmp_path / "run" / f"step-{step:08d}").model() for step in range(4)]

    def changed(network: str, step: int) -> bool:
        before, after = weights[step], weights[step + 1]
        return any(not torch.equal(before[key], after[key]) for key in before if key.startswith(network + "."))

    assert [changed("generator", step) for step in range(3)] == [False, True, True]
    assert [changed("discriminator", step) for step in range(3)] == [False, False, True]
    assert [changed("duration_discriminator", step) for step in range(3)] == [True, True, True]
    assert all(torch.isfinite(value).all() for value in weights[3].values())
    assert logs.read_metrics(tmp_path / "run" / "metrics.csv")[-1]["skipped"] == "3"


def test_max_nonfinite(corpus: Path, tmp_path: Path, poison: dict[str, set[int]]) -> None:
    poison["g"] = {1, 3, 4, 5}
    config = mini_config(corpus, **{"train.steps": 9, "train.on_nonfinite": "skip", "train.max_nonfinite": 3})
    with pytest.raises(NonFiniteLoss, match="step 5"):
        trainer.train(config, tmp_path / "run")


def test_infinite_gradient_does_not_step(tmp_path: Path) -> None:
    config = mini_config(tmp_path).train
    config.on_nonfinite = OnNonfinite.skip
    guard = NonFinite(config, tmp_path, trainer.dist.World())
    fine, wrong = torch.tensor(1.0), torch.tensor(float("inf"))
    assert guard.check("g", fine, fine, {}, ["a"], Clock())
    assert not guard.check("g", fine, wrong, {}, ["a"], Clock())


# --- weights of losses ----------------------------------------------------------------------------------------------
def test_weight_zero_switches_a_loss_off_even_when_it_is_nan() -> None:
    losses = {"loss_mel": torch.tensor(2.0, requires_grad=True), "loss_kl": torch.tensor(float("nan"))}
    figures = turn_figures("g", losses, {"loss_mel": 45.0, "loss_kl": 0.0})
    assert float(figures["loss/g/total"]) == 90.0 and set(figures) == {"loss/g/mel", "loss/g/kl", "loss/g/total"}
    with pytest.raises(ValueError, match="without a weight.*loss_kl"):
        turn_figures("g", losses, {"loss_mel": 1.0})


def test_a_turn_without_losses_does_not_step(corpus: Path, tmp_path: Path) -> None:
    config = mini_config(corpus, **{"train.steps": 1, "weights.loss_disc": 0, "weights.loss_dur_disc": 0})
    trainer.train(config, tmp_path / "run")
    begin, end = (checkpoint.open_set(tmp_path / "run" / f"step-{step:08d}").model() for step in (0, 1))
    same = {key.split(".")[0] for key in begin if not torch.equal(begin[key], end[key])}
    assert same == {"generator"}  # not even weight decay has moved the others


# --- what is kept and written ---------------------------------------------------------------------------------------
def test_keep_best_and_weights_every(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """V-47 and V-48: two newest sets, step 0 and the best one; weights alone every three steps."""
    scores = iter([3.0, 1.0, 2.0, 5.0, 4.0, 6.0])
    monkeypatch.setattr(trainer.run_setup, "validate", lambda *arguments: {"loss/g/mel": next(scores)})
    options = {"train.steps": 6, "train.save_every": 1, "train.eval_every": 1, "train.keep": 2, "train.weights_every": 3}
    counters = trainer.train(mini_config(corpus, **options), tmp_path / "run")
    assert (counters.best, counters.best_step) == (1.0, 2)
    assert sets(tmp_path / "run") == [0, 2, 5, 6]
    assert (tmp_path / "run" / "best").resolve().name == "step-00000002"
    assert checkpoint.best_set(tmp_path / "run").meta["metrics"] == {"loss/g/mel": 1.0}  # type: ignore[union-attr]
    alone = sorted(path.name for path in (tmp_path / "run" / "weights").iterdir())
    assert alone == ["step-00000003.safetensors", "step-00000006.safetensors"]
    last = checkpoint.open_set(tmp_path / "run" / "step-00000006").model()
    loose = checkpoint.load_weights(tmp_path / "run" / "weights" / alone[1])
    assert all(torch.equal(last[key], value) for key, value in loose.items()) and set(loose) == set(last)


def test_moving_average_is_what_is_measured_and_served(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Tensor]] = []

    def validate(system: Vits2, *arguments: Any) -> dict[str, float]:
        seen.append({key: value.clone() for key, value in system.state_dict().items()})
        return {"loss/g/mel": 1.0}

    monkeypatch.setattr(trainer.run_setup, "validate", validate)
    trainer.train(mini_config(corpus, **{"train.steps": 2, "train.eval_every": 2, "train.ema": 0.9}), tmp_path / "run")
    found = checkpoint.open_set(tmp_path / "run" / "step-00000002")
    served, raw = found.model(), found.state()["raw"]
    assert all(torch.equal(served[key], value) for key, value in seen[0].items())
    assert not torch.equal(served["generator.text_encoder.symbol.weight"], raw["generator.text_encoder.symbol.weight"])
    system = checkpoint.load(tmp_path / "run")
    assert all(torch.equal(system.state_dict()[key], value) for key, value in served.items())


SCALARS = [
    "loss/g/total", "loss/d/total", "loss/wd/total", "learning_rate", "grad_norm_d", "grad_norm_g", "grad_norm_dur",
    "grad_norm_wd", "loss/g/fm", "loss/g/mel", "loss/g/dur", "loss/g/kl", "loss/g/lm", "loss/g/lm_gen", "loss/g/0",
    "loss/g/1", "loss/d_r/0", "loss/d_r/1", "loss/d_g/0", "loss/d_g/1", "loss/dur_disc/total", "loss/dur_disc_g/0",
    "loss/dur_disc_r/0", "loss/g/dur_gen", "loss/g/dur_gen_0", "loss/g/dur_gen_1",
]  # fmt: skip


def test_scalars_and_media_in_tensorboard(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """V-52 and V-54: every tag of the list, in TensorBoard and in the table; evaluation in a writer of its own."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sound = Media(audio={"gen/audio_0_sdp": (torch.zeros(800).numpy(), 8000)})
    monkeypatch.setattr(Vits2, "media", lambda self, batch, clock: sound)
    options = {"train.steps": 2, "train.log_every": 1, "train.eval_every": 2, "discriminator.periods": "[2, 3]", **FOUR}
    trainer.train(mini_config(corpus, **options), tmp_path / "run")
    rows = logs.read_metrics(tmp_path / "run" / "metrics.csv")
    assert [(row["step"], row["split"]) for row in rows] == [("1", "train"), ("2", "train"), ("2", "eval")]
    events, evaluation = (EventAccumulator(str(path)).Reload() for path in (tmp_path / "run", tmp_path / "run" / "eval"))
    for tag in SCALARS:
        assert tag in events.Tags()["scalars"], tag
        assert len(events.Scalars(tag)) == 2 and float(rows[0][tag]) == pytest.approx(events.Scalars(tag)[0].value, rel=1e-5), tag
    assert "loss/g/mel" in evaluation.Tags()["scalars"] and evaluation.Tags()["audio"] == ["gen/audio_0_sdp"]
    assert float(rows[0]["grad_norm_wd"]) > 0 and float(rows[0]["learning_rate"]) == pytest.approx(2e-4)


def test_two_runs_are_equal_and_seeds_differ(corpus: Path, tmp_path: Path) -> None:
    """V-06, and that neither a loader process nor evaluation changes what is learned."""
    plain = {"train.steps": 3, "model.dropout": 0.2}
    trainer.train(mini_config(corpus, **plain), tmp_path / "a")
    trainer.train(mini_config(corpus, **plain, **{"data.workers": 1}), tmp_path / "b")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Vits2, "media", lambda self, batch, clock: Media())
        trainer.train(mini_config(corpus, **plain, **{"train.eval_every": 1}), tmp_path / "c")
    trainer.train(mini_config(corpus, **plain, **{"train.seed": 1}), tmp_path / "d")
    a, b, c, d = (checkpoint.load_weights(tmp_path / name) for name in "abcd")
    for other in (b, c):
        assert all(torch.equal(a[key], other[key]) for key in a)
    assert not all(torch.equal(a[key], d[key]) for key in a)
