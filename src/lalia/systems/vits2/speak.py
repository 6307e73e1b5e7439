"""Inference of ``vits2``: text → sentences → latents → waves, offline and as a stream; resynthesis; pictures for the logs."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lalia import mel, plots
from lalia.data import BadRow, Row
from lalia.nn.align import attention_path
from lalia.nn.masks import slice_segments
from lalia.nn.noise import RowNoise, row_seeds
from lalia.nn.vocoder import decode_stream
from lalia.system import Clock, Media, SpeakRequest, Speech
from lalia.systems.vits2 import data
from lalia.systems.vits2.generator import TextInput
from lalia.text import split_sentences

if TYPE_CHECKING:
    from lalia.systems.vits2.system import Vits2

log = logging.getLogger(__name__)

BATCH = 16  # sentences whose latents are predicted together
MAX_SENTENCE_CHARACTERS = 200
MEDIA_CLIPS = 2


@dataclass
class Sentence:
    """One piece of a request, ready for the text encoder. ``seed`` fixes its noise whatever it is batched with."""

    request: SpeakRequest
    text: Tensor
    tones: Tensor
    languages: Tensor
    speaker: int
    seed: int
    notes: list[str]


@dataclass
class Latent:
    """``value`` [1, D, T] and ``speaker`` [1, G, 1] for the decoder."""

    value: Tensor
    speaker: Tensor
    notes: list[str]


def sentences(system: Vits2, request: SpeakRequest) -> list[Sentence]:
    """Splits and analyses a request. ValueError names what is wrong (empty text, unknown speaker or language …)."""
    pieces = split_sentences(request.text, request.language, MAX_SENTENCE_CHARACTERS)
    if not pieces:
        raise BadRow("the text is empty: give at least one word to speak")
    side, result = system.text_side, []
    speaker = side.speaker(request.speaker)
    for index, piece in enumerate(pieces):
        if not any(character.isalnum() for character in piece) and len(pieces) > 1:
            continue  # a piece of punctuation alone is a pause, which the joint already makes
        analysis = side.analyse(piece, request.language)
        text, tones, languages, _ = side.ids(analysis)
        seed = row_seeds([f"{index}\0{piece}"], request.seed, 0)[0]
        result.append(Sentence(request, text, tones, languages, speaker, seed, list(analysis.notes)))
    if not result:
        raise BadRow(f"nothing to speak in {request.text[:60]!r}: it has no letters and no digits")
    return result


def _batches(pieces: Sequence[Sentence]) -> Iterator[list[Sentence]]:
    """Runs of sentences with equal settings, at most BATCH long."""
    batch: list[Sentence] = []
    for piece in pieces:
        same = batch and replace(batch[0].request, text="", seed=0) == replace(piece.request, text="", seed=0)
        if batch and (not same or len(batch) == BATCH):
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


@torch.inference_mode()
def predict(system: Vits2, pieces: Sequence[Sentence]) -> list[Latent]:
    """Latents of sentences that share their settings, in one batch."""
    request, config = pieces[0].request, system.config
    device = next(system.parameters()).device
    text, tones, languages, lengths = data.pad_text(pieces)
    rate = config.audio.sample_rate / config.audio.hop
    max_frames = max(1, int(request.max_seconds * rate))
    bert = {n: torch.zeros(len(pieces), config.model.bert_width, text.shape[1]) for n in config.model.bert_languages}
    given = TextInput(
        text=text.to(device),
        tones=tones.to(device),
        languages=languages.to(device),
        lengths=lengths.to(device),
        speaker=torch.tensor([p.speaker for p in pieces], device=device),
        bert={n: v.to(device) for n, v in bert.items()},
    )
    if config.model.reference_encoder:
        given.reference, given.reference_lengths = _reference(system, request, len(pieces))
    value, frames, _, speaker = system.generator.predict_latent(
        given,
        RowNoise([p.seed for p in pieces], device),
        noise_scale=request.noise_scale,
        noise_scale_w=request.noise_scale_w,
        length_scale=request.length_scale,
        sdp_ratio=request.sdp_ratio,
        max_frames=max_frames,
    )
    latents = []
    for row, (piece, length) in enumerate(zip(pieces, frames.tolist(), strict=True)):
        notes = list(piece.notes)
        if length >= max_frames:
            notes.append(f"cut at max_seconds={request.max_seconds:g}")
        latents.append(Latent(value[row : row + 1, :, :length], speaker[row : row + 1], notes))
    return latents


def _reference(system: Vits2, request: SpeakRequest, count: int) -> tuple[Tensor, Tensor]:
    """Spectrogram of the request's reference recording, repeated for each sentence."""
    if not request.reference:
        raise BadRow("this model takes its voice from a recording: give SpeakRequest.reference (CLI --reference FILE)")
    wave = data.load_wave(Row(id=request.reference, audio=request.reference), system.config)
    device = next(system.parameters()).device
    spectrogram = mel.spectrogram(wave, system.mel_spec).to(device)
    return spectrogram.expand(count, -1, -1), torch.full((count,), spectrogram.shape[1], device=device)


@torch.inference_mode()
def decode(system: Vits2, latent: Latent) -> np.ndarray:
    """Latent → float32 [S]."""
    return system.generator.decoder(latent.value, latent.speaker)[0, 0].float().cpu().numpy()


def check(request: SpeakRequest) -> None:
    """ValueError when a setting makes no sense."""
    for name in ("length_scale", "max_seconds"):
        if not 0 < getattr(request, name) < math.inf:
            raise ValueError(f"{name} must be above 0, got {getattr(request, name)}")
    for name in ("noise_scale", "noise_scale_w", "pause"):
        if not 0 <= getattr(request, name) < math.inf:
            raise ValueError(f"{name} must be 0 or above, got {getattr(request, name)}")
    if not 0 <= request.sdp_ratio <= 1:
        raise ValueError(f"sdp_ratio must be between 0 and 1, got {request.sdp_ratio}")


def speak(system: Vits2, requests: Sequence[SpeakRequest]) -> list[Speech]:
    """See :meth:`Vits2.speak`."""
    rate = system.config.audio.sample_rate
    pieces: list[tuple[int, Sentence]] = []
    for index, request in enumerate(requests):
        check(request)
        try:
            pieces += [(index, piece) for piece in sentences(system, request)]
        except BadRow as error:
            which = f"text {index + 1} of {len(requests)} ({request.text[:40]!r}): " if len(requests) > 1 else ""
            raise BadRow(f"{which}{error}") from error
    latents = [latent for batch in _batches([p for _, p in pieces]) for latent in predict(system, batch)]
    results = [Speech(np.zeros(0, np.float32), rate) for _ in requests]
    for (index, piece), latent in zip(pieces, latents, strict=True):
        speech, pause = results[index], np.zeros(int(piece.request.pause * rate), np.float32)
        joined = [speech.wave, pause] if speech.wave.size else []
        speech.wave = np.concatenate([*joined, decode(system, latent)])
        speech.notes += [note for note in latent.notes if note not in speech.notes]
    return results


def stream(system: Vits2, request: SpeakRequest, chunk_frames: int = 64) -> Iterator[np.ndarray]:
    """See :meth:`Vits2.speak_stream`."""
    if chunk_frames < 1:
        raise ValueError(f"chunk_frames must be at least 1, got {chunk_frames}")
    check(request)
    rate = system.config.audio.sample_rate
    for index, piece in enumerate(sentences(system, request)):
        if index:
            yield np.zeros(int(request.pause * rate), np.float32)
        latent = predict(system, [piece])[0]
        for note in latent.notes:
            log.warning("%s", note)  # a stream has no other place for it
        with torch.inference_mode():
            chunks = decode_stream(system.generator.decoder, latent.value, latent.speaker, chunk_frames)
            for chunk in chunks:
                yield chunk[0, 0].float().cpu().numpy()


@torch.inference_mode()
def resynthesize(system: Vits2, rows: Sequence[Row]) -> list[Speech]:
    """See :meth:`Vits2.resynthesize`."""
    results, device = [], next(system.parameters()).device
    for row in rows:
        wave = data.load_wave(row, system.config)
        spectrogram = mel.spectrogram(wave, system.mel_spec).unsqueeze(0).to(device)
        lengths = torch.tensor([spectrogram.shape[2]], device=device)
        given = TextInput(
            text=lengths[:, None],
            tones=lengths[:, None],
            languages=lengths[:, None],
            lengths=torch.ones_like(lengths),
            speaker=torch.tensor([system.text_side.speaker(row.speaker)], device=device),
            reference=spectrogram,
            reference_lengths=lengths,
        )
        speaker = system.generator.speaker_vector(given)
        noise = RowNoise(row_seeds([row.id], 0, 0), device)
        latent, _, _ = system.generator.encode_audio(spectrogram, lengths, speaker, noise)
        results.append(Speech(decode(system, Latent(latent, speaker, [])), system.config.audio.sample_rate))
    return results


def media(system: Vits2, batch: data.Batch, clock: Clock) -> Media:
    """Slices, whole mels and the alignment of the first clip; speech of the first clips with SDP (1) and DP (0)."""
    result, hop = Media(), system.config.audio.hop
    noise = RowNoise(row_seeds(batch.ids, clock.seed, 0), batch.spectrogram.device)
    out = system.generator(batch.text_input(), batch.spectrogram, batch.frame_lengths, 0.0, noise)
    segment = system.config.data.segment_frames * hop
    real = slice_segments(batch.wave, out.starts * hop, segment)
    frames, tokens = int(batch.frame_lengths[0]), int(batch.text_lengths[0])
    whole = mel.mel_from_spectrogram(batch.spectrogram[0, :, :frames], system.mel_spec)
    path = attention_path(out.durations, batch.spectrogram.shape[2])[0, :frames, :tokens]
    result.images["slice/mel_org"] = plots.spectrogram_image(mel.mel(real[0, 0], system.mel_spec))
    result.images["slice/mel_gen"] = plots.spectrogram_image(mel.mel(out.wave[0, 0].float(), system.mel_spec))
    result.images["all/mel"] = plots.spectrogram_image(whole)
    result.images["all/attn"] = plots.alignment_image(path)
    for row in range(min(MEDIA_CLIPS, len(batch.ids))):
        _media_clip(system, batch, row, result, clock)
    return result


def _media_clip(system: Vits2, batch: data.Batch, row: int, result: Media, clock: Clock) -> None:
    """Ground truth and generated sound of one clip, under tags of their own for the two duration predictors."""
    rate, hop = system.config.audio.sample_rate, system.config.audio.hop
    truth = batch.wave[row, 0, : int(batch.frame_lengths[row]) * hop]
    result.audio[f"gt/audio_{row}"] = (truth.cpu().numpy(), rate)
    result.images[f"gt/mel_{row}"] = plots.spectrogram_image(mel.mel(truth, system.mel_spec))
    one, tokens = slice(row, row + 1), int(batch.text_lengths[row])
    given = TextInput(
        text=batch.text[one, :tokens],
        tones=batch.tones[one, :tokens],
        languages=batch.languages[one, :tokens],
        lengths=batch.text_lengths[one],
        speaker=batch.speaker[one],
        bert={name: value[one, :, :tokens] for name, value in batch.bert.items()},
        reference=batch.spectrogram[one],
        reference_lengths=batch.frame_lengths[one],
    )
    for use_sdp in (True, False):
        value, lengths, _, speaker = system.generator.predict_latent(
            given,
            RowNoise(row_seeds([batch.ids[row]], clock.seed, 0), batch.text.device),
            noise_scale=0.667,
            noise_scale_w=0.8,
            length_scale=1.0,
            sdp_ratio=float(use_sdp),
            max_frames=1000,
        )
        wave = decode(system, Latent(value[:, :, : int(lengths[0])], speaker, []))
        tag = f"{row}_{'sdp' if use_sdp else 'dp'}"
        result.audio[f"gen/audio_{tag}"] = (wave, rate)
        result.images[f"gen/mel_{tag}"] = plots.spectrogram_image(mel.mel(torch.from_numpy(wave), system.mel_spec))
