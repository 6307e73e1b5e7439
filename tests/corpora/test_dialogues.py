"""Simulated dialogues: the process against its formulas, sound against what was asked for, and the corpus as it is written."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runner import lalia
from factories import make_wave
from test_prepare import run

from lalia import audio, corpora
from lalia.corpora import SPLITS, CorpusError, CorpusUnavailable, Report, _simulate
from lalia.corpora._simulate import Acoustics, Voice, draw_drive, draw_order, render, stateless_ceiling, states
from lalia.data import Row, read_manifest, write_manifest
from lalia.dialogues import dialogues
from lalia.leaks import audit

RATE = _simulate.SAMPLE_RATE


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty short clips of three voices; every second sentence is said by two of them."""
    folder = tmp_path_factory.mktemp("base")
    rows = []
    for index in range(60):
        path = folder / f"clip{index:02d}.flac"
        audio.write(path, make_wave(0.85 + 0.01 * (index % 7), seed=index), RATE)
        rows.append(Row(path.stem, str(path), text=f"Sentence {index // 2}.", speaker=f"v{index % 3}", language="en"))
    write_manifest(folder / "train.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made")
    run("dialogues", out, base=[str(base)], dialogues=8, turns=6)
    return out


def rows_of(out: Path, part: str) -> list[Row]:
    return list(read_manifest(out / f"{part}.jsonl"))


def sounds(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "audio").rglob("*.flac"))}


# --- the process ----------------------------------------------------------------------------------------------------
def test_state_by_hand_and_reset() -> None:
    drive = np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0], [-1.0, 0.0]])
    step = (1 - _simulate.MEMORY) * _simulate.INPUT
    found = states(np.array([0, 1, 0, 1]), drive)
    first, second = np.array([step, 0.0]), np.array([_simulate.COUPLING * step, 2 * step])
    third = _simulate.MEMORY * first + _simulate.COUPLING * second
    fourth = _simulate.MEMORY * second + step * drive[3] + _simulate.COUPLING * third
    np.testing.assert_allclose(found, [first, second, third, fourth], atol=1e-12)
    np.testing.assert_array_equal(states(np.array([1, 1]), np.zeros((2, 2))), np.zeros((2, 2)))


def test_the_ceiling_is_the_correlation_that_simulation_finds() -> None:
    rng = np.random.default_rng(0)
    orders = [draw_order(rng, 24) for _ in range(20)]
    drives = [[draw_drive(rng, 24) for _ in range(100)] for _ in orders]
    drive = np.concatenate([u for many in drives for u in many])
    state = np.concatenate([states(order, u) for order, many in zip(orders, drives, strict=True) for u in many])
    assert 0.55 < stateless_ceiling(orders) < 0.75
    for dimension in range(2):
        found = float(np.corrcoef(drive[:, dimension], state[:, dimension])[0, 1])
        assert found == pytest.approx(stateless_ceiling(orders), abs=0.01)
    assert 0.8 < state.std() < 1.2 and np.abs(drive).max() <= _simulate.MOST_DRIVE
    assert stateless_ceiling([np.zeros(1, dtype=int)]) == pytest.approx(1.0)  # the first turn has no history


@pytest.mark.parametrize(("pitch", "tempo"), [(1.3, 0.8), (0.7, 1.2), (1.9, 0.7), (1.0, 1.0)])
def test_pitch_tempo_and_level_are_what_was_asked_for(pitch: float, tempo: float) -> None:
    tone = 0.3 * np.sin(2 * np.pi * 220 * np.arange(2 * RATE) / RATE).astype(np.float32)
    changed, lowered = render(tone, RATE, Acoustics(pitch, tempo, 6.0))
    spectrum = np.abs(np.fft.rfft(changed * np.hanning(len(changed))))
    assert np.argmax(spectrum) * RATE / len(changed) == pytest.approx(220 * pitch, rel=0.02)
    assert len(changed) / RATE == pytest.approx(2 / tempo, rel=0.04)
    assert _simulate.active_level(changed) == pytest.approx(_simulate.LEVEL_DB + 6.0, abs=0.1) and not lowered
    loud, lowered = render(tone, RATE, Acoustics(pitch, tempo, 40.0))
    assert lowered and np.abs(loud).max() == pytest.approx(_simulate.HIGHEST_PEAK, abs=1e-3)


def test_two_drives_are_told_apart_by_their_acoustics() -> None:
    voice = Voice(1.0, 1.0, 0.0)

    def effect(drive: list[float]) -> list[float]:
        sound = voice.acoustics(np.array(drive))
        return [12 * np.log2(sound.pitch), 10 * np.log2(sound.tempo), sound.gain_db]

    matrix = np.array([effect([1, 0]), effect([0, 1])])
    assert np.linalg.cond(matrix) < 4
    assert effect([2.0, 0.0])[0] == pytest.approx(2 * _simulate.SEMITONES[0])


# --- the corpus -----------------------------------------------------------------------------------------------------
def test_rows_are_turns_in_time_with_both_kinds_of_labels(made: Path) -> None:
    for part in ("train", "valid", "test"):
        corpus = read_manifest(made / f"{part}.jsonl")
        for indices in dialogues(corpus):
            turns = [corpus[i] for i in indices]
            assert [row.turn for row in turns] == list(range(6)) and len({row.speaker for row in turns}) <= 2
            for row, following in zip(turns[:-1], turns[1:], strict=True):
                assert row.extra["time"] + row.duration < following.extra["time"] < row.extra["time"] + row.duration + 0.9
            for row in turns:
                assert set(row.labels) == {"valence", "arousal", "valence_now", "arousal_now"}
                assert all(1 <= value <= 5 for value in row.labels.values())
                assert audio.info(row.audio).seconds == row.duration and audio.info(row.audio).sample_rate == RATE


def test_labels_follow_from_one_another_by_the_documented_formula(made: Path) -> None:
    corpus = read_manifest(made / "train.jsonl")
    for indices in dialogues(corpus):
        turns = [corpus[i] for i in indices]
        order = np.array([row.speaker.endswith("b") for row in turns], dtype=int)
        drive = np.array([[row.labels["valence_now"], row.labels["arousal_now"]] for row in turns]) / 0.8 - 3 / 0.8
        expected = 3 + 0.8 * states(order, drive)
        found = np.array([[row.labels["valence"], row.labels["arousal"]] for row in turns])
        np.testing.assert_allclose(found, np.clip(expected, 1, 5), atol=1e-5)


def test_no_speaker_session_or_sentence_crosses_and_the_report_says_what_this_is(made: Path) -> None:
    parts = {part: rows_of(made, part) for part in ("train", "valid", "test")}
    for one, other in (("train", "valid"), ("train", "test"), ("valid", "test")):
        leaks = audit(parts[one], parts[other])
        assert not leaks.fatal and not leaks.sentences and not leaks.unknown_speakers
        assert not {row.extra["base"] for row in parts[one]} & {row.extra["base"] for row in parts[other]}
    report = json.loads((made / "report.json").read_text("utf-8"))
    assert "simulated" in report["notes"][0] and report["facts"]["simulated"] and 0.5 < report["facts"]["stateless_ceiling"] < 0.9
    assert "simulated" in (made / "README.md").read_text("utf-8").lower()


def test_same_bytes_again_in_one_process_or_two_and_other_bytes_for_another_seed(made: Path, base: Path, tmp_path: Path) -> None:
    run("dialogues", tmp_path / "two", base=[str(base)], dialogues=8, turns=6, workers=2)
    assert sounds(tmp_path / "two") == sounds(made)
    assert (tmp_path / "two" / "train.jsonl").read_bytes() == (made / "train.jsonl").read_bytes()
    run("dialogues", tmp_path / "other", base=[str(base)], dialogues=3, turns=2, seed=1)
    assert not set(sounds(tmp_path / "other").values()) & set(sounds(made).values())


def test_a_stopped_call_goes_on_and_another_plan_begins_anew(base: Path, tmp_path: Path) -> None:
    run("dialogues", tmp_path, base=[str(base)], dialogues=3, turns=3)
    before, manifest = sounds(tmp_path), (tmp_path / "train.jsonl").read_bytes()
    files = sorted((tmp_path / "audio").rglob("*.flac"))
    kept = files[2].stat().st_mtime_ns
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:200])
    run("dialogues", tmp_path, base=[str(base)], dialogues=3, turns=3)
    assert sounds(tmp_path) == before and (tmp_path / "train.jsonl").read_bytes() == manifest
    assert files[2].stat().st_mtime_ns == kept
    run("dialogues", tmp_path, base=[str(base)], dialogues=3, turns=3, seed=5)
    assert not set(sounds(tmp_path).values()) & set(before.values())


def test_a_dialogue_of_one_turn(base: Path, tmp_path: Path) -> None:
    report = run("dialogues", tmp_path, base=[str(base / "train.jsonl")], dialogues=3, turns=1)
    assert report.clips == {"train": 1, "valid": 1, "test": 1}
    assert report.facts["stateless_ceiling"] == 1.0


def test_wrong_wishes(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no voice of the base has a clip in each"):
        run("dialogues", tmp_path, base=[str(base)], limit=2)
    with pytest.raises(CorpusError, match="dialogues >= 3"):
        run("dialogues", tmp_path, base=[str(base)], dialogues=2)
    with pytest.raises(CorpusError, match="folder without train.jsonl"):
        run("dialogues", tmp_path, base=[str(tmp_path)])
    with pytest.raises(CorpusError, match="--split does not apply"):
        run("dialogues", tmp_path, base=[str(base)], dialogues=3, turns=1, split=(0.8, 0.1, 0.1))


def test_without_apt_the_message_names_the_other_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError("apt-get")

    monkeypatch.setattr(subprocess, "run", absent)
    with pytest.raises(CorpusUnavailable, match=r"apt-get is not on this machine.*`--base synth`"):
        run("dialogues", tmp_path)


def test_the_fallback_of_dialogues_is_another_base_not_another_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def prepare(source: str, out: Path, **options: Any) -> Report:
        calls.append((source, options))
        if len(calls) == 1:
            raise CorpusUnavailable("apt-get is not on this machine")
        return Report(source, str(out), 1, 1, clips=dict.fromkeys(SPLITS, 1), hours=dict.fromkeys(SPLITS, 0.0))

    monkeypatch.setattr(corpora, "prepare", prepare)
    assert lalia("prepare", "dialogues", "-o", tmp_path, "--turns", 3, "--fallback", "synth").exit_code == 0
    assert [source for source, _ in calls] == ["dialogues", "dialogues"]
    assert calls[1][1]["base"] == ["synth"] and calls[1][1]["turns"] == 3
