"""Configuration of ``vits2``. The defaults are the full-size 44.1 kHz model; YAML files say only what differs."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from lalia import sections
from lalia.sections import ExternalModel, OptimizerConfig, Section


class DecoderKind(Enum):
    istft = "istft"  # ConvNeXt blocks at frame rate and an inverse STFT (Vocos): fast on a CPU
    hifigan = "hifigan"  # the seed's; needed for its weights


class FlowKind(Enum):
    transformer = "transformer"  # VITS2
    wavenet = "wavenet"  # VITS: about three times cheaper


class OnUnknown(Enum):
    """Characters that the front end cannot speak: an error, dropped with a note, or the unknown symbol with a note."""

    error = "error"
    skip = "skip"
    replace = "replace"


@dataclass
class AudioConfig(Section):
    """Sampling and spectrogram. Frames per second are ``sample_rate / hop``."""

    sample_rate: int = 44100
    n_fft: int = 2048
    hop: int = 512
    win: int = 2048
    mels: int = 128
    fmin: float = 0.0
    fmax: float = 0.0  # 0 = half the sampling rate

    def __post_init__(self) -> None:
        if self.win > self.n_fft:
            raise ValueError(f"win ({self.win}) must not exceed n_fft ({self.n_fft})")
        if self.n_fft % 2 or self.hop > self.win:
            raise ValueError(f"n_fft must be even and hop at most win, got n_fft={self.n_fft} hop={self.hop}")


@dataclass
class DataConfig(sections.DataConfig):
    languages: list[str] = field(default_factory=lambda: ["en"])  # phone sets in the symbol table
    add_blank: bool = True  # a blank between all phones
    max_phones: int = 384  # longer texts are rejected, with a reason
    on_unknown: OnUnknown = OnUnknown.error
    segment_frames: int = 32  # length of the random slice that is decoded in training


@dataclass
class HifiGanConfig(Section):
    channels: int = 512
    rates: list[int] = field(default_factory=lambda: [8, 8, 2, 2, 2])
    kernels: list[int] = field(default_factory=lambda: [16, 16, 8, 2, 2])
    residual_kernels: list[int] = field(default_factory=lambda: [3, 7, 11])
    dilations: list[int] = field(default_factory=lambda: [1, 3, 5])


@dataclass
class IstftConfig(Section):
    channels: int = 512
    inner: int = 0  # 0 = 3 · channels
    layers: int = 8


@dataclass
class DiscriminatorConfig(Section):
    """One waveform discriminator (sum of scales, periods and STFT resolutions), and the two optional ones."""

    scales: int = 1
    periods: list[int] = field(default_factory=lambda: [2, 3, 5, 7, 11])
    resolutions: list[list[int]] = field(default_factory=list)  # [n_fft, hop, window] of each STFT discriminator
    channels: float = 1.0  # multiplies the width of all of them
    spectral_norm: bool = False
    start_step: int = 0  # before this step the waveform discriminator rests and the decoder learns from the mel loss alone
    duration: bool = True  # DurationDiscriminator (VITS2)
    wavlm: bool = False  # WavLMDiscriminator and the WavLM feature loss
    wavlm_channels: int = 64
    slm: ExternalModel = field(default_factory=lambda: ExternalModel(source="tiny"))


@dataclass
class ModelConfig(Section):
    """The generator: encoders, flow, duration predictors, decoder. The defaults are VITS2 at full size."""

    width: int = 192  # channels of the latent and of the text encoder
    filter: int = 768
    heads: int = 2
    layers: int = 6
    kernel: int = 3
    window: int = 4
    dropout: float = 0.1
    posterior_layers: int = 16
    posterior_kernel: int = 5
    flow: FlowKind = FlowKind.transformer
    flows: int = 4
    flow_layers: int = 4
    flow_kernel: int = 5
    flow_heads: int = 2
    flow_share_parameters: bool = False
    speaker_width: int = 512
    speaker_conditioned_encoder: bool = True
    speaker_layer: int = 2
    reference_encoder: bool = False  # speaker vector from a recording instead of a table
    duration_width: int = 256
    duration_dropout: float = 0.5
    decoder: DecoderKind = DecoderKind.istft
    hifigan: HifiGanConfig = field(default_factory=HifiGanConfig)
    istft: IstftConfig = field(default_factory=IstftConfig)
    mel_prior: bool = False  # tokens also predict mel frames, and the alignment search uses them: for little data or little time
    noise_scaled_mas: bool = True
    mas_noise: float = 0.01
    mas_noise_delta: float = 2e-6
    bert_width: int = 1024
    bert_languages: list[str] = field(default_factory=list)  # languages with a BERT projection in the text encoder

    def __post_init__(self) -> None:
        if self.reference_encoder and self.speaker_conditioned_encoder:
            raise ValueError(
                "speaker_conditioned_encoder needs a speaker table, but reference_encoder replaces it: set one of them to false"
            )
        if self.speaker_conditioned_encoder and self.speaker_layer >= self.layers:
            raise ValueError(f"speaker_layer ({self.speaker_layer}) must be below layers ({self.layers})")
        if self.width % 2:
            raise ValueError(f"width must be even (the flow halves it), got {self.width}")


@dataclass
class Weights(Section):
    """Weight of each loss; 0 switches it off."""

    loss_disc: float = 1.0  # waveform discriminator, LSGAN
    loss_dur_disc: float = 1.0  # duration discriminator
    loss_slm: float = 1.0  # WavLM discriminator
    loss_gen: float = 1.0
    loss_fm: float = 1.0  # feature matching (already × 2)
    loss_mel: float = 45.0
    loss_dur: float = 1.0
    loss_kl: float = 1.0
    loss_mel_prior: float = 1.0  # only with model.mel_prior
    loss_lm: float = 1.0  # WavLM features
    loss_lm_gen: float = 1.0
    loss_dur_gen: float = 1.0


@dataclass
class Optimizers(Section):
    """One optimizer per network, in the order in which they step."""

    d: OptimizerConfig = field(default_factory=OptimizerConfig)
    dur: OptimizerConfig = field(default_factory=OptimizerConfig)
    wd: OptimizerConfig = field(default_factory=OptimizerConfig)
    g: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class Config(sections.RunConfig):
    """Everything that a ``vits2`` run is made of, and the checks that concern two sections at once."""

    system: str = "vits2"
    audio: AudioConfig = field(default_factory=AudioConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    weights: Weights = field(default_factory=Weights)
    optimizers: Optimizers = field(default_factory=Optimizers)
    kl_start: float = 1.0  # the KL's share at step 0; below 1 the posterior first learns to carry the sound (beta-VAE)
    kl_ramp_steps: int = 0  # steps over which that share rises linearly to 1; 0 keeps kl_start throughout
    diagonal: float = 0.0  # weight of a penalty for alignments far from even durations, which finds the first ones sooner
    diagonal_steps: int = 2000  # steps over which that weight falls linearly to 0
    freeze_zh_bert: bool = False
    freeze_ja_bert: bool = False
    freeze_en_bert: bool = False

    def __post_init__(self) -> None:
        for language in ("zh", "ja", "en"):
            pattern = f"generator.text_encoder.bert.{language}"
            if self[f"freeze_{language}_bert"] and pattern not in self.train.freeze:
                self.train.freeze.append(pattern)
        if self.model.decoder is DecoderKind.hifigan:
            product = 1
            for rate in self.model.hifigan.rates:
                product *= rate
            if product != self.audio.hop:
                raise ValueError(f"model.hifigan.rates multiply to {product}, but audio.hop is {self.audio.hop}")
        if self.train.accumulate != 1:
            raise ValueError("train.accumulate works only for systems with one optimizer step a batch; vits2 has four")
