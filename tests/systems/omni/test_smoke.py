"""The smoke run: wav to loss, its verdict, and its control."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import lalia

from lalia import optim
from lalia.config import ConfigError, load_run_config
from lalia.corpora import prepare
from lalia.data import Corpus
from lalia.smoke import Checks, judge, smoke
from lalia.system import Clock
from lalia.systems.omni.smoke import OmniSmoke, shuffled

ROOT = Path(__file__).resolve().parents[3]
SMALL = [
    "listen.whisper.source=tiny", "listen.hidden=32", "model.depth=2", "model.aspect=32", "model.head_width=32",
    "model.context=128", "optimizers.main.adamw_lr=3e-4", "train.device=cpu", "train.threads=1", "train.precision=fp32",
]  # fmt: skip


@pytest.fixture(scope="module")
def sines(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("sines")
    prepare("sines", out, progress=False)
    return f"data.train=[{out / 'manifest.jsonl'}]"


def settings(sines: str, *more: str) -> Any:
    return load_run_config(ROOT / "configs/omni/smoke.yaml", [sines, *SMALL, *more])


def build(config: Any) -> tuple[OmniSmoke, Any]:
    rows = Corpus.read(config.data.train)
    torch.manual_seed(0)
    system = OmniSmoke(config, OmniSmoke.make_tables(config, rows))
    system.load_external()
    return system, system.collate([system.prepare(row, Clock()) for row in rows])


def test_the_first_loss_is_ln_257_and_gradients_reach_the_projector(sines: str) -> None:
    system, batch = build(settings(sines))
    first = system.losses(batch, Clock())["loss_next"]
    assert float(first.detach()) == pytest.approx(math.log(257), abs=0.05)
    with torch.no_grad():
        for parameter in system.language.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    system.losses(batch, Clock())["loss_next"].backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in system.projector.parameters() if p.requires_grad)
    assert all(p.grad is None for p in system.listener.encoder.parameters())


def test_loss_is_of_the_text_alone_by_hand(sines: str) -> None:
    """The first caption byte is predicted from the mark after the audio; audio and padding say nothing."""
    system, batch = build(settings(sines))
    with torch.no_grad():
        for parameter in system.language.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        nats, count = 0.0, 0
        for heard, name in zip(system.hear(batch), batch.ids, strict=True):
            caption = system.tokenizer.encode(next(r.text for r in Corpus.read(system.config.data.train) if r.id == name))
            prefix, _ = system.projector(heard[None], torch.tensor([len(heard)]))
            logits = system.language(torch.tensor([[256, *caption]]), None, prefix)[0].log_softmax(-1)
            nats -= sum(float(logits[i, t]) for i, t in enumerate([*caption, 256]))
            count += len(caption) + 1
        assert float(system.losses(batch, Clock())["loss_next"]) == pytest.approx(nats / count, rel=1e-4)


def test_captions_are_told_apart_by_ears_alone(sines: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ears that tell the sines apart, pairs end near 0; shuffled, not below ln 5 nats a caption (trap 10)."""
    ears = torch.randn(5, 40, 32, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(OmniSmoke, "hear", lambda self, batch: list(ears))
    last = {}
    for control in ("false", "true"):
        config = settings(sines, f"data.shuffled={control}", "model.aspect=64", "model.head_width=128")
        system, batch = build(config)
        optimizers = optim.build(system, config)
        optimizer = optimizers["main"]
        for step in range(60):
            optim.set_learning_rates(optimizers, config, step, step, 60)
            loss = system.losses(batch, Clock(42, step))["loss_next"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        last[control] = float(loss.detach())
    assert last["false"] < 0.04 and last["true"] > 0.9 * math.log(5) / 19


def test_shuffling_tells_nothing_and_depends_on_seed_and_step() -> None:
    orders = [shuffled(5, Clock(1, step)) for step in range(2000)]
    assert all(sorted(order) == list(range(5)) for order in orders)
    counts = torch.zeros(5, 5)
    for order in orders:
        counts[torch.arange(5), order] += 1
    assert counts.flatten().tolist() == pytest.approx([400] * 25, abs=75)
    assert shuffled(5, Clock(1, 7)) == orders[7] and [shuffled(5, Clock(2, s)) for s in range(9)] != orders[:9]


# --- the verdict ------------------------------------------------------------------------------------------------------
FALLING = [5.55 - 0.1 * step for step in range(20)]


@pytest.mark.parametrize(
    ("run", "control", "words"),
    [
        (FALLING, [5.0] * 20, ""),
        (FALLING, FALLING, "control"),
        ([5.55] * 20, [9.0] * 20, "fell by 0.000"),
        ([5.768, *FALLING[1:]], [5.0] * 20, "ln 320"),
        ([6.3, *FALLING[1:]], [5.0] * 20, "head starts near zero"),
        ([5.55, *[math.nan] * 19], [5.0] * 20, "fell by nan"),
    ],
)
def test_verdict(run: list[float], control: list[float], words: str) -> None:
    checks = Checks(initial=math.log(257), control="data.shuffled=true", margin=0.04)
    verdict = judge(checks, run, control)
    assert bool(verdict.failures) == bool(words) and words in verdict.text()
    assert ("passed" in verdict.text()) == (not words)


def test_too_short_a_run_is_no_verdict() -> None:
    with pytest.raises(ConfigError, match="train.log_every=1"):
        judge(Checks(), [1.0] * 9, [])


def test_command_passes_and_fails_by_its_exit_code(sines: str, tmp_path: Path) -> None:
    run = tmp_path / "smoke"
    arguments = ["smoke", str(ROOT / "configs/omni/smoke.yaml"), sines, *SMALL, "train.steps=12"]
    done = lalia(*arguments, "checks.control=", "-m", run)
    assert done.exit_code == 0 and "passed" in done.output
    stored = json.loads((run / "smoke.json").read_text(encoding="utf-8"))
    assert stored["failures"] == [] and stored["first"] - stored["last"] >= 0.5 and stored["control"] is None
    again = lalia(*arguments, "-m", run)
    assert again.exit_code == 1 and "already" in again.output
    failed = lalia(*arguments, "checks.drop=9", "-m", tmp_path / "failed")
    assert failed.exit_code == 1 and "less than 9" in failed.output and (tmp_path / "failed-control" / "metrics.csv").is_file()


def test_a_system_without_checks_is_refused(tmp_path: Path) -> None:
    config = load_run_config(ROOT / "configs/omni/base-tiny.yaml")
    with pytest.raises(ConfigError, match="checks"):
        smoke(config, tmp_path / "run")
