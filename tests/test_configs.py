"""Every file in configs/ loads, builds, and says in its first line what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lalia.config import load_run_config
from lalia.sections import RunConfig
from lalia.system import System, system_class
from lalia.systems.vits2.config import Config, DecoderKind, FlowKind
from lalia.text import SymbolTable

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*") if path.suffix in (".yaml", ".yml", ".json"))
VITS2 = ROOT / "configs" / "vits2"


def build(config: RunConfig) -> System:
    """On the meta device: shapes without memory or arithmetic."""
    tables = {"symbols": SymbolTable.from_languages(["en"]).to_dict(), "speakers": {"one": 0}}
    with torch.device("meta"):
        return system_class(config.system)(config, tables)


def parameters(network: torch.nn.Module) -> float:
    """Millions."""
    return sum(p.numel() for p in network.parameters()) / 1e6


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_loads_and_builds(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# ")
    overrides = ["discriminator.slm.source=tiny"] if path.parent == VITS2 else []
    config = load_run_config(path, overrides)
    assert config.system == path.parent.name
    assert build(config).optimizers().keys() <= set(config["optimizers"].keys())


def vits2(name: str) -> Config:
    config = load_run_config(VITS2 / f"{name}.yaml", ["discriminator.slm.source=tiny"])
    assert isinstance(config, Config)
    return config


def test_seed_is_the_seeds() -> None:
    config = vits2("seed")
    assert config.data.boundaries == [32, 300, 400, 500, 600, 700, 800, 900, 1000]
    assert (config.optimizers.g.lr, config.optimizers.g.betas, config.optimizers.g.eps) == (2e-4, [0.8, 0.99], 1e-9)
    assert (config.model.decoder, config.model.flow) == (DecoderKind.hifigan, FlowKind.transformer)
    system = build(config)
    assert parameters(system.discriminator) == pytest.approx(46.75, abs=0.1)  # type: ignore[arg-type]
    # 14.66 M in the published model
    assert parameters(system.generator.decoder) == pytest.approx(14.7, abs=0.3)  # type: ignore[union-attr,arg-type]


def test_base_is_lean_and_uses_a_real_wavlm() -> None:
    assert load_run_config(VITS2 / "base.yaml")["discriminator"]["slm"]["source"] == "microsoft/wavlm-base-plus"
    config = vits2("base")
    assert (config.model.decoder, config.model.flow) == (DecoderKind.istft, FlowKind.wavenet)
    assert set(build(config).optimizers()) == {"d", "dur", "wd", "g"}


def test_vits1_has_none_of_vits2s_additions() -> None:
    config = vits2("vits1")
    assert config.model.flow is FlowKind.wavenet and not config.model.noise_scaled_mas
    system = build(config)
    assert set(system.optimizers()) == {"d", "g"}
    assert not any("text_encoder" in name and "speaker" in name for name, _ in system.named_parameters())
