"""The wandb logger against a module that records its calls: nothing here needs the package or a network."""

from __future__ import annotations

import importlib.machinery
import json
import logging
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainer_children import mini_config

from lalia import train as trainer
from lalia.logs import Logs
from lalia.run_setup import NonFinite, NonFiniteLoss
from lalia.sections import RunConfig, TrainConfig
from lalia.system import Media
from lalia.wandb_log import STORED, WandbError, begin, identity, require

KEY = "0123456789abcdef0123456789abcdef01234567"


class FakeRun:
    def __init__(self, given: dict[str, Any]) -> None:
        self.given, self.id = given, given["id"]
        self.logged: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str]] = []
        self.exit_code: int | None = None

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        assert self.exit_code is None, "told after the end"
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        assert self.exit_code is None, "ended twice"
        self.exit_code = exit_code


class FakeWandb(types.ModuleType):
    class Error(Exception): ...

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="fake")
        self.runs: list[FakeRun] = []
        self.refuse = ""

    def init(self, **given: Any) -> FakeRun:
        if self.refuse:
            raise self.Error(self.refuse)
        self.runs.append(FakeRun(given))
        return self.runs[-1]

    Settings = staticmethod(lambda **given: given)
    Image = staticmethod(lambda picture: ("image", picture.shape))
    Audio = staticmethod(lambda wave, sample_rate: ("audio", len(wave), sample_rate))
    Table = staticmethod(lambda columns, data: ("table", data))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_MODE", "LALIA_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    return module


def asked(**settings: Any) -> RunConfig:
    return RunConfig("omni-align", TrainConfig(wandb=True, **settings))


# --- a run ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Logs, "curves", lambda self: [])


def test_a_run_tells_figures_pictures_and_sounds_and_ends(wandb: FakeWandb, tmp_path: Path, no_curves: None) -> None:
    settings = {"train.wandb": True, "train.steps": 2, "train.log_every": 1, "train.eval_every": 2, "train.valid_batches": 1}
    trainer.train(mini_config(tmp_path, **settings), tmp_path / "run")
    (run,) = wandb.runs
    told = {name: (values["step"], value) for values in run.logged for name, value in values.items()}
    assert [values["step"] for values in run.logged if "loss/g/total" in values] == [1, 2]
    assert told["eval/loss/g/total"][0] == 2 and "loss/g/total" in told and told["epoch"][1] == 0
    kinds = {value[0] for _, value in told.values() if isinstance(value, tuple)}
    assert kinds == {"image", "audio"} and all(n.startswith("eval/") for n, (_, v) in told.items() if isinstance(v, tuple))
    assert run.exit_code == 0 and run.metrics == [("*", "step")]
    given = run.given
    assert (given["project"], given["name"], given["resume"]) == ("lalia-vits2", "run", "allow")
    assert given["dir"] == str(tmp_path / "run")
    assert given["config"]["train.steps"] == 2 and given["config"]["model.width"] == 16 and not given["save_code"]
    table = (tmp_path / "run" / "metrics.csv").read_text()
    assert "loss/g/total" in table and list((tmp_path / "run").glob("events*")), "the other logs are written as ever"

    trainer.train(mini_config(tmp_path, **{**settings, "train.steps": 3}), tmp_path / "run")
    assert wandb.runs[1].id == run.id == json.loads((tmp_path / "run" / STORED).read_text())["id"]
    assert [values["step"] for values in wandb.runs[1].logged if "loss/g/total" in values] == [3]


def test_a_crash_ends_the_run_as_failed(wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> bool:
        raise NonFiniteLoss("nan")

    monkeypatch.setattr(NonFinite, "check", fail)
    with pytest.raises(NonFiniteLoss):
        trainer.train(mini_config(tmp_path, **{"train.wandb": True, "train.steps": 1}), tmp_path / "run")
    assert [run.exit_code for run in wandb.runs] == [1]


def test_off_nothing_is_imported_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Logs, "curves", lambda self: [])
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail
    trainer.train(mini_config(tmp_path, **{"train.steps": 1}), tmp_path / "run")
    assert not (tmp_path / "run" / STORED).exists() and begin(RunConfig("x"), tmp_path) is None


def test_a_missing_package_is_told_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = mini_config(tmp_path, **{"train.wandb": True})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WandbError, match=r"pip install 'lalia\[wandb\]'"):
        trainer.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_that_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb itself leaves a folder ``wandb`` where it is run, which Python would import."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(WandbError, match="needs the package wandb"):
        require(TrainConfig(wandb=True))


# --- what is told ---------------------------------------------------------------------------------------------------
def test_secrets_are_neither_told_nor_kept(
    wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    config = asked(init_from=f"https://me:password@host/{KEY}", freeze=["a", "hf_secret"], wandb_project="nanochat-omni-audio")
    with caplog.at_level(logging.INFO):
        assert begin(config, tmp_path) is not None
    given = wandb.runs[0].given
    assert given["project"] == "nanochat-omni-audio" and given["config"]["train.init_from"] == "https://***@host/***"
    assert given["config"]["train.freeze"] == ["a", "***"]
    wandb.refuse = f"bad key {KEY}"
    with pytest.raises(WandbError, match=r"train.wandb: bad key \*\*\*; `wandb login`, WANDB_MODE=offline") as caught:
        begin(config, tmp_path)
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    everything = written + caplog.text + repr(given) + repr(caught.value)
    assert not any(secret in everything for secret in (KEY, "hf_secret", "password"))


def test_offline_is_honoured(wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mode() -> Any:
        begin(asked(), tmp_path)
        return wandb.runs[-1].given.get("mode", os.environ.get("WANDB_MODE"))  # as wandb itself reads it

    assert mode() is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert mode() is None, "that is about models alone"
    monkeypatch.setenv("LALIA_OFFLINE", "1")
    assert mode() == "offline"
    for wanted in ("offline", "disabled"):
        monkeypatch.setenv("WANDB_MODE", wanted)
        assert mode() == wanted
    monkeypatch.setenv("WANDB_MODE", "online")
    assert mode() == "offline"


def test_the_id_belongs_to_folder_and_project(tmp_path: Path) -> None:
    one = identity(tmp_path, "a")
    assert one == identity(tmp_path, "a") and len(one) == 10
    assert identity(tmp_path, "b") != one


def test_media_of_every_kind(wandb: FakeWandb, tmp_path: Path) -> None:
    with Logs(tmp_path) as record:
        record.tracker = begin(asked(), tmp_path)
        wave = (np.zeros(8, np.float32), 8000)
        record.media(3, Media({"p": np.zeros((2, 4, 3), np.uint8)}, {"s": wave}, {"t": "words"}))
        record.media(4, Media())
        record.scalars(5, {"a": torch.tensor(2.0)}, epoch=1)
        record.close()
        record.close()
    (run,) = wandb.runs
    assert run.logged == [
        {"eval/p": ("image", (2, 4, 3)), "eval/s": ("audio", 8, 8000), "eval/t": ("table", [["words"]]), "step": 3},
        {"a": 2.0, "epoch": 1, "step": 5},
    ]
    assert run.exit_code == 0
    with Logs(tmp_path, rank=1) as other:
        other.scalars(1, {"a": 1.0})
    assert len(wandb.runs) == 1
