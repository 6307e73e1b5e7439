from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lalia import audio
from lalia.data import Row
from lalia.evaluate import Evaluation, evaluate, write_report
from lalia.evaluate.harness import choose
from lalia.evaluate.results import RECORDING, RESYNTHESIS, SPEECH
from lalia.sections import RunConfig
from lalia.system import SpeakRequest, Speech, System
from lalia.text.compare import comparison_form

RATE = 16000
TEXTS = ["please hold the line", "goodbye", "you have two new messages", "press one", "<b>bold</b> & brave"]


def voice(index: int, seconds: float) -> np.ndarray:
    time = np.arange(int(RATE * seconds)) / RATE
    hertz = 120 + 20 * index + 30 * np.sin(2 * np.pi * 2 * time)
    phase = 2 * np.pi * np.cumsum(hertz) / RATE
    wave = sum(np.sin(k * phase) / k for k in range(1, 6)) * 0.1 * (1 + np.sin(2 * np.pi * 3 * time))
    wave = wave + np.random.default_rng(index).normal(0, 0.005, len(time))  # no band is empty, so that levels can be compared
    return np.asarray(wave, dtype=np.float32)


class Parrot(System):
    """Resynthesis is the recording at half level; speech the recording, slower by a tenth. Fails on one text on purpose."""

    def __init__(self, rows: Sequence[Row]) -> None:
        super().__init__(RunConfig(system="parrot"), {})
        self.layer = torch.nn.Linear(3, 2)
        self.rows = {row.text: row for row in rows}

    def resynthesize(self, rows: Sequence[Any]) -> list[Speech]:
        return [Speech(audio.read(row.audio)[0] * 0.5, RATE) for row in rows]

    def speak(self, requests: Sequence[SpeakRequest]) -> list[Speech]:
        if requests[0].text == "goodbye":
            raise ValueError("no goodbyes")
        wave, _ = audio.read(self.rows[requests[0].text].audio)
        return [Speech(audio.resample(wave, 10, 11), RATE)]

    def speak_stream(self, request: SpeakRequest, chunk_frames: int = 64) -> Iterator[np.ndarray]:
        yield self.speak([request])[0].wave

    def alignment(self, row: Row) -> np.ndarray:
        return np.eye(20, 7, dtype=np.float32)


class Ears:
    """Hears recordings rightly, drops the first word of anything at half level, hears one word in speech."""

    name = "ears"

    def __init__(self, rows: Sequence[Row]) -> None:
        self.texts = {row.duration: row.text for row in rows}
        self.calls = 0

    def transcribe(self, waves: Sequence[np.ndarray], sample_rate: int, language: str = "en") -> list[str]:
        self.calls += 1
        return [self.one(wave, len(wave) / sample_rate) for wave in waves]

    def one(self, wave: np.ndarray, seconds: float) -> str:
        text = next((t for s, t in self.texts.items() if abs(s - seconds) < 1e-3), "")
        return "please" if not text else text if np.abs(wave).max() > 0.25 else text.partition(" ")[2]


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    made = []
    for index, text in enumerate(TEXTS):
        wave = voice(index, 0.6 + 0.3 * index)
        path = tmp_path / f"{index}.wav"
        audio.write(path, wave, RATE)
        made.append(Row(id=f"a/{index}", audio=str(path), text=text, speaker="x", language="en", duration=len(wave) / RATE))
    return made


def run(rows: list[Row], out: Path, **options: Any) -> Evaluation:
    return evaluate(Parrot(rows), rows, Ears(rows), out=out, progress=False, **options)


def test_three_conditions_with_their_figures_and_files(rows: list[Row], tmp_path: Path) -> None:
    result = run(rows, tmp_path / "out")
    words = sum(clip.words for clip in result.clips)
    value = {figure.name: figure.value for figure in result.figures}
    assert value["wer.recording"] == 0
    dropped = sum(len(comparison_form(text.partition(" ")[0], "en").split()) for text in TEXTS)
    assert value["wer.resynthesis"] == pytest.approx(100 * dropped / words)
    speech_errors = sum(clip.words - ("please" in clip.text) for clip in result.clips)
    assert value["wer.speech"] == pytest.approx(100 * speech_errors / words)  # the failed clip counts as wholly wrong
    assert value["mel_distance.resynthesis"] == pytest.approx(np.log(2), abs=0.05)
    assert value["pitch_error.resynthesis"] < 0.01 and value["pitch_correlation.resynthesis"] > 0.99
    # 1.65 semitones lower; warping finds some frames of more similar pitch
    assert value["pitch_error.speech"] == pytest.approx(12 * np.log2(1.1), abs=0.5)
    assert value["duration_ratio.speech"] == pytest.approx(1.1, abs=0.01)
    assert value["duration_correlation.speech"] > 0.999
    assert [clip.id for clip in result.failures(SPEECH)] == ["a/1"] and not result.failures(RESYNTHESIS)
    for clip in result.clips:
        for condition, made in clip.conditions.items():
            if not made.failure:
                assert (tmp_path / "out" / made.wave).is_file() and (tmp_path / "out" / made.picture).is_file(), condition
    assert result.parameters == 8 and result.sample_rate == RATE and result.corpus_rows == 5


def test_eval_json_reads_back_and_is_strict_json(rows: list[Row], tmp_path: Path) -> None:
    result = run(rows, tmp_path, limit=1)  # one clip: nan intervals become null
    text = (tmp_path / "eval.json").read_text()
    assert "NaN" not in text and json.loads(text)["schema"] == 1
    assert Evaluation.load(tmp_path / "eval.json").to_dict() == result.to_dict()
    (tmp_path / "eval.json").write_text(text.replace('"schema": 1', '"schema": 99'))
    with pytest.raises(ValueError, match="schema 99"):
        Evaluation.load(tmp_path / "eval.json")


def test_again_is_the_same_but_for_the_clock_and_hears_nothing_twice(rows: list[Row], tmp_path: Path) -> None:
    ears = Ears(rows)
    results = [evaluate(Parrot(rows), rows, ears, out=tmp_path, progress=False) for _ in range(2)]
    assert ears.calls == 1
    first, second = ([f.to_dict() for f in r.figures if not f.name.startswith("rtf")] for r in results)
    assert first == second


def test_a_broken_row_is_named_and_not_fatal(rows: list[Row], tmp_path: Path) -> None:
    bad = [Row(id="gone", audio=str(tmp_path / "gone.wav"), text="hello"), Row(id="mute", audio=rows[0].audio, text="...")]
    result = run(rows + bad, tmp_path)
    assert set(result.skipped) == {"gone", "mute"} and "gone.wav" in result.skipped["gone"]
    assert len(result.clips) == len(rows)
    with pytest.raises(ValueError, match="none of the 2 rows.*gone"):
        run(bad, tmp_path)


def test_nothing_to_evaluate_and_unknown_condition(rows: list[Row], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rows"):
        run([], tmp_path)
    with pytest.raises(ValueError, match="unknown condition 'song'"):
        run(rows, tmp_path, conditions=("song",))


def test_what_the_system_cannot_do_is_left_out(rows: list[Row], tmp_path: Path) -> None:
    mute = System(RunConfig(system="mute"), {})
    result = evaluate(mute, rows, Ears(rows), out=tmp_path, progress=False)
    assert {name for clip in result.clips for name in clip.conditions} == {RECORDING}
    assert [f.name for f in result.figures] == ["wer.recording", "cer.recording"]


def test_a_smaller_limit_is_a_subset(rows: list[Row]) -> None:
    chosen = [[row.id for row in choose(rows, limit, 7)] for limit in (2, 4, 0)]
    assert chosen[1][:2] == chosen[0] and chosen[2][:4] == chosen[1] and len(chosen[2]) == 5
    assert [row.id for row in choose(rows, 0, 8)] != chosen[2]


def test_a_fault_of_the_program_is_not_swallowed(rows: list[Row], tmp_path: Path) -> None:
    class Broken(Parrot):
        def resynthesize(self, rows: Sequence[Any]) -> list[Speech]:
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        evaluate(Broken(rows), rows, Ears(rows), out=tmp_path, progress=False)


def test_report_holds_every_figure_and_needs_nothing_else(rows: list[Row], tmp_path: Path) -> None:
    from lalia.evaluate import wording

    bad = Row(id="gone<i>", audio="gone.wav", text="hello")
    early = run(rows, tmp_path / "early", label="step 1")
    result = run([*rows, bad], tmp_path, label="step 2")
    (tmp_path / "run").mkdir()
    lines = ["step,split,epoch,loss/g/mel", *(f"{s},train,0,{50 / s}" for s in range(1, 60)), "30,eval,0,2.5"]
    (tmp_path / "run" / "metrics.csv").write_text("\n".join(lines) + "\n")
    path = write_report(tmp_path / "report.html", [early, result], tmp_path / "run", facts={"Audio": "1 < 2 minutes"}, minutes=3)
    html = path.read_text()
    for figure in result.figures:
        assert wording.figure_name(figure) in html
        assert f">{wording.number(figure.value, figure.unit)}<" in html and f">{wording.interval(figure)}<" in html
    assert not re.search(r"(?:src|href)=[\"'](?!data:)|https?://|@import|url\(|<script", html)
    assert "<b>bold</b>" not in html and "&lt;b&gt;bold&lt;/b&gt; &amp; brave" in html
    assert "gone&lt;i&gt;" in html and "1 &lt; 2 minutes" in html and "no goodbyes" in html
    assert html.count("<audio") == 3 * len(rows) - 1 and "polyline" in html and "loss/g/mel" in html
    assert f"<dt>System</dt><dd>{result.system}</dd>" in html and "<dt>Operating system</dt>" in html
    assert "How the figures moved" in html and "step 1" in html and wording.reading(result) in html


def test_wording_follows_the_numbers(rows: list[Row], tmp_path: Path) -> None:
    from dataclasses import replace

    from lalia.evaluate import wording

    result = run(rows, tmp_path)

    def with_rates(recording: float, resynthesis: float, speech: float) -> str:
        rates = {"wer.recording": recording, "wer.resynthesis": resynthesis, "wer.speech": speech}
        kept = [f for f in result.figures if f.name in rates]
        result.figures = [replace(f, value=rates[f.name], low=rates[f.name] - 2, high=rates[f.name] + 2) for f in kept]
        return " ".join([wording.reading(result), *wording.verdict(result, 9.0)])

    assert "misreads 6 in the recordings, 40 in their resynthesis and 97 in speech" in with_rates(6, 40, 97)
    assert "not intelligible" in with_rates(6, 40, 97) and "9 minutes" in with_rates(6, 40, 97)
    assert "broken up" in with_rates(6, 8, 60) and "can be followed" in with_rates(6, 8, 30)
    assert "as readable" in with_rates(6, 7, 7.5) and "no longer costs words" in with_rates(6, 7, 7.5)
    assert "130" in with_rates(6, 40, 130) and "words that nobody said" in with_rates(6, 40, 130)
    assert "misreads" not in with_rates(6, 40, 130)
