"""``lalia demo`` on a tiny model: every stage, what a second call leaves out, and what it says when something is missing."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from factories import make_corpus, tiny_vits2_config
from rich.console import Console

from lalia import demo
from lalia.config import save
from lalia.corpora import SPLITS, CorpusUnavailable
from lalia.data import read_manifest, write_manifest
from lalia.demo import SENTENCES, STAGES, Demo, Options
from lalia.pretrained import PretrainedError
from lalia.text import analyse


class Echo:
    def __init__(self, name: str = "echo") -> None:
        self.name = name

    def transcribe(self, waves: Sequence[np.ndarray], sample_rate: int, language: str = "en") -> list[str]:
        return ["alpha bravo" for _ in waves]


def prepared(folder: Path) -> Path:
    """A corpus as ``prepare`` leaves it."""
    rows = list(read_manifest(make_corpus(folder)))
    for name, part in zip(SPLITS, (rows[:6], rows[6:], rows[6:]), strict=True):
        write_manifest(folder / f"{name}.jsonl", part)
    (folder / "report.json").write_text("{}")
    return folder


def make_demo(root: Path, **options: Any) -> Demo:
    config = root / "small.yaml"
    save(tiny_vits2_config(root, **{"train.steps": 0, "train.eval_every": 0, "train.log_every": 1}), config)
    chosen = Options(run=root / "run", config=config, data=root / "data", **{"minutes": 0.06, "clips": 2, "asr": "echo", **options})
    return Demo(chosen, Console(file=io.StringIO(), width=200))


def said(instance: Demo) -> str:
    return instance.console.file.getvalue()  # type: ignore[attr-defined]


def test_the_whole_demo_and_its_second_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(tmp_path / "data" / "asterisk")
    monkeypatch.setattr(demo, "open_recogniser", Echo)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    first = make_demo(tmp_path, install_seconds=7.0)
    first.play()
    run = tmp_path / "run"
    assert [len(soundfile.read(run / "samples" / f"{n}.wav")[0]) > 0 for n in (1, 2, 3)] == [True] * 3
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Time by stage" in page and "install 0:07" in page
    times = json.loads((run / "demo.json").read_text())["seconds"]
    assert set(times) == {"install", *STAGES} - {"corpus"} and times["training"] > 3
    for shown in ("Recording", "Resynthesis", "Speech from text", "95 % interval", "report.html", "train.minutes=60"):
        assert shown in said(first)

    monkeypatch.setattr(demo, "train", lambda *_: pytest.fail("trained again"))
    second = make_demo(tmp_path)
    second.play()
    assert "run has had" in said(second)
    assert second.seconds["training"] == times["training"] and second.seconds["install"] == 7.0


def test_synthetic_speech_where_there_is_no_apt_and_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Report:
        def summary(self) -> str:
            return "done"

    def prepare(source: str, out: Path, **_: Any) -> Report:
        if source == "asterisk":
            raise CorpusUnavailable("apt-get is not on this machine")
        return Report()

    monkeypatch.setattr(demo, "prepare", prepare)
    instance = make_demo(tmp_path)
    assert instance.corpus() == tmp_path / "data" / "synth"
    assert "apt-get is not on this machine" in said(instance) and "robotic" in said(instance)
    assert instance.seconds["corpus"] >= 0
    prepared(tmp_path / "data" / "synth")
    monkeypatch.setattr(demo, "prepare", lambda *_, **__: pytest.fail("prepared again"))
    assert instance.corpus() == tmp_path / "data" / "synth"


def test_the_recogniser_that_can_be_had_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(source: str) -> Echo:
        if source.startswith("wheel:"):
            raise PretrainedError("the network is switched off")
        return Echo(source)

    instance = make_demo(tmp_path, asr="")
    monkeypatch.setattr(demo, "open_recogniser", Echo)
    assert instance._recogniser().name == "wheel:whisper-base"
    monkeypatch.setattr(demo, "open_recogniser", offline)
    assert instance._recogniser().name == "pocketsphinx"
    assert "the network is switched off" in said(instance) and "using pocketsphinx" in said(instance)


def test_interrupted_training_ends_the_demo_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped:
        interrupted = True

    configs: list[Any] = []
    monkeypatch.setattr(demo, "train", lambda config, *_: configs.append(config) or Stopped())
    monkeypatch.setattr(Demo, "_trained_minutes", lambda self: 2.0)
    instance = make_demo(tmp_path, minutes=8.0)
    instance.seconds["training"] = 130.0
    with pytest.raises(KeyboardInterrupt):
        instance.training(tmp_path / "data" / "asterisk")
    assert configs[0].train.minutes == 6.0 and configs[0].data.train == [str(tmp_path / "data" / "asterisk" / "train.jsonl")]
    assert f"demo --run {tmp_path / 'run'}" in said(instance)
    assert instance.seconds["training"] >= 130.0


def test_a_corpus_that_cannot_be_trained_on_ends_the_demo(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "data" / "asterisk")
    instance = make_demo(tmp_path)
    text = instance.options.config.read_text().replace("min_seconds: 0.0", "min_seconds: 1.1")
    instance.options.config.write_text(text)
    with pytest.raises(ValueError, match="cannot be trained on"):
        instance.examine(folder)
    assert not (tmp_path / "run" / "doctor_data.json").exists()


def test_threads_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert demo.cores() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert demo.cores() >= 1


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="minutes must be above 0"):
        Options(minutes=0)


def test_the_samples_hold_nothing_unknown() -> None:
    assert not any(analyse(text, "en").unknown for text in SENTENCES)
