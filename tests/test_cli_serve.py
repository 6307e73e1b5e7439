"""``lalia serve`` as a process, ``lalia chat`` in a conversation, and what both refuse."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runner import lalia, refused
from factories import make_wave, write_wav
from serve_fake import Fake, write_voice
from systems.omni.omni_standin import write_align
from typer.testing import CliRunner, Result

from lalia import checkpoint
from lalia import config as configuration
from lalia.cli import app
from lalia.runfolder import RunFolder
from lalia.sections import RunConfig
from lalia.system import SYSTEMS, Message, System

SOURCE = Path(__file__).resolve().parents[1] / "src"


@pytest.fixture(scope="module")
def voice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_voice(tmp_path_factory.mktemp("voice"))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Every run is this system's."""
    system = Fake()
    for command in ("chat", "serve"):
        monkeypatch.setattr(f"lalia.commands.{command}.load_system", lambda *_: system)
    return system


def get(address: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


# --- serve ----------------------------------------------------------------------------------------------------------
def test_serve_answers_until_ctrl_c_and_leaves_nothing(voice: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the extra 'serve' installs gradio")
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lalia", "serve", str(voice), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        try:
            line = process.stdout.readline()
            found = re.fullmatch(r"voice \(speak\) at (http://127\.0\.0\.1:(\d+)); stop with Ctrl-C\n", line)
            assert found, line + process.stderr.read()
            address, port = found.groups()
            status, health = get(f"{address}/healthz")
            assert status == 200 and json.loads(health) == {
                "status": "ok", "model": "voice", "capabilities": ["speak"], "waiting": 0,
            }  # fmt: skip
            assert json.loads(get(f"{address}/v1/models")[1])["data"][0]["id"] == "voice"
            status, page = get(f"{address}/")
            assert status == 200 and "Text to speak" in page and "#history" not in page
            assert get(f"{address}/healthz", Host="evil.example")[0] == 400
            assert "--port takes another" in refused("serve", voice, "--port", port)
            assert [path.name for path in tmp_path.iterdir() if path.name.startswith("lalia-serve-")]
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 0
            assert "Traceback" not in (told := process.stderr.read()) and "rror" not in told
        finally:
            process.kill()
    assert not list(tmp_path.glob("lalia-serve-*"))


def test_serve_takes_names_hosts_and_limits(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("lalia.serve.app.run", lambda *given: seen.append(given))
    (tmp_path / "config.yaml").touch()
    arguments = ["--name", "ours", "--no-page", "--host", "0.0.0.0", "--max-seconds", 7, "--max-waiting", 2, "--max-upload-mb", 3]
    result = lalia("serve", tmp_path, "--port", 0, *arguments)
    engine, listener, host, page = seen[0]
    assert result.exit_code == 0 and f"ours (reply, transcribe) at http://0.0.0.0:{listener.getsockname()[1]}" in result.output
    assert "nobody is asked for a password" in result.output and (host, page, engine.name) == ("0.0.0.0", False, "ours")
    assert (engine.limits.seconds, engine.limits.waiting, engine.limits.upload_bytes) == (7, 2, 3_000_000)
    assert not fake.training
    assert lalia("serve", tmp_path, "--port", 0).exit_code == 0 and seen[1][0].name == tmp_path.name
    for held in seen:
        held[1].close()


def test_serve_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no run folder" in refused("serve", tmp_path / "none", "--port", 0)
    assert "the limit seconds must be above 0" in refused("serve", tmp_path, "--port", 0, "--max-seconds", 0)
    assert "--host nowhere at all" in refused("serve", tmp_path, "--host", "nowhere at all")
    monkeypatch.setattr("lalia.commands.serve.load_system", lambda *_: System(RunConfig(system="mute"), {}))
    assert "'mute', which can neither reply nor transcribe nor speak" in refused("serve", tmp_path, "--port", 0)


# --- chat -----------------------------------------------------------------------------------------------------------
def talk(lines: Sequence[str], *arguments: object) -> Result:
    return CliRunner().invoke(app, ["chat", *map(str, arguments)], input="".join(f"{line}\n" for line in lines))


def test_chat_answers_one_question(fake: Fake, tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", 1.5, 22050)
    result = lalia("chat", tmp_path, "what is said", "--audio", tmp_path / "a.wav", "--system", "be short")
    assert (result.exit_code, result.output) == (0, "1.5s what is said\n")
    assert [(message.role, message.text) for message in fake.asked[0]] == [("system", "be short"), ("user", "what is said")]
    assert abs(len(fake.asked[0][1].audio[0]) - 24000) < 10  # heard at 16 kHz
    assert lalia("chat", tmp_path, "a b c", "--max-tokens", 2).output == "a b\n"
    drawn = [lalia("chat", tmp_path, "a b c d e f", "--temperature", 1, "--seed", seed).output for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_chat_goes_on_over_lines(fake: Fake, tmp_path: Path) -> None:
    write_wav(tmp_path / "my voice.wav", 1.0)
    lines = ["hello", f"/audio {tmp_path / 'none.wav'}", f"/audio {tmp_path / 'my voice.wav'}", "heard", "", "word " * 500, "again"]
    result = talk([*lines, "/help", "/new", "fresh", "/quit", "never"], tmp_path)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == ["hello", "1.0s heard", "again", "fresh"]
    assert "none.wav" in result.stderr and "recording 1: 1.00 s" in result.stderr and "500 positions" not in result.stdout
    assert "the context of the model has 400" in result.stderr and result.stderr.count("/quit") == 2
    said = [[message.text for message in messages] for messages in fake.asked]
    assert said[1] == ["hello", "hello", "heard"] and len(fake.asked[1][2].audio) == 1
    assert said[3] == ["hello", "hello", "heard", "1.0s heard", "again"] and said[4] == ["fresh"]  # what failed is forgotten


def test_chat_hears_a_recording_alone(fake: Fake, tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", 2.0)
    assert talk([], tmp_path, "--audio", tmp_path / "a.wav").stdout == "2.0s\n"
    assert talk(["one", "two"], tmp_path, "--audio", tmp_path / "a.wav").stdout == "2.0s one\ntwo\n"
    assert talk([], tmp_path).stdout == ""


def test_chat_refuses(voice: Path, fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "none.wav" in refused("chat", tmp_path, "hello", "--audio", tmp_path / "none.wav")
    assert "500 positions" in refused("chat", tmp_path, "word " * 500)
    monkeypatch.undo()
    assert "'vits2', which cannot reply" in refused("chat", voice, "hello")
    assert "no run folder" in refused("chat", tmp_path / "none", "hello")


def test_chat_with_a_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny ``omni-chat`` of random weights: what the command prints is what the loaded system replies."""
    pytest.importorskip("peft", reason="the extra 'lora' installs peft")
    monkeypatch.setitem(SYSTEMS, "standin-align", "systems.omni.omni_standin:Standin")
    write_align(tmp_path / "align")
    settings = ["system=omni-chat", "model.lora.rank=4", f"align={tmp_path / 'align'}", "train.device=cpu"]
    config: Any = configuration.load_run_config(None, settings)
    from lalia.systems.omni.chat import OmniChat

    system = OmniChat(config, OmniChat.make_tables(config, None))
    system.load_external()
    (tmp_path / "run").mkdir()
    configuration.save(config, tmp_path / "run" / "config.yaml")
    RunFolder(tmp_path / "run").write_tables(system.tables)
    checkpoint.save_set(tmp_path / "run", 1, system.state_dict(), {})
    write_wav(tmp_path / "a.flac", 0.5)
    result = lalia("chat", tmp_path / "run", "What?", "--audio", tmp_path / "a.flac", "--max-tokens", 12, "--device", "cpu")
    assert result.exit_code == 0, result.output
    wave = np.round(make_wave(0.5) * 32768).clip(-32768, 32767).astype(np.float32) / 32768
    reply = "".join(system.eval().reply([Message("user", "What?", [wave])], max_tokens=12))
    assert result.output == f"{reply}\n" and reply
