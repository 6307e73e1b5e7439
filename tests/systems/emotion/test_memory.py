"""Features that are kept, and memory that runs out."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from emotion_systems import build, one_batch, weights_of
from factories import make_dialogues, tiny_emotion_config, train_tiny_emotion

from lalia import dist
from lalia.data import Corpus, Row
from lalia.system import Clock
from lalia.systems.emotion.system import EmotionSystem


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the dialogues and their functionals, computed once for all tests of this file."""
    made = tmp_path_factory.mktemp("emotion")
    build(made)
    return made


# --- features -------------------------------------------------------------------------------------------------------------
def test_statistics_are_of_the_training_rows_alone(folder: Path, tmp_path: Path) -> None:
    from lalia.data import write_manifest
    from lalia.features import egemaps_of

    rows = list(Corpus.read([folder / "dialogues" / "all.jsonl"]))
    write_manifest(tmp_path / "few.jsonl", rows[:5])
    config = tiny_emotion_config(folder, **{"data.train": f"[{tmp_path / 'few.jsonl'}]"})
    tables = EmotionSystem.make_tables(config, Corpus.read(config["data"].train))
    values = torch.stack([egemaps_of(row) for row in rows[:5]]).double()
    assert tables["prosody"]["turns"] == 5
    assert torch.allclose(torch.tensor(tables["prosody"]["mean"], dtype=torch.float64), values.mean(0))
    assert (tmp_path / "features" / "egemaps").is_dir()


def test_pooled_features_are_kept_and_give_the_same_answers(folder: Path, tmp_path: Path) -> None:
    make_dialogues(tmp_path / "dialogues", dialogues=2, turns=3)
    settings = {"model.speech.kind": "wavlm", "model.speech.wavlm.source": "tiny", "model.speaker.source": "tiny"}
    system, rows = build(tmp_path, **settings)
    system.train()
    first = one_batch(system, rows)
    assert not first.speech_known.any() and len(first.wave) == int(first.wave_lengths.sum()) > 0
    chosen = torch.arange(len(first.ids))
    fresh = system.hear(first, chosen)
    second = one_batch(system, rows)
    assert second.speech_known.all() and second.voice_known.all() and not len(second.wave)
    assert torch.allclose(system.hear(second, chosen), fresh, atol=1e-5)
    assert any((tmp_path / "dialogues" / "features").glob("speech-*/*.pt"))
    name = next((tmp_path / "dialogues" / "features").glob("speech-*"))
    other, _ = build(tmp_path, **settings, **{"train.init_from": "runs/other"})
    assert not one_batch(other, rows).speech_known.any()  # its encoder may be another one
    shutil.rmtree(name)
    system.eval()
    system.hear(one_batch(system, rows), chosen)
    assert not name.exists(), "use of a run writes nothing"
    system, _ = build(tmp_path, **settings)  # which has heard nothing yet
    system.meter = system.eval().new_meter()
    system.hear(one_batch(system, rows), chosen)
    assert any(name.glob("*.pt")), "validation comes again"
    off, _ = build(tmp_path, **settings, **{"data.features": "none"})
    assert not one_batch(off, rows).speech_known.any()


def test_what_is_kept_does_not_depend_on_the_precision_of_the_run(folder: Path, tmp_path: Path) -> None:
    make_dialogues(tmp_path / "dialogues", dialogues=1, turns=3)
    settings = {"model.speech.kind": "wavlm", "model.speech.wavlm.source": "tiny", "model.speaker.source": "tiny"}
    system, rows = build(tmp_path, **settings, **{"data.features": "none"})
    batch, chosen = one_batch(system, rows), torch.arange(3)
    with torch.no_grad():
        expected = [system._encoded(kind, batch, chosen) for kind in ("speech", "voice")]
        system.autocast_dtype = torch.bfloat16
        with system.autocast():
            found = [system._encoded(kind, batch, chosen) for kind in ("speech", "voice")]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_feature_folder_that_cannot_be_written_stops_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "file").write_text("no folder")
    settings = {"model.speaker.source": "tiny", "data.features": str(folder / "file" / "features")}
    train_tiny_emotion(folder, "unwritable", **settings)
    kept, blocked = (build(folder, **more)[0] for more in ({}, settings))
    assert kept.tables["prosody"] == blocked.tables["prosody"]
    assert "egemaps features are not kept" in caplog.text and "voice features are not kept" in caplog.text


def test_functionals_of_another_version_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    system, _ = build(folder)
    tables = {**system.tables, "prosody": {**system.tables["prosody"], "version": "old"}}
    EmotionSystem(system.config, tables)
    assert "learnt from functionals old" in caplog.text


def test_memory_that_runs_out_in_the_backward_pass_is_answered_with_smaller_parts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer throws the error into the generator; the same stretch comes again, and the weights end as if nothing was."""
    settings = {"model.speech.kind": "wavlm", "model.speech.wavlm.source": "tiny", "model.speech.tuned": True, "train.steps": 2}
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda hidden, *_, **__: hidden)  # drawn anew when computed again
    calm = train_tiny_emotion(folder, "calm", **settings)
    backward, failures = torch.Tensor.backward, iter([True])

    def failing(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if next(failures, False):
            raise torch.OutOfMemoryError("out of memory")
        backward(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", failing)
    tight = train_tiny_emotion(folder, "tight", **settings)
    first, second = weights_of(calm), weights_of(tight)
    assert all(torch.allclose(first[k], second[k], atol=1e-4) for k in first)
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(torch.OutOfMemoryError, match="data.batch_size"):
        train_tiny_emotion(folder, "full", **settings)


class _Holds(torch.autograd.Function):
    """Passes a tensor on; its node in the graph holds ``keeper``, so that a weak reference to that sees the graph go."""

    keeper: Any = None

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
        ctx.keeper, _Holds.keeper = _Holds.keeper, None
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def test_the_graph_that_did_not_fit_is_gone_before_the_stretch_is_computed_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward, failures, graphs, gone = torch.Tensor.backward, iter([True]), list[Any](), list[bool]()
    hear = EmotionSystem.hear

    def held(system: EmotionSystem, *given: Any) -> torch.Tensor:
        if graphs:
            gone.append(graphs.pop()() is None)
            return hear(system, *given)
        keeper = torch.nn.Identity() if system.training and not gone else None
        graphs.extend([weakref.ref(keeper)] if keeper is not None else [])
        _Holds.keeper = keeper
        return _Holds.apply(hear(system, *given))

    def failing(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if next(failures, False):
            raise torch.OutOfMemoryError("out of memory")
        backward(tensor, *args, **kwargs)

    monkeypatch.setattr(EmotionSystem, "hear", held)
    monkeypatch.setattr(torch.Tensor, "backward", failing)
    gc.disable()  # cycles that only the collector finds would hold the memory until it runs
    try:
        settings = {"model.speech.kind": "wavlm", "model.speech.wavlm.source": "tiny", "model.speech.tuned": True}
        train_tiny_emotion(folder, "gone", **settings, **{"train.steps": 1})
    finally:
        gc.enable()
    assert gone == [True]


def test_a_stretch_that_is_computed_again_asks_nothing_of_the_other_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out on one rank alone, so what all do together is done once."""
    settings = {"model.speech.kind": "wavlm", "model.speech.wavlm.source": "tiny", "model.speech.tuned": True}
    system, rows = build(folder, **settings)
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda hidden, *_, **__: hidden)  # drawn anew when computed again
    asked, average = list[Any](), dist.average
    monkeypatch.setattr(dist, "average", lambda value: asked.append(value) or average(value))
    turns = system.turns(one_batch(system, rows), Clock())
    _, first = next(turns)
    before = len(asked)
    again = turns.throw(torch.OutOfMemoryError("out of memory"))[1]  # type: ignore[attr-defined]
    assert before and len(asked) == before
    assert all(torch.allclose(first[name], again[name], atol=1e-3) for name in first)


def test_what_is_asked_about_again_is_heard_once_and_nothing_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lalia import egemaps

    make_dialogues(tmp_path / "dialogues", dialogues=1, turns=3)
    system, rows = build(folder, **{"model.speech.kind": "wavlm", "model.speech.wavlm.source": "tiny"})
    heard = list[int]()
    compute = egemaps.functionals
    monkeypatch.setattr(egemaps, "functionals", lambda wave, rate: heard.append(len(wave)) or compute(wave, rate))
    dialogue = list(Corpus.read([tmp_path / "dialogues" / "all.jsonl"]))
    first = system.recognize_emotion([dialogue])
    assert len(heard) == 3 and system.recognize_emotion([dialogue]) == first and len(heard) == 3
    make_dialogues(tmp_path / "dialogues", dialogues=1, turns=3, seed=1)  # other recordings under the same names
    assert system.recognize_emotion([dialogue]) != first and len(heard) == 6
    assert not (tmp_path / "dialogues" / "features").exists()


def test_recent_features_stay_within_their_limit() -> None:
    from lalia.systems.emotion.stores import Recent

    recent = Recent(["voice"], limit=40)
    for number in range(4):
        recent.put("voice", Row(str(number), f"{number}.wav"), torch.zeros(4))
    assert recent.size == 32 and recent.get("voice", Row("0", "0.wav")) is None
    assert recent.get("voice", Row("3", "3.wav")) is not None
    recent.put("speech", Row("5", "5.wav"), torch.zeros(4))
    assert recent.get("speech", Row("5", "5.wav")) is None
