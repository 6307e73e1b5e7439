from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from lalia.nn.ecapa import Ecapa
from lalia.pretrained import PretrainedError, describe_ecapa, load_ecapa, resolve, sources
from lalia.sections import ExternalModel

SHAPE = {"channels": [16, 16, 16, 24, 32], "kernels": [5, 3, 5, 3, 1], "attention": 8, "squeezed": 4, "scale": 4, "width": 10}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    for name in ("HF_HUB_OFFLINE", "LALIA_OFFLINE", "HF_ENDPOINT", "SPEAKER_MS_ID", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LALIA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def published(folder: Path) -> tuple[Path, Ecapa]:
    """A folder as SpeechBrain publishes it: a pickled state dict, no config.json, no safetensors."""
    torch.manual_seed(3)
    network = Ecapa(**SHAPE)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), folder / "embedding_model.ckpt")
    torch.save({"count": 7, "glob_mean": torch.zeros(10), "spk_dict_mean": {}}, folder / "mean_var_norm_emb.ckpt")
    (folder / "hyperparams.yaml").write_text("embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN\n")
    return folder, network


def test_a_published_folder_loads_whole_and_frozen(tmp_path):
    folder, network = published(tmp_path / "ecapa")
    loaded = load_ecapa(ExternalModel(str(folder)), offline=True)
    wave, lengths = torch.randn(2, 4_000), torch.tensor([4_000, 2_500])
    assert torch.equal(loaded.embed(wave, lengths), network.embed(wave, lengths))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_the_architecture_is_read_from_the_shapes(tmp_path):
    folder, network = published(tmp_path / "ecapa")
    description = describe_ecapa(ExternalModel(str(folder)))
    assert {key: description[key] for key in SHAPE} == SHAPE and description["dilations"] == [1, 2, 3, 4, 1]
    assert Ecapa(**description).load_state_dict(network.state_dict())


def test_tiny_is_the_same_everywhere_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = load_ecapa(ExternalModel("tiny"), offline=True)
    assert torch.equal(torch.get_rng_state(), before)
    bare = Ecapa(**describe_ecapa(ExternalModel("tiny")))
    bare.load_state_dict(load_ecapa(ExternalModel("tiny")).state_dict())
    wave = torch.randn(1, 3_000)
    assert torch.equal(first.embed(wave, torch.tensor([3_000])), bare.embed(wave, torch.tensor([3_000])))
    assert first.width == 192


def test_a_missing_or_unexpected_weight_is_named(tmp_path):
    folder, network = published(tmp_path / "ecapa")
    weights = network.state_dict()
    del weights["asp_bn.norm.weight"]
    weights["classifier.weight"] = torch.zeros(1)
    torch.save(weights, folder / "embedding_model.ckpt")
    with pytest.raises(PretrainedError) as caught:
        load_ecapa(ExternalModel(str(folder)))
    assert "missing: asp_bn.norm.weight" in str(caught.value) and "unexpected: classifier.weight" in str(caught.value)


def test_another_network_and_a_damaged_file_are_refused(tmp_path):
    folder, _ = published(tmp_path / "ecapa")
    path = folder / "embedding_model.ckpt"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(PretrainedError, match="embedding_model.ckpt"):
        load_ecapa(ExternalModel(str(folder)))
    torch.save({"layer.weight": torch.zeros(2)}, path)
    with pytest.raises(PretrainedError, match="no ECAPA-TDNN"):
        load_ecapa(ExternalModel(str(folder)))


class Malice:
    def __reduce__(self):
        return print, ("code in a pickle was run",)


def test_code_in_the_pickle_is_not_run(tmp_path, capfd):
    folder, _ = published(tmp_path / "ecapa")
    torch.save({"weight": Malice()}, folder / "embedding_model.ckpt")
    with pytest.raises(PretrainedError, match="print"):
        load_ecapa(ExternalModel(str(folder)))
    assert "was run" not in capfd.readouterr().out


def test_a_folder_without_the_file_names_it(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(PretrainedError, match="lacks embedding_model.ckpt"):
        load_ecapa(ExternalModel(str(tmp_path / "empty")))


def test_the_hub_is_asked_for_the_one_file_and_offline_afterwards(monkeypatch, own_cache, tmp_path):
    """Through the same resolver, so HF_ENDPOINT counts here as for every other model."""
    asked = {}

    def snapshot_download(_name, **options):
        if options.get("local_files_only"):
            raise OSError("not in the hub's own cache")
        asked.update(options)
        published(Path(options["local_dir"]))

    class Api:
        def model_info(self, *_, **__):
            return SimpleNamespace(sha="abc", siblings=[])

    hub, errors = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.errors")
    hub.HfApi, hub.snapshot_download, hub.__spec__ = Api, snapshot_download, SimpleNamespace()
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    source = ExternalModel("owner/ecapa")
    loaded = load_ecapa(source)
    assert asked["allow_patterns"] == ["embedding_model.ckpt"] and loaded.width == 10
    monkeypatch.setattr(sources, "_fetch_huggingface", None)
    assert load_ecapa(source, offline=True).width == 10
    assert resolve("owner/ecapa", "speaker", offline=True).parent == own_cache / "models"


def test_a_failed_download_names_the_mirror_that_was_tried_and_the_file(monkeypatch):
    def fail(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(sources, "_fetch_huggingface", fail)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    with pytest.raises(PretrainedError) as caught:
        load_ecapa(ExternalModel("owner/ecapa"))
    assert "https://mirror.example/owner/ecapa" in str(caught.value) and "embedding_model.ckpt" in str(caught.value)
