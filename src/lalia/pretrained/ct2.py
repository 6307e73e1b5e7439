"""CTranslate2 Whisper binaries → transformers folders.

A CTranslate2 ``model.bin`` (binary version 6) is: uint32 version, string name, uint32 revision, uint32 count, then per
variable a string key, uint8 rank, uint32 dimensions, uint8 type, uint32 bytes and the data; then uint32 count of
aliases and their string pairs. Strings are a uint16 length (with the closing zero) and the bytes. Everything is
little-endian.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

TYPES: dict[int, type[np.generic]] = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
ATTENTION = {"self_attention": ("self_attn", "linear_0", "linear_1"), "attention": ("encoder_attn", "", "linear_2")}


class Ct2Error(ValueError):
    """The file is not a CTranslate2 Whisper model that Lalia can read."""


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, kind: str) -> int:
        (value,) = struct.unpack_from("<" + kind, self.data, self.at)
        self.at += struct.calcsize("<" + kind)
        return value

    def string(self) -> str:
        length = self.number("H")
        self.at += length
        return self.data[self.at - length : self.at - 1].decode()

    def tensor(self) -> np.ndarray:
        shape = [self.number("I") for _ in range(self.number("B"))]
        kind, size = self.number("B"), self.number("I")
        if kind not in TYPES:
            raise Ct2Error(f"unknown data type {kind}")
        dtype = np.dtype(TYPES[kind])
        values = np.frombuffer(self.data, dtype, size // dtype.itemsize, self.at).reshape(shape)
        self.at += size
        return values


def read_variables(path: Path) -> dict[str, np.ndarray]:
    """Every variable of a ``model.bin`` by its key, aliases included. Ct2Error when the file is cut short or is
    something else."""
    reader = _Reader(path.read_bytes())
    try:
        version, name, _revision = reader.number("I"), reader.string(), reader.number("I")
        if "Whisper" not in name:
            raise Ct2Error(f"{path}: a {name or 'nameless'} model (binary version {version}), not Whisper")
        variables = {reader.string(): reader.tensor() for _ in range(reader.number("I"))}
        for _ in range(reader.number("I")):
            alias, key = reader.string(), reader.string()
            variables[alias] = variables[key]
    except (struct.error, UnicodeDecodeError, KeyError) as error:
        raise Ct2Error(f"{path}: damaged or not a CTranslate2 model ({error})") from error
    except ValueError as error:
        raise error if isinstance(error, Ct2Error) else Ct2Error(f"{path}: damaged ({error})") from error
    if reader.at != len(reader.data):
        raise Ct2Error(f"{path}: {len(reader.data) - reader.at} bytes left over at the end")
    return variables


@dataclass
class _Shapes:
    """What the variables say about the architecture."""

    width: int
    mels: int
    encoder_layers: int
    decoder_layers: int
    filter_width: int
    vocabulary: int
    heads: int
    frames: int
    tokens: int

    @classmethod
    def of(cls, variables: dict[str, np.ndarray]) -> _Shapes:
        width, mels = variables["encoder/conv1/weight"].shape[:2]
        heads = variables.get("encoder/num_heads")
        return cls(
            width,
            mels,
            _count_layers(variables, "encoder"),
            _count_layers(variables, "decoder"),
            variables["encoder/layer_0/ffn/linear_0/weight"].shape[0],
            variables["decoder/embeddings/weight"].shape[0],
            width // 64 if heads is None else int(heads),
            variables["encoder/position_encodings/encodings"].shape[0],
            variables["decoder/position_encodings/encodings"].shape[0],
        )


def _count_layers(variables: dict[str, np.ndarray], side: str) -> int:
    layers = {key.split("/")[1] for key in variables if key.startswith(f"{side}/layer_")} - {"layer_norm"}
    return len(layers)


def state_dict(variables: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """CTranslate2 variables → float32 tensors under the keys of transformers' WhisperForConditionalGeneration."""
    state = dict(_stem(variables))
    shapes = _Shapes.of(variables)
    for side, count in (("encoder", shapes.encoder_layers), ("decoder", shapes.decoder_layers)):
        for index in range(count):
            state.update(_layer(variables, f"{side}/layer_{index}", f"model.{side}.layers.{index}"))
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    return state


def _tensor(variables: dict[str, np.ndarray], key: str) -> Tensor:
    if key not in variables:
        raise Ct2Error(f"the model has no variable {key}")
    return torch.from_numpy(variables[key].astype(np.float32))


def _stem(variables: dict[str, np.ndarray]) -> Iterator[tuple[str, Tensor]]:
    for conv in ("conv1", "conv2"):
        yield from _linear(variables, f"encoder/{conv}", f"model.encoder.{conv}")
    for side in ("encoder", "decoder"):
        yield f"model.{side}.embed_positions.weight", _tensor(variables, f"{side}/position_encodings/encodings")
        yield from _norm(variables, f"{side}/layer_norm", f"model.{side}.layer_norm")
    yield "model.decoder.embed_tokens.weight", _tensor(variables, "decoder/embeddings/weight")


def _layer(variables: dict[str, np.ndarray], source: str, target: str) -> Iterator[tuple[str, Tensor]]:
    for name, (attention, joint, output) in ATTENTION.items():
        if f"{source}/{name}/layer_norm/gamma" not in variables:
            continue  # encoder layers have no attention to an encoder
        yield from _norm(variables, f"{source}/{name}/layer_norm", f"{target}.{attention}_layer_norm")
        if joint:
            yield from _projections(variables, f"{source}/{name}/{joint}", f"{target}.{attention}", "qkv")
        else:
            yield from _projections(variables, f"{source}/{name}/linear_0", f"{target}.{attention}", "q")
            yield from _projections(variables, f"{source}/{name}/linear_1", f"{target}.{attention}", "kv")
        yield from _linear(variables, f"{source}/{name}/{output}", f"{target}.{attention}.out_proj")
    yield from _norm(variables, f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
    yield from _linear(variables, f"{source}/ffn/linear_0", f"{target}.fc1")
    yield from _linear(variables, f"{source}/ffn/linear_1", f"{target}.fc2")


def _norm(variables: dict[str, np.ndarray], source: str, target: str) -> Iterator[tuple[str, Tensor]]:
    yield f"{target}.weight", _tensor(variables, f"{source}/gamma")
    yield f"{target}.bias", _tensor(variables, f"{source}/beta")


def _linear(variables: dict[str, np.ndarray], source: str, target: str) -> Iterator[tuple[str, Tensor]]:
    yield f"{target}.weight", _tensor(variables, f"{source}/weight")
    yield f"{target}.bias", _tensor(variables, f"{source}/bias")


def _projections(
    variables: dict[str, np.ndarray], source: str, target: str, names: str
) -> Iterator[tuple[str, Tensor]]:
    """Query, key, value are stored as one matrix; Whisper's key has no bias, CTranslate2 writes zeros for it."""
    weights, biases = (
        _tensor(variables, f"{source}/weight").chunk(len(names)),
        _tensor(variables, f"{source}/bias").chunk(len(names)),
    )
    for name, weight, bias in zip(names, weights, biases, strict=True):
        yield f"{target}.{name}_proj.weight", weight.clone()
        if name != "k":
            yield f"{target}.{name}_proj.bias", bias.clone()
        elif bias.abs().max() > 0:
            raise Ct2Error(f"{source}: the key projection has a bias, which Whisper does not")


def convert_whisper(source: Path, target: Path) -> None:
    """``source`` (model.bin, config.json, tokenizer.json) → a transformers folder ``target``. Every key must match, or
    Ct2Error."""
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizer,
    )

    variables = read_variables(source / "model.bin")
    shapes = _Shapes.of(variables)
    tokenizer = WhisperTokenizer(tokenizer_file=str(source / "tokenizer.json"))
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    generation = _generation(settings, tokenizer, shapes.tokens)
    config = WhisperConfig(
        vocab_size=shapes.vocabulary,
        num_mel_bins=shapes.mels,
        d_model=shapes.width,
        encoder_layers=shapes.encoder_layers,
        decoder_layers=shapes.decoder_layers,
        encoder_attention_heads=shapes.heads,
        decoder_attention_heads=shapes.heads,
        encoder_ffn_dim=shapes.filter_width,
        decoder_ffn_dim=shapes.filter_width,
        max_source_positions=shapes.frames,
        max_target_positions=shapes.tokens,
        decoder_start_token_id=generation.decoder_start_token_id,
        eos_token_id=generation.eos_token_id,
        pad_token_id=generation.pad_token_id,
        bos_token_id=generation.bos_token_id,
    )
    model = WhisperForConditionalGeneration(config)
    try:
        model.load_state_dict(state_dict(variables))
    except RuntimeError as error:
        raise Ct2Error(f"{source}: {error}") from error
    model.generation_config = generation
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    WhisperFeatureExtractor(feature_size=shapes.mels).save_pretrained(target)


def _generation(settings: dict[str, Any], tokenizer: Any, max_length: int) -> Any:
    from transformers import GenerationConfig
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    number = tokenizer.convert_tokens_to_ids
    known = tokenizer.get_vocab()
    end = number("<|endoftext|>")
    return GenerationConfig(
        is_multilingual=True,
        decoder_start_token_id=number("<|startoftranscript|>"),
        eos_token_id=end,
        pad_token_id=end,
        bos_token_id=end,
        no_timestamps_token_id=number("<|notimestamps|>"),
        prev_sot_token_id=number("<|startofprev|>"),
        suppress_tokens=settings.get("suppress_ids"),
        begin_suppress_tokens=settings.get("suppress_ids_begin"),
        alignment_heads=settings.get("alignment_heads"),
        max_length=max_length,
        max_initial_timestamp_index=50,
        lang_to_id={f"<|{code}|>": known[f"<|{code}|>"] for code in LANGUAGES if f"<|{code}|>" in known},
        task_to_id={"transcribe": number("<|transcribe|>"), "translate": number("<|translate|>")},
        return_timestamps=False,
    )
