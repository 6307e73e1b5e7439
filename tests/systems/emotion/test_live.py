"""Turn by turn equals the whole dialogue; a few labels adapt to a speaker."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from factories import tiny_emotion_config

from lalia import audio
from lalia.data import BadRow, Corpus, Row
from lalia.dialogues import group_rows
from lalia.systems.emotion.config import LabelConfig
from lalia.systems.emotion.personal import Personalizer, fit
from lalia.systems.emotion.system import EmotionSystem


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("live")


def system_of(folder: Path, **overrides: object) -> EmotionSystem:
    config = tiny_emotion_config(folder, **overrides)
    torch.manual_seed(0)
    system = EmotionSystem(config, EmotionSystem.make_tables(config, Corpus.read(config["data"].train)))  # type: ignore[arg-type]
    system.load_external()
    for parameter in system.model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.constant_(system.model.answer_bias, 0.5)  # answers beyond the scale would all be its ends
    return system.eval()


def rows_of(folder: Path) -> list[list[Row]]:
    return group_rows(Corpus.read([folder / "dialogues" / "all.jsonl"]))


@pytest.mark.parametrize("kind", ["none", "ema", "mamba"])
@pytest.mark.parametrize("autoregressive", [False, True])
@pytest.mark.parametrize("speech", ["none", "wavlm"])
def test_online_equals_offline(folder: Path, kind: str, autoregressive: bool, speech: str) -> None:
    if kind == "none" and autoregressive:
        pytest.skip("a stateless model is told nothing")
    system = system_of(
        folder, **{"model.state.kind": kind, "model.autoregressive": autoregressive, "model.speech.kind": speech,
                   "model.speech.wavlm.source": "tiny", "model.speaker.source": "tiny" if speech == "wavlm" else ""},
    )  # fmt: skip
    for dialogue in rows_of(folder)[:2]:
        expected = system.recognize_emotion([[Row(**{**vars(row), "labels": {}}) for row in dialogue]])[0]
        live = system.listen()
        for row, whole in zip(dialogue, expected, strict=True):
            wave, rate = audio.read(row.audio)
            said = live.turn(wave, rate, row.speaker, row.id)
            assert said.id == whole.id and said.speaker == whole.speaker
            assert said.values == pytest.approx(whole.values, abs=1e-5)


def test_own_labels_never_reach_the_answer_about_a_turn(folder: Path) -> None:
    """Free running uses no label, so their absence changes nothing (the trap of scheduled sampling)."""
    system = system_of(folder, **{"model.autoregressive": True, "model.state.kind": "mamba"})
    rows = rows_of(folder)[:2]
    bare = [[Row(**{**vars(row), "labels": {}}) for row in dialogue] for dialogue in rows]
    assert system.recognize_emotion(rows) == system.recognize_emotion(bare)
    told = system.recognize_emotion(rows, feedback="labels")
    assert told != system.recognize_emotion(rows)
    assert told[0][0] == system.recognize_emotion(rows)[0][0]  # the first turn has nothing before it


def test_a_bad_turn_leaves_the_live_dialogue_as_it_was(folder: Path) -> None:
    system = system_of(folder)
    first, second = rows_of(folder)[0][:2]
    calm, shaken = system.listen(), system.listen()
    for live in (calm, shaken):
        live.turn(*audio.read(first.audio), first.speaker)
    for bad in (np.zeros(0, np.float32), np.full(10, np.nan, np.float32), np.zeros((2, 2), np.float32)):
        with pytest.raises(BadRow):
            shaken.turn(bad, 16000, "someone new")
    wave, rate = audio.read(second.audio)
    assert shaken.turn(wave, rate, second.speaker).values == calm.turn(wave, rate, second.speaker).values


# --- personalisation --------------------------------------------------------------------------------------------------
def test_calibration_uses_the_first_labelled_turns_and_marks_them(folder: Path) -> None:
    system = system_of(folder)
    dialogue = rows_of(folder)[0]
    plain, adapted = system.recognize_emotion([dialogue])[0], system.recognize_emotion([dialogue], calibrate=1)[0]
    assert [e.calibration for e in adapted] == [True, True, *[False] * (len(dialogue) - 2)]  # two speakers, one turn each
    assert [e.values for e in adapted[:2]] == [e.values for e in plain[:2]]
    assert all(a.values != b.values for a, b in zip(adapted[2:], plain[2:], strict=True))
    assert not any(e.calibration for e in plain)


def test_live_labels_calibrate_later_turns_of_that_speaker_alone(folder: Path) -> None:
    system = system_of(folder, **{"model.state.kind": "none"})
    wave, rate = audio.read(rows_of(folder)[0][0].audio)
    live = system.listen()
    before = live.turn(wave, rate, "a", labels={"valence": 5.0, "arousal": 5.0})
    assert before.calibration
    after, other = live.turn(wave, rate, "a"), live.turn(wave, rate, "b")
    assert after.values["valence"] > before.values["valence"] and other.values == pytest.approx(before.values)


@pytest.mark.parametrize("count", [0, 1, 3, 10, 1000])
def test_the_fit_goes_from_no_correction_to_least_squares(count: int) -> None:
    random = np.random.default_rng(count)
    answers = random.uniform(0, 1, count)
    labels = 0.5 + 0.7 * (answers - 0.5) + 0.2
    slope, shift = fit(answers, labels)
    if count == 0:
        assert (slope, shift) == pytest.approx((1, 0))
    assert 0.69 <= slope <= 1.01 and -0.01 <= shift <= 0.21
    if count == 1000:
        assert (slope, shift) == pytest.approx((0.7, 0.2), abs=0.01)


def test_a_speaker_with_an_offset_is_answered_better_with_more_turns() -> None:
    random = np.random.default_rng(0)
    errors = {}
    for turns in (0, 1, 3, 10):
        wrong = []
        for _ in range(200):
            offset = random.normal(0, 0.15)
            personal = Personalizer(LabelConfig(dimensions=["valence"]), turns)
            for index in range(20):
                truth = random.uniform(0.2, 0.8)
                heard = torch.tensor([truth - offset + random.normal(0, 0.05)])
                value = personal.answer(str(index), "a", heard, {"valence": 1 + 4 * truth}).values["valence"]
                if index >= 10:
                    wrong.append((value - (1 + 4 * truth)) ** 2)
        errors[turns] = np.mean(wrong)
    assert errors[0] > errors[1] > errors[3] > errors[10]


def test_a_negative_number_of_turns_is_refused() -> None:
    with pytest.raises(ValueError, match="0 or above"):
        Personalizer(LabelConfig(), -1)
