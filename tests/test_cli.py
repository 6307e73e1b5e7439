"""The command line on tiny models: each command, and what wrong input is answered with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import typer
import yaml
from factories import tiny_vits2_config, train_tiny_run, write_wav
from typer.testing import CliRunner, Result

from lalia import checkpoint, corpora, run_setup
from lalia import evaluate as evaluation
from lalia.cli import app, is_for_user
from lalia.commands.shared import program, split_overrides, step_label
from lalia.config import save
from lalia.corpora import SOURCES, CorpusUnavailable
from lalia.runfolder import RunFolder
from lalia.sections import RunConfig
from lalia.system import System

COMMANDS = ["prepare", "doctor", "train", "speak", "evaluate", "config", "demo"]


def lalia(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object, code: int = 1) -> str:
    """The message of a command that must fail with ``code`` and without a traceback."""
    result = lalia(*arguments)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    if code == 1:
        assert "error: " in result.output
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="session")
def run(folder: Path) -> Path:
    return train_tiny_run(folder)


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
        own = lalia(name, "--help").output if name != "doctor" else lalia("doctor", "data", "--help").output
        assert f"lalia {name}" in own
    for absent in ("transcribe", "emotion", "tokenize", "chat", "serve"):
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
    result = lalia("prepare", "folder", source, "-o", tmp_path / "out", "--speaker", "me", "--language", "en", "--split", ".6,.2,.2")
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


# --- train ----------------------------------------------------------------------------------------------------------
def test_train_begins_goes_on_and_can_be_called_by_the_run_alone(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "first"
    begun = lalia("train", config_file, "-m", run, "train.steps=1")
    assert begun.exit_code == 0 and "done: step 1" in begun.output and "speak" in begun.output
    assert (run / "small.yaml").is_file() or (run / "config.yaml").is_file()
    again = lalia("train", "-c", config_file, "--model", run, "train.steps=2")
    assert again.exit_code == 0 and "done: step 2" in again.output
    alone = lalia("train", "-m", run, "train.steps=3")
    assert alone.exit_code == 0 and "done: step 3" in alone.output
    assert checkpoint.latest_set(run).step == 3  # type: ignore[union-attr]


def test_train_chooses_a_run_folder(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []
    monkeypatch.setattr("lalia.train.train", lambda config, run, source: seen.append(run) or counters())
    monkeypatch.chdir(tmp_path)
    assert lalia("train", config_file).exit_code == 0
    assert seen == [Path("runs/small")]


def counters(interrupted: bool = False) -> Any:
    from lalia.train import Counters

    result = Counters(step=5)
    result.interrupted = interrupted
    return result


def test_ctrl_c_saves_says_how_to_go_on_and_exits_with_130(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = run_setup.seed_step

    def pressed(clock: Any, rank: int) -> None:
        original(clock, rank)
        if clock.step == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run_setup, "seed_step", pressed)
    run = tmp_path / "run"
    result = lalia("train", config_file, "-m", run, "train.steps=50")
    assert result.exit_code == 130, result.output
    assert f"train {config_file} -m {run} train.steps=50" in result.output.replace("\n", " ")
    assert checkpoint.latest_set(run).step == 2  # type: ignore[union-attr]


def test_ctrl_c_elsewhere_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lalia.config.load_run_config", pressed)
    result = lalia("config", "system=vits2")
    assert result.exit_code == 130 and "interrupted" in result.output


def test_train_refuses(config_file: Path, tmp_path: Path) -> None:
    refused("train", code=2)
    assert "is not a run yet" in refused("train", "-m", tmp_path / "absent", code=2)
    refused("train", config_file, config_file, code=2)
    assert "did you mean 'lr'" in refused("train", config_file, "-m", tmp_path / "a", "optimizers.g.lrr=1")
    assert "absent.jsonl" in refused("train", config_file, "-m", tmp_path / "b", "data.train=[absent.jsonl]")
    locked = RunFolder(tmp_path / "c")
    locked.create()
    locked.lock()
    try:
        assert "is in use by" in refused("train", config_file, "-m", tmp_path / "c")
    finally:
        locked.unlock()


# --- speak ----------------------------------------------------------------------------------------------------------
def test_speak_writes_a_file(run: Path, tmp_path: Path) -> None:
    result = lalia("speak", run, "Hello world.", "-o", tmp_path / "hello.wav", "--speaker", "s1", "--seed", 3, "--device", "cpu")
    assert result.exit_code == 0, result.output
    wave, rate = soundfile.read(tmp_path / "hello.wav")
    assert rate == 16000 and len(wave) > 1000 and "s of speech" in result.output
    slow = lalia("speak", run, "Hello world.", "-o", tmp_path / "slow.wav", "--speaker", "s1", "--seed", 3, "--length-scale", 2)
    assert slow.exit_code == 0
    assert len(soundfile.read(tmp_path / "slow.wav")[0]) > 1.4 * len(wave)


def test_stream_equals_offline(run: Path, tmp_path: Path) -> None:
    text = "Hello world. Good morning."
    assert lalia("speak", run, text, "-o", tmp_path / "a.wav").exit_code == 0
    assert lalia("speak", run, text, "-o", tmp_path / "b.wav", "--stream").exit_code == 0
    piped = lalia("speak", run, text, "-o", "-", "--stream")
    offline, streamed = (soundfile.read(tmp_path / name)[0] for name in ("a.wav", "b.wav"))
    assert len(offline) == len(streamed) == len(piped.stdout_bytes) // 2
    assert np.abs(offline - streamed).max() < 2e-4


def test_a_file_of_texts(run: Path, tmp_path: Path) -> None:
    texts = tmp_path / "lines.txt"
    texts.write_text("Hello world.\n\nGood morning.\n", encoding="utf-8")
    assert lalia("speak", run, "--text-file", texts, "-o", tmp_path / "many").exit_code == 0
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == ["0001.wav", "0002.wav"]
    assert lalia("speak", run, "--text-file", texts, "-o", tmp_path / "one.wav", "--pause", 0.5).exit_code == 0
    parts = [len(soundfile.read(p)[0]) for p in sorted((tmp_path / "many").iterdir())]
    assert len(soundfile.read(tmp_path / "one.wav")[0]) == sum(parts) + 8000
    texts.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refused("speak", run, "--text-file", texts)
    texts.write_text("\n")
    assert "holds no text" in refused("speak", run, "--text-file", texts)


def test_five_thousand_characters_are_split_and_spoken(run: Path, tmp_path: Path) -> None:
    text = ("The next free operator will answer your call. " * 120)[:5000]
    result = lalia("speak", run, text, "-o", tmp_path / "long.wav", "--length-scale", 0.5)
    assert result.exit_code == 0, result.output
    assert soundfile.info(tmp_path / "long.wav").duration > 5


def test_speak_refuses(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.wav"
    assert "text is empty" in refused("speak", run, "", "-o", out)
    assert "text is empty" in refused("speak", run, "", "-o", out, "--stream")
    assert "☃" in refused("speak", run, "Hello ☃ world.", "-o", out)
    assert "unknown speaker 'nobody'; this run has s0, s1" in refused("speak", run, "Hello.", "--speaker", "nobody", "-o", out)
    assert "language 'xx'" in refused("speak", run, "Hello.", "--language", "xx", "-o", out)
    assert "length_scale" in refused("speak", run, "Hello.", "--length-scale", 0, "-o", out)
    assert "is not a device" in refused("speak", run, "Hello.", "--device", "toaster", "-o", out)
    assert "has no set 'step-9'" in refused("speak", run, "Hello.", "--which", "step-9", "-o", out)
    assert "mp3" in refused("speak", run, "Hello.", "-o", tmp_path / "out.mp3")
    assert not list(tmp_path.iterdir())


def test_speak_usage(run: Path, tmp_path: Path) -> None:
    texts = tmp_path / "lines.txt"
    texts.write_text("a\nb\n")
    for arguments in ([], ["Hello.", "--text-file", texts], ["Hello.", "-o", "-"], ["--text-file", texts, "--stream"]):
        refused("speak", run, *arguments, code=2)


def test_no_such_run_names_its_neighbours(run: Path) -> None:
    assert f"no run folder {run.parent / 'ran'}; folders in {run.parent}: corpus, run" in refused("speak", run.parent / "ran", "Hello.")


def flip_a_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))


def test_a_damaged_run_is_named(run: Path, tmp_path: Path) -> None:
    broken, out = tmp_path / "broken", tmp_path / "out.wav"
    shutil.copytree(run, broken, symlinks=True)
    flip_a_byte(broken / "step-00000002" / "model.safetensors")
    earlier = lalia("speak", broken, "Hello.", "-o", out)
    assert earlier.exit_code == 0 and "using the checkpoint of step 0 instead" in earlier.output
    (broken / "tables.json").rename(broken / "tables.away")
    assert "tables.json is missing" in refused("speak", broken, "Hello.", "-o", out)
    flip_a_byte(broken / "step-00000000" / "model.safetensors")
    message = refused("speak", broken, "Hello.", "-o", out)
    assert "every checkpoint in" in message and "model.safetensors was altered" in message


def test_a_system_that_cannot_speak_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "load", lambda *_: System(RunConfig(system="mute"), {}))
    assert "'mute', which cannot speak" in refused("speak", tmp_path, "Hello.")


def test_checkpoints_are_labelled_by_their_step(run: Path) -> None:
    assert step_label(run, "latest") == step_label(run / "latest", "best") == "step 2"
    assert step_label(run, "step-00000000") == step_label(run / "step-00000000", "best") == "step 0"


# --- evaluate -------------------------------------------------------------------------------------------------------
class Echo:
    name = "echo"

    def transcribe(self, waves: Sequence[np.ndarray], sample_rate: int, language: str = "en") -> list[str]:
        return ["alpha bravo" for _ in waves]


def test_evaluate_writes_figures_and_a_report(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "open_recogniser", lambda source: Echo())
    data = folder / "corpus" / "all.jsonl"
    result = lalia("evaluate", run, "--data", data, "--limit", 2, "-o", tmp_path, "--which", "latest")
    assert result.exit_code == 0, result.output
    figures = {f["name"]: f for f in json.loads((tmp_path / "eval.json").read_text())["figures"]}
    assert {"wer.recording", "wer.resynthesis", "wer.speech"} <= set(figures)
    assert json.loads((tmp_path / "eval.json").read_text())["label"] == "step 2"
    assert (tmp_path / "report.html").is_file() and "Word error rate · recording" in result.output


def test_evaluate_refuses(run: Path, folder: Path, tmp_path: Path) -> None:
    data = folder / "corpus" / "all.jsonl"
    assert "absent.jsonl" in refused("evaluate", run, "--data", tmp_path / "absent.jsonl")
    assert "no folder ./absent" in refused("evaluate", run, "--data", data, "--asr", "./absent")
    assert "no run folder" in refused("evaluate", tmp_path / "absent", "--data", data)
    refused("evaluate", run, code=2)


def test_every_command_is_one_function_of_typer() -> None:
    assert sorted(typer.main.get_command(app).commands) == sorted(COMMANDS)  # type: ignore[attr-defined]
