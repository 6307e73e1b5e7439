"""The VITS2 generator: prior and posterior encoders, flow, alignment, durations, decoder.

Training: the latent comes from the *posterior*; the flow maps it to the prior's space, where alignment search finds the
durations; the decoder gets a random slice of the posterior latent. Only inference runs the flow backwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lalia.mel import MelSpec, mel_from_spectrogram
from lalia.nn.align import expand, log_likelihood, mas_noise, search_alignment
from lalia.nn.couplings import Flow
from lalia.nn.masks import channel_mask, segment_starts, sequence_mask, slice_segments
from lalia.nn.noise import RowNoise
from lalia.nn.vocoder import HifiGanDecoder, IstftDecoder
from lalia.systems.vits2.config import AudioConfig, Config, DecoderKind, ModelConfig
from lalia.systems.vits2.duration import DurationPredictor, StochasticDurationPredictor
from lalia.systems.vits2.encoders import PosteriorEncoder, Prior, ReferenceEncoder, TextEncoder


@dataclass
class TextInput:
    """``text, tones, languages`` int64 [B, L]; ``lengths`` [B]; ``bert[name]`` [B, bert_width, L]; ``speaker`` int64 [B].

    ``reference`` [B, F, T] with ``reference_lengths`` replaces ``speaker`` when the model has a reference encoder.
    """

    text: Tensor
    tones: Tensor
    languages: Tensor
    lengths: Tensor
    speaker: Tensor
    bert: Mapping[str, Tensor] = field(default_factory=dict)
    reference: Tensor | None = None
    reference_lengths: Tensor | None = None


@dataclass
class Forward:
    """What one training pass yields. B batch, L tokens, T frames, D width, S segment samples."""

    wave: Tensor  # [B, 1, S]
    starts: Tensor  # [B] first frame of each slice
    text_mask: Tensor  # [B, 1, L]
    frame_mask: Tensor  # [B, 1, T]
    durations: Tensor  # int64 [B, L], from the alignment
    latent_prior: Tensor  # z_p [B, D, T]
    mean_prior: Tensor  # expanded to frames [B, D, T]
    log_scale_prior: Tensor
    log_scale_posterior: Tensor
    duration_nll: Tensor  # [B], stochastic predictor
    log_duration: Tensor  # [B, 1, L], deterministic prediction
    log_duration_sampled: Tensor  # [B, 1, L], stochastic prediction
    log_duration_target: Tensor  # [B, 1, L], from the alignment
    hidden: Tensor  # [B, D, L]
    speaker: Tensor  # [B, G, 1]
    mel: Tensor | None = None  # log-mel of the recording [B, M, T], with model.mel_prior
    mel_prior: Tensor | None = None  # what the tokens predict of it [B, M, T]


def mel_spec(audio: AudioConfig) -> MelSpec:
    """The spectrogram settings of a configuration."""
    return MelSpec(audio.sample_rate, audio.n_fft, audio.hop, audio.win, audio.mels, audio.fmin, audio.fmax)


def build_decoder(model: ModelConfig, audio: AudioConfig) -> nn.Module:
    """The decoder of ``model.decoder``: latent [B, D, T], speaker [B, G, 1] → wave [B, 1, T · hop]."""
    if model.decoder is DecoderKind.hifigan:
        h = model.hifigan
        return HifiGanDecoder(
            model.width,
            channels=h.channels,
            rates=h.rates,
            kernels=h.kernels,
            residual_kernels=h.residual_kernels,
            dilations=h.dilations,
            speaker_width=model.speaker_width,
        )
    i = model.istft
    return IstftDecoder(
        model.width,
        hop=audio.hop,
        channels=i.channels,
        layers=i.layers,
        inner=i.inner,
        n_fft=audio.n_fft,
        speaker_width=model.speaker_width,
    )


class Generator(nn.Module):
    """See the module's docstring. ``tables`` gives the sizes of the symbol, tone, language and speaker tables."""

    def __init__(self, config: Config, symbols: int, tones: int, languages: int, speakers: int) -> None:
        super().__init__()
        model = config.model
        bins = config.audio.n_fft // 2 + 1
        self.model = model
        self.segment_frames = config.data.segment_frames
        if model.reference_encoder:
            self.reference: nn.Module | None = ReferenceEncoder(bins, model.speaker_width)
            self.speaker_table = None
        else:
            self.reference = None
            self.speaker_table = nn.Embedding(speakers, model.speaker_width)
        self.text_encoder = TextEncoder(model, symbols, tones, languages, config.audio.mels if model.mel_prior else 0)
        self.mel_spec = mel_spec(config.audio)
        self.posterior_encoder = PosteriorEncoder(model, bins)
        self.flow = Flow(
            width=model.width,
            hidden=model.width,
            kernel=model.flow_kernel,
            layers=model.flow_layers,
            flows=model.flows,
            speaker_width=model.speaker_width,
            kind=model.flow.value,
            transformer_layers=model.flow_layers,
            transformer_kernel=model.flow_kernel,
            filter_width=model.filter,
            heads=model.flow_heads,
            share_parameters=model.flow_share_parameters,
        )
        self.stochastic_duration = StochasticDurationPredictor(
            model.width, 3, model.duration_dropout, flows=4, speaker_width=model.speaker_width
        )
        self.duration = DurationPredictor(
            model.width, model.duration_width, 3, model.duration_dropout, speaker_width=model.speaker_width
        )
        self.decoder = build_decoder(model, config.audio)

    def speaker_vector(self, text: TextInput) -> Tensor:
        """[B, G, 1] from the table, or from the reference recording."""
        if self.speaker_table is not None:
            return self.speaker_table(text.speaker).unsqueeze(-1)
        if text.reference is None:
            raise ValueError("this model has a reference encoder: give a reference recording for the voice")
        assert self.reference is not None
        return self.reference(text.reference, text.reference_lengths)

    def encode_text(self, text: TextInput, speaker: Tensor) -> Prior:
        mask = channel_mask(text.lengths, text.text.shape[1])
        return self.text_encoder(text.text, text.tones, text.languages, mask, text.bert, speaker)

    def encode_audio(self, spectrogram: Tensor, lengths: Tensor, speaker: Tensor, noise: RowNoise) -> tuple[Tensor, Tensor, Tensor]:
        """Spectrogram [B, F, T] → latent sample, log-scale [B, D, T], mask [B, 1, T]."""
        frames = spectrogram.shape[2]
        mask = channel_mask(lengths, frames)
        drawn = noise.normal(self.model.width, lengths.tolist(), frames)
        latent, _, log_scale = self.posterior_encoder(spectrogram, mask, speaker, drawn)
        return latent, log_scale, mask

    @torch.no_grad()
    def align(
        self,
        latent: Tensor,
        prior: Prior,
        lengths: tuple[Tensor, Tensor],
        noise_scale: float,
        noise: RowNoise,
        diagonal: float = 0.0,
        mel: Tensor | None = None,
    ) -> Tensor:
        """Durations int64 [B, L] by monotonic alignment search, with VITS2's noise over the valid cells.

        ``mel`` [B, M, T] adds the likelihood of the recording's frames under what the tokens predict of them, at unit variance.
        ``diagonal`` weighs a penalty for leaving the diagonal (guided attention, 1710.08969), for the first steps of a run.
        """
        scores = log_likelihood(latent.float(), prior.mean.float(), prior.log_scale.float())
        if mel is not None and prior.mel is not None:
            scores = scores + log_likelihood(mel, prior.mel.float(), torch.zeros_like(prior.mel, dtype=torch.float32))
        if noise_scale > 0:
            drawn = noise.normal_grid(lengths[1], lengths[0])
            frame_mask = sequence_mask(lengths[1], scores.shape[1])
            mask = frame_mask.unsqueeze(2) & sequence_mask(lengths[0], scores.shape[2]).unsqueeze(1)
            scores = mas_noise(scores, mask, noise_scale, drawn)
        if diagonal > 0:
            scores = scores - diagonal * off_diagonal(lengths[0], lengths[1], scores.shape)
        # what is not a number here makes the losses so too, and those are what the trainer guards, on all ranks alike
        return search_alignment(scores.nan_to_num(), lengths[0], lengths[1])

    def forward(
        self,
        text: TextInput,
        spectrogram: Tensor,
        frame_lengths: Tensor,
        noise_scale: float,
        noise: RowNoise,
        diagonal: float = 0.0,
    ) -> Forward:
        """One training pass; ``spectrogram`` [B, F, T], ``noise_scale`` that of the alignment at this step."""
        speaker = self.speaker_vector(text)
        prior = self.encode_text(text, speaker)
        latent, log_scale_posterior, frame_mask = self.encode_audio(spectrogram, frame_lengths, speaker, noise)
        latent_prior = self.flow(latent, frame_mask, speaker)
        mel = mel_from_spectrogram(spectrogram, self.mel_spec) if prior.mel is not None else None
        durations = self.align(latent_prior, prior, (text.lengths, frame_lengths), noise_scale, noise, diagonal, mel)

        tokens = text.text.shape[1]
        exact = durations.unsqueeze(1).float() * prior.mask  # never in bf16, which has no 257
        token_lengths = text.lengths.tolist()
        condition = self.stochastic_duration.condition(prior.hidden, prior.mask, speaker)
        nll = self.stochastic_duration(condition, prior.mask, exact, noise.normal(2, token_lengths, tokens))
        sampled = self.stochastic_duration.sample(condition, prior.mask, noise.normal(2, token_lengths, tokens))

        frames = spectrogram.shape[2]
        fractions = noise.uniform().squeeze(1)
        starts = segment_starts(frame_lengths, self.segment_frames, fractions)
        wave = self.decoder(slice_segments(latent, starts, self.segment_frames), speaker)
        return Forward(
            wave=wave,
            starts=starts,
            text_mask=prior.mask,
            frame_mask=frame_mask,
            durations=durations,
            latent_prior=latent_prior,
            mean_prior=expand(prior.mean, durations, frames),
            log_scale_prior=expand(prior.log_scale, durations, frames),
            log_scale_posterior=log_scale_posterior,
            duration_nll=nll,
            log_duration=self.duration(prior.hidden, prior.mask, speaker),
            log_duration_sampled=sampled,
            log_duration_target=torch.log(exact + 1e-6) * prior.mask,
            hidden=prior.hidden,
            speaker=speaker,
            mel=mel,
            mel_prior=expand(prior.mel, durations, frames) if prior.mel is not None else None,
        )

    @torch.inference_mode()
    def predict_latent(
        self,
        text: TextInput,
        noise: RowNoise,
        *,
        noise_scale: float,
        noise_scale_w: float,
        length_scale: float,
        sdp_ratio: float,
        max_frames: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Text → latent [B, D, T], frame lengths [B], durations [B, L], speaker [B, G, 1]; the decoder is left to the caller.

        Clips longer than ``max_frames`` keep their first ``max_frames`` frames.
        """
        speaker = self.speaker_vector(text)
        prior = self.encode_text(text, speaker)
        tokens, token_lengths = text.text.shape[1], text.lengths.tolist()
        log_duration = self.duration(prior.hidden, prior.mask, speaker) * (1 - sdp_ratio)
        if sdp_ratio > 0:
            condition = self.stochastic_duration.condition(prior.hidden, prior.mask, speaker)
            drawn = noise.normal(2, token_lengths, tokens) * noise_scale_w
            log_duration = log_duration + self.stochastic_duration.sample(condition, prior.mask, drawn) * sdp_ratio
        # a cap on the exponent: an untrained predictor must give a long sound, not an overflow
        durations = torch.ceil(log_duration.clamp(max=8.0).exp() * length_scale * prior.mask).long().squeeze(1)
        durations = torch.maximum(durations, prior.mask.squeeze(1).long())
        durations = cut_durations(durations, max_frames)
        lengths = durations.sum(1)
        frames = int(lengths.max())
        mask = channel_mask(lengths, frames)
        mean = expand(prior.mean, durations, frames)
        scale = expand(prior.log_scale, durations, frames).exp()
        drawn = noise.normal(self.model.width, lengths.tolist(), frames)
        latent = self.flow((mean + drawn * scale * noise_scale) * mask, mask, speaker, reverse=True) * mask
        return latent, lengths, durations, speaker


def off_diagonal(text_lengths: Tensor, frame_lengths: Tensor, shape: torch.Size) -> Tensor:
    """Squared distance of each cell [B, T, L] from the line of even durations, in shares of the clip."""
    frame = (torch.arange(shape[1], device=text_lengths.device) + 0.5) / frame_lengths[:, None]
    token = (torch.arange(shape[2], device=text_lengths.device) + 0.5) / text_lengths[:, None]
    return (frame[:, :, None] - token[:, None, :]).square()


def cut_durations(durations: Tensor, max_frames: int) -> Tensor:
    """Durations [B, L] whose sum is at most ``max_frames``: later tokens lose their frames first."""
    before = durations.cumsum(1) - durations
    return torch.minimum(durations, (max_frames - before).clamp(min=0))
