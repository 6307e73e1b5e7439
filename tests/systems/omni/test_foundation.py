"""``base=`` of omni-align from anywhere: a folder, a hub, ModelScope, a wheel. The hubs are stood in for by a folder here."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
from factories import make_corpus
from test_hf_base import align_config, write_model, write_tokenizer

from lalia import checkpoint
from lalia.data import Corpus
from lalia.pretrained import sources, wheels
from lalia.systems.omni.foundation import BaseError, build_language, describe_base, load_base
from lalia.train import train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``corpus`` of two clips and ``lm``, a small model that knows their texts."""
    root = tmp_path_factory.mktemp("base")
    texts = [row.text for row in Corpus.read([make_corpus(root / "corpus", 2)])]
    write_tokenizer(root / "lm", texts)
    write_model(root / "lm", texts, steps=60)
    return root


class Hub:
    """Stands in for both hubs and for wheels: gives ``folder`` for the ids that it knows, and notes what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.known, self.asked = folder, {"owner/lm", "small"}, []

    def fetch(self, name: str, revision: str, folder: Path) -> str:
        self.asked.append(name)
        if name not in self.known:
            raise OSError("404")
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return "abc"

    def assemble(self, name: str, target: Path, store: Path) -> Path:
        self.fetch(name, "", target)
        return target


@pytest.fixture
def hub(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(root / "lm")
    for name in ("HF_HUB_OFFLINE", "LALIA_OFFLINE", "HF_ENDPOINT", "LANGUAGE_MS_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LALIA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_in_hub_cache", lambda *_: None)
    monkeypatch.setattr(sources, "_fetch_huggingface", hub.fetch)
    monkeypatch.setattr(sources, "_fetch_modelscope", lambda name, *rest: hub.fetch(name, *rest))
    monkeypatch.setitem(wheels.MODELS, "small", wheels.WheelModel((), shutil.copytree))
    monkeypatch.setattr(wheels, "assemble", hub.assemble)
    monkeypatch.chdir(tmp_path)
    return hub


@pytest.mark.parametrize("base", ["owner/lm", "ms:owner/lm", "wheel:small"])
def test_a_base_from_elsewhere_is_that_of_its_folder(hub: Hub, root: Path, base: str) -> None:
    local, found = describe_base(str(root / "lm")), describe_base(base)
    assert {**found, "origin": ""} == {**local, "origin": ""} and hub.asked == [base.split(":")[-1]]
    assert found["origin"] == str(sources.cached_path(base))
    networks: list[Any] = []
    for description in (local, found):
        networks.append(build_language(description))
        load_base(networks[-1], description)
    tokens = torch.arange(12).reshape(1, 12)
    assert torch.equal(networks[0](tokens), networks[1](tokens))


def test_it_is_fetched_once_and_the_run_goes_on_without_it(hub: Hub, root: Path, tmp_path: Path) -> None:
    options = {"train.epochs": 10, "optimizers.main.schedule": "constant"}
    train(align_config(root, Path("owner/lm"), **options), tmp_path / "run")
    assert hub.asked == ["owner/lm"]
    shutil.rmtree(tmp_path / "cache")
    train(align_config(root, Path("owner/lm"), **{**options, "train.steps": 2}), tmp_path / "run")
    system: Any = checkpoint.load(tmp_path / "run", which="latest")
    assert hub.asked == ["owner/lm"] and system.transcribe([torch.zeros(4_000).numpy()])


def test_offline_says_what_to_do(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LALIA_OFFLINE", "1")
    for base in ("HuggingFaceTB/SmolLM2-135M-Instruct", "ms:owner/lm", "wheel:small"):
        with pytest.raises(BaseError, match="(?s)^base: .*the network is switched off.*By hand: .*name the run folder"):
            describe_base(base)
    assert not hub.asked


@pytest.mark.parametrize("base", ["./lm", "~/no-such-lm", "a/b/c", "/no/such/lm", "runs/bsae", "base.txt"])
def test_a_path_that_is_not_there_is_not_looked_for_elsewhere(hub: Hub, tmp_path: Path, base: str) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "base.txt").touch()
    with pytest.raises(BaseError, match=r"there is no folder .*name the run folder of a trained omni-base .*hub id, ms:.*wheel:"):
        describe_base(base)
    assert not hub.asked


def test_what_nobody_has_is_named_as_both(hub: Hub) -> None:
    for base, said in [
        ("runs/base", r"^base: there is no folder runs/base; (?s:.*)huggingface.co/runs/base: OSError: 404"),
        ("bad id!", "^base: there is no folder bad id!; 'bad id!' is neither a folder nor a hub id"),
        ("wheel:unheard-of", "^base: no wheel is known for 'unheard-of'; known: whisper-base, smollm2-135m-instruct"),
    ]:
        with pytest.raises(BaseError, match=f"{said}(?s:.*)name the run folder of a trained omni-base"):
            describe_base(base)


def test_a_folder_of_that_name_wins(hub: Hub, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "lm", tmp_path / "owner" / "lm")
    assert describe_base("owner/lm")["origin"] == "owner/lm" and not hub.asked


def test_tiny_stays_refused(hub: Hub) -> None:
    with pytest.raises(BaseError, match=r"random \(tiny\)"):
        describe_base("tiny")
