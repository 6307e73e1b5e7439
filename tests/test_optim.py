"""Optimizers: schedules, freezing (V-34), AdamW per network (V-36), clipping (V-39), state by name (V-46), EMA."""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lalia import optim
from lalia.sections import OptimizerConfig, RunConfig, ScheduleKind, Section
from lalia.system import System


@dataclass
class Optimizers(Section):
    g: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-2))
    d: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=2e-2, betas=[0.5, 0.9], weight_decay=0.1))
    wd: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class Config(RunConfig):
    optimizers: Optimizers = field(default_factory=Optimizers)


class Toy(System):
    """Generator with two parts, discriminator, and optionally a second discriminator."""

    def __init__(self, config: Config, second: bool = False) -> None:
        super().__init__(config, {})
        torch.manual_seed(0)
        self.enc_p = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("bert_proj", "ja_bert_proj", "emb")})
        self.dec = nn.Linear(3, 3)
        self.disc = nn.Linear(3, 1)
        self.second = nn.Linear(3, 1) if second else None

    def optimizers(self) -> dict[str, list[nn.Parameter]]:
        nets = {"g": [*self.enc_p.parameters(), *self.dec.parameters()], "d": [*self.disc.parameters()]}
        return nets if self.second is None else {**nets, "wd": [*self.second.parameters()]}


def train(system: Toy, optimizers: dict[str, torch.optim.Optimizer], first: int, last: int) -> None:
    for step in range(first, last):
        optim.set_learning_rates(optimizers, system.config, step, epoch=step)
        rows = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        hidden = rows
        for layer in [*system.enc_p.values(), system.dec]:
            hidden = layer(hidden).tanh()
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        loss = system.disc(hidden).square().mean()
        if system.second is not None:
            loss = loss + system.second(hidden).square().mean()
        loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def on_disk(state: Any) -> Any:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


# --- schedules ------------------------------------------------------------------------------------------------------
def test_exponential_is_torchs_schedule_per_epoch() -> None:
    config = OptimizerConfig(lr=2e-4, decay=0.99)
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-4)
    schedule = torch.optim.lr_scheduler.ExponentialLR(reference, gamma=0.99)
    for epoch in range(50):
        assert optim.learning_rate(config, step=epoch * 7, epoch=epoch) == pytest.approx(schedule.get_last_lr()[0])
        reference.step()
        schedule.step()


def test_warm_up_holds_exactly_the_asked_number_below_the_full_rate() -> None:
    by_step = OptimizerConfig(lr=1.0, decay=1.0, warmup_steps=4)
    assert [optim.learning_rate(by_step, s, 0) for s in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    by_epoch = OptimizerConfig(lr=1.0, decay=0.5, warmup_epochs=1)
    assert [optim.learning_rate(by_epoch, 99, e) for e in range(4)] == pytest.approx([0.5, 1.0, 0.5, 0.25])


def test_cosine_linear_and_constant() -> None:
    cosine = OptimizerConfig(lr=1.0, schedule=ScheduleKind.cosine, final=0.1, warmup_steps=10)
    values = [optim.learning_rate(cosine, s, 0, 110) for s in (4, 10, 60, 110, 500)]
    assert values == pytest.approx([5 / 11, 1.0, 0.55, 0.1, 0.1])
    linear = OptimizerConfig(lr=2.0, schedule=ScheduleKind.linear, cooldown=0.4, final=0.0)
    assert [optim.learning_rate(linear, s, 0, 100) for s in (0, 60, 80, 100)] == pytest.approx([2.0, 2.0, 1.0, 0.0])
    assert optim.learning_rate(OptimizerConfig(lr=3.0, schedule=ScheduleKind.constant), 10**6, 9) == 3.0
    for config in (cosine, linear):
        with pytest.raises(ValueError, match="set train.steps"):
            optim.learning_rate(config, 0, 0)


def test_set_learning_rates_gives_each_optimizer_its_own() -> None:
    config = Config()
    optimizers = optim.build(Toy(config), config)
    config.optimizers.g.lr = 5e-3  # the configuration decides, also after a resume
    rates = optim.set_learning_rates(optimizers, config, step=0, epoch=10)
    assert rates == pytest.approx({"g": 5e-3 * 0.999875**10, "d": 2e-2 * 0.999875**10})
    assert {n: o.param_groups[0]["lr"] for n, o in optimizers.items()} == rates


# --- building -------------------------------------------------------------------------------------------------------
def test_build_makes_one_adamw_per_network_from_its_section() -> None:
    config = Config()
    optimizers = optim.build(Toy(config), config)
    group = optimizers["d"].param_groups[0]
    assert all(isinstance(o, torch.optim.AdamW) for o in optimizers.values()) and list(optimizers) == ["g", "d"]
    assert (group["betas"], group["eps"], group["weight_decay"], group["fused"]) == ((0.5, 0.9), 1e-9, 0.1, True)
    assert group["param_names"] == ["disc.weight", "disc.bias"]


def test_build_leaves_frozen_parameters_out_and_names_mistakes() -> None:
    config = Config()
    system = Toy(config)
    optim.freeze(system, ["enc_p"])
    names = optim.build(system, config)["g"].param_groups[0]["param_names"]
    assert names == ["dec.weight", "dec.bias"]
    optim.freeze(system, ["dec"])
    with pytest.raises(ValueError, match="'g' has no trainable parameter"):
        optim.build(system, config)
    with pytest.raises(ValueError, match="no section 'gen'.*it has g, d, wd"):
        optim.section(config, "gen")


def test_build_refuses_a_parameter_without_optimizer() -> None:
    class Leaky(Toy):
        def optimizers(self) -> dict[str, list[nn.Parameter]]:
            return {"g": [*self.enc_p.parameters()], "d": [*self.disc.parameters()]}

    with pytest.raises(ValueError, match="dec.weight"):
        optim.build(Leaky(Config()), Config())


def test_parameters_without_weight_decay_have_a_group_of_their_own_and_resume_by_name() -> None:
    def marked() -> tuple[Config, Toy, dict[str, torch.optim.Optimizer]]:
        config = Config()
        config.optimizers.g.weight_decay = 0.5
        system = Toy(config)
        system.enc_p["emb"].weight._no_weight_decay = True  # type: ignore[assignment]  # in the middle of the order
        return config, system, optim.build(system, config)

    _, straight, optimizers = marked()
    rest, free = optimizers["g"].param_groups
    assert free["param_names"] == ["enc_p.emb.weight"] and len(rest["param_names"]) == 7
    assert (rest["weight_decay"], free["weight_decay"]) == (0.5, 0.0) and rest["betas"] == free["betas"]
    assert len(optimizers["d"].param_groups) == 1
    for p in straight.parameters():
        p.grad = torch.zeros_like(p)
    before = weights(straight)
    optimizers["g"].step()  # without a gradient, decay is all that moves
    moved = {n for n, p in straight.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if not n.startswith("disc")} - {"enc_p.emb.weight"}

    train(straight, optimizers, 0, 3)
    saved, kept = on_disk(optim.optimizer_state(optimizers)), weights(straight)
    train(straight, optimizers, 3, 6)
    _, resumed, fresh = marked()
    resumed.load_state_dict(kept)
    assert optim.load_optimizer_state(fresh, saved) == []
    train(resumed, fresh, 3, 6)
    assert same(weights(straight), weights(resumed))
    assert {group["lr"] for group in fresh["g"].param_groups} == {fresh["g"].param_groups[0]["lr"]}

    plain = optim.build(Toy(Config()), Config())
    assert optim.load_optimizer_state(plain, saved) == [] and len(plain["g"].param_groups) == 1  # a run from before the mark


# --- freezing -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["enc_p.bert_proj"], {"enc_p.bert_proj.weight", "enc_p.bert_proj.bias"}),
        (["dec.*"], {"dec.weight", "dec.bias"}),
        (["enc_p.*bert_proj"], {f"enc_p.{n}bert_proj.{w}" for n in ("", "ja_") for w in ("weight", "bias")}),
        (["dec.bias", "disc", "dec.b*"], {"dec.bias", "disc.weight", "disc.bias"}),
        ([], set()),
    ],
)
def test_freeze_patterns(patterns: list[str], expected: set[str]) -> None:
    system = Toy(Config())
    assert set(optim.freeze(system, patterns)) == expected
    assert {n for n, p in system.named_parameters() if not p.requires_grad} == expected


@pytest.mark.parametrize("pattern", ["enc_p.bert_prj", "de", "Dec", "zzz"])
def test_freeze_refuses_a_pattern_that_matches_nothing(pattern: str) -> None:
    system = Toy(Config())
    with pytest.raises(ValueError, match=f"'{pattern}' matches no parameter; (nearest|modules): .*[a-z]"):
        optim.freeze(system, ["dec", pattern])
    assert all(p.requires_grad for p in system.parameters())


# --- clipping -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("limit", [0.0, 0.5, 1e6])
def test_clip_agrees_with_torch(limit: float) -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(n)) for n in (3, 5, 7)]
    for p in parameters[:2]:
        p.grad = torch.randn_like(p)
    before = [p.grad.clone() for p in parameters[:2] if p.grad is not None]
    whole = torch.cat(before).norm()
    norm = optim.clip_gradients(parameters, limit)
    scale = min(1.0, limit / (float(whole) + 1e-6)) if limit else 1.0
    assert torch.allclose(norm, whole) and norm.shape == ()
    for p, old in zip(parameters, before, strict=False):
        assert p.grad is not None and torch.allclose(p.grad, old * scale)
    assert parameters[2].grad is None


def test_clip_without_gradients_and_with_infinite_ones() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    assert float(optim.clip_gradients([parameter], 1.0)) == 0.0
    parameter.grad = torch.tensor([1.0, float("inf")])
    assert not torch.isfinite(optim.clip_gradients([parameter]))


# --- state ----------------------------------------------------------------------------------------------------------
def test_resumed_optimizers_step_bit_for_bit_like_the_uninterrupted_ones() -> None:
    config = Config()
    straight = Toy(config)
    optimizers = optim.build(straight, config)
    train(straight, optimizers, 0, 4)
    saved, kept = on_disk(optim.optimizer_state(optimizers)), weights(straight)
    train(straight, optimizers, 4, 8)

    resumed = Toy(config)
    resumed.load_state_dict(kept)
    fresh = optim.build(resumed, config)
    assert optim.load_optimizer_state(fresh, saved) == []
    train(resumed, fresh, 4, 8)
    assert same(weights(straight), weights(resumed))
    again, state = optim.optimizer_state(fresh), optim.optimizer_state(optimizers)
    assert all(same(again[n][p], state[n][p]) for n in state for p in state[n])
    assert {v.dtype for v in again["g"]["dec.weight"].values()} == {torch.float32}


def test_round_trip_is_exact_for_odd_values_and_does_not_share_memory() -> None:
    config = Config()
    optimizers = optim.build(Toy(config), config)
    train_system = Toy(config)
    source = optim.build(train_system, config)
    train(train_system, source, 0, 2)
    state = optim.optimizer_state(source)
    state["d"]["disc.bias"]["exp_avg"].view(torch.int32)[0] = 0x7FC00123  # a NaN with a payload
    state["d"]["disc.weight"]["exp_avg_sq"][0, 0] = 1e-42  # subnormal
    assert optim.load_optimizer_state(optimizers, on_disk(state)) == []
    back = optim.optimizer_state(optimizers)
    for name, entries in state.items():
        for parameter, entry in entries.items():
            for key, value in entry.items():
                assert torch.equal(back[name][parameter][key].view(torch.int32), value.view(torch.int32))
    optim.load_optimizer_state(optimizers, state)
    state["g"]["dec.bias"]["exp_avg"].fill_(7)
    assert not (optim.optimizer_state(optimizers)["g"]["dec.bias"]["exp_avg"] == 7).any()


def test_a_new_network_starts_afresh_while_the_others_resume(caplog: pytest.LogCaptureFixture) -> None:
    config = Config()
    old = Toy(config)
    optimizers = optim.build(old, config)
    train(old, optimizers, 0, 3)
    saved = optim.optimizer_state(optimizers)
    new = Toy(config, second=True)
    wider = optim.build(new, config)
    assert optim.load_optimizer_state(wider, saved) == ["wd/second.weight", "wd/second.bias"]
    train(new, wider, 3, 4)
    steps = {n: float(s["step"]) for part in optim.optimizer_state(wider).values() for n, s in part.items()}
    assert steps["disc.bias"] == 4 and steps["second.bias"] == 1
    with caplog.at_level(logging.WARNING):
        optim.load_optimizer_state(optimizers, {**optim.optimizer_state(wider), "d": {"gone.weight": {}}})
    assert "gone.weight" in caplog.text and "wd" in caplog.text


def test_state_of_another_shape_is_named() -> None:
    config = Config()
    system = Toy(config)
    optimizers = optim.build(system, config)
    train(system, optimizers, 0, 1)
    saved = optim.optimizer_state(optimizers)
    saved["d"]["disc.weight"]["exp_avg"] = torch.zeros(1, 9)
    with pytest.raises(ValueError, match=r"d/disc.weight.exp_avg: saved \[1, 9\], the model has \[1, 3\]"):
        optim.load_optimizer_state(optimizers, saved)


# --- moving average -------------------------------------------------------------------------------------------------
def test_ema_follows_its_formula_swaps_and_resumes(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    mean = module.weight.detach().clone()
    ema = optim.Ema(module, 0.9)
    for _ in range(5):
        module.weight.data.normal_()
        mean = 0.9 * mean + 0.1 * module.weight.data
        ema.update()
    assert torch.allclose(ema.state()["weight"], mean)
    live = weights(module)
    with pytest.raises(KeyError), ema.swapped():
        assert torch.allclose(module.weight, mean)
        raise KeyError
    assert same(weights(module), live)
    torch.save(ema.state(), tmp_path / "ema.pt")
    other = optim.Ema(nn.Linear(2, 2), 0.9)
    other.load_state(torch.load(tmp_path / "ema.pt", weights_only=True))
    assert same(other.state(), ema.state())
    with pytest.raises(ValueError, match="average of weight"):
        optim.Ema(nn.Linear(3, 2), 0.9).load_state(ema.state())


def test_ema_forgets_its_start_when_it_knows_the_step() -> None:
    module = nn.Linear(2, 2).to(torch.bfloat16)
    ema = optim.Ema(module, 0.9999)
    module.weight.data.fill_(3)
    for step in range(200):
        ema.update(step)
    assert torch.allclose(ema.state()["weight"], torch.full((2, 2), 3.0), atol=1e-2)
    with ema.swapped():
        assert module.weight.dtype is torch.bfloat16
    with pytest.raises(ValueError, match="train.ema"):
        optim.Ema(module, 1.0)
