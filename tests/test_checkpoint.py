"""Checkpoint sets: exact round trips, damage found and named, saves that die at any moment, locks, foreign weights."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lalia import checkpoint, runfolder
from lalia.checkpoint import (
    CheckpointError,
    DamagedCheckpoint,
    RunFolder,
    WeightsMismatch,
    best_set,
    latest_set,
    open_set,
    prune,
    save_set,
    save_weights,
)

FILES = ["model.safetensors", "train.pt", "manifest.json"]
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")


def weights(step: int) -> dict[str, torch.Tensor]:
    return {"layer.weight": torch.arange(12.0).reshape(3, 4) + step, "layer.bias": torch.full((3,), float(step))}


def state(step: int) -> dict[str, Any]:
    return {"counters": {"step": step, "best": None}, "moments": [torch.ones(4) * step], "rng": torch.get_rng_state()}


def save(run: Path, step: int, best: bool = False) -> Path:
    return save_set(run, step, weights(step), state(step), {"system": "toy", "metrics": {"loss": 1 / (step + 1)}}, best)


def newest(run: Path) -> int:
    """Step of the newest whole set, with its content checked."""
    found = latest_set(run)
    assert found is not None
    assert torch.equal(found.model()["layer.weight"], weights(found.step)["layer.weight"])
    assert found.state()["counters"]["step"] == found.step
    return found.step


# --- round trip -----------------------------------------------------------------------------------------------------
def test_round_trip_is_exact_for_every_layout_of_memory(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    model = {
        "plain": base,
        "tied": base,
        "transposed": base.t(),
        "part": base[1:3],
        "strided": base[:, ::2],
        "half": torch.randn(3).bfloat16(),
        "count": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "also_empty": torch.empty(0),
        "flag": torch.tensor([True, False]),
        "learned": nn.Parameter(torch.randn(2)),
    }
    save_set(tmp_path, 5, model, state(5), {"epoch": 2, "metrics": {"mel": torch.tensor(0.25), "bad": float("nan")}})
    found = latest_set(tmp_path)
    assert found is not None
    loaded = found.model()
    assert loaded.keys() == model.keys()
    for name, tensor in model.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    assert loaded["tied"].data_ptr() == loaded["plain"].data_ptr()
    assert torch.equal(found.state()["rng"], state(5)["rng"])
    assert (found.meta["epoch"], found.meta["metrics"]) == (2, {"mel": 0.25, "bad": None})
    assert found.step == 5 and found.path.name == "step-00000005"


def test_state_that_could_not_be_loaded_again_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\['rng'\]\[1\] is a Random"):
        save_set(tmp_path, 1, weights(1), {"rng": [0, random.Random(0)]})
    assert list(tmp_path.iterdir()) == []


def test_no_set_is_none_and_pointers_name_the_sets(tmp_path: Path) -> None:
    assert latest_set(tmp_path) is None
    assert latest_set(tmp_path / "absent") is None
    save(tmp_path, 9, best=True)
    save(tmp_path, 10)
    assert newest(tmp_path) == 10
    assert os.readlink(tmp_path / "latest") == "step-00000010"
    best = best_set(tmp_path)
    assert best is not None and best.step == 9


def test_pointers_are_text_files_where_symlinks_are_not_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "a required privilege is not held")

    monkeypatch.setattr(os, "symlink", refuse)
    save(tmp_path, 3, best=True)
    save(tmp_path, 4)
    assert (tmp_path / "best").read_text() == "step-00000003\n"
    best = best_set(tmp_path)
    assert best is not None and best.step == 3
    assert torch.equal(checkpoint.load_weights(tmp_path / "latest")["layer.bias"], weights(4)["layer.bias"])


def test_saving_the_same_step_again_replaces_the_set(tmp_path: Path) -> None:
    save(tmp_path, 7)
    (tmp_path / "step-00000007" / "train.pt").unlink()
    save(tmp_path, 7)
    assert newest(tmp_path) == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000007"]


# --- damage ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_found_and_the_previous_set_used(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    victim = save(tmp_path, 2) / name
    good = victim.read_bytes()
    draw = random.Random(name)
    every = range(len(good)) if name == "manifest.json" else draw.sample(range(len(good)), 100)
    for position in {0, len(good) - 1, *every}:
        bad = bytearray(good)
        bad[position] ^= 1 << draw.randrange(8)
        victim.write_bytes(bad)
        with pytest.raises(DamagedCheckpoint, match=name):
            open_set(victim.parent)
    assert newest(tmp_path) == 1
    assert "step 2 is damaged" in caplog.text and name in caplog.text
    victim.write_bytes(good)
    assert newest(tmp_path) == 2


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0, 1, 0.5, -1, None])
def test_truncated_and_missing_files_are_found(name: str, kept: float | None, tmp_path: Path) -> None:
    save(tmp_path, 1)
    victim = save(tmp_path, 2) / name
    data = victim.read_bytes()
    if kept is None:
        victim.unlink()
    else:
        victim.write_bytes(data[: int(len(data) * kept) if 0 < kept < 1 else int(kept)])
    assert newest(tmp_path) == 1


def test_when_every_set_is_damaged_the_run_does_not_start_again(tmp_path: Path) -> None:
    for step in (1, 2):
        (save(tmp_path, step) / "train.pt").write_bytes(b"")
    (tmp_path / "step-00000003").mkdir()
    with pytest.raises(DamagedCheckpoint, match="every checkpoint.*train.pt.*train.pt"):
        latest_set(tmp_path)


def test_a_manifest_of_a_newer_lalia_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="newer"):
        latest_set(tmp_path)


# --- saves that die -------------------------------------------------------------------------------------------------
class Countdown:
    """Makes the n-th call of anything that touches the disk do ``then`` instead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, left: int, then: Callable[[], Any]) -> None:
        self.left, self.then = left, then
        for owner, name in [(os, n) for n in ("rename", "replace", "symlink", "mkdir")] + [(shutil, "rmtree")]:
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name)))
        monkeypatch.setattr(os, "fsync", self.wrap(lambda handle: None))  # slow; a kill keeps the page cache
        real_open, countdown = runfolder.HashingFile.__init__, self

        def open_counted(self: Any, path: Path) -> None:
            countdown.wrap(real_open)(self, path)
            self._file = CountedFile(self._file, countdown)

        monkeypatch.setattr(runfolder.HashingFile, "__init__", open_counted)

    def wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if self.left > 0:
                self.left -= 1
                if self.left == 0:
                    self.then()
            return real(*arguments, **named)

        return call


class CountedFile:
    def __init__(self, real: Any, countdown: Countdown) -> None:
        self.fileno = real.fileno
        self.write, self.flush, self.close = (countdown.wrap(f) for f in (real.write, real.flush, real.close))


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def prepare(tmp_path: Path, again: bool) -> tuple[Path, int]:
    """A run with step 1 (and 2 when ``again``), and how many disk calls one more save of step 2 makes."""
    before, count = tmp_path / "before", tmp_path / "count"
    for step in (1, 2) if again else (1,):
        save(before, step)
    shutil.copytree(before, count, symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        counter = Countdown(patch, 10**9, lambda: None)
        save(count, 2, best=True)
    return before, 10**9 - counter.left


@pytest.mark.parametrize("again", [False, True], ids=["new", "replacing"])
def test_a_full_disk_at_any_write_is_said_and_loses_nothing(again: bool, tmp_path: Path) -> None:
    before, total = prepare(tmp_path, again)
    assert total > 20
    failures = 0
    for stage in range(1, total + 1):
        run = tmp_path / str(stage)
        shutil.copytree(before, run, symlinks=True)
        with pytest.MonkeyPatch.context() as patch:
            Countdown(patch, stage, disk_full)
            try:
                save(run, 2, best=True)
            except CheckpointError as error:
                failures += 1
                assert str(run) in str(error) and "the disk is full" in str(error) and "free" in str(error)
            except OSError as error:  # the tidying-up itself was what failed
                assert error.errno == errno.ENOSPC
        assert newest(run) in ((2,) if again else (1, 2))
        RunFolder(run).lock()
        assert not [p.name for p in run.iterdir() if p.name.startswith(".")]
        assert newest(run) in ((2,) if again else (1, 2))
    assert failures > 15


class Killed(BaseException):
    """Stands for SIGKILL: no cleaning up after it reaches the disk."""


def kill_in_process(run: Path, stage: int) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):

        def die() -> None:
            countdown.left = 1  # every later call dies as well
            raise Killed

        countdown = Countdown(patch, stage, die)
        save(run, 2, best=True)


def kill_for_real(run: Path, stage: int) -> None:
    child = os.fork()
    if child == 0:
        Countdown(pytest.MonkeyPatch(), stage, lambda: os.kill(os.getpid(), signal.SIGKILL))
        save(run, 2, best=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@posix
@pytest.mark.parametrize("again", [False, True], ids=["new", "replacing"])
def test_a_save_killed_at_any_stage_leaves_a_whole_set(again: bool, tmp_path: Path) -> None:
    before, total = prepare(tmp_path, again)
    for stage in range(1, total + 1):
        run = tmp_path / str(stage)
        shutil.copytree(before, run, symlinks=True)
        (kill_for_real if stage % 5 == 0 else kill_in_process)(run, stage)
        step = newest(run)
        assert step in ((2,) if again else (1, 2)), stage
        with RunFolder(run):
            found = latest_set(run, repair=True)
            assert found is not None and found.step == step
            assert runfolder.pointed(run, "latest") == found.path.name
            assert found.meta["best"] == (runfolder.pointed(run, "best") == found.path.name)
            assert not [p.name for p in run.iterdir() if p.name.startswith(".")], stage


# --- pruning --------------------------------------------------------------------------------------------------------
def steps(run: Path) -> list[int]:
    return sorted(step for p in run.iterdir() if (step := runfolder.step_of(p.name)) is not None)


def test_prune_counts_whole_sets_by_number_and_spares_best_and_step_zero(tmp_path: Path) -> None:
    for step in (0, 1, 2, 9, 10, 100, 123456789):
        save(tmp_path, step, best=step == 2)
    (tmp_path / "step-00000100" / "train.pt").write_bytes(b"short")
    assert prune(tmp_path, 0) == [] and prune(tmp_path, -1) == []
    removed = prune(tmp_path, 2)
    assert [p.name for p in removed] == ["step-00000009", "step-00000001"]
    assert steps(tmp_path) == [0, 2, 10, 100, 123456789]
    assert prune(tmp_path, 2) == []


def test_prune_hashes_a_set_again_when_it_changed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    victim = tmp_path / "step-00000003" / "model.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    os.utime(victim, ns=(1, 1))  # the change may fall into the same tick of the clock as the save
    prune(tmp_path, 1)
    assert steps(tmp_path) == [2, 3] and newest(tmp_path) == 2


def test_weights_alone(tmp_path: Path) -> None:
    path = save_weights(tmp_path, 1000, weights(1))
    assert path == tmp_path / "weights" / "step-00001000.safetensors"
    assert torch.equal(checkpoint.load_weights(path)["layer.bias"], weights(1)["layer.bias"])
    prune(tmp_path, 1)
    assert path.is_file()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError, match="disk is full"):
        Countdown(patch, 2, disk_full)
        save_weights(tmp_path, 2000, weights(2))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


# --- models ---------------------------------------------------------------------------------------------------------
class Toy(nn.Module):
    def __init__(self, config: Any, tables: dict[str, Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.drop = nn.Dropout()
        self.speakers = tables["speakers"]


class ToyConfig:
    system = "toy"


@pytest.fixture
def toy_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    config = pytest.importorskip("lalia.config")
    system = pytest.importorskip("lalia.system")
    monkeypatch.setattr(config, "load_run_config", lambda path, overrides: ToyConfig())
    monkeypatch.setattr(system, "system_class", lambda name: Toy)
    run = RunFolder(tmp_path / "run").create()
    run.write_config("system: toy\n")
    run.write_tables({"speakers": ["βήτα"]})
    save(run.path, 1, best=True)
    save(run.path, 2)
    return run.path


def test_load_rebuilds_the_system_from_the_folder(toy_run: Path) -> None:
    def bias(*arguments: Any, **named: Any) -> float:
        return float(checkpoint.load(*arguments, **named).layer.bias[0].detach())  # type: ignore[attr-defined]

    system = checkpoint.load(toy_run)
    assert not system.training and system.speakers == ["βήτα"]  # type: ignore[attr-defined]
    assert bias(toy_run) == 1.0
    assert bias(toy_run, which="latest") == bias(toy_run, which="step-00000002") == bias(toy_run / "latest") == 2.0
    assert bias(toy_run / "step-00000002") == 2.0
    (toy_run / "step-00000001" / "train.pt").write_bytes(b"")
    assert bias(toy_run) == 2.0
    with pytest.raises(FileNotFoundError, match="step-00000002"):
        bias(toy_run, which="step-00000009")


@pytest.mark.parametrize("name", ["config.yaml", "tables.json"])
def test_load_names_what_the_folder_lacks(name: str, toy_run: Path) -> None:
    (toy_run / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        checkpoint.load(toy_run)


def test_load_is_strict(toy_run: Path) -> None:
    save_set(toy_run, 3, {"layer.weight": torch.zeros(2, 2), "extra": torch.zeros(1)}, {}, best=True)
    with pytest.raises(WeightsMismatch) as caught:
        checkpoint.load(toy_run)
    shapes = "mismatched: layer.weight: [2, 2] → [3, 4]"
    for part in ("missing: layer.bias", "unexpected: extra", shapes, "step-00000003"):
        assert part in str(caught.value)


def test_manifest_says_where_the_set_comes_from(tmp_path: Path) -> None:
    manifest = json.loads((save(tmp_path, 3) / "manifest.json").read_text())
    assert {"format", "step", "best", "lalia", "git", "time", "system", "metrics", "files", "sha256"} == set(manifest)
    assert set(manifest["files"]["train.pt"]) == {"sha256", "size"}
    with pytest.raises(ValueError, match="step"):
        save_set(tmp_path, 4, weights(4), {}, {"step": 5})
