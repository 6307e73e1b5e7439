from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lalia.evaluate import recognise
from lalia.evaluate.recognise import Recogniser, RecogniserError, WhisperRecogniser, is_silent, open_recogniser, split_at_pauses

RATE = 16000


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, int(seconds * RATE)).astype(np.float32)


def test_long_sound_is_cut_in_pauses_and_nothing_is_lost() -> None:
    wave = noise(70.0)
    wave[int(25.2 * RATE) : int(25.6 * RATE)] = 0
    pieces = split_at_pauses(wave)
    assert np.array_equal(np.concatenate(pieces), wave)
    assert all(len(piece) <= 30 * RATE for piece in pieces)
    assert 25.2 * RATE <= len(pieces[0]) <= 25.6 * RATE
    assert len(split_at_pauses(noise(30.0))) == 1


def test_silence() -> None:
    assert is_silent(np.zeros(RATE, np.float32)) and is_silent(noise(0.01)) and is_silent(np.zeros(0, np.float32))
    assert not is_silent(noise(0.1))


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(RecogniserError, match=r"pip install 'lalia\[asr\]'"):
        open_recogniser("pocketsphinx")


def test_what_is_no_recogniser(tmp_path: Path) -> None:
    with pytest.raises(RecogniserError, match="no folder"):
        open_recogniser(str(tmp_path / "absent"))
    with pytest.raises(RecogniserError, match="config.json"):
        open_recogniser(str(tmp_path))


def test_pocketsphinx_does_not_carry_anything_from_clip_to_clip() -> None:
    pytest.importorskip("pocketsphinx")
    recogniser = open_recogniser("pocketsphinx")
    assert isinstance(recogniser, Recogniser)
    time = np.arange(RATE // 2) / RATE
    clips = [np.sin(2 * np.pi * hertz * time * (1 + 0.2 * time)).astype(np.float32) * 0.2 for hertz in (150, 300, 700)]
    forward = recogniser.transcribe([*clips, np.zeros(RATE, np.float32)], RATE)
    backward = recogniser.transcribe(clips[::-1], RATE)
    assert forward[:3] == backward[::-1] and forward[3] == ""
    with pytest.raises(RecogniserError, match="English only"):
        recogniser.transcribe(clips, RATE, "zh")


@pytest.fixture(scope="module")
def tiny_whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Whisper of the real shape (30 s window, real special tokens) with a tokenizer of single characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizerFast

    folder = tmp_path_factory.mktemp("whisper") / "tiny"
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    vocabulary = {token: index for index, token in enumerate([*"abcdefghijklmnopqrstuvwxyz", *special])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = WhisperTokenizerFast(tokenizer_object=tokenizer, unk_token=special[0], bos_token=special[0], eos_token=special[0])
    fast.add_special_tokens({"additional_special_tokens": special[1:]})
    fast.save_pretrained(folder)
    ids = {token: vocabulary[token] for token in special}
    torch.manual_seed(0)
    end = ids["<|endoftext|>"]
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(vocabulary),
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            decoder_start_token_id=ids["<|startoftranscript|>"],
            eos_token_id=end,
            pad_token_id=end,
            bos_token_id=end,
            begin_suppress_tokens=None,
            suppress_tokens=None,
            init_std=1.0,
        )
    )
    options = model.generation_config
    options.is_multilingual = True
    options.lang_to_id = {"<|en|>": ids["<|en|>"]}
    options.task_to_id = {"transcribe": ids["<|transcribe|>"]}
    options.no_timestamps_token_id = ids["<|notimestamps|>"]
    options.suppress_tokens = [*list(ids.values())[1:], end]  # never ends: the guard has to
    options.max_length = 448
    model.save_pretrained(folder)
    options.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("narrow", [True, False])
def test_whisper_stops_at_what_the_clip_can_hold_and_ignores_its_neighbours(tiny_whisper: Path, narrow: bool) -> None:
    recogniser = WhisperRecogniser(tiny_whisper, batch=3, narrow=narrow)
    clips = [noise(0.5, 1), noise(2.0, 2), np.zeros(RATE, np.float32), noise(1.0, 3)]
    together = recogniser.transcribe(clips, RATE)
    alone = [recogniser.transcribe([clip], RATE)[0] for clip in clips]
    assert together == alone and together[2] == ""
    for text, clip in zip(together, clips, strict=True):
        assert len(text) <= recognise.TOKENS_PER_SECOND * len(clip) / RATE + recognise.SPARE_TOKENS
    assert len(together[0]) == 16 and len(together[1]) == 34


def test_the_window_depends_on_the_clip_alone(tiny_whisper: Path) -> None:
    narrow, full = (WhisperRecogniser(tiny_whisper, narrow=flag) for flag in (True, False))
    assert [narrow._window(int(s * RATE)) for s in (1, 5, 5.1, 14, 16, 30)] == [10, 10, 15, 20, 30, 30]
    assert full._window(RATE) == 30 and narrow.name != full.name


def test_encoding_the_whole_window_by_hand_equals_the_model(tiny_whisper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recogniser = WhisperRecogniser(tiny_whisper)
    features = torch.randn(2, 80, 3000)
    with torch.inference_mode():
        expected = recogniser._encode(features, 30).last_hidden_state
        monkeypatch.setattr(recognise, "WINDOW_SECONDS", 31.0)
        by_hand = recogniser._encode(features, 30).last_hidden_state
    torch.testing.assert_close(by_hand, expected)
