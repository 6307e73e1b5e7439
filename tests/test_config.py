"""Configuration: typed loading, errors that help, exact round trips (V-03, V-04, V-05)."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from lalia import config as lalia_config
from lalia.config import ConfigError, difference, flatten, load, load_run_config, nearest, save, to_dict, to_yaml
from lalia.sections import DataConfig, ExternalModel, OptimizerConfig, RunConfig, ScheduleKind, Section


class Color(Enum):
    red = "r"
    blue = "b"


@dataclass
class Weights(Section):
    mel: float = 45.0
    kl: float = 1.0


@dataclass
class Model(Section):
    width: int = 192
    name: str = ""
    title: str | None = None
    color: Color = Color.red
    wide: bool = False
    rates: list[int] = field(default_factory=lambda: [8, 8])
    labels: dict[str, float] = field(default_factory=dict)
    towers: list[Weights] = field(default_factory=list)
    named: dict[str, Weights] = field(default_factory=dict)
    encoder: ExternalModel | None = None
    anything: Any = None

    def __post_init__(self) -> None:
        if self.width % 2:
            raise ValueError(f"width must be even, got {self.width}")


@dataclass
class Config(RunConfig):
    model: Model = field(default_factory=Model)
    weights: Weights = field(default_factory=Weights)
    data: DataConfig = field(default_factory=DataConfig)
    main: OptimizerConfig = field(default_factory=OptimizerConfig)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def message(*arguments: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(Config, *arguments)
    return str(caught.value)


def test_yaml_file_and_overrides_become_plain_dataclasses(tmp_path: Path) -> None:
    text = "train:\n  steps: 5\ndata:\n  train: [x.jsonl]\nmain: {schedule: cosine, lr: 1e-4}\n"
    overrides = ["train.steps=10", "data.valid=[a.jsonl, b.jsonl]", "model.rates=[1,2]", "main.clip=.5"]
    config = load(Config, write(tmp_path / "a.yaml", text), overrides)
    assert type(config) is Config and type(config.train) is type(Config().train)
    assert (config.train.steps, config.data.train, config.data.valid) == (10, ["x.jsonl"], ["a.jsonl", "b.jsonl"])
    assert type(config.model.rates) is list and config.model.rates == [1, 2]
    assert config.main.schedule is ScheduleKind.cosine and config.main.lr == 1e-4 and config.main.clip == 0.5
    assert config.weights == Weights()


def test_json_means_the_same_as_yaml(tmp_path: Path) -> None:
    tree: dict[str, Any] = {"train": {"steps": 7}}
    tree |= {"model": {"name": "日本 \U0001f600 \\ /", "rates": [], "labels": {"a": 1}}}
    as_json = write(tmp_path / "c.json", json.dumps(tree, indent="\t"))
    as_yaml = write(tmp_path / "c.yaml", to_yaml(tree))
    assert load(Config, as_json) == load(Config, as_yaml)
    assert load(Config, as_json).model.name == tree["model"]["name"]


TEXTS = ["00123", "no", "on", "12:30", "1e-4", "true", "null", "[1, 2]", "a=b", "", "0x10", " x"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_fields_keep_their_text(tmp_path: Path, text: str) -> None:
    assert load(Config, None, [f"model.name={text}"]).model.name == text
    config = Config(model=Model(name=text, title=text))
    save(config, tmp_path / "c.yaml")
    assert load(Config, tmp_path / "c.yaml") == config


def test_plain_yaml_scalars_in_text_fields_stay_as_written(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "model: {name: 00123, title: no}\ntrain: {init_from: }\n")
    config = load(Config, path)
    assert (config.model.name, config.model.title, config.train.init_from) == ("00123", "no", "")


def test_typed_values_from_text() -> None:
    values = ["wide=yes", "color=blue", "title=null", "anything=[1, x]", "labels.valence=2"]
    values += ["encoder.source=tiny", "named.a.mel=3", "towers=[{kl: 2}]"]
    model = load(Config, None, [f"model.{value}" for value in values]).model
    assert (model.wide, model.color, model.title, model.anything) == (True, Color.blue, None, [1, "x"])
    assert model.labels == {"valence": 2.0} and model.encoder == ExternalModel("tiny")
    assert model.named == {"a": Weights(3.0)} and model.towers == [Weights(kl=2.0)]


def test_a_heading_without_lines_keeps_the_defaults(tmp_path: Path) -> None:
    assert load(Config, write(tmp_path / "a.yaml", "train:\n  # steps: 3\n")) == Config()
    assert load(Config, write(tmp_path / "b.yaml", "# nothing\n")) == Config()
    assert load(Config, write(tmp_path / "b.json", "")) == Config()


def test_unknown_key_names_file_line_key_neighbours_and_nearest(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "train:\n  epochs: 3\n  step: 5\n")
    text = message(path)
    assert f"{path}:3" in text and "'train.step'" in text and "did you mean 'steps'" in text and "eval_every" in text
    text = message(None, ["trian.steps=5"])
    assert "override 'trian.steps=5'" in text and "did you mean 'train'" in text
    assert "'weights.dur'" in message(None, ["weights={dur: 1}"])
    assert "not a section" in message(None, ["model.width.x=1"])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train: {steps: many}", ["train.steps", "int", "'many'", ":1"]),
        ("train: {steps: 1.5}", ["train.steps", "int", "'1.5'"]),
        ("train: {steps: true}", ["train.steps", "int", "'true'"]),
        ("model:\n  rates: [8, wide]", ["model.rates", "list[int]", "'wide'", ":2"]),
        ("data: {train: a.jsonl}", ["data.train", "list[str]", "write [a.jsonl]"]),
        ("model: {color: bleu}", ["model.color", "one of red, blue", "did you mean 'blue'"]),
        ("model: {wide: perhaps}", ["model.wide", "bool", "'perhaps'"]),
        ("model: {width: null}", ["model.width", "int", "null"]),
        ("model: {width: {a: 1}}", ["model.width", "int", "a mapping"]),
        ("train: 5", ["train", "a section", "'5'"]),
        ("train: [1]", ["train", "a section", "['1']"]),
        ("model: {labels: {a: b}}", ["model.labels", "dict[str, float]"]),
    ],
)
def test_wrong_type_names_key_expectation_and_value(tmp_path: Path, text: str, parts: list[str]) -> None:
    shown = message(write(tmp_path / "a.yaml", text))
    assert all(part in shown for part in parts), shown


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train:\n  steps: 1\n bad: 2\n", [":3", "broken YAML"]),
        ("train: {steps: 1\n", ["broken YAML", "a.yaml:"]),
        ("train:\n  steps: 1\n  steps: 2\n", [":3", "'train.steps'", "twice", ":2"]),
        ("model: {name: '${oc.env:HOME}'}", ["model.name", "interpolation"]),
        ("model: {_target_: os.system}", ["_target_", "nothing is instantiated"]),
        ("model: {anything: {_target_: !!python/name:os.system x}}", ["tag"]),
        ("model: {rates: &r [1], anything: *r}", ["aliases"]),
        ("[1, 2]", ["expected a mapping"]),
        ("---\na: 1\n---\nb: 2\n", ["broken YAML"]),
    ],
)
def test_files_that_are_not_plain_data_are_refused(tmp_path: Path, text: str, parts: list[str]) -> None:
    shown = message(write(tmp_path / "a.yaml", text))
    assert all(part in shown for part in parts), shown


def test_broken_json_and_bytes(tmp_path: Path) -> None:
    assert ":2" in message(write(tmp_path / "a.json", '{"train":\n {"steps" 1}}'))
    assert "'steps' is given twice" in message(write(tmp_path / "b.json", '{"train": {"steps": 1, "steps": 2}}'))
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in message(tmp_path / "c.yaml")


def test_missing_file_names_what_is_near(tmp_path: Path) -> None:
    write(tmp_path / "tiny.yaml", "")
    text = message(tmp_path / "tinny.yaml")
    assert "tinny.yaml" in text and "did you mean 'tiny.yaml'" in text
    assert "does not exist either" in message(tmp_path / "nowhere" / "a.yaml")
    assert "is a folder" in message(tmp_path)


def test_cross_checks_name_their_section(tmp_path: Path) -> None:
    text = message(write(tmp_path / "a.yaml", "model: {width: 3}"))
    assert "section 'model'" in text and "width must be even, got 3" in text and "a.yaml" in text
    assert "section 'data'" in message(None, ["data.boundaries=[3, 2]"])


def test_override_without_equals_sign() -> None:
    assert "key=value" in message(None, ["train.steps"])


def test_patterns_with_a_star_in_an_override() -> None:
    assert load(Config, None, ["train.freeze=[enc_p, dec.*, '*.bias']"]).train.freeze == ["enc_p", "dec.*", "*.bias"]
    assert "put quotes around" in message(None, ["train.freeze=[*.bias]"])


def test_round_trip_of_everything(tmp_path: Path) -> None:
    overrides = ["model.labels={a.b: 1e-9}", "main.lr=3e-05", "model.towers=[{mel: 1e16}]", "model.encoder={}"]
    overrides += ["model.named.x={kl: .5}", "train.freeze=['*.bias', dec.*]", "model.anything='1e5'"]
    config = load(Config, None, overrides)
    save(config, tmp_path / "runs" / "a" / "config.yaml")
    assert load(Config, tmp_path / "runs" / "a" / "config.yaml") == config
    assert json.loads(json.dumps(to_dict(config))) == to_dict(config)
    assert to_dict(config)["main"]["schedule"] == "exponential"


def test_save_is_atomic_and_leaves_the_source_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "default.yaml", "train: {steps: 3}  # mine\n")
    before = source.read_bytes()
    copy = tmp_path / "run" / "config.yaml"
    save(load(Config, source, ["train.steps=4"]), copy)
    assert source.read_bytes() == before and load(Config, copy).train.steps == 4
    kept = copy.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lalia_config.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(Config(), copy)
    assert copy.read_bytes() == kept and [p.name for p in copy.parent.iterdir()] == ["config.yaml"]


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.yaml", "train: {steps: 3}")
    monkeypatch.chdir(tmp_path)
    assert load(Config, "a.yaml") == load(Config, tmp_path / "a.yaml")
    save(Config(), "b.yaml")
    assert (tmp_path / "b.yaml").exists()


def test_mapping_access() -> None:
    weights = load(Config).weights
    assert "mel" in weights and "lr" not in weights and hasattr(weights, "kl")
    assert weights["mel"] == 45.0 and list(weights.keys()) == ["mel", "kl"]
    assert dict(**weights) == {"mel": 45.0, "kl": 1.0} == dict(weights)
    with pytest.raises(KeyError, match="mel, kl"):
        weights["dur"]


def test_flatten_and_difference() -> None:
    first, second = Config(), load(Config, None, ["train.steps=3", "model.labels.a=1", "main.schedule=cosine"])
    assert flatten(first)["train.steps"] == 0 and flatten(first)["main.betas"] == [0.8, 0.99]
    assert difference(first, first) == {}
    assert difference(first, second) == {
        "train.steps": (0, 3),
        "model.labels": ({}, None),
        "model.labels.a": (None, 1.0),
        "main.schedule": ("exponential", "cosine"),
    }


def test_nearest() -> None:
    assert nearest("epocs", ["epochs", "steps"]) == "; did you mean 'epochs'?"
    assert nearest("zzz", ["epochs"]) == ""


@pytest.fixture
def toy_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system named ``toy`` whose configuration module follows the convention."""
    module = types.ModuleType("lalia.systems.toy.config")
    module.Config = Config  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(lalia_config, "_has_module", lambda name: name == module.__name__)


@pytest.mark.usefixtures("toy_system")
def test_load_run_config_takes_the_class_of_the_named_system(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "system: toy\nmodel: {width: 8}\n")
    config = load_run_config(path, ["train.steps=2"])
    assert type(config) is Config and (config.system, config.model.width, config.train.steps) == ("toy", 8, 2)
    assert type(load_run_config(None, ["system=toy"])) is Config
    with pytest.raises(ConfigError, match="unknown system 'vitz2'; did you mean 'vits2'"):
        load_run_config(path, ["system=vitz2"])


def test_load_run_config_without_system(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'system' is missing"):
        load_run_config(write(tmp_path / "a.yaml", "train: {steps: 1}"), [])


def test_configuration_alone_imports_no_torch() -> None:
    code = "import sys, lalia.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
