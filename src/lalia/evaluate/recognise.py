"""Recognisers: what a listener that never saw the text writes down. The word error rate is theirs as much as the voice's."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from lalia.audio import resample

SAMPLE_RATE = 16000
WINDOW_SECONDS = 30.0  # what Whisper was trained on
#: Quieter than this everywhere is silence, about which Whisper would invent a sentence ("Thank you.").
SILENT_PEAK = 1e-4
SHORTEST_SECONDS = 0.05
#: Hallucination guard: no language is spoken at more byte-pair tokens per second than this; noise can decode to 448 of them.
TOKENS_PER_SECOND = 12.0
SPARE_TOKENS = 10


class RecogniserError(ValueError):
    """A recogniser that cannot be used: unknown name, missing package, folder without weights."""


@runtime_checkable
class Recogniser(Protocol):
    """``name`` goes into reports and cache keys, so it names the weights."""

    name: str

    def transcribe(self, waves: Sequence[np.ndarray], sample_rate: int, language: str = "en") -> list[str]:
        """What is heard in each wave (float32 ``[S]``); '' for silence. The result does not depend on the other waves."""
        ...


def open_recogniser(source: str) -> Recogniser:
    """``pocketsphinx``, a transformers Whisper folder, or a source that :func:`lalia.pretrained.resolve` knows.

    Raises:
        RecogniserError: nothing is found there, with what to do about it.
    """
    if source == "pocketsphinx":
        return PocketsphinxRecogniser()
    if Path(source).is_dir():
        return WhisperRecogniser(source)
    if source.startswith((".", "/", "~")):
        raise RecogniserError(f"no folder {source}; give pocketsphinx, a Whisper folder, a hub id or wheel:whisper-base")
    from lalia.pretrained import resolve

    folder = resolve(source, "whisper")
    if folder is None:
        raise RecogniserError(f"recogniser {source!r} has random weights; a transcript of it would mean nothing")
    return WhisperRecogniser(folder)


class PocketsphinxRecogniser:
    """CMU Sphinx with the English model of its own wheel: small, and wrong in a third to a half of the words of real prompts."""

    name = "pocketsphinx"

    def __init__(self) -> None:
        # cmn=batch: the channel is estimated from each clip alone; the default carries it on from the clips before.
        # maxhmmpf bounds the search, which on noise (an untrained voice) takes several times as long otherwise.
        self._decoder = _import("pocketsphinx", "asr").Decoder(samprate=SAMPLE_RATE, loglevel="FATAL", cmn="batch", maxhmmpf=3000)

    def transcribe(self, waves: Sequence[np.ndarray], sample_rate: int, language: str = "en") -> list[str]:
        if not language.lower().startswith("en"):
            raise RecogniserError(f"pocketsphinx knows English only, not {language!r}; give a Whisper folder")
        return [self._one(wave) for wave in _at_16k(waves, sample_rate)]

    def _one(self, wave: np.ndarray) -> str:
        if is_silent(wave):
            return ""
        self._decoder.reinit_feat()  # nothing of the clip before
        self._decoder.start_utt()
        self._decoder.process_raw((wave.clip(-1, 1) * 32767).astype("<i2").tobytes(), full_utt=True)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        return hypothesis.hypstr if hypothesis else ""


class WhisperRecogniser:
    """Whisper (Radford et al. 2022) from a local transformers folder: greedy, no timestamps, the language given.

    Args:
        folder: ``config.json``, weights, tokenizer and ``preprocessor_config.json``.
        batch: clips per forward pass, of similar length.
        narrow: let the encoder see the clip and at least 5 s of silence after it (10 s in all at least) instead of 30 s. About
            three times quicker for short prompts. Narrower windows make Whisper repeat itself.
        device: torch device.
    """

    def __init__(self, folder: str | Path, batch: int = 8, narrow: bool = True, device: str = "cpu") -> None:
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise RecogniserError(f"{folder} is not a transformers Whisper folder: it has no config.json")
        from transformers import WhisperForConditionalGeneration, WhisperProcessor  # seconds, so only where it is used

        with _quiet_transformers():
            self._processor: Any = WhisperProcessor.from_pretrained(folder, local_files_only=True)
            model = WhisperForConditionalGeneration.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        self._model: Any = model.to(device).eval()  # type: ignore[arg-type]
        self.batch, self.narrow, self.device = batch, narrow, device
        self.name = f"{folder.name.removeprefix('wheel--')}{' (narrow window)' if narrow else ''}"

    def transcribe(self, waves: Sequence[np.ndarray], sample_rate: int, language: str = "en") -> list[str]:
        pieces: list[np.ndarray] = []
        owners: list[int] = []
        for index, wave in enumerate(_at_16k(waves, sample_rate)):
            for piece in split_at_pauses(wave):
                if not is_silent(piece):
                    pieces.append(piece)
                    owners.append(index)
        heard: list[list[str]] = [[] for _ in waves]
        texts = self._pieces(pieces, language)
        for owner, text in zip(owners, texts, strict=True):
            heard[owner].append(text.strip())
        return [" ".join(parts) for parts in heard]

    def _pieces(self, pieces: list[np.ndarray], language: str) -> list[str]:
        texts = [""] * len(pieces)
        for window in sorted({self._window(len(piece)) for piece in pieces}):
            members = sorted((i for i, p in enumerate(pieces) if self._window(len(p)) == window), key=lambda i: len(pieces[i]))
            for first in range(0, len(members), self.batch):
                chosen = members[first : first + self.batch]
                heard = self._batch([pieces[i] for i in chosen], window, language)
                for index, text in zip(chosen, heard, strict=True):
                    texts[index] = text
        return texts

    def _window(self, samples: int) -> int:
        """Seconds that the encoder sees. A function of the clip alone, so that the neighbours in a batch do not matter."""
        if not self.narrow:
            return int(WINDOW_SECONDS)
        needed = samples / SAMPLE_RATE + 5.0
        return next((w for w in (10, 15, 20) if needed <= w), int(WINDOW_SECONDS))

    @torch.inference_mode()
    def _batch(self, pieces: list[np.ndarray], window: int, language: str) -> list[str]:
        features = self._processor.feature_extractor(pieces, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
        limits = [int(TOKENS_PER_SECOND * len(piece) / SAMPLE_RATE) + SPARE_TOKENS for piece in pieces]
        options: dict[str, Any] = {"max_new_tokens": max(limits), "num_beams": 1, "do_sample": False}
        if getattr(self._model.generation_config, "lang_to_id", None):  # the .en models refuse both
            options |= {"language": language, "task": "transcribe"}
        with _quiet_transformers():
            hidden = self._encode(features.to(self.device), window)
            rows = self._model.generate(encoder_outputs=hidden, **options)
        tokenizer = self._processor.tokenizer
        special = set(tokenizer.all_special_ids)
        plain = [[t for t in row.tolist() if t not in special][:limit] for row, limit in zip(rows, limits, strict=True)]
        return [tokenizer.decode(ids, skip_special_tokens=True) for ids in plain]

    def _encode(self, features: torch.Tensor, window: int) -> Any:
        """Whisper's encoder on the first ``window`` seconds of ``features [B, M, 3000]``; 30 s is the ordinary forward."""
        from transformers.modeling_outputs import BaseModelOutput

        encoder = self._model.model.encoder
        if window >= WINDOW_SECONDS:
            return encoder(features)
        hidden = torch.nn.functional.gelu(encoder.conv1(features[..., : window * 100]))
        hidden = torch.nn.functional.gelu(encoder.conv2(hidden)).permute(0, 2, 1)
        hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
        for layer in encoder.layers:
            output = layer(hidden, None)
            hidden = output[0] if isinstance(output, tuple) else output
        return BaseModelOutput(last_hidden_state=encoder.layer_norm(hidden))


def split_at_pauses(wave: np.ndarray, longest: float = WINDOW_SECONDS) -> list[np.ndarray]:
    """Cut a 16 kHz ``wave [S]`` into pieces of at most ``longest`` seconds, each at the quietest 0.1 s of its last third."""
    most, frame = int(longest * SAMPLE_RATE), SAMPLE_RATE // 10
    pieces = []
    while len(wave) > most:
        first = most * 2 // 3
        region = wave[first : first + (most - first) // frame * frame].reshape(-1, frame)
        cut = first + int((region**2).mean(1).argmin()) * frame + frame // 2
        pieces.append(wave[:cut])
        wave = wave[cut:]
    return [*pieces, wave]


def is_silent(wave: np.ndarray) -> bool:
    """True for a 16 kHz wave in which there is nothing to recognise."""
    return len(wave) < SHORTEST_SECONDS * SAMPLE_RATE or float(np.abs(wave).max()) < SILENT_PEAK


def _at_16k(waves: Sequence[np.ndarray], sample_rate: int) -> list[np.ndarray]:
    return [np.asarray(resample(w, sample_rate, SAMPLE_RATE) if len(w) else w, dtype=np.float32) for w in waves]


def _import(package: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise RecogniserError(f"{package} is not installed; run: pip install 'lalia[{extra}]'") from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings about generation options that are set on purpose."""
    from transformers.utils import logging as transformers_logging

    from lalia.pretrained.models import without_progress_bars

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        with without_progress_bars():
            yield
    finally:
        transformers_logging.set_verbosity(level)
