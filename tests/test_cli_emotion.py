"""``lalia emotion`` and ``lalia evaluate`` of a system that recognises emotion."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_runner import lalia, refused
from emotion_fake import Fake, FakeSession, make_rows
from factories import write_wav
from typer.testing import CliRunner

from lalia.cli import app
from lalia.data import Row, write_manifest
from lalia.evaluate.emotion import SPEAKER_DEPENDENT
from lalia.sections import DataConfig, RunConfig


class Config(RunConfig):
    """What ``evaluate`` reads of a run."""

    data: Any


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Every run folder is this system's; its training rows are in train.jsonl."""
    write_manifest(tmp_path / "train.jsonl", make_rows(tmp_path / "audio", "train", 2, 3))
    config = RunConfig(system="fake")
    config.data = DataConfig(train=[str(tmp_path / "train.jsonl")])  # type: ignore[attr-defined]
    monkeypatch.setattr(RunConfig, "keys", lambda self: ["system", "train", "dist", "data"])
    system = Fake(config, noise=0.3)
    for module in ("emotion", "evaluate"):
        monkeypatch.setattr(f"lalia.commands.{module}.load_system", lambda *_: system)
    monkeypatch.setattr("lalia.commands.evaluate.step_label", lambda *_: "step 3")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    return system


@pytest.fixture
def waves(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "waves" / f"{name}.wav" for name in "abc"]
    for path in paths:
        write_wav(path, 0.2)
    return paths


def said(fake: Fake) -> list[list[str]]:
    """File names of the dialogues that the system was given."""
    return [[Path(name).name for name in ids] for call in fake.calls for ids in call["ids"]]


# --- files, folders, manifests --------------------------------------------------------------------------------------
def test_one_file_and_several_as_a_dialogue(fake: Fake, waves: list[Path], tmp_path: Path) -> None:
    one = lalia("emotion", tmp_path / "run", waves[0])
    assert one.exit_code == 0 and "valence" in one.output and "arousal" in one.output and "3.000" not in one.output.split("\n")[0]
    assert lalia("emotion", tmp_path / "run", waves[2], waves[0], "--speaker", "anna", "--speaker", "ben").exit_code == 0
    assert said(fake) == [["a.wav"], ["c.wav", "a.wav"]]


def test_a_folder_by_name_each_file_for_itself_or_as_a_dialogue(fake: Fake, waves: list[Path], tmp_path: Path) -> None:
    assert lalia("emotion", tmp_path / "run", waves[0].parent).exit_code == 0
    assert lalia("emotion", tmp_path / "run", waves[0].parent, "--dialogue").exit_code == 0
    assert said(fake) == [["a.wav"], ["b.wav"], ["c.wav"], ["a.wav", "b.wav", "c.wav"]]


def test_a_manifest_in_time_order_with_calibration_and_files_out(fake: Fake, tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "audio", "test", 2, 6)
    write_manifest(tmp_path / "test.jsonl", rows[::-1])
    done = lalia("emotion", tmp_path / "run", tmp_path / "test.jsonl", "--calibrate", 2, "-o", tmp_path / "o" / "x.jsonl")
    assert done.exit_code == 0, done.output
    assert sorted(said(fake)) == [[row.id for row in rows[:6]], [row.id for row in rows[6:]]] and fake.calls[0]["calibrate"] == 2
    records = [json.loads(line) for line in (tmp_path / "o" / "x.jsonl").read_text().splitlines()]
    assert len(records) == 12 and sum(record.get("calibration", False) for record in records) == 8
    assert set(records[-1]) == {"id", "speaker", "dialogue", "turn", "valence", "arousal"} and "calibration" in done.output
    assert lalia("emotion", tmp_path / "run", tmp_path / "test.jsonl", "-o", tmp_path / "x.csv").exit_code == 0
    with open(tmp_path / "x.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [float(line["valence"]) for line in table] and {line["turn"] for line in table} == set("012345")


def test_bad_turns_are_listed_and_the_others_answered(fake: Fake, waves: list[Path], tmp_path: Path) -> None:
    (tmp_path / "waves" / "empty.wav").touch()
    (tmp_path / "waves" / "text.wav").write_text("this is no sound")
    result = lalia("emotion", tmp_path / "run", tmp_path / "waves", "-o", tmp_path / "x.csv")
    assert result.exit_code == 1 and "2 turns could not be heard" in result.output
    assert "empty audio file" in result.output and "unreadable" in result.output
    assert len((tmp_path / "x.csv").read_text().splitlines()) == 4
    rows = make_rows(tmp_path / "audio", "test", 2, 3)
    rows[0] = replace(rows[0], audio="")
    rows[4] = replace(rows[4], extra={"broken": True})
    write_manifest(tmp_path / "test.jsonl", rows)
    with open(tmp_path / "test.jsonl", "a") as file:
        file.write("{broken\n")
    result = lalia("emotion", tmp_path / "run", tmp_path / "test.jsonl")
    assert result.exit_code == 1 and "names no audio" in result.output and "test.jsonl:7" in result.output
    assert "test-d0-01" in result.output and "5 turns could not be heard" in result.output


def test_wrong_calls_are_refused(fake: Fake, waves: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    assert "could not be heard" in refused("emotion", run, tmp_path / "gone.wav")
    (tmp_path / "hollow").mkdir()
    assert "holds no audio file" in refused("emotion", run, tmp_path / "hollow")
    assert "no manifest" in refused("emotion", run, tmp_path / "gone.jsonl")
    assert "needs labelled turns" in refused("emotion", run, waves[0], "--calibrate", 2)
    for wrong in ([], [waves[0], "--online"], ["--online", "--calibrate", 1], [waves[0], "-o", "x.txt"]):
        refused("emotion", run, *wrong, code=2)
    refused("emotion", run, *waves, "--speaker", "a", "--speaker", "b", code=2)
    refused("emotion", run, waves[0], "--calibrate", -1, code=2)
    monkeypatch.setattr("lalia.commands.emotion.load_system", lambda *_: type("Mute", (), {"config": RunConfig(system="mute")})())
    assert "'mute', which cannot recognise emotion" in refused("emotion", run, waves[0])


# --- live -----------------------------------------------------------------------------------------------------------
def online(run: Path, text: str | bytes) -> tuple[int, list[dict[str, Any]], str]:
    result = CliRunner().invoke(app, ["emotion", str(run), "--online"], input=text)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    return result.exit_code, lines, result.output


def test_live_turns_carry_the_state_and_an_empty_line_resets_it(fake: Fake, waves: list[Path], tmp_path: Path) -> None:
    text = f'{waves[0]}\n{waves[1]}\tanna\t{{"valence": 4.5}}\r\n{waves[2]}\tben\n\n{waves[0]}\n'
    code, lines, _ = online(tmp_path / "run", text)
    assert code == 0 and [line["valence"] for line in lines] == [1, 2, 3, 1]
    assert [line["speaker"] for line in lines] == ["", "anna", "ben", ""]
    assert [line["arousal"] for line in lines] == [0, 0, 4.5, 0] and lines[1]["calibration"] is True
    assert lines[0]["id"] == str(waves[0])


def test_bad_live_lines_are_answered_and_the_dialogue_goes_on(fake: Fake, waves: list[Path], tmp_path: Path) -> None:
    bad = ["gone.wav", f"{waves[0]}\tx\t[1]", f"{waves[0]}\tx\t{{broken", f'{waves[0]}\tx\t{{"joy": 1}}', f"{waves[0]}\ta\t\tmore"]
    bad.append(f'{waves[0]}\tx\t{{"valence": 1e999}}')
    text = "\n".join([str(waves[0]), *bad, str(waves[1])]).encode() + b"\n\xff\xfe\n"
    code, lines, output = online(tmp_path / "run", text)
    assert code == 1 and ["error" in line for line in lines] == [False, *[True] * 6, False, True]
    assert [line["valence"] for line in lines if "valence" in line] == [1, 2]
    assert "gone.wav" in lines[1]["error"] and "unknown label 'joy'" in lines[4]["error"] and "7 turns could not be heard" in output


ANSWERS_AT_ONCE = """
import sys
from lalia.commands.emotion import listen_live
from emotion_fake import Fake
listen_live(Fake(), sys.stdin.buffer)
"""


def test_each_live_turn_is_answered_before_the_next_is_asked(waves: list[Path]) -> None:
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent / "src"), str(here)]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", ANSWERS_AT_ONCE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        for number in (1, 2):
            child.stdin.write(f"{waves[number]}\n")
            child.stdin.flush()
            assert json.loads(child.stdout.readline())["valence"] == number
        child.stdin.close()
        assert child.wait(20) == 0
    assert FakeSession().turns == 0


# --- evaluate -------------------------------------------------------------------------------------------------------
def test_evaluate_follows_the_capability(fake: Fake, tmp_path: Path) -> None:
    write_manifest(tmp_path / "test.jsonl", make_rows(tmp_path / "audio", "test", 4, 5))
    done = lalia("evaluate", tmp_path / "run", "--data", tmp_path / "test.jsonl", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "CCC · valence" in done.output and "CCC · mean" in done.output and "Too few labelled turns" in done.output
    assert (tmp_path / "out" / "report.html").is_file() and (tmp_path / "out" / "eval" / "calibration.png").is_file()
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["label"] == "step 3"


def test_evaluate_refuses_leaks_and_options_of_another_kind(fake: Fake, tmp_path: Path) -> None:
    run, test = tmp_path / "run", tmp_path / "test.jsonl"
    rows: list[Row] = make_rows(tmp_path / "audio", "test", 2, 3)
    write_manifest(test, [replace(row, speaker="train-a") for row in rows])
    said = refused("evaluate", run, "--data", test, "-o", tmp_path / "out")
    assert "'train-a'" in said and "--allow-leaks" in said and not (tmp_path / "out").exists()
    allowed = lalia("evaluate", run, "--data", test, "-o", tmp_path / "out", "--allow-leaks")
    assert allowed.exit_code == 0 and SPEAKER_DEPENDENT in allowed.output
    assert "--asr does not apply" in refused("evaluate", run, "--data", test, "--asr", "pocketsphinx", code=2)
    write_manifest(test, rows)
    (tmp_path / "train.jsonl").rename(tmp_path / "moved.jsonl")
    assert "--train" in refused("evaluate", run, "--data", test)
    assert lalia("evaluate", run, "--data", test, "-o", tmp_path / "out", "--train", tmp_path / "moved.jsonl").exit_code == 0
