"""The run folder: one owner at a time, the commit of the code, configurations never overwritten unseen."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lalia import runfolder
from lalia.runfolder import RunFolder, RunLocked

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")


# --- one owner ------------------------------------------------------------------------------------------------------
HOLD = """
import sys, time
from lalia.runfolder import RunFolder
RunFolder(sys.argv[1]).lock()
print('held', flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(runfolder.__file__).parents[1])}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(RunLocked, match=rf"{tmp_path.name}.*process {holder.pid} on \S+"):
            RunFolder(tmp_path).lock()
        holder.kill()
        holder.wait()
        run = RunFolder(tmp_path)
        run.lock()
        with pytest.raises(RunLocked, match=str(os.getpid())):
            RunFolder(tmp_path).lock()
        run.unlock()
        RunFolder(tmp_path).lock()


def _sleep_in_child(ready: Any) -> None:
    ready.set()
    signal.pause()


@posix
def test_a_forked_loader_process_does_not_hold_the_lock(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.lock()
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    child = context.Process(target=_sleep_in_child, args=(ready,), daemon=True)
    child.start()
    assert ready.wait(10)
    run.unlock()
    RunFolder(tmp_path).lock()
    child.kill()
    child.join()


# --- the folder's own files -----------------------------------------------------------------------------------------
def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_recorded_and_a_change_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, run = tmp_path / "source", RunFolder(tmp_path / "run").create()
    source.mkdir()
    assert run.record_git(source) == "" and not (run.path / "githash").exists()
    git(source, "init")
    (source / "code.py").write_text("1")
    git(source, "add", "."), git(source, "commit", "-m", "one")
    first = run.record_git(source)
    assert first == git(source, "rev-parse", "HEAD").strip() == (run.path / "githash").read_text().strip()
    assert len(first) == 40 and run.record_git(source) == first and caplog.text == ""
    git(source, "commit", "--allow-empty", "-m", "two")
    second = run.record_git(source)
    assert first in caplog.text and second in caplog.text and (run.path / "githash").read_text().strip() == second


def test_without_git_there_is_no_commit_and_no_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert RunFolder(tmp_path).record_git() == ""
    assert capfd.readouterr() == ("", "")


def test_a_changed_configuration_keeps_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "mine.yaml"
    source.write_text("lr: 2\n")
    run = RunFolder(tmp_path / "run").create()
    run.write_config("lr: 1\nseed: 1\n")
    run.write_config("lr: 2\nseed: 1\n", source)
    assert (run.path / "config.previous.yaml").read_text() == "lr: 1\nseed: 1\n"
    assert (run.path / "config.source.yaml").read_text() == source.read_text() == "lr: 2\n"
    assert "lr: 2" in caplog.text and "seed" not in caplog.text


def test_on_windows_pointers_are_text_and_can_be_swung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link to a folder could be made there once, and replacing it would then fail at the second save."""
    monkeypatch.setattr(sys, "platform", "win32")
    for name in ("step-00000001", "step-00000002"):
        runfolder.point(tmp_path, "latest", name)
        assert runfolder.pointed(tmp_path, "latest") == name and not (tmp_path / "latest").is_symlink()
