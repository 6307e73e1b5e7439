from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import WavLMConfig, WavLMModel, WhisperFeatureExtractor

from lalia.pretrained import load_wavlm, load_whisper
from lalia.sections import ExternalModel
from lalia.systems.emotion.backbones import WavlmBackbone
from lalia.systems.emotion.encoders import SpeechEncoder, describe_encoder, load_weights

TINY = ExternalModel("tiny")
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_buckets": 32,
    "max_bucket_distance": 64,
}
NO_DROPOUT = dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0)
BASE = SMALL | {"feat_extract_norm": "group"}
LARGE = SMALL | {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}


def wavlm(settings: dict[str, Any], normalize: bool = False, seconds: float = 30.0, **options: Any) -> SpeechEncoder:
    torch.manual_seed(0)
    description = {"kind": "wavlm", "config": settings, "normalize": normalize, "trim": True, "window_seconds": seconds}
    return SpeechEncoder(description, **options)


def whisper(**options: Any) -> SpeechEncoder:
    encoder = SpeechEncoder(describe_encoder("whisper", TINY, offline=True, **options))
    load_weights(encoder, TINY, offline=True)
    return encoder


def waves(*samples: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Clips of different loudness, the padded batch with rubbish beyond each end, and the lengths."""
    torch.manual_seed(1)
    clips = [0.3 * torch.randn(n) / (i + 1) + 0.05 for i, n in enumerate(samples)]
    batch = nn.utils.rnn.pad_sequence(clips, batch_first=True)
    for row, clip in zip(batch, clips, strict=True):
        row[len(clip) :] = 0.7
    return clips, batch, torch.tensor(samples)


def alone(encoder: SpeechEncoder, clips: list[Tensor]) -> Tensor:
    return torch.cat([encoder.pooled(clip[None], torch.tensor([len(clip)])) for clip in clips])


# --- the same alone and padded ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("settings", "normalize"), [(BASE, False), (BASE, True), (LARGE, True), (LARGE, False)])
def test_padding_changes_nothing_for_wavlm(settings, normalize):
    encoder = wavlm(settings, normalize)
    clips, batch, lengths = waves(8_000, 5_321, 1_200, 90, 1)
    expected = alone(encoder, clips)
    torch.testing.assert_close(encoder.pooled(batch, lengths), expected, atol=1e-5, rtol=0)
    assert (expected[0] - expected[1]).abs().max() > 1e-3


def test_transformers_own_group_norm_does_depend_on_padding():
    """What the masked norm is for: without it the test above could not fail."""
    model = WavLMModel(WavLMConfig.from_dict(BASE)).eval()
    clips, _, _ = waves(4_000)
    padded, mask = torch.zeros(1, 8_000), torch.zeros(1, 8_000, dtype=torch.long)
    padded[0, :4_000], mask[0, :4_000] = clips[0], 1
    with torch.no_grad():
        single = model(clips[0][None]).last_hidden_state
        assert (model(padded, attention_mask=mask).last_hidden_state[:, : single.shape[1]] - single).abs().max() > 1e-2


@pytest.mark.parametrize("trim", [True, False])
def test_padding_changes_nothing_for_whisper(trim):
    encoder = whisper(trim=trim)
    clips, batch, lengths = waves(9_000, 4_801, 320, 1)
    torch.testing.assert_close(encoder.pooled(batch, lengths), alone(encoder, clips), atol=1e-5, rtol=0)


# --- the same as transformers -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("settings", [BASE, LARGE])
def test_wavlm_is_transformers_for_one_clip(settings):
    torch.manual_seed(4)
    model = WavLMModel(WavLMConfig.from_dict(settings)).eval()
    encoder = wavlm(settings)
    encoder.backbone.load(model)
    clips, _, lengths = waves(5_000)
    with torch.no_grad():
        states = model(clips[0][None], output_hidden_states=True).hidden_states
    expected = torch.stack([state.mean(1) for state in states], dim=1)
    torch.testing.assert_close(encoder.pooled(clips[0][None], lengths), expected, atol=1e-5, rtol=0)
    assert (encoder.layers, encoder.width) == (len(states), 16)


def test_normalised_input_is_that_of_the_feature_extractor():
    from transformers import Wav2Vec2FeatureExtractor

    clips, batch, lengths = waves(4_000, 3_000)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    theirs = extractor([c.numpy() for c in clips], sampling_rate=16_000, padding=True, return_tensors="pt").input_values
    given = wavlm(LARGE, normalize=True).pooled(batch, lengths)
    torch.testing.assert_close(given, wavlm(LARGE).pooled(theirs, lengths), atol=1e-5, rtol=0)


def test_padded_whisper_is_transformers():
    model, processor = load_whisper(TINY)
    encoder = whisper(trim=False)
    clips, batch, lengths = waves(7_000, 16_000)
    batch, lengths = batch[:, :16_000], lengths
    features = processor.feature_extractor([c.numpy() for c in clips], sampling_rate=16_000, return_tensors="pt").input_features
    with torch.no_grad():
        states = model.model.encoder(features, output_hidden_states=True).hidden_states
    assert len(states) == encoder.layers
    for row, frames in enumerate((22, 50)):
        expected = torch.stack([state[row, :frames].mean(0) for state in states])
        torch.testing.assert_close(encoder.pooled(batch, lengths)[row], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("samples", [320, 12_345, 480_000])
def test_log_mel_is_whispers(samples):
    clips, _, lengths = waves(samples)
    expected = WhisperFeatureExtractor()(clips[0].numpy(), sampling_rate=16_000, return_tensors="pt").input_features
    padded = whisper(trim=False).backbone.log_mel(clips[0][None], lengths, 1_500)
    torch.testing.assert_close(padded, expected, atol=1e-5, rtol=0)
    total = -(-samples // 320)
    trimmed = whisper().backbone.log_mel(clips[0][None], lengths, total)
    assert (trimmed[..., :-1] - expected[..., : 2 * total - 1]).abs().max() < 1e-5


# --- any length -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["wavlm", "whisper"])
def test_a_long_turn_is_the_mean_of_its_windows(kind):
    encoder = wavlm(BASE, seconds=1.0) if kind == "wavlm" else whisper(window_seconds=1.0)
    clips, batch, lengths = waves(40_001, 6_000)
    parts = [clips[0][: 40_001 // 3], clips[0][40_001 // 3 : 2 * 40_001 // 3], clips[0][2 * 40_001 // 3 :]]
    weights = torch.tensor([len(part) / 40_001 for part in parts])
    pooled = encoder.pooled(batch, lengths)
    torch.testing.assert_close(pooled[0], torch.einsum("p,pld->ld", weights, alone(encoder, parts)), atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled[1:], alone(encoder, clips[1:]), atol=1e-5, rtol=0)


class Counting(nn.Module):
    """A network that counts what it is given: state = mean of the wave · weight."""

    layers, width = 3, 3

    def __init__(self, most: float = float("inf")) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.most, self.given = most, []

    def states(self, wave: Tensor, lengths: Tensor) -> tuple[list[Tensor], Tensor]:
        self.given.append(tuple(wave.shape))
        if wave.numel() > self.most:
            raise torch.OutOfMemoryError("too much")
        frames = (lengths + 99) // 100
        blocks = nn.functional.pad(wave, (0, -wave.shape[1] % 100)).unflatten(1, (-1, 100)).mean(2)
        state = (blocks.unsqueeze(2) * self.weight).tanh()
        return [state, state.square(), state**3], frames


def counting(most: float = float("inf"), **options: Any) -> SpeechEncoder:
    encoder = wavlm(BASE, **options)
    encoder.backbone = Counting(most)
    return encoder


def test_a_ten_minute_turn_is_never_whole_in_memory():
    encoder = counting()
    pooled = encoder.pooled(torch.randn(1, 600 * 16_000), torch.tensor([600 * 16_000]))
    assert pooled.shape == (1, 3, 3) and max(n * s for n, s in encoder.backbone.given) <= 4 * 30 * 16_000


@pytest.mark.parametrize("encoder", [wavlm(BASE), whisper()], ids=["wavlm", "whisper"])
def test_no_samples_is_an_error_that_says_which(encoder):
    with pytest.raises(ValueError, match="recording 1 of 2 has no samples"):
        encoder.pooled(torch.zeros(2, 4_000), torch.tensor([4_000, 0]))


@pytest.mark.parametrize("encoder", [wavlm(BASE), whisper()], ids=["wavlm", "whisper"])
def test_means_stay_float32_under_autocast(encoder):
    _, batch, lengths = waves(4_000, 3_000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = encoder.pooled(batch, lengths)
    assert pooled.dtype is torch.float32
    torch.testing.assert_close(pooled, encoder.pooled(batch, lengths), atol=0.1, rtol=0.1)


def test_silence_is_finite():
    for encoder in (wavlm(BASE), wavlm(LARGE, normalize=True), whisper()):
        assert encoder.pooled(torch.zeros(2, 4_000), torch.tensor([4_000, 100])).isfinite().all()


# --- frozen and tuned -------------------------------------------------------------------------------------------------
def test_frozen_means_evaluation_and_no_gradients_whatever_train_says():
    encoder = wavlm(BASE).train()
    assert encoder.training and not any(module.training for module in encoder.backbone.modules())
    _, batch, lengths = waves(3_000, 2_000)
    first, second = encoder.pooled(batch, lengths), encoder.pooled(batch, lengths)
    assert torch.equal(first, second) and not first.requires_grad
    encoder(first).square().sum().backward()
    learning = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    assert learning == ["layer_weights"] and encoder.layer_weights.grad.abs().sum() > 0


def test_layers_are_summed_by_softmax_weights_that_start_equal():
    encoder = wavlm(BASE)
    pooled = torch.randn(4, encoder.layers, encoder.width)
    torch.testing.assert_close(encoder(pooled), pooled.mean(1))
    encoder.layer_weights.data = torch.tensor([-99.0, 99.0, -99.0])
    torch.testing.assert_close(encoder(pooled), pooled[:, 1])


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("settings", [BASE, LARGE])
def test_tuned_gradients_reach_everything_but_a_frozen_extractor(settings, freeze):
    encoder = wavlm(settings, tuned=True, freeze_extractor=freeze).train()
    assert encoder.backbone.training
    _, batch, lengths = waves(3_000, 2_000)
    encoder(encoder.pooled(batch, lengths)).square().sum().backward()
    without = {name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None}
    # the norm after the last layer of the large model makes no hidden state
    assert without <= {"backbone.model.encoder.layer_norm.weight", "backbone.model.encoder.layer_norm.bias"}
    extractor = list(encoder.backbone.model.feature_extractor.parameters())
    assert all((p.grad is None) == freeze for p in extractor)


def test_tuned_whisper_learns_too():
    encoder = SpeechEncoder(describe_encoder("whisper", TINY), tuned=True).train()
    _, batch, lengths = waves(3_000, 2_000)
    encoder(encoder.pooled(batch, lengths)).square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)
    assert encoder.backbone.model.conv1.weight.grad is None and encoder.backbone.model.layers[0].fc1.weight.grad is not None


# --- micro-batches ----------------------------------------------------------------------------------------------------
def gradients(encoder: SpeechEncoder, batch: Tensor, lengths: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    encoder.zero_grad()
    pooled = encoder.pooled(batch, lengths)
    encoder(pooled).square().sum().backward()
    return pooled.detach(), {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}


def test_micro_batches_give_the_result_and_gradients_of_the_whole():
    encoder = wavlm(BASE | NO_DROPOUT, tuned=True, freeze_extractor=False).train()
    _, batch, lengths = waves(3_000, 800, 2_000, 2_900, 400)
    whole, expected = gradients(encoder, batch, lengths)
    encoder.micro_seconds = 6_000 / 16_000
    split, got = gradients(encoder, batch, lengths)
    torch.testing.assert_close(split, whole, atol=1e-5, rtol=0)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_dropout_is_replayed_when_activations_are_computed_again():
    encoder = wavlm(BASE | NO_DROPOUT | {"hidden_dropout": 0.5}, tuned=True, micro_seconds=0.1).train()
    _, batch, lengths = waves(1_600, 1_500)
    torch.manual_seed(7)
    pooled = encoder.pooled(batch, lengths)
    weights = torch.randn(pooled.shape)
    (pooled * weights).sum().backward()
    bias = encoder.backbone.model.encoder.layers[1].final_layer_norm.bias
    # the last state is normed output + bias, after the last dropout: its gradient is the sum of the weights, with any mask;
    # the one below passed a dropout, so only the same mask twice gives finite differences' answer
    torch.testing.assert_close(bias.grad, weights[:, -1].sum(0), atol=1e-4, rtol=1e-4)
    lower = encoder.backbone.model.encoder.layers[0].final_layer_norm.bias
    with torch.no_grad():
        sums = []
        for sign in (1, -1):
            lower[0] += sign * 1e-2
            torch.manual_seed(7)
            sums.append((encoder.pooled(batch, lengths) * weights).sum())
            lower[0] -= sign * 1e-2
    torch.testing.assert_close(lower.grad[0], (sums[0] - sums[1]) / 2e-2, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("tuned", [True, False])
def test_memory_that_runs_out_halves_the_micro_batch(tuned, caplog):
    _, batch, lengths = waves(4_000, 1_000, 3_000, 2_000, 3_500)
    free, tight = counting(tuned=tuned), counting(most=8_000, tuned=tuned)
    whole, expected = gradients(free, batch, lengths)
    with caplog.at_level("WARNING"):
        split, got = gradients(tight, batch, lengths)
    torch.testing.assert_close(split, whole)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, msg=name)
    assert 0 < tight.micro_seconds <= 0.5 and f"{tight.micro_seconds:.1f} padded seconds" in caplog.messages[-1]
    before = len(tight.backbone.given)
    tight.pooled(batch, lengths)
    assert all(n * s <= 8_000 for n, s in tight.backbone.given[before:]), "the smaller size is kept"


def test_what_does_not_fit_even_alone_is_raised_with_advice():
    _, batch, lengths = waves(4_000, 3_000)
    encoder = counting(most=3_500)
    with pytest.raises(torch.OutOfMemoryError, match=r"0\.2 s of speech.*window_seconds.*too much"):
        encoder.pooled(batch, lengths)


def test_shrinking_by_hand_ends_with_single_utterances():
    _, batch, lengths = waves(4_000, 3_000, 3_000)
    encoder = counting(tuned=True)
    assert not encoder.shrink(), "nothing was encoded yet"
    encoder.pooled(batch, lengths)
    steps = 0
    while encoder.shrink():
        encoder.pooled(batch, lengths)
        steps += 1
    assert 1 <= steps <= 3 and encoder.backbone.given[-3:] == [(1, 4_000), (1, 3_000), (1, 3_000)]


# --- descriptions -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["wavlm", "whisper"])
@pytest.mark.parametrize("where", ["tiny", "folder"])
def test_a_description_rebuilds_the_network_and_takes_its_weights(kind, where, tmp_path):
    source = TINY
    if where == "folder":
        model, processor = (load_wavlm(TINY), None) if kind == "wavlm" else load_whisper(TINY)
        model.save_pretrained(tmp_path)
        if processor is not None:
            processor.save_pretrained(tmp_path)
        source = ExternalModel(str(tmp_path))
    description = json.loads(json.dumps(describe_encoder(kind, source, offline=True)))
    assert str(tmp_path) not in json.dumps(description) and not description["normalize"]
    loaded, restored = SpeechEncoder(description), SpeechEncoder(description)
    load_weights(loaded, source, offline=True)
    restored.load_state_dict(loaded.state_dict())
    _, batch, lengths = waves(3_000, 2_000)
    assert torch.equal(restored.pooled(batch, lengths), loaded.pooled(batch, lengths))
    reference = load_wavlm(TINY) if kind == "wavlm" else load_whisper(TINY)[0].model.encoder
    ours = loaded.backbone.model.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in reference.state_dict().items())


def test_the_large_model_asks_for_normalised_waves(tmp_path):
    load_wavlm(TINY).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": true}')
    description = describe_encoder("wavlm", ExternalModel(str(tmp_path)))
    encoder = SpeechEncoder(description)
    assert description["normalize"] and isinstance(encoder.backbone, WavlmBackbone) and encoder.backbone.normalize


def test_impossible_descriptions_are_refused():
    with pytest.raises(ValueError, match="hubert.*wavlm, whisper"):
        describe_encoder("hubert", TINY)
    with pytest.raises(ValueError, match="from 1 to 30 for whisper"):
        describe_encoder("whisper", TINY, window_seconds=31.0)
