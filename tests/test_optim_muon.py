"""Muon for marked matrices with AdamW beside it: groups, rates, steps, and resuming by name."""

from __future__ import annotations

import pytest
import torch
from test_optim import Config, Toy, on_disk, same, train, weights

from lalia import optim
from lalia.sections import OptimizerConfig, OptimizerKind, ScheduleKind


def muon_toy(lr: float = 0.02) -> tuple[Config, Toy, dict[str, torch.optim.Optimizer]]:
    config = Config()
    config.optimizers.g = OptimizerConfig(
        kind=OptimizerKind.muon, lr=lr, adamw_lr=1e-3, betas=[0.9, 0.95], weight_decay=0.0, schedule=ScheduleKind.constant
    )
    system = Toy(config)
    for layer in system.enc_p.values():
        layer.weight._learning = {"muon": True}  # type: ignore[assignment]
    settings = {"rate": 5.0, "betas": (0.8, 0.99), "weight_decay": 0.01}
    system.enc_p["emb"].bias._learning = settings  # type: ignore[assignment]
    return config, system, optim.build(system, config)


def test_muon_takes_the_marked_matrices_and_adamw_the_rest_at_their_own_rates() -> None:
    config, _, optimizers = muon_toy()
    assert isinstance(optimizers["g"], optim.MuonAdamW) and isinstance(optimizers["d"], torch.optim.AdamW)
    rates = optim.set_learning_rates(optimizers, config, 0, 0)
    groups = {name: group for group in optimizers["g"].param_groups for name in group["param_names"]}
    assert rates["g"] == 0.02 and len(groups) == 8
    assert (groups["enc_p.emb.weight"]["lr"], groups["enc_p.emb.weight"]["momentum"]) == (0.02, 0.95)
    assert groups["enc_p.emb.bias"]["lr"] == pytest.approx(0.1) and groups["enc_p.emb.bias"]["betas"] == (0.8, 0.99)
    assert groups["dec.weight"]["lr"] == pytest.approx(1e-3) and groups["dec.weight"]["weight_decay"] == 0.0
    assert groups["dec.weight"]["betas"] == (0.9, 0.95)


def test_muon_steps_as_torchs_own_and_adamw_beside_it() -> None:
    config, system, optimizers = muon_toy()
    _, twin, _ = muon_toy()
    matrices = [layer.weight for layer in twin.enc_p.values()]
    bias = twin.enc_p["emb"].bias
    alone = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0),
        torch.optim.AdamW([bias], lr=0.1, betas=(0.8, 0.99), eps=1e-9, weight_decay=0.01),
    ]
    optim.set_learning_rates(optimizers, config, 0, 0)
    for _ in range(3):
        for a, b in zip(system.parameters(), twin.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(a.numel()))
            b.grad = a.grad.clone()
        for optimizer in (optimizers["g"], *alone):
            optimizer.step()
    for a, b in zip([*(layer.weight for layer in system.enc_p.values()), system.enc_p["emb"].bias], [*matrices, bias], strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_muon_resumes_bit_for_bit_from_the_disk() -> None:
    _, straight, optimizers = muon_toy()
    train(straight, optimizers, 0, 4)
    saved, kept = on_disk(optim.optimizer_state(optimizers)), weights(straight)
    assert set(saved["g"]["enc_p.emb.weight"]) == {"momentum_buffer"} and "exp_avg_sq" in saved["g"]["dec.weight"]
    train(straight, optimizers, 4, 8)
    _, resumed, fresh = muon_toy()
    resumed.load_state_dict(kept)
    assert optim.load_optimizer_state(fresh, saved) == []
    train(resumed, fresh, 4, 8)
    assert same(weights(straight), weights(resumed))


def test_plain_adamw_ignores_the_marks_and_muon_needs_matrices() -> None:
    _, system, _ = muon_toy()
    plain = optim.build(system, Config())["g"]
    assert isinstance(plain, torch.optim.AdamW) and len(plain.param_groups) == 1
    config, system, _ = muon_toy()
    system.dec.bias._learning = {"muon": True}  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"shape \[3\]"):
        optim.build(system, config)
    with pytest.raises(ValueError, match="momentum"):
        OptimizerConfig(momentum=1.0)
