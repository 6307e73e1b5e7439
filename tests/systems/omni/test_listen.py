"""The frozen Whisper encoder: parity with transformers, trimming, layer choice, where the weights come from."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from lalia.pretrained import load_whisper, sources
from lalia.pretrained.whisper import choose
from lalia.sections import ExternalModel
from lalia.systems.omni.listen import Layers, Listener, describe_listener, frames_of

TINY = ExternalModel(source="tiny")
RATE = 16_000


def listener(**options) -> Listener:
    made = Listener(describe_listener(TINY, offline=True, **options))
    made.load_external(TINY)
    return made.eval()


def clips(*samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    waves = torch.zeros(len(samples), max(samples))
    for row, count in enumerate(samples):
        waves[row, :count] = 0.3 * torch.randn(count, generator=torch.Generator().manual_seed(row))
    return waves, torch.tensor(samples)


def test_padded_features_are_transformers_cut_to_the_clips_frames() -> None:
    model, processor = load_whisper(TINY)
    waves, lengths = clips(16_000, 5_001)
    found = listener().features(waves, lengths)
    assert [len(f) for f in found] == [50, 16] == [frames_of(n) for n in (16_000, 5_001)]
    inputs = processor([w[:n].numpy() for w, n in zip(waves, lengths, strict=True)], sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        expected = model.model.encoder(inputs.input_features, output_hidden_states=True).hidden_states
    for row, frames in enumerate(found):
        torch.testing.assert_close(frames, expected[-1][row, : len(frames)], rtol=1e-4, atol=1e-4)
    middle = listener(layers="index", numbers=[1]).features(waves, lengths)
    torch.testing.assert_close(middle[0], expected[1][0, :50], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trim", [True, False])
def test_a_clip_is_heard_the_same_in_any_batch(trim: bool) -> None:
    ear = listener(trim=trim)
    waves, lengths = clips(6_400, 12_345, 300)
    together = ear.features(waves, lengths)
    for row, count in enumerate(lengths.tolist()):
        alone = ear.features(waves[row : row + 1, :count], lengths[row : row + 1])[0]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)
        assert len(alone) == frames_of(count)


def test_trimming_is_another_hidden_state() -> None:
    waves, lengths = clips(8_000)
    padded, trimmed = (listener(trim=trim).features(waves, lengths)[0] for trim in (False, True))
    assert padded.shape == trimmed.shape and not torch.allclose(padded, trimmed, atol=1e-3)


def test_long_clips_are_heard_in_windows() -> None:
    ear = listener(trim=True)
    waves, lengths = clips(30 * RATE + 1_000)
    found = ear.features(waves, lengths)[0]
    assert len(found) == 1_504
    torch.testing.assert_close(found[1_500:], ear.features(waves[:, 30 * RATE :], torch.tensor([1_000]))[0], rtol=1e-4, atol=1e-5)


def test_layer_choice() -> None:
    waves, lengths = clips(3_200)
    states = [listener(layers="index", numbers=[n]).features(waves, lengths)[0] for n in range(3)]
    torch.testing.assert_close(listener().features(waves, lengths)[0], states[2])
    torch.testing.assert_close(listener(layers="index", numbers=[-1]).features(waves, lengths)[0], states[2])
    side = listener(layers="list", numbers=[0, 2])
    torch.testing.assert_close(side.features(waves, lengths)[0], torch.cat([states[0], states[2]], 1))
    assert side.width == 64 and listener().width == 32
    every = listener(layers="weighted")
    torch.testing.assert_close(every.features(waves, lengths)[0], sum(states) / 3)
    every.layer_weights.data = torch.tensor([0.0, 1.0, 2.0])
    shares = torch.tensor([0.0, 1.0, 2.0]).softmax(0)
    assert float(shares.sum()) == pytest.approx(1)
    expected = sum(share * state for share, state in zip(shares, states, strict=True))
    torch.testing.assert_close(every.features(waves, lengths)[0], expected)


def test_only_layer_weights_learn() -> None:
    ear = listener(layers="weighted", numbers=[1, 2]).train()
    assert not ear.encoder.training
    ear.features(*clips(3_200))[0].square().sum().backward()
    learnt = [name for name, p in ear.named_parameters() if p.grad is not None and bool(p.grad.any())]
    assert learnt == ["layer_weights"] == [name for name, p in ear.named_parameters() if p.requires_grad]
    assert not any(p.requires_grad for p in listener().parameters())


def test_half_precision_from_a_cache_is_mixed_too() -> None:
    ear = listener(layers="weighted")
    heard = ear.hear(*clips(3_200))[0]
    assert heard.shape == (10, 3, 32)
    torch.testing.assert_close(ear.mix(heard.half()), ear.mix(heard), rtol=1e-2, atol=1e-2)


def test_layer_numbers_are_checked() -> None:
    assert choose(Layers.weighted, [], 3) == [0, 1, 2] and choose(Layers.list, [-1, 0], 3) == [2, 0]
    for layers, numbers, message in [
        ("index", [], "one layer number"), ("index", [3], "0 … 2"), ("list", [], "takes layer numbers"),
        ("last", [1], "takes no layer"), ("list", [2, -1], "twice"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            describe_listener(TINY, layers=layers, numbers=numbers)


def test_silence_of_no_length_is_refused_by_number() -> None:
    with pytest.raises(ValueError, match="recording 2 of 2 has no samples"):
        listener().features(torch.zeros(2, 400), torch.tensor([400, 0]))


def test_the_random_encoder_is_named_in_the_log(caplog) -> None:
    with caplog.at_level(logging.INFO, "lalia"):
        description = describe_listener(TINY)
    assert description["source"] == "tiny (random)" and "tiny (random)" in caplog.text
    assert json.loads(json.dumps(description)) == description


def test_a_whisper_of_another_width_is_refused(tmp_path) -> None:
    ear = Listener({**describe_listener(TINY), "config": {**describe_listener(TINY)["config"], "d_model": 48}})
    with pytest.raises(ValueError, match=r"tiny \(random\) is not the Whisper this run was made with: conv1.weight is \(32"):
        ear.load_external(TINY)


@pytest.fixture
def hubs(monkeypatch, tmp_path):
    """Both hubs as folders; returns the list of (hub, id) that were asked and a dict of ids that fail."""
    model, processor = load_whisper(TINY)
    whole = tmp_path / "whole"
    model.save_pretrained(whole)
    processor.save_pretrained(whole)
    asked, broken = [], set()

    def fetch(hub):
        def into(name, revision, folder, single=""):
            asked.append((hub, name))
            if hub in broken:
                raise OSError(f"{hub} is not reachable")
            for path in whole.iterdir():
                (folder / path.name).write_bytes(path.read_bytes())
            return "commit"

        return into

    for name in ("HF_HUB_OFFLINE", "LALIA_OFFLINE", "WHISPER_MS_ID", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LALIA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_fetch_modelscope", fetch("modelscope"))
    monkeypatch.setattr(sources, "_fetch_huggingface", fetch("huggingface"))
    monkeypatch.setattr(sources, "_in_hub_cache", lambda *_: None)
    return asked, broken


def test_modelscope_comes_first_and_hugging_face_is_the_fallback(hubs, monkeypatch) -> None:
    asked, broken = hubs
    monkeypatch.setenv("WHISPER_MS_ID", "mirror/whisper-base")
    source = ExternalModel(source="openai/whisper-one")
    ear = Listener(describe_listener(source))
    ear.load_external(source)
    assert asked == [("modelscope", "mirror/whisper-base")]
    reference = load_whisper(TINY)[0].model.encoder.state_dict()
    assert all(torch.equal(reference[name], value) for name, value in ear.encoder.state_dict().items())
    asked.clear()
    broken.add("modelscope")
    describe_listener(ExternalModel(source="openai/whisper-two"))
    assert asked == [("modelscope", "mirror/whisper-base"), ("huggingface", "openai/whisper-two")]
    asked.clear()
    monkeypatch.delenv("WHISPER_MS_ID")
    describe_listener(ExternalModel(source="openai/whisper-three"))
    assert asked == [("huggingface", "openai/whisper-three")]
    broken.add("huggingface")
    with pytest.raises(sources.PretrainedError, match="WHISPER_MS_ID"):
        describe_listener(ExternalModel(source="openai/whisper-four"))


def test_the_fingerprint_goes_with_the_weights_not_with_the_folder(hubs) -> None:
    one = describe_listener(ExternalModel(source="openai/one"))
    two = describe_listener(ExternalModel(source="openai/two"))
    assert one["source"] != two["source"] and one["fingerprint"] == two["fingerprint"] != describe_listener(TINY)["fingerprint"]
