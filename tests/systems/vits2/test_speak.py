"""Inference: batches, streams, long texts, settings, errors; saved models speak the same; pictures and sounds for the logs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import make_corpus
from trainer_children import mini_config
from vits2_models import batch_of, build, stir

from lalia import checkpoint, plots
from lalia import train as trainer
from lalia.data import BadRow, Row
from lalia.system import Aligns, Clock, Resynthesizes, SpeakRequest, Speaks
from lalia.systems.vits2 import speak
from lalia.systems.vits2.system import Vits2

HIFIGAN = {
    "model.decoder": "hifigan",
    "model.hifigan.channels": 16,
    "model.hifigan.rates": "[8, 4, 4]",
    "model.hifigan.kernels": "[16, 8, 8]",
    "model.hifigan.residual_kernels": "[3, 5]",
    "model.hifigan.dilations": "[1, 3]",
}
DECODERS: dict[str, dict[str, Any]] = {"istft": {}, "hifigan": HIFIGAN}
LONG = "Alpha bravo charlie. Delta, echo! Foxtrot golf hotel? India."


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    make_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module", params=list(DECODERS))
def system(request: pytest.FixtureRequest, corpus: Path) -> Vits2:
    model, _ = build(corpus, **DECODERS[request.param])
    stir(model, 0.03)
    with torch.no_grad():  # an untrained predictor says one frame a phone: give the speech some length
        model.generator.duration.projection.bias.fill_(1.0)  # type: ignore[union-attr]
    return model.eval()


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal in length and within 1e-4 of the loudest sample."""
    return a.shape == b.shape and float(np.abs(a - b).max()) < 1e-4 * max(1.0, float(np.abs(a).max()))


def test_capabilities(system: Vits2) -> None:
    assert isinstance(system, Speaks) and isinstance(system, Resynthesizes) and isinstance(system, Aligns)


def test_batch_equals_single(system: Vits2) -> None:
    """V-35: whoever shares the batch, in whatever order, with other settings or not."""
    requests = [
        SpeakRequest("Alpha.", "s0", seed=3),
        SpeakRequest("Bravo charlie delta echo foxtrot.", "s1", sdp_ratio=1.0, length_scale=1.3),
        SpeakRequest(LONG, "s1", noise_scale=0.2),
        SpeakRequest("Golf hotel.", "s0", sdp_ratio=0.0),
        SpeakRequest("Alpha.", "s1", seed=3),
        SpeakRequest("Bravo charlie delta echo.", "s1", seed=5),  # same settings: one batch with the one before
    ]
    alone = [system.speak([request])[0] for request in requests]
    for chosen in (range(6), (5, 4, 2, 0)):
        for index, speech in zip(chosen, system.speak([requests[i] for i in chosen]), strict=True):
            assert same(speech.wave, alone[index].wave) and speech.wave.dtype == np.float32
            assert speech.sample_rate == 8000 and np.isfinite(speech.wave).all()
    assert not same(alone[0].wave, alone[4].wave)  # another speaker
    assert system.speak([]) == []


def test_many_sentences_are_batched_and_still_the_same(system: Vits2, monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(f"{word.capitalize()} alpha." for word in ["bravo", "delta", "echo", "golf", "hotel"])
    whole = system.speak([SpeakRequest(text)])[0].wave
    monkeypatch.setattr(speak, "BATCH", 2)
    assert same(system.speak([SpeakRequest(text)])[0].wave, whole)


def test_seed(system: Vits2) -> None:
    request = SpeakRequest("Alpha bravo.")
    first, again, other = (system.speak([replace(request, seed=seed)])[0].wave for seed in (0, 0, 1))
    assert np.array_equal(first, again) and (first.shape != other.shape or not np.allclose(first, other))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert np.array_equal(system.speak([request])[0].wave, first) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("chunk", [1, 5, 64, 10**6])
def test_stream_equals_offline(system: Vits2, chunk: int) -> None:
    request = SpeakRequest("Alpha bravo charlie delta. Echo!", "s1", sdp_ratio=0.5)
    pieces = list(system.speak_stream(request, chunk))
    assert all(piece.dtype == np.float32 and piece.ndim == 1 for piece in pieces)
    assert same(np.concatenate(pieces), system.speak([request])[0].wave)
    assert len(pieces) > 10 or chunk > 5
    with pytest.raises(ValueError, match="chunk_frames"):
        next(system.speak_stream(request, 0))


def test_long_text_is_split_and_joined(system: Vits2) -> None:
    pieces = ["Alpha bravo charlie.", "Delta, echo!", "Foxtrot golf hotel?", "India."]
    whole = system.speak([SpeakRequest(LONG, pause=0.1, sdp_ratio=0)])[0].wave
    parts = [system.speak([SpeakRequest(piece, sdp_ratio=0)])[0].wave for piece in pieces]
    assert len(whole) == sum(map(len, parts)) + 3 * 800
    assert not whole[len(parts[0]) : len(parts[0]) + 800].any()
    long = system.speak([SpeakRequest("Alpha bravo charlie delta. " * 190, max_seconds=0.2, pause=0)])[0]  # 5,130 characters
    assert len(long.wave) > 8000 and np.isfinite(long.wave).all()
    digits = system.speak([SpeakRequest("7" * 150, max_seconds=0.3)])[0]  # data.max_phones is a limit of training alone
    assert digits.wave.size


def test_a_stream_says_what_was_cut(system: Vits2, caplog: pytest.LogCaptureFixture) -> None:
    list(system.speak_stream(SpeakRequest("Alpha bravo charlie.", max_seconds=0.1)))
    assert "cut at max_seconds=0.1" in caplog.text


def test_one_bad_text_of_several_is_named(system: Vits2) -> None:
    with pytest.raises(BadRow, match="text 2 of 3 .*Ω"):
        system.speak([SpeakRequest("Alpha."), SpeakRequest("Ω"), SpeakRequest("Bravo.")])


def test_max_seconds_cuts_and_says_so(system: Vits2) -> None:
    request = SpeakRequest("Alpha bravo charlie delta echo foxtrot.", sdp_ratio=0)
    free, cut = (system.speak([replace(request, max_seconds=seconds)])[0] for seconds in (60, 0.25))
    assert len(cut.wave) == 15 * 128 < len(free.wave)  # 0.25 s are 15 whole frames
    assert cut.notes == ["cut at max_seconds=0.25"] and free.notes == []


def test_length_scale_and_duration_mix(system: Vits2) -> None:
    request = SpeakRequest("Alpha bravo charlie.", sdp_ratio=0)
    lengths = [len(system.speak([replace(request, length_scale=scale)])[0].wave) for scale in (0.5, 1.0, 1.5, 3.0)]
    assert lengths == sorted(set(lengths))
    deterministic = [len(system.speak([replace(request, seed=seed)])[0].wave) for seed in range(4)]
    assert len(set(deterministic)) == 1  # sdp_ratio 0: durations do not depend on the noise
    stochastic = [len(system.speak([replace(request, seed=seed, sdp_ratio=1.0)])[0].wave) for seed in range(8)]
    still = [len(system.speak([replace(request, seed=s, sdp_ratio=1.0, noise_scale_w=0)])[0].wave) for s in range(4)]
    assert len(set(stochastic)) > 1 and len(set(still)) == 1


def test_noise_scale_zero_is_the_mean(system: Vits2) -> None:
    request = SpeakRequest("Alpha bravo.", sdp_ratio=0, noise_scale=0)
    first, second = (system.speak([replace(request, seed=seed)])[0].wave for seed in (0, 1))
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": ""}, "text is empty"),
        ({"text": " \n"}, "text is empty"),
        ({"text": "?! ..."}, "speak|letters|pronunc|nothing"),
        ({"text": "Alpha ☃."}, "☃"),
        ({"speaker": "nobody"}, "unknown speaker 'nobody'; this run has s0, s1"),
        ({"language": "zh"}, "language 'zh' is not in this model; it has en"),
        ({"language": "klingon"}, "language 'klingon' is not in this model"),
        ({"sdp_ratio": 1.5}, "sdp_ratio must be between 0 and 1"),
        ({"sdp_ratio": float("nan")}, "sdp_ratio"),
        ({"length_scale": 0.0}, "length_scale must be above 0"),
        ({"length_scale": float("nan")}, "length_scale must be above 0"),
        ({"noise_scale": -0.1}, "noise_scale must be 0 or above"),
        ({"max_seconds": 0.0}, "max_seconds must be above 0"),
        ({"max_seconds": float("inf")}, "max_seconds must be above 0"),
        ({"pause": -1.0}, "pause must be 0 or above"),
    ],
)
def test_bad_requests(system: Vits2, change: dict[str, Any], message: str) -> None:
    request = replace(SpeakRequest("Alpha."), **change)
    for call in (lambda: system.speak([request]), lambda: list(system.speak_stream(request))):
        with pytest.raises(ValueError, match=message):
            call()


def test_unknown_characters_can_be_skipped_with_a_note(corpus: Path) -> None:
    system, _ = build(corpus, **{"data.on_unknown": "skip"})
    speech = system.eval().speak([SpeakRequest("Alpha ☃ bravo.", max_seconds=0.5)])[0]
    assert any("☃" in note for note in speech.notes) and speech.wave.size


def test_voice_from_a_recording(corpus: Path) -> None:
    options = {"model.reference_encoder": True, "model.speaker_conditioned_encoder": False}
    system, rows = build(corpus, **options)
    stir(system.eval(), 0.1)
    request = SpeakRequest("Alpha bravo. Charlie.", sdp_ratio=0, reference=rows[0].audio)
    first, second = (system.speak([replace(request, reference=rows[i].audio)])[0].wave for i in (0, 1))
    assert first.shape != second.shape or not np.allclose(first, second)
    assert same(np.concatenate(list(system.speak_stream(request, 7))), first)
    with pytest.raises(BadRow, match="give SpeakRequest.reference"):
        system.speak([SpeakRequest("Alpha.")])
    with pytest.raises(BadRow, match="gone.wav"):
        system.speak([replace(request, reference=str(corpus / "gone.wav"))])


def test_resynthesis_and_alignment(system: Vits2, corpus: Path) -> None:
    from lalia.data import Corpus

    rows = Corpus.read([corpus / "corpus" / "all.jsonl"])
    first, again = (system.resynthesize([rows[i] for i in chosen]) for chosen in ((0, 4), (4, 0)))
    assert same(first[0].wave, again[1].wave) and [len(s.wave) for s in first] == [6400, 9600]
    path = system.alignment(rows[0])
    assert path.shape[0] == 50 and (path.sum(1) == 1).all()
    tokens = path.argmax(1)
    assert tokens[0] == 0 and tokens[-1] == path.shape[1] - 1 and set(np.diff(tokens)) <= {0, 1}
    with pytest.raises(BadRow):
        system.resynthesize([Row("x", str(corpus / "gone.wav"))])


def test_saved_model_speaks_the_same(corpus: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lalia.logs.Logs.curves", lambda self: [])
        trainer.train(mini_config(corpus, **{"train.steps": 2}), tmp_path / "run")
    loaded = checkpoint.load(tmp_path / "run")
    assert isinstance(loaded, Vits2) and not loaded.training
    other = Vits2(loaded.config, loaded.tables).eval()
    other.load_state_dict(loaded.state_dict())
    request = SpeakRequest("Alpha bravo.", "s1", sdp_ratio=0.7)
    once, twice, thrice = (s.speak([request])[0].wave for s in (loaded, other, checkpoint.load(tmp_path / "run")))
    assert np.array_equal(once, twice) and np.array_equal(once, thrice)
    (tmp_path / "moved").mkdir()
    (tmp_path / "run").rename(tmp_path / "moved" / "elsewhere")  # from that folder alone
    assert np.array_equal(checkpoint.load(tmp_path / "moved" / "elsewhere").speak([request])[0].wave, once)  # type: ignore[operator]


def test_ready_for_inference_speaks_the_same(corpus: Path) -> None:
    """Norms folded, convolutions packed, critics gone: the same speech to rounding, offline and as a stream."""
    for options in DECODERS.values():
        system, rows = build(corpus, **options)
        stir(system.eval(), 0.03)
        request = SpeakRequest("Alpha bravo. Charlie!", "s1", sdp_ratio=0.5)
        before, again = system.speak([request])[0].wave, system.resynthesize([rows[0]])[0].wave
        system.for_inference()
        assert same(system.speak([request])[0].wave, before)
        assert same(np.concatenate(list(system.speak_stream(request, 9))), before)
        assert same(system.resynthesize([rows[0]])[0].wave, again)


# --- pictures and sounds for the logs -------------------------------------------------------------------------------
def test_media(system: Vits2, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """V-53, V-57, R29: every tag, both duration predictors apart, nothing disturbed."""
    from lalia.data import Corpus

    drawn: list[tuple[int, ...]] = []
    picture = np.zeros((4, 4, 3), np.uint8)
    for name in ("spectrogram_image", "alignment_image"):
        monkeypatch.setattr(plots, name, lambda values: (drawn.append(tuple(values.shape)), picture)[1])
    batch = batch_of(system, Corpus.read([corpus / "corpus" / "all.jsonl"]), [0, 4, 1])
    before = {key: value.clone() for key, value in system.state_dict().items()}
    torch.manual_seed(9)
    state = torch.get_rng_state()
    first, second = system.media(batch, Clock(seed=1)), system.media(batch, Clock(seed=1, step=7))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in system.state_dict().items())
    images = {"slice/mel_org", "slice/mel_gen", "all/mel", "all/attn", "gt/mel_0", "gt/mel_1"}
    images |= {f"gen/mel_{i}_{kind}" for i in (0, 1) for kind in ("sdp", "dp")}
    assert set(first.images) == images
    assert set(first.audio) == {"gt/audio_0", "gt/audio_1", *(f"gen/audio_{i}_{kind}" for i in (0, 1) for kind in ("sdp", "dp"))}
    tokens = int(batch.text_lengths[0])
    assert drawn[:4] == [(20, 8), (20, 8), (20, 50), (50, tokens)]
    for name, (wave, rate) in first.audio.items():
        assert rate == 8000 and wave.dtype == np.float32 and np.array_equal(wave, second.audio[name][0]), name
        assert len(wave) <= 1000 * 128
    assert np.array_equal(first.audio["gt/audio_0"][0], batch.wave[0, 0, :6400].numpy())
