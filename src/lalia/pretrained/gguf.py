"""GGUF files of Llama models → transformers folders.

The package ``gguf`` reads the container and its quantised blocks. What is left is naming, the order of the rows of
queries and keys (llama.cpp turns neighbouring pairs, transformers the two halves of a head) and the tokenizer.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PACKAGES = ("gguf",)
CONTROL = 3  # the token type of marks
#: ways to part a text that are GPT-2's pattern; smollm also parts spaces from a digit, which transformers' reader leaves out too
SPLITS = ("gpt-2", "smollm")
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
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


class GgufError(ValueError):
    """The file is not a GGUF Llama model that Lalia can read."""


def convert_llama(source: Path, target: Path) -> None:
    """The one ``.gguf`` in ``source`` → a transformers folder ``target`` with weights in bfloat16, exact up to that rounding.

    Raises:
        GgufError: no GGUF file, another architecture or tokenizer than Llama's with byte-level BPE, or tensors that do not fit.
    """
    files = sorted(source.glob("*.gguf"))
    if len(files) != 1:
        raise GgufError(f"{source} holds {len(files)} .gguf files, not one")
    try:
        model, tokenizer = _read(files[0])
    except KeyError as error:
        raise GgufError(f"{files[0].name} lacks {error}") from error
    except (IndexError, RuntimeError, ValueError) as error:
        raise GgufError(f"{files[0].name}: {error}") from error
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def _read(path: Path) -> tuple[Any, Any]:
    """(LlamaForCausalLM in float32, tokenizer)."""
    from transformers import LlamaForCausalLM

    reader = importlib.import_module("gguf").GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(fields, tied="output.weight" not in {tensor.name for tensor in reader.tensors})
    state = dict(_tensors(reader.tensors, config.num_attention_heads, config.num_key_value_heads))
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.random.fork_rng(devices=[]):  # the model begins with random weights: leave the caller's generator alone
        model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model, _tokenizer(fields)


def _config(fields: Mapping[str, Any], tied: bool) -> Any:
    from transformers import LlamaConfig

    if fields["general.architecture"] != "llama":
        raise GgufError(f"the architecture is {fields['general.architecture']}, only llama is known")
    scaled = sorted(name for name in fields if name.startswith("llama.rope.scaling."))
    if scaled:
        raise GgufError(f"scaled rotary positions ({', '.join(scaled)}) are not known")
    heads = fields["llama.attention.head_count"]
    rest: dict[str, Any] = {f"{name}_token_id": _mark(fields, name) for name in ("bos", "eos", "pad")}
    rest["rope_theta"] = fields.get("llama.rope.freq_base", 10_000.0)  # transformers 4 knows no rope_parameters
    return LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=fields.get("llama.attention.head_count_kv", heads),
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        tie_word_embeddings=tied,
        **rest,
    )


def _mark(fields: Mapping[str, Any], name: str) -> int | None:
    theirs = {"pad": "padding", "unk": "unknown"}.get(name, name)
    return fields.get(f"tokenizer.ggml.{theirs}_token_id")


def _tensors(tensors: Any, heads: int, key_heads: int) -> Iterator[tuple[str, Tensor]]:
    """(name in transformers, float32) of each tensor."""
    dequantize = importlib.import_module("gguf").dequantize
    for tensor in tensors:
        found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name)
        if found is None or found[2] not in NAMES:
            raise GgufError(f"the tensor {tensor.name} is not known")
        layer = f"model.layers.{found[1]}." if found[1] else ""
        values = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
        if found[2] in ("attn_q", "attn_k"):
            values = _halves(values, heads if found[2] == "attn_q" else key_heads)
        yield f"{layer}{NAMES[found[2]]}.weight", torch.from_numpy(values)


def _halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads · 2n, W] as pairs (0, 1), (2, 3) … of each head → as halves (0, n), (1, n + 1) …"""
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows.shape))


def _tokenizer(fields: Mapping[str, Any]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre", "")
    if kind[0] != "gpt2" or kind[1] not in SPLITS:
        raise GgufError(f"the tokenizer is {kind[0]} ({kind[1] or 'unnamed'}), only gpt2 ({', '.join(SPLITS)}) is known")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    library = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    library.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    types = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    library.add_special_tokens([AddedToken(token, special=True, normalized=False) for token, kind in types if kind == CONTROL])
    numbers = {name: _mark(fields, name) for name in ("bos", "eos", "unk", "pad")}
    marks = {f"{name}_token": tokens[number] for name, number in numbers.items() if number is not None}
    fast = PreTrainedTokenizerFast(tokenizer_object=library, **marks)
    fast.chat_template = fields.get("tokenizer.chat_template")
    return fast
