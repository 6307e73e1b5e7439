"""``lalia convert nanochat`` (O-21): tiny files of nanochat's own format become a run; pickles and strangers are refused."""

from __future__ import annotations

import base64
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import lalia, refused
from torch import Tensor

from lalia import checkpoint
from lalia.checkpoint import UnsafePickle, WeightsMismatch
from lalia.nn.gpt import Gpt, GptConfig
from lalia.systems.omni.nanochat import MARKS, NanochatError, convert, read_ranks

SHAPE = {"sequence_len": 512, "vocab_size": 257, "n_layer": 3, "n_head": 2, "n_kv_head": 2, "n_embd": 64, "window_pattern": "SL"}


def nanochat_names(model: Gpt) -> dict[str, Tensor]:
    """The state dict that nanochat itself would save (gpt.py of July 2026), written out by hand."""
    found = {"transformer.wte.weight": model.tokens.weight, "lm_head.weight": model.head.weight}
    for i, block in enumerate(model.blocks):
        a: Any = block.attention
        m: Any = block.mlp
        found |= {f"transformer.h.{i}.attn.c_{n}.weight": p.weight for n, p in zip("qkv", (a.query, a.key, a.value), strict=True)}
        found[f"transformer.h.{i}.attn.c_proj.weight"] = a.out.weight
        found |= {f"transformer.h.{i}.mlp.c_fc.weight": m.up.weight, f"transformer.h.{i}.mlp.c_proj.weight": m.down.weight}
        if i % 2 == 0:  # the last of three, and every other one before it
            found[f"transformer.h.{i}.attn.ve_gate.weight"] = a.value_gate.weight
            found[f"value_embeds.{i}.weight"] = model.value_tables[str(i)].weight
    assert model.smear_gate is not None and model.smear_scale is not None
    found |= {"resid_lambdas": model.residual_scale, "x0_lambdas": model.input_scale, "smear_lambda": model.smear_scale}
    return found | {"smear_gate.weight": model.smear_gate.weight, "backout_lambda": model.backout_scale}


@pytest.fixture
def model() -> Gpt:
    torch.manual_seed(0)
    made = Gpt(GptConfig(depth=3, vocab=257, context=512, aspect=21, head_width=32, window="SL"))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made.eval()


def write(folder: Path, weights: dict[str, Tensor], step: int = 7, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / f"model_{step:06d}.pt")
    meta = {"step": step, "val_bpb": 1.25, "model_config": {**SHAPE, **changes}}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


def ranks(folder: Path, merges: list[bytes]) -> Path:
    tokens = [bytes([value]) for value in range(256)] + merges
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.tiktoken"
    path.write_text("".join(f"{base64.b64encode(t).decode()} {r}\n" for r, t in enumerate(tokens)), encoding="utf-8")
    return path


def test_a_checkpoint_becomes_a_run_with_the_same_logits(model: Gpt, tmp_path: Path) -> None:
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in nanochat_names(model).items()}
    folder = write(tmp_path / "d3", compiled)
    write(folder, {"older": torch.zeros(1)}, step=3)
    report = convert(folder, tmp_path / "run", tokenizer="byte")
    assert len(report.matched) == len(compiled) and not (report.missing or report.unexpected or report.mismatched)
    system: Any = checkpoint.load(tmp_path / "run")
    tokens = torch.randint(0, 257, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(system.model(tokens), model(tokens))
    assert system.config.system == "omni-base" and system.model.config.windows() == [128, 0, 0]
    found = checkpoint.best_set(tmp_path / "run")
    assert found is not None and (found.step, found.meta["metrics"]) == (7, {"bits_per_byte": 1.25})
    with pytest.raises(NanochatError, match="already holds a run"):
        convert(folder, tmp_path / "run", tokenizer="byte")


def test_bfloat16_and_models_from_before_the_learnt_scales(model: Gpt, tmp_path: Path) -> None:
    weights = {
        name: tensor.bfloat16() for name, tensor in nanochat_names(model).items() if name not in ("resid_lambdas", "x0_lambdas")
    }
    convert(write(tmp_path / "d3", weights), tmp_path / "run", tokenizer="byte")
    system: Any = checkpoint.load(tmp_path / "run")
    assert system.model.residual_scale.tolist() == [1, 1, 1] and system.model.input_scale.tolist() == [0, 0, 0]
    assert {p.dtype for p in system.model.parameters()} == {torch.float32}


def test_other_architectures_are_named_and_nothing_is_written(model: Gpt, tmp_path: Path) -> None:
    weights = nanochat_names(model)
    for number, (changed, error, message) in enumerate(
        (
            (
                {k: v for k, v in weights.items() if "smear" not in k},
                NanochatError,
                "lacks smear_lambda, smear_gate.weight: .* older",
            ),
            ({k: v for k, v in weights.items() if "c_k" not in k}, WeightsMismatch, "missing: blocks.0.attention.key.weight"),
            ({**weights, "transformer.wpe.weight": torch.zeros(2)}, WeightsMismatch, "unexpected: transformer.wpe.weight"),
            ({**weights, "lm_head.weight": torch.zeros(64, 64)}, WeightsMismatch, r"head.weight: \[64, 64\] → \[320, 64\]"),
        )
    ):
        with pytest.raises(error, match=message):
            convert(write(tmp_path / f"d{number}", changed), tmp_path / "run", tokenizer="byte")
    assert not (tmp_path / "run").exists()


def test_grouped_heads_are_taken_over(tmp_path: Path) -> None:
    grouped = Gpt(GptConfig(depth=3, vocab=257, context=512, aspect=21, head_width=32, window="L", kv_heads=1))
    folder = write(tmp_path / "d3", nanochat_names(grouped), n_kv_head=1, window_pattern="L")
    convert(folder, tmp_path / "run", tokenizer="byte")
    system: Any = checkpoint.load(tmp_path / "run")
    assert system.model.config == grouped.config


def test_folders_that_are_no_checkpoint(model: Gpt, tmp_path: Path) -> None:
    with pytest.raises(NanochatError, match=r"holds no model_<step>\.pt"):
        convert(tmp_path, tmp_path / "run")
    folder = write(tmp_path / "d3", nanochat_names(model))
    with pytest.raises(NanochatError, match="has no step 9; it has 7"):
        convert(folder, tmp_path / "run", step=9)
    with pytest.raises(NanochatError, match=r"no tokenizer beside .*--tokenizer"):
        convert(folder, tmp_path / "run")
    ranks(tmp_path / "words", [b"th"])
    with pytest.raises(NanochatError, match="has 266 tokens, the model 257"):
        convert(folder, tmp_path / "run", tokenizer=str(tmp_path / "words" / "tokenizer.tiktoken"))
    (folder / "meta_000007.json").unlink()
    with pytest.raises(NanochatError, match=r"meta_000007\.json is missing"):
        convert(folder, tmp_path / "run")


class Mischief:
    """Unpickling it would make the file ``trace``."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, (f"open({self.trace!r}, 'w')",)


def test_pickles_are_refused_with_the_way_out(model: Gpt, tmp_path: Path) -> None:
    folder = write(tmp_path / "base_checkpoints" / "d3", nanochat_names(model))
    mischief = pickle.dumps(Mischief(trace := tmp_path / "was-here"))
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.pkl").write_bytes(mischief)
    for given in ("", str(tmp_path / "tokenizer" / "tokenizer.pkl")):
        with pytest.raises(NanochatError, match=r"tokenizer\.pkl is a pickled object.*was not.*python -c .*tokenizer\.tiktoken"):
            convert(folder, tmp_path / "run", tokenizer=given)
    (folder / "model_000007.pt").write_bytes(mischief)
    with pytest.raises(UnsafePickle, match="eval"):
        convert(folder, tmp_path / "run", tokenizer="byte")
    assert not trace.exists() and not (tmp_path / "run").exists()


def merged(word: bytes, known: dict[bytes, int]) -> list[int]:
    """Byte-pair encoding of one word as it is defined: the pair of the lowest rank merges first, the leftmost of equals."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while pairs := [(known[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in known]:
        place = min(pairs)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return [known[part] for part in parts]


def test_ranks_become_the_same_tokens(tmp_path: Path) -> None:
    merges = [b"th", b"he", b" t", b"the", b" the", b"12", "é".encode()]
    path = ranks(tmp_path, merges)
    words = read_ranks(path)
    known = {bytes([value]): value for value in range(256)} | {token: 256 + i for i, token in enumerate(merges)}
    for word in (b" th", b"he", b"thhe", b" thethe", b" teth"):
        assert words.encode(word.decode()) == merged(word, known)
    assert (words.size, words.bos, words.eos) == (263 + len(MARKS), 263, 263)
    assert words.encode(" the") == [260] and words.encode("the") == [259] and words.encode("é") == [262]
    assert words.encode("1212") == [261, 261] and words.encode("<|bos|>")[0] == 263
    for text in ("héllo, the 123 wörld!\n\n  日本", "it's\tfine", ""):
        assert words.decode([263, *words.encode(text)]) == text
    path.write_text("AA== 0\n", encoding="utf-8")
    with pytest.raises(NanochatError, match="every byte must have one"):
        read_ranks(path)
    path.write_text("nonsense\n", encoding="utf-8")
    with pytest.raises(NanochatError, match=":1 is not 'base64 rank'"):
        read_ranks(path)


def test_the_command_finds_the_tokenizer_beside_the_checkpoint(tmp_path: Path) -> None:
    made = Gpt(GptConfig(depth=3, vocab=266, context=512, aspect=21, head_width=32, window="SL"))
    folder = write(tmp_path / "base_checkpoints" / "d3", nanochat_names(made), vocab_size=266)
    ranks(tmp_path / "tokenizer", [b"th"])
    result = lalia("convert", "nanochat", folder, "-o", tmp_path / "run")
    assert result.exit_code == 0 and "29 matched, 0 missing" in result.output
    system: Any = checkpoint.load(tmp_path / "run")
    assert system.tokenizer.encode("th") == [256] and system.model.vocab == 266
    assert "holds no model_<step>.pt" in refused("convert", "nanochat", tmp_path, "-o", tmp_path / "other")
