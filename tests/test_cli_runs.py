"""``lalia train``, ``speak`` and ``evaluate`` on a tiny run, and what wrong input is answered with."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from cli_runner import lalia, refused
from factories import tiny_vits2_config, train_tiny_run

from lalia import checkpoint, run_setup
from lalia import evaluate as evaluation
from lalia.commands.shared import step_label
from lalia.config import save
from lalia.runfolder import RunFolder
from lalia.sections import RunConfig
from lalia.system import System


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


# --- train ----------------------------------------------------------------------------------------------------------
def test_train_begins_goes_on_and_can_be_called_by_the_run_alone(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "first"
    begun = lalia("train", config_file, "-m", run, "train.steps=1", "data.valid=[]")
    assert begun.exit_code == 0 and "done: step 1" in begun.output and "speak" in begun.output
    assert (run / "config.source.yaml").read_text() == config_file.read_text()
    again = lalia("train", "-c", config_file, "--model", run, "train.steps=2", "data.valid=[]")
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
    result = lalia("train", config_file, "-m", run, "train.steps=50", "data.valid=[]")
    assert result.exit_code == 130, result.output
    assert f"train {config_file} -m {run} train.steps=50 'data.valid=[]'" in result.output.replace("\n", " ")
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
    message = refused("speak", run.parent / "ran", "Hello.")
    assert f"no run folder {run.parent / 'ran'}; folders in {run.parent}: corpus, run" in message


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
