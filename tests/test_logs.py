"""What a run writes down survives kills, grows columns, and is quiet where nobody watches."""

from __future__ import annotations

import io
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from lalia import logs
from lalia.logs import Logs, MetricsTable, Progress, curve_groups, read_metrics
from lalia.system import Media


def cells(path: Path, name: str) -> list[str]:
    return [row.get(name, "") for row in read_metrics(path)]


# --- metrics.csv ----------------------------------------------------------------------------------------------------
def test_columns_grow_and_old_rows_stay(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    table = MetricsTable(path)
    table.add(1, "train", {"a": 1.5})
    table.add(2, "train", {"a": 2.5, "b": 7})
    table.add(3, "train", {"c,d": float("nan")})
    table.add(4, "train", {"a": 1e-9})
    assert cells(path, "a") == ["1.5", "2.5", "", "1e-09"]
    assert cells(path, "b") == ["", "7", "", ""] and cells(path, "c,d") == ["", "", "nan", ""]


def test_the_same_step_and_split_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    table = MetricsTable(path)
    table.add(1, "train", {"a": 123456789.0, "b": 1})
    table.add(1, "train", {"a": 2})
    table.add(1, "train", {"new": 3})
    table.add(1, "eval", {"a": 4})
    table.add(1, "eval", {"b": 5})
    rows = read_metrics(path)
    assert [(r["step"], r["split"], r["a"], r["b"], r["new"]) for r in rows] == [
        ("1", "train", "2", "1", "3"),
        ("1", "eval", "4", "5", ""),
    ]


def test_a_kill_at_any_byte_and_a_resume_leave_no_gap_and_no_duplicate(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    table = MetricsTable(path)
    for step in (10, 20, 30, 40):
        table.add(step, "train", {"loss": step / 3})
    data = path.read_bytes()
    second_row_ends = data.index(b"\n", data.index(b"\n20,") + 1) + 1
    for length in range(second_row_ends, len(data) + 1):
        path.write_bytes(data[:length])
        table = MetricsTable(path, resume_step=20)
        assert cells(path, "step") == ["10", "20"]
        for step in (30, 40):
            table.add(step, "train", {"loss": step / 3})
        assert path.read_bytes() == data
    MetricsTable(path, resume_step=0)
    assert read_metrics(path) == []


def test_a_broken_line_is_said_and_the_rest_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"step,split,epoch,a\n1,train,0,5\n2,tra\xff\n3,train,0,6\n")
    assert cells(path, "a") == ["5", "6"] and "1 unreadable" in caplog.text


# --- the logs of a run ----------------------------------------------------------------------------------------------
def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "audio": 0})
    accumulator.Reload()
    return accumulator


def test_tensorboard_has_train_and_eval_apart_with_pictures_and_sounds(tmp_path: Path) -> None:
    picture = np.zeros((20, 30, 3), dtype=np.uint8)
    media = Media(images={"all/mel": picture}, audio={"gen/audio_0_1": (np.full(800, 2.0, np.float32), 8000)})
    with Logs(tmp_path) as record:
        record.scalars(1, {"loss/g/total": torch.tensor(2.0, requires_grad=True), "lr": 0.5}, epoch=3)
        record.scalars(1, {"mel": 0.25}, split="eval")
        record.media(1, media)
        with pytest.raises(ValueError, match="uint8"):
            record.media(1, Media(images={"x": picture[0]}))
    train, evaluation = events(tmp_path), events(tmp_path / "eval")
    assert sorted(train.Tags()["scalars"]) == ["loss/g/total", "lr"]
    assert evaluation.Tags()["scalars"] == ["mel"] and evaluation.Tags()["audio"] == ["gen/audio_0_1"]
    image = evaluation.Images("all/mel")[0]
    assert (image.height, image.width) == (20, 30)
    assert cells(tmp_path / "metrics.csv", "epoch") == ["3", "0"]


def test_a_resumed_run_has_each_step_once_in_tensorboard_and_csv(tmp_path: Path) -> None:
    with Logs(tmp_path) as record:
        for step in range(1, 7):
            record.scalars(step, {"a": step})
    with Logs(tmp_path) as record:
        record.resume_at(3)
        for step in range(4, 8):
            record.scalars(step, {"a": -step})
        with pytest.raises(RuntimeError):
            record.resume_at(1)
    assert cells(tmp_path / "metrics.csv", "a") == ["1", "2", "3", "-4", "-5", "-6", "-7"]
    assert [e.value for e in events(tmp_path).Scalars("a")] == [1, 2, 3, -4, -5, -6, -7]


def test_every_rank_writes_its_file_and_rank_0_alone_speaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Logs(tmp_path, rank=1) as record:
        logging.getLogger("lalia.data").info("from one")
        warnings.warn("careful", stacklevel=1)
        record.scalars(1, {"a": 1})
        assert record.curves() == []
    assert capsys.readouterr().out == ""
    with Logs(tmp_path, rank=0) as record:
        record.epoch(2, 600, waste=0.0123, lines=["Train Loss: 1.5"])
    logging.getLogger("lalia.data").info("after the end")
    out = capsys.readouterr().out
    assert "epoch 2 · step 600 · 0:00 · padding 1.2%" in out and "Train Loss: 1.5" in out
    files = {p.name: p.read_text() for p in tmp_path.glob("*.log")}
    assert "from one" in files["train.rank1.log"] and "careful" in files["train.rank1.log"]
    assert "epoch 2" in files["train.rank0.log"] and "from one" not in files["train.rank0.log"]
    assert not any("after the end" in text for text in files.values())
    assert not (tmp_path / "metrics.csv").exists()


def test_curves_are_drawn_from_the_table(tmp_path: Path) -> None:
    with Logs(tmp_path) as record:
        for step in range(1, 30):
            record.scalars(step, {"loss/g/total": 9 / step, "loss/g/0": 1.0, "grad_norm_g": 1.0, "lr": 1e-4})
        record.scalars(29, {"loss/total": 1.0, "wer": 0.5}, split="eval")
        assert [p.name for p in record.curves()] == ["loss_curve.png", "metrics_curve.png"]
    losses, metrics = curve_groups(read_metrics(tmp_path / "metrics.csv"))
    assert {k: list(v) for k, v in losses.items()} == {"loss/g": ["total (train)"], "loss": ["total (eval)"]}
    assert {k: list(v) for k, v in metrics.items()} == {
        "grad_norm": ["grad_norm_g (train)"],
        "lr": ["lr (train)"],
        "wer": ["wer (eval)"],
    }
    assert metrics["wer"]["wer (eval)"] == ((29,), (0.5,))


def test_device_scalars_are_copied_once_and_keep_their_order() -> None:
    values = {"b": torch.tensor([2.0]), "a": 1, "c": torch.tensor(3)}
    assert list(logs.to_floats(values).items()) == [("b", 2.0), ("a", 1.0), ("c", 3.0)]


# --- progress -------------------------------------------------------------------------------------------------------
class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(logs.time, "monotonic", lambda: self.now)


def test_without_a_terminal_there_is_a_line_about_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, out = Clock(monkeypatch), io.StringIO()
    with Progress(100, console=Console(file=out)) as progress:
        for step in range(1, 101):
            clock.now += 1.0
            progress.update(step, audio_seconds=20.0 * step, waste=0.012, loss=torch.tensor(1.25))
    lines = out.getvalue().splitlines()
    assert len(lines) == 11 and "\x1b" not in out.getvalue() and "\r" not in out.getvalue()
    middle = re.sub(r"peak \S+ GiB", "peak", lines[5])
    assert middle == "step 51/100 · 51% · ETA 0:49 · 1.00 steps/s · 20.0 audio-s/s · peak · padding 1.2% · loss 1.25"
    assert lines[-1].startswith("step 100/100 · 100% · ETA 0:00")


def test_minutes_end_a_run_that_has_more_steps_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    progress = Progress(10_000, minutes=2.0, enabled=True, console=Console(file=io.StringIO()))
    progress.update(5000)
    clock.now = 30.0
    progress.update(5001)
    assert progress.fraction(30.0, 50) == 0.25 and progress.remaining(30.0, 5001) == 90.0
    assert Progress(console=Console(file=io.StringIO())).remaining(1.0, 5) is None


def test_other_ranks_are_silent_and_a_terminal_gets_a_bar() -> None:
    out = io.StringIO()
    with Progress(3, enabled=False, console=Console(file=out, force_terminal=True)) as progress:
        progress.update(3)
    assert out.getvalue() == ""
    with Progress(3, console=Console(file=out, force_terminal=True, width=120)) as progress:
        progress.update(3, loss=2.0)
    assert "step 3/3" in out.getvalue() and "loss 2" in out.getvalue()
