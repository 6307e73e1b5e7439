"""``vits2`` as a System: four optimizer turns D → DUR → WD → G from one generator forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalia import mel, pretrained
from lalia.data import BadRow, Row
from lalia.nn.align import attention_path, mas_noise_scale
from lalia.nn.conv import fold_norms
from lalia.nn.discriminators import DurationDiscriminator, MultiDiscriminator
from lalia.nn.gan_losses import (
    discriminator_loss,
    duration_discriminator_loss,
    duration_generator_loss,
    feature_loss,
    generator_loss,
)
from lalia.nn.masks import slice_segments
from lalia.nn.noise import RowNoise, row_seeds
from lalia.nn.packed import pack_layers
from lalia.nn.slm import WavLMDiscriminator, WavLMFeatures, slm_feature_loss
from lalia.system import Clock, Media, SpeakRequest, Speech, System
from lalia.systems.vits2 import config as settings
from lalia.systems.vits2 import data, speak
from lalia.systems.vits2.generator import Forward, Generator, mel_spec
from lalia.systems.vits2.losses import duration_loss, kl_loss, kl_share, mel_prior_loss, share, token_count
from lalia.text import SymbolTable

Losses = dict[str, Tensor]


class Vits2(System):
    """See :mod:`lalia.systems.vits2`. ``tables``: ``symbols`` (SymbolTable), ``speakers`` (name → id)."""

    Config = settings.Config
    best_metric = "loss/g/mel"
    config: settings.Config

    def __init__(self, config: settings.Config, tables: Mapping[str, Any]) -> None:
        super().__init__(config, tables)
        self.text_side = data.TextSide(config, tables)
        self.mel_spec = mel_spec(config.audio)
        symbols = self.text_side.symbols
        self.generator = Generator(
            config, len(symbols.symbols), symbols.tone_count, len(symbols.language_ids), max(1, len(tables["speakers"]))
        )
        d = config.discriminator
        self.discriminator: nn.Module = MultiDiscriminator(
            scales=d.scales,
            periods=d.periods,
            resolutions=d.resolutions,
            channels_scale=d.channels,
            norm="spectral" if d.spectral_norm else "weight",
        )
        self.duration_discriminator: nn.Module | None = None
        if d.duration:
            width = config.model.width
            self.duration_discriminator = DurationDiscriminator(width, width, 3, 0.1, config.model.speaker_width)
        self.wavlm_features: WavLMFeatures | None = None
        self.wavlm_discriminator: nn.Module | None = None
        if d.wavlm:
            features = WavLMFeatures(pretrained.load_wavlm(d.slm), config.audio.sample_rate)
            self.wavlm_features = features
            self.wavlm_discriminator = WavLMDiscriminator(features.width, features.layers, d.wavlm_channels)
        self.figures: dict[str, float | Tensor] = {}

    # --- data -------------------------------------------------------------------------------------------------------
    @classmethod
    def make_tables(cls, config: Any, rows: Any) -> dict[str, Any]:
        """Symbols of the configured languages, and the speakers of the training rows in alphabetical order."""
        return {
            "symbols": SymbolTable.from_languages(config.data.languages).to_dict(),
            "speakers": {name: i for i, name in enumerate(sorted(set(rows.column("speaker"))))},
        }

    def reject(self, row: Row) -> str:
        if not row.text.strip():
            return "no text"
        if row.speaker not in self.text_side.speakers and not self.config.model.reference_encoder:
            return f"unknown speaker {row.speaker!r}"
        if self.length(row) < self.config.data.segment_frames:
            return f"too short: {self.length(row):.0f} frames, one segment has {self.config.data.segment_frames}"
        try:
            data.read_text(row, int(self.length(row)), self.config, self.text_side)
        except BadRow as error:
            return str(error)
        return ""

    def length(self, row: Row) -> float:
        return row.duration * self.config.audio.sample_rate / self.config.audio.hop

    def prepare(self, row: Row, clock: Clock) -> data.Example:
        return data.prepare(row, self.config, self.text_side)

    def collate(self, examples: Sequence[data.Example]) -> data.Batch:
        return data.collate(examples, self.config.model.bert_width, self.config.model.bert_languages)

    def for_inference(self) -> None:
        """Norms folded into plain weights, convolutions packed for the CPU, critics (half of all parameters) dropped."""
        fold_norms(self.generator)
        for network in ("text_encoder", "flow", "stochastic_duration", "duration", "decoder"):
            pack_layers(getattr(self.generator, network))
        self.discriminator, self.duration_discriminator, self.wavlm_discriminator = nn.Identity(), None, None
        self.wavlm_features = None
        self.eval().requires_grad_(False)

    # --- learning ---------------------------------------------------------------------------------------------------
    def optimizers(self) -> dict[str, list[nn.Parameter]]:
        nets = {
            "d": self.discriminator,
            "dur": self.duration_discriminator,
            "wd": self.wavlm_discriminator,
            "g": self.generator,
        }
        return {name: [p for p in net.parameters() if p.requires_grad] for name, net in nets.items() if net is not None}

    def turns(self, batch: data.Batch, clock: Clock) -> Iterator[tuple[str, Losses]]:
        """D, then DUR, then WD (where configured), then G, each seeing the networks as the turns before left them."""
        self.figures = {}
        noise = RowNoise(row_seeds(batch.ids, clock.seed, clock.step), batch.spectrogram.device)
        with self.autocast():
            search = self._mas_noise(clock.step), noise, self._diagonal(clock.step)
            out = self.generator(batch.text_input(), batch.spectrogram, batch.frame_lengths, *search)
        real = self._real_slice(batch, out)
        fair = share(len(batch.ids), real.device)
        adversarial = clock.step >= self.config.discriminator.start_step
        if adversarial:
            yield "d", self._discriminator_turn(real, out, fair)
        if self.duration_discriminator is not None:
            yield "dur", self._duration_turn(out)
        real_layers = self._wavlm_real(real)
        if self.wavlm_discriminator is not None:
            assert self.wavlm_features is not None
            with self.autocast():
                fake_layers = self.wavlm_features(out.wave)
            yield "wd", self._wavlm_turn(real_layers, fake_layers, fair)
        else:
            fake_layers = None
        losses = {
            "loss_mel": self._mel_loss(real, out.wave) * fair,
            "loss_dur": duration_loss(out),
            "loss_kl": self._kl(out, clock),
        }
        if out.mel_prior is not None:
            losses["loss_mel_prior"] = mel_prior_loss(out)
        if adversarial:
            losses |= self._adversarial_losses(real, out, fair)
        if self.duration_discriminator is not None:
            losses["loss_dur_gen"] = self._duration_adversarial(out)
        if real_layers is not None and fake_layers is not None:
            losses |= self._wavlm_losses(real_layers, fake_layers, fair)
        yield "g", losses

    def _diagonal(self, step: int) -> float:
        c = self.config
        return c.diagonal * max(0.0, 1.0 - step / c.diagonal_steps) if c.diagonal_steps else 0.0

    def _kl(self, out: Forward, clock: Clock) -> Tensor:
        """The KL at its present share; the whole of it is logged as ``kl_nats``."""
        whole = kl_loss(out)
        self._note("kl_nats", [whole])
        return whole * kl_share(clock.step, self.config.kl_start, self.config.kl_ramp_steps)

    def _mas_noise(self, step: int) -> float:
        m = self.config.model
        return mas_noise_scale(step, m.mas_noise, m.mas_noise_delta) if m.noise_scaled_mas else 0.0

    def _real_slice(self, batch: data.Batch, out: Forward) -> Tensor:
        """The recording's samples under the frames that were decoded: [B, 1, segment · hop]."""
        hop = self.config.audio.hop
        return slice_segments(batch.wave, out.starts * hop, self.config.data.segment_frames * hop)

    def _discriminator_turn(self, real: Tensor, out: Forward, fair: Tensor) -> Losses:
        with self.autocast():
            real_scores, _ = self.discriminator(real)
            fake_scores, _ = self.discriminator(out.wave.detach())
        total, real_parts, fake_parts = discriminator_loss(real_scores, fake_scores)
        self._note("loss/d_r/{}", real_parts)
        self._note("loss/d_g/{}", fake_parts)
        return {"loss_disc": total * fair}

    def _duration_turn(self, out: Forward) -> Losses:
        """Real durations against each of the two predictions, judged apart and averaged over valid tokens (not added)."""
        assert self.duration_discriminator is not None
        predicted = [out.log_duration.detach(), out.log_duration_sampled.detach()]
        with self.autocast():
            real, *fakes = self.duration_discriminator(
                out.hidden, out.text_mask, [out.log_duration_target, *predicted], out.speaker
            )
        total, real_part, fake_part = duration_discriminator_loss(real, fakes, out.text_mask, token_count(out))
        self._note("loss/dur_disc/total", [total])
        self._note("loss/dur_disc_r/{}", [real_part])
        self._note("loss/dur_disc_g/{}", [fake_part])
        return {"loss_dur_disc": total}

    def _wavlm_real(self, real: Tensor) -> Tensor | None:
        """Hidden states of the recording: once a step, without gradient, used by both the WD and the G turn."""
        if self.wavlm_features is None:
            return None
        with self.autocast():
            return self.wavlm_features.reference(real)

    def _wavlm_turn(self, real_layers: Tensor | None, fake_layers: Tensor, fair: Tensor) -> Losses:
        assert self.wavlm_discriminator is not None and real_layers is not None
        with self.autocast():
            real_scores = self.wavlm_discriminator(real_layers)
            fake_scores = self.wavlm_discriminator(fake_layers.detach())
        total, _, _ = discriminator_loss([real_scores], [fake_scores])
        return {"loss_slm": total * fair}

    def _adversarial_losses(self, real: Tensor, out: Forward, fair: Tensor) -> Losses:
        with self.frozen(self.discriminator), self.autocast():
            with torch.no_grad():
                _, real_features = self.discriminator(real)
            fake_scores, fake_features = self.discriminator(out.wave)
        total, parts = generator_loss(fake_scores)
        self._note("loss/g/{}", parts)
        return {"loss_gen": total * fair, "loss_fm": feature_loss(real_features, fake_features) * fair}

    def _wavlm_losses(self, real_layers: Tensor, fake_layers: Tensor, fair: Tensor) -> Losses:
        """Feature loss and adversarial loss on the same fake pass that the WD turn judged detached."""
        assert self.wavlm_features is not None and self.wavlm_discriminator is not None
        with self.frozen(self.wavlm_discriminator), self.autocast():
            scores = self.wavlm_discriminator(fake_layers)
        return {
            "loss_lm": slm_feature_loss(real_layers, fake_layers, self.wavlm_features.layers) * fair,
            "loss_lm_gen": generator_loss([scores])[0] * fair,
        }

    def _mel_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """L1 between log-mels of the two slices, in float32."""
        return F.l1_loss(mel.mel(fake.squeeze(1).float(), self.mel_spec), mel.mel(real.squeeze(1), self.mel_spec))

    def _duration_adversarial(self, out: Forward) -> Tensor:
        assert self.duration_discriminator is not None
        predicted = [out.log_duration, out.log_duration_sampled]
        with self.frozen(self.duration_discriminator), self.autocast():
            fakes = self.duration_discriminator(out.hidden, out.text_mask, predicted, out.speaker)
        total, parts = duration_generator_loss(fakes, out.text_mask, token_count(out))
        self._note("loss/g/dur_gen_{}", parts)
        return total

    def _note(self, name: str, values: Sequence[Tensor]) -> None:
        for index, value in enumerate(values):
            self.figures[name.format(index)] = value.detach()

    def scalars(self) -> dict[str, float | Tensor]:
        return self.figures

    # --- pictures ---------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def media(self, batch: data.Batch, clock: Clock) -> Media:
        return speak.media(self, batch, clock)

    # --- capabilities -----------------------------------------------------------------------------------------------
    def speak(self, requests: Sequence[SpeakRequest]) -> list[Speech]:
        """Each request's text as one sound; a batch gives what each request gives alone."""
        return speak.speak(self, requests)

    def speak_stream(self, request: SpeakRequest, chunk_frames: int = 64) -> Iterator[np.ndarray]:
        """Float32 pieces [S'] as they are decoded; joined they equal :meth:`speak` of the same request."""
        return speak.stream(self, request, chunk_frames)

    def resynthesize(self, rows: Sequence[Row]) -> list[Speech]:
        """Recording → posterior latent → decoder."""
        return speak.resynthesize(self, rows)

    def alignment(self, row: Row) -> np.ndarray:
        """Monotonic alignment of a recording with its text: 0/1 float32 [T, L]."""
        batch = self.collate([self.prepare(row, Clock(training=False))]).to(next(self.parameters()).device)
        with torch.no_grad():
            noise = RowNoise(row_seeds(batch.ids, 0, 0), batch.spectrogram.device)
            out = self.generator(batch.text_input(), batch.spectrogram, batch.frame_lengths, 0.0, noise)
        return attention_path(out.durations, batch.spectrogram.shape[2])[0].cpu().numpy()
