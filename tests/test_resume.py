"""Exact resume (V-44): killed at any moment and started again, a run ends with the very same bits. Damage is found and named."""

from __future__ import annotations

import logging
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_children import FOUR, child, fingerprint, mini_config, run_to_end, sets, stall, wait_for

from lalia import checkpoint, optim, runfolder
from lalia import train as trainer
from lalia.checkpoint import DamagedCheckpoint

STEPS = 11  # four steps an epoch: the run ends in the middle of the third
PLANS: dict[str, dict[str, Any]] = {
    "four optimizers, a loader process": {**FOUR, "data.workers": 1, "train.seed": 7},
    "moving average, dropout, evaluation": {"train.ema": 0.9, "model.dropout": 0.3, "train.eval_every": 3},
}


def kill(config: Any, run: Path, marker: Path, *where: Any) -> bool:
    """Train until the moment ``where`` (see :func:`stall`) and kill; False when the run ended before it came to that."""
    marker.unlink(missing_ok=True)
    module, name, after = where
    with child(config, run, stall, module, name, str(marker), after) as process:
        reached = wait_for(marker.exists, process)
    return reached


def kill_somewhere(config: Any, run: Path, seconds: float) -> None:
    with child(config, run) as process:
        before = sets(run)
        wait_for(lambda: sets(run) != before or bool(before), process)
        process.join(seconds)


@pytest.mark.parametrize("name", list(PLANS))
def test_killed_and_restarted_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    config = mini_config(tmp_path, **{"train.steps": STEPS, "train.save_every": 3, **PLANS[name]})
    whole, broken, marker = tmp_path / "whole", tmp_path / "broken", tmp_path / "marker"
    assert run_to_end(config, whole) == 0, (tmp_path / "whole.log").read_text()

    assert kill(config, broken, marker, "lalia.optim", "clip_gradients", 14)  # in the middle of step 3 or 4, some networks stepped
    assert sets(broken) == [0, 3]
    assert kill(config, broken, marker, "lalia.checkpoint", "_write_state", 1)  # step 6: the weights are written, the rest is not
    assert sets(broken) == [0, 3]
    assert kill(config, broken, marker, "lalia.checkpoint", "_publish", 1)  # step 6: all written, not yet renamed
    assert sets(broken) == [0, 3] and list(broken.glob(".tmp-step-00000006*"))
    assert kill(config, broken, marker, "lalia.checkpoint", "point", 1)  # step 6: renamed, `latest` still at 3
    assert sets(broken) == [0, 3, 6] and (broken / "latest").resolve().name == "step-00000003"
    kill_somewhere(config, broken, random.random())
    assert run_to_end(config, broken) == 0, (tmp_path / "broken.log").read_text()

    assert fingerprint(broken) == fingerprint(whole)
    assert not list(broken.glob(".tmp-*"))


def test_random_kills(tmp_path: Path) -> None:
    """Kills at moments that nobody chose; the seed of a failure is in the message."""
    seed = random.randrange(10**6)
    draw = random.Random(seed)
    config = mini_config(tmp_path, **{"train.steps": 16, "train.save_every": 2, "train.keep": 3, "data.workers": 1})
    assert run_to_end(config, tmp_path / "whole") == 0
    for _ in range(3):
        kill_somewhere(config, tmp_path / "broken", draw.uniform(0, 1.0))
    assert run_to_end(config, tmp_path / "broken") == 0
    assert fingerprint(tmp_path / "broken") == fingerprint(tmp_path / "whole"), f"seed {seed}"


def test_a_finished_run_changes_nothing(trained: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (trained / "run").glob("step-*/*")}
    trainer.train(finished(trained), trained / "run")
    assert {path: path.stat().st_mtime_ns for path in (trained / "run").glob("step-*/*")} == before


# --- damage ---------------------------------------------------------------------------------------------------------
def finished(folder: Path, **overrides: Any) -> Any:
    return mini_config(folder, **{"train.steps": 2, "train.save_every": 1, **overrides})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert run_to_end(finished(folder), folder / "run") == 0
    return folder


@pytest.mark.parametrize("file", ["model.safetensors", "train.pt", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate"])
def test_damage_is_named_and_the_set_before_is_used(
    file: str, harm: str, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run, symlinks=True)
    good = fingerprint(run)
    victim = run / "step-00000002" / file
    data = bytearray(victim.read_bytes())
    position = random.randrange(len(data))
    data[position] ^= 1 << random.randrange(8)
    victim.write_bytes(bytes(data) if harm == "flip" else bytes(data[:position]))
    monkeypatch.setattr("lalia.logs.Logs.curves", lambda self: [])
    with caplog.at_level(logging.WARNING, "lalia"):
        trainer.train(finished(trained), run)
    assert str(victim) in caplog.text, f"{harm} of byte {position} went unnoticed"
    assert "using the checkpoint of step 1 instead" in caplog.text
    assert fingerprint(run) == good  # step 2 was done again, and to the bit


def test_a_run_of_damaged_sets_does_not_begin_again(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run, symlinks=True)
    for path in run.glob("step-*/train.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedCheckpoint, match=r"every checkpoint .* is damaged"):
        trainer.train(finished(trained), run)


# --- the optimizers and the schedule --------------------------------------------------------------------------------
def test_skip_optimizer_keeps_the_rate_where_the_schedule_is(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """V-45 and R6: moments start afresh, but the learning rate is that of the epoch, not that of the beginning."""
    monkeypatch.setattr("lalia.logs.Logs.curves", lambda self: [])
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run, symlinks=True)
    rates: list[tuple[int, float]] = []
    real = optim.set_learning_rates

    def spy(optimizers: Any, config: Any, step: int, epoch: int, total: int = 0) -> dict[str, float]:
        if step == 2:
            assert all(not optimizer.state for optimizer in optimizers.values())
        found = real(optimizers, config, step, epoch, total)
        rates.append((epoch, optimizers["g"].param_groups[0]["lr"]))
        return found

    monkeypatch.setattr(optim, "set_learning_rates", spy)
    schedule = {"optimizers.g.decay": 0.5, "optimizers.g.lr": 0.001}
    wanted = {"train.steps": 6, "train.save_every": 0, "train.skip_optimizer": True, **schedule}
    trainer.train(finished(trained, **wanted), run)
    assert rates == [(0, 0.001), (0, 0.001), (1, 0.0005), (1, 0.0005)]
    state = checkpoint.open_set(run / "step-00000006").state()["optimizers"]["g"]
    assert {int(entry["step"]) for entry in state.values()} == {4}


def test_missing_networks_start_fresh(trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """V-46: a base model without WavLM and duration discriminator: these start fresh, the others take its weights."""
    base = tmp_path / "base"
    config = finished(trained, **{"train.steps": 1, "train.save_every": 0, "discriminator.duration": False})
    assert run_to_end(config, base) == 0
    weights = checkpoint.load_weights(base)
    wanted = {**FOUR, "train.init_from": str(base), "train.steps": 1, "train.save_every": 0, "train.ema": 0.9}
    with caplog.at_level(logging.INFO, "lalia"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("lalia.logs.Logs.curves", lambda self: [])
        trainer.train(finished(trained, **wanted), tmp_path / "run")
    assert "has no duration_discriminator, wavlm_discriminator: these start fresh" in caplog.text
    begun = checkpoint.open_set(tmp_path / "run" / "step-00000000")
    for tensors in (begun.model(), begun.state()["raw"]):
        assert {key.split(".")[0] for key in tensors} > {key.split(".")[0] for key in weights}
        assert all(torch.equal(tensors[key], value) for key, value in weights.items())

    other = {"train.init_from": str(tmp_path / "run"), "train.steps": 1, "discriminator.duration": False}
    trainer.train(finished(trained, **other), tmp_path / "back")  # and a base model that has more than is wanted
    with pytest.raises(checkpoint.WeightsMismatch, match=r"speaker_table.weight: \[2, 8\] → \[2, 4\]"):
        other["model.speaker_width"] = 4
        trainer.train(finished(trained, **other), tmp_path / "narrow")


def test_unrelated_weights_are_refused(trained: Path, tmp_path: Path) -> None:
    path = checkpoint.save_weights(tmp_path, 1, {"encoder.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="has none of"):
        trainer.train(finished(trained, **{"train.init_from": str(path)}), tmp_path / "run")


def test_another_model_in_the_same_folder_is_refused(trained: Path) -> None:
    with pytest.raises(ValueError, match=r"trained with another model \(model.width: 16 → 24\)"):
        trainer.train(finished(trained, **{"model.width": 24}), trained / "run")


def test_tables_are_made_anew_while_there_is_no_checkpoint(tmp_path: Path) -> None:
    """A first start that failed must not leave the speakers of its wrong manifest behind."""
    run = tmp_path / "run"
    runfolder.RunFolder(run).create().write_tables({"speakers": {"nobody": 0}, "symbols": {}})
    assert run_to_end(mini_config(tmp_path, **{"train.steps": 1}), run) == 0
    assert set(runfolder.RunFolder(run).read_tables()["speakers"]) == {"s0", "s1"}
