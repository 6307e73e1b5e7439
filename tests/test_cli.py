"""The command line itself, and ``config``, ``prepare`` and ``doctor``. ``train``, ``speak`` and ``evaluate``: test_cli_runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import yaml
from cli_runner import lalia, refused
from factories import tiny_vits2_config, write_wav

from lalia import corpora, run_setup
from lalia.cli import app, is_for_user
from lalia.commands.shared import program, split_overrides
from lalia.config import save
from lalia.corpora import SOURCES, CorpusUnavailable

COMMANDS = [
    "prepare", "features", "doctor", "train", "smoke", "speak", "chat", "serve", "emotion", "evaluate", "crossval", "config",
    "convert", "demo",
]  # fmt: skip
GROUPS = {"doctor": "data", "features": "egemaps", "convert": "nanochat"}  # command → one of its own commands


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="session")
def config_file(folder: Path) -> Path:
    path = folder / "small.yaml"
    save(tiny_vits2_config(folder), path)
    return path


# --- the program itself ---------------------------------------------------------------------------------------------
def test_help_lists_the_commands_and_each_has_an_example() -> None:
    top = lalia("--help").output
    for name in COMMANDS:
        assert name in top
        own = lalia(name, *([GROUPS[name]] if name in GROUPS else []), "--help").output
        assert f"lalia {name}" in own
    for absent in ("transcribe", "tokenize"):
        assert absent not in top


def test_the_help_of_prepare_names_every_source() -> None:
    shown = " ".join(lalia("prepare", "--help").output.replace("│", " ").split())
    assert all(name in shown for name in SOURCES)


def test_version_and_no_arguments() -> None:
    assert lalia("--version").output.startswith("lalia ")
    assert "Usage" in lalia().output


def test_help_and_config_need_no_torch() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom lalia.cli import app\n"
        "for line in (['--help'], ['speak', '--help'], ['config', 'system=vits2']):\n"
        "    assert CliRunner().invoke(app, line).exit_code == 0, line\n"
        "print([name for name in ('torch', 'transformers', 'numba', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_command_and_option_are_usage_errors() -> None:
    assert "No such command" in refused("sing", code=2)
    assert "No such option" in refused("speak", "--lauder", code=2)


def test_offline_sets_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LALIA_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert lalia("--offline", "config", "system=vits2").exit_code == 0
    assert os.environ["LALIA_OFFLINE"] == os.environ["HF_HUB_OFFLINE"] == "1"


def test_traceback_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "no.yaml"
    assert "Traceback" not in lalia("config", missing).output
    assert "Traceback" in lalia("--verbose", "config", missing).output
    monkeypatch.setenv("LALIA_DEBUG", "1")
    assert "Traceback" in lalia("config", missing).output


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        np.zeros(3).reshape(2)

    monkeypatch.setattr("lalia.config.load_run_config", broken)
    result = lalia("config", "system=vits2")
    assert isinstance(result.exception, ValueError) and "error: " not in result.output


def test_which_errors_are_for_users() -> None:
    def raised(error: Exception) -> Exception:
        try:
            raise error
        except Exception as caught:
            return caught

    assert is_for_user(raised(CorpusUnavailable("x")))
    assert is_for_user(raised(run_setup.NonFiniteLoss("x")))
    assert is_for_user(raised(FileNotFoundError(2, "no such file", "x")))
    assert not is_for_user(raised(ValueError("from outside")))
    assert not is_for_user(raised(RuntimeError("x")))
    assert not is_for_user(raised(KeyError("x")))


def test_files_and_overrides_are_told_apart() -> None:
    items = ["a.yaml", "train.steps=3", "data/x=y.jsonl", "data.train=[a=b]"]
    assert split_overrides(items) == (["a.yaml", "data/x=y.jsonl"], ["train.steps=3", "data.train=[a=b]"])


def test_the_program_is_named_as_it_was_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    monkeypatch.setattr(sys, "argv", ["/somewhere/lalia/__main__.py"])
    assert program() == ".venv/bin/python -m lalia"
    for called in ("/usr/bin/lalia", "lalia"):
        monkeypatch.setattr(sys, "argv", [called])
        assert program() == "lalia"
    monkeypatch.setattr(sys, "argv", [str(tmp_path / ".venv/bin/lalia")])
    assert program() == ".venv/bin/lalia"


# --- config ---------------------------------------------------------------------------------------------------------
def test_config_prints_the_resolved_tree(config_file: Path) -> None:
    result = lalia("config", config_file, "train.steps=77")
    tree = yaml.safe_load(result.output)
    assert (tree["train"]["steps"], tree["model"]["width"], tree["system"]) == (77, 16, "vits2")


def test_config_mistakes_are_named(config_file: Path, tmp_path: Path) -> None:
    assert "did you mean 'steps'" in refused("config", config_file, "train.stepz=1")
    assert "train.steps expects int, got 'many'" in refused("config", config_file, "train.steps=many")
    assert "no such file" in refused("config", tmp_path / "absent.yaml")
    assert "did you mean 'vits2'" in refused("config", "system=vits")
    refused("config", config_file, config_file, code=2)


# --- prepare --------------------------------------------------------------------------------------------------------
def recordings(root: Path, good: int, bad: int) -> Path:
    for index in range(good + bad):
        write_wav(root / f"clip{index}.wav", 1.5, 8000, seed=index)
        (root / f"clip{index}.txt").write_text("One two three four." if index < good else "", encoding="utf-8")
    return root


def test_prepare_folder(tmp_path: Path) -> None:
    source = recordings(tmp_path / "in", 12, 1)
    options = ["-o", tmp_path / "out", "--speaker", "me", "--language", "en", "--split", ".6,.2,.2"]
    result = lalia("prepare", "folder", source, *options)
    assert result.exit_code == 0, result.output
    assert "12 of 13 clips usable" in result.output
    rows = [json.loads(line) for name in corpora.SPLITS for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and {row["speaker"] for row in rows} == {"me"}


def test_prepare_refuses(tmp_path: Path) -> None:
    source = recordings(tmp_path / "in", 3, 3)
    assert "above max_bad_fraction" in refused("prepare", "folder", source, "-o", tmp_path / "out")
    assert lalia("prepare", "folder", source, "-o", tmp_path / "out", "--max-bad-fraction", "0.6").exit_code == 0
    assert "did you mean 'folder'" in refused("prepare", "foldr", source, "-o", tmp_path / "out")
    assert "no such folder" in refused("prepare", "folder", tmp_path / "absent", "-o", tmp_path / "out")
    assert "has no option 'sentences'" in refused("prepare", "folder", source, "--sentences", 3, "-o", tmp_path / "out")
    refused("prepare", "folder", source, "--split", "most", code=2)
    refused("prepare", "folder", source, "--language", "en", "--language", "fr", code=2)


def test_prepare_falls_back_only_when_asked_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Path, dict[str, Any]]] = []

    class Report:
        def summary(self) -> str:
            return "synth: done"

    def prepare(source: str, out: Path, **options: Any) -> Report:
        asked.append((source, out, options))
        if source == "asterisk":
            raise CorpusUnavailable("apt-get is not on this machine")
        return Report()

    monkeypatch.setattr(corpora, "prepare", prepare)
    assert "apt-get is not on this machine" in refused("prepare", "asterisk")
    result = lalia("prepare", "asterisk", "--language", "en", "--sample-rate", 16000, "--fallback", "synth")
    assert result.exit_code == 0 and "preparing 'synth' instead" in result.output and "synth: done" in result.output
    assert asked[1][2]["languages"] == ["en"]
    assert asked[2][:2] == ("synth", Path("data/synth"))
    assert asked[2][2]["sample_rate"] == 16000 and "languages" not in asked[2][2]


# --- doctor ---------------------------------------------------------------------------------------------------------
def test_doctor_env_runs() -> None:
    result = lalia("doctor", "env")
    assert "torch" in result.output and result.exit_code in (0, 1)


def test_doctor_data_and_its_exit_code(folder: Path, config_file: Path, tmp_path: Path) -> None:
    manifest = folder / "corpus" / "all.jsonl"
    result = lalia("doctor", "data", manifest, "-c", config_file, "--json", tmp_path / "report.json")
    assert result.exit_code == 0 and "ready" in result.output
    assert json.loads((tmp_path / "report.json").read_text())["usable"] == 8
    assert lalia("doctor", "data", manifest, "-c", config_file, "data.min_seconds=5").exit_code == 1
    assert "absent.jsonl" in refused("doctor", "data", tmp_path / "absent.jsonl")
    refused("doctor", "data", manifest, "data.min_seconds=5", code=2)


def test_doctor_config_and_its_exit_code(config_file: Path) -> None:
    result = lalia("doctor", "config", config_file)
    assert result.exit_code == 0 and "generator" in result.output, result.output
    missing = lalia("doctor", "config", config_file, "data.train=[absent.jsonl]")
    assert missing.exit_code == 1 and "absent.jsonl" in missing.output


def test_every_command_is_one_function_of_typer() -> None:
    assert sorted(typer.main.get_command(app).commands) == sorted(COMMANDS)  # type: ignore[attr-defined]
