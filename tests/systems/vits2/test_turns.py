"""The four turns of a step: who is judged by whom, switches, freezing, precision, and that a step is worth taking."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import make_corpus
from torch import nn
from trainer_children import FOUR, mini_config
from vits2_models import batch_of, build, stir

from lalia import checkpoint, mel, optim, run_setup
from lalia import train as trainer
from lalia.data import Corpus, write_manifest
from lalia.loader import Loader
from lalia.logs import Logs, read_metrics
from lalia.nn.align import attention_path
from lalia.nn.masks import slice_segments
from lalia.system import Clock, Media, loss_weights
from lalia.systems.vits2.system import Vits2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    make_corpus(folder / "corpus")
    return folder


def take_step(system: Vits2, batch: Any, step: int = 0) -> dict[str, dict[str, float]]:
    """Run the turns without optimizers; turn → loss name → value."""
    return {turn: {k: float(v.detach()) for k, v in losses.items()} for turn, losses in system.turns(batch, Clock(step=step))}


def grads(module: nn.Module | None) -> list[bool]:
    assert module is not None
    return [p.grad is not None for p in module.parameters()]


def test_order_and_names_of_the_losses(corpus: Path) -> None:
    system, rows = build(corpus, **FOUR, **{"model.mel_prior": True})
    found = take_step(system, batch_of(system, rows, [0, 1]))
    assert list(found) == ["d", "dur", "wd", "g"]
    assert {name: list(losses) for name, losses in found.items() if name != "g"} == {
        "d": ["loss_disc"], "dur": ["loss_dur_disc"], "wd": ["loss_slm"]
    }  # fmt: skip
    parts = ("gen", "fm", "mel", "dur", "kl", "lm", "lm_gen", "dur_gen", "mel_prior")
    assert set(found["g"]) == {f"loss_{part}" for part in parts}
    assert {name for losses in found.values() for name in losses} == set(loss_weights(system.config))


def test_each_turn_reaches_its_own_network_alone(corpus: Path) -> None:
    system, rows = build(corpus, **FOUR)
    networks = {"d": system.discriminator, "dur": system.duration_discriminator, "wd": system.wavlm_discriminator}
    for turn, losses in system.turns(batch_of(system, rows, [0, 1]), Clock()):
        system.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        own = networks.get(turn, system.generator)
        assert all(grads(own)), turn
        for name, other in {**networks, "g": system.generator}.items():
            assert other is own or not any(grads(other)), f"turn {turn} reaches {name}"
        assert all(p.requires_grad for p in system.parameters())  # what was frozen for a moment is free again


def test_two_passes_of_wavlm_a_step(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system, rows = build(corpus, **FOUR)
    backbone = system.wavlm_features.backbone  # type: ignore[union-attr]
    passes: list[bool] = []
    real = backbone.forward
    monkeypatch.setattr(backbone, "forward", lambda wave, **k: (passes.append(wave.requires_grad), real(wave, **k))[1])
    take_step(system, batch_of(system, rows, [0]))  # and a batch of one keeps its dimension
    assert passes == [False, True]


def test_wavlm_losses_without_the_duration_discriminator(corpus: Path) -> None:
    """R28: the WavLM discriminator reaches the generator whether or not the other one is there."""
    system, rows = build(corpus, **FOUR, **{"discriminator.duration": False})
    found = take_step(system, batch_of(system, rows, [0, 1]))
    assert list(found) == ["d", "wd", "g"] and {"loss_lm", "loss_lm_gen"} <= set(found["g"])


def test_start_step_lets_the_discriminator_rest(corpus: Path) -> None:
    system, rows = build(corpus, **{"discriminator.start_step": 3})
    batch = batch_of(system, rows, [0, 1])
    assert list(take_step(system, batch, 2)) == ["dur", "g"] and "loss_fm" not in take_step(system, batch, 2)["g"]
    assert list(take_step(system, batch, 3)) == ["d", "dur", "g"] and "loss_fm" in take_step(system, batch, 3)["g"]


def test_turns_see_the_networks_as_the_turns_before_left_them(corpus: Path) -> None:
    system, rows = build(corpus)
    batch = batch_of(system, rows, [0, 1])
    plain = take_step(system, batch)["g"]
    steps = system.turns(batch, Clock())
    next(steps)
    with torch.no_grad():
        for parameter in system.discriminator.parameters():
            parameter.mul_(1.5)
    after = dict(steps)["g"]
    assert after["loss_gen"].item() != plain["loss_gen"] and after["loss_mel"].item() == plain["loss_mel"]


def test_duration_discriminator_loss_is_a_mean_over_valid_tokens(corpus: Path) -> None:
    """R3: at 0.5 for everything the loss is 0.25 + 0.25 whatever the batch and the padding."""
    system, rows = build(corpus)
    judge = system.duration_discriminator
    with torch.no_grad():
        judge.score.weight.zero_()  # type: ignore[union-attr]
        judge.score.bias.zero_()  # type: ignore[union-attr]
    for chosen in ([0], [0, 1, 4], [0, 1, 2, 3, 4, 5]):
        found = take_step(system, batch_of(system, rows, chosen))
        assert found["dur"]["loss_dur_disc"] == pytest.approx(0.5) and found["g"]["loss_dur_gen"] == pytest.approx(0.25)


def test_slices_of_wave_and_latent_belong_together(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """V-41: with the recording itself in place of the decoder's slice the mel loss is 0."""
    system, rows = build(corpus)
    batch = batch_of(system, rows, [0, 1, 2])
    real = system.generator.forward

    def perfect(*arguments: Any) -> Any:
        out = real(*arguments)
        out.wave = torch.stack([batch.wave[i, :, s * 128 : (s + 8) * 128] for i, s in enumerate(out.starts.tolist())])
        return out

    monkeypatch.setattr(system.generator, "forward", perfect)
    assert take_step(system, batch)["g"]["loss_mel"] == 0.0
    assert torch.equal(slice_segments(batch.wave, torch.tensor([128, 0, 256]), 8)[0, 0], batch.wave[0, 0, 128:136])


def test_frames_of_the_spectrogram_are_those_of_the_wave(corpus: Path) -> None:
    system, rows = build(corpus)
    batch = batch_of(system, rows, [4])
    assert batch.wave.shape[2] == batch.spectrogram.shape[2] * 128
    assert torch.allclose(mel.spectrogram(batch.wave[0, 0], system.mel_spec), batch.spectrogram[0])


def test_kl_rises_to_its_whole_weight(corpus: Path) -> None:
    system, rows = build(corpus, **{"kl_start": 0.2, "kl_ramp_steps": 10})
    batch = batch_of(system, rows, [0])
    shares = []
    for step in (0, 5, 10, 99):
        found = take_step(system, batch, step)["g"]["loss_kl"]
        shares.append(found / float(system.scalars()["kl_nats"]))
    assert shares == pytest.approx([0.2, 0.6, 1.0, 1.0])


def test_diagonal_prior_evens_the_first_durations(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a large weight the alignment keeps to the line of even durations; the weight is gone after ``diagonal_steps``."""
    system, rows = build(corpus, **{"diagonal": 1e9, "diagonal_steps": 10, "model.noise_scaled_mas": False})
    stir(system.eval())
    batch = batch_of(system, rows, [0, 4])
    spread = {}
    real = system.generator.forward
    for step in (0, 10):
        kept: dict[str, Any] = {}
        monkeypatch.setattr(system.generator, "forward", lambda *a, kept=kept: kept.setdefault("out", real(*a)))
        take_step(system, batch, step)
        path = attention_path(kept["out"].durations, batch.spectrogram.shape[2])
        where = [path[i, :t, :n].argmax(1) / n - torch.arange(t) / t for i, (t, n) in
                 enumerate(zip(batch.frame_lengths.tolist(), batch.text_lengths.tolist(), strict=True))]  # fmt: skip
        spread[step] = max(float(w.abs().max()) for w in where)
    assert spread[0] < 0.06 < spread[10]


# --- freezing -------------------------------------------------------------------------------------------------------
def test_freeze_patterns(corpus: Path) -> None:
    """V-34: patterns take whole modules; an unknown one is an error that names the nearest."""
    system, _ = build(corpus, **{"model.bert_languages": "[en, zh]", "model.bert_width": 4, "freeze_zh_bert": True})
    assert system.config.train.freeze == ["generator.text_encoder.bert.zh"]
    frozen = optim.freeze(system, [*system.config.train.freeze, "generator.decoder.*"])
    still = {name for name, p in system.named_parameters() if p.requires_grad}
    assert "generator.text_encoder.bert.zh.weight" in frozen and "generator.text_encoder.bert.en.weight" in still
    assert not any(name.startswith("generator.decoder.") for name in still)
    assert not {id(p) for p in system.parameters() if not p.requires_grad} & {id(p) for p in system.optimizers()["g"]}
    with pytest.raises(ValueError, match="'generator.decodr' matches no parameter.*generator.decoder"):
        optim.freeze(system, ["generator.decodr"])


def test_frozen_parameters_do_not_move(corpus: Path, tmp_path: Path) -> None:
    config = mini_config(corpus, **{"train.steps": 1, "train.freeze": "[generator.text_encoder]"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lalia.logs.Logs.curves", lambda self: [])
        trainer.train(config, tmp_path / "run")
    before, after = (checkpoint.open_set(tmp_path / "run" / f"step-{s:08d}").model() for s in (0, 1))
    same = {key for key in before if torch.equal(before[key], after[key])}
    assert {key for key in before if key.startswith("generator.text_encoder.")} <= same
    assert "generator.decoder.head.weight" not in same


# --- precision ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reference", [False, True])
def test_bf16_is_near_fp32(corpus: Path, reference: bool) -> None:
    """V-38: all losses finite and close to those in float32; masks, durations and likelihoods are never bf16."""
    voice = {"model.reference_encoder": True, "model.speaker_conditioned_encoder": False} if reference else {}
    system, rows = build(corpus, **FOUR, **voice, **{"model.dropout": 0, "model.duration_dropout": 0})
    batch = batch_of(system, rows, [0, 1, 4])
    for module in system.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    full = take_step(system, batch)
    system.autocast_dtype = torch.bfloat16
    half = take_step(system, batch)
    assert {turn: set(losses) for turn, losses in half.items()} == {turn: set(losses) for turn, losses in full.items()}
    for turn, losses in full.items():
        for name, value in losses.items():
            assert np.isfinite(half[turn][name]) and half[turn][name] == pytest.approx(value, rel=0.12, abs=0.03), name
    out: dict[str, Any] = {}
    real = system.generator.forward
    system.generator.forward = lambda *a: out.setdefault("out", real(*a))  # type: ignore[method-assign]
    for _, losses in system.turns(batch, Clock()):
        assert all(value.dtype is torch.float32 for value in losses.values())
        torch.stack(list(losses.values())).sum().backward()
    assert all(getattr(out["out"], name).dtype is torch.float32 for name in ("text_mask", "frame_mask", "log_duration_target"))
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in system.generator.parameters())


# --- learning -------------------------------------------------------------------------------------------------------
@pytest.fixture
def quiet() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lalia.logs.Logs.curves", lambda self: [])
        patch.setattr(Vits2, "media", lambda self, batch, clock: Media())
        yield


def test_overfits_two_rows(corpus: Path, tmp_path: Path, quiet: None) -> None:
    """Sixty steps on two clips: mel, KL and duration losses fall clearly, and resynthesis comes nearer to the recording."""
    rows = [Corpus.read([corpus / "corpus" / "all.jsonl"])[i] for i in (0, 2)]
    write_manifest(tmp_path / "two.jsonl", rows)
    config = mini_config(
        corpus,
        **{"data.train": f"[{tmp_path / 'two.jsonl'}]", "train.steps": 60, "train.log_every": 10, "train.save_every": 60,
           "optimizers.g.lr": 0.004, "optimizers.g.clip": 1000, "model.istft.channels": 32, "discriminator.start_step": 40,
           "discriminator.duration": False},
    )  # fmt: skip
    trainer.train(config, tmp_path / "run")
    figures = read_metrics(tmp_path / "run" / "metrics.csv")
    first, last = figures[0], figures[-1]
    for name, share in (("loss/g/mel", 0.75), ("loss/g/kl", 0.7), ("loss/g/dur", 0.85)):
        assert float(last[name]) < share * float(first[name]), (name, first[name], last[name])

    def distance(which: str) -> float:
        system = checkpoint.load(tmp_path / "run", which=which)
        assert isinstance(system, Vits2)
        errors = []
        for row, speech in zip(rows, system.resynthesize(rows), strict=True):
            truth = system.prepare(row, Clock()).wave
            made = mel.mel(torch.from_numpy(speech.wave), system.mel_spec)
            errors.append(float((mel.mel(truth, system.mel_spec) - made).abs().mean()))
        return float(np.mean(errors))

    assert distance("latest") < 0.75 * distance("step-00000000")


def test_validation_disturbs_nothing(corpus: Path, tmp_path: Path, quiet: None) -> None:
    """V-57: neither weights nor the random state change, and twice gives the same figures."""
    system, rows = build(corpus, **FOUR, **{"discriminator.spectral_norm": True})
    stir(system)
    loader = Loader(system, rows, system.config.data, 0, training=False)
    before = {key: value.clone() for key, value in system.state_dict().items()}
    state = torch.get_rng_state()
    with Logs(tmp_path) as logs:
        first, second = (
            run_setup.validate(system, loader, system.config, loss_weights(system.config), logs, 5) for _ in range(2)
        )
    assert first == second and np.isfinite(list(first.values())).all() and "loss/g/mel" in first
    assert torch.equal(torch.get_rng_state(), state) and system.training
    assert all(torch.equal(before[key], value) for key, value in system.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in system.parameters())
