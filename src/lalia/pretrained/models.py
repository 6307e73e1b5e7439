"""External models as torch modules: from a local folder, or small and random (``tiny``) so that every path runs with no
network."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lalia.pretrained.sources import TINY, PretrainedError, resolve
from lalia.sections import ExternalModel

TINY_SEED = 1234
#: parameters that training needs and released checkpoints may lack; frozen models do not use them
UNUSED = {"masked_spec_embed"}
WHISPER_SPECIALS = [
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|zh|>",
    "<|ja|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
]


def describe(config: ExternalModel) -> str:
    """How a model is named in logs and run folders: ``none``, ``tiny (random)``, or its source and revision."""
    if not config.source:
        return "none"
    if config.source == TINY:
        return "tiny (random)"
    return config.source + (f"@{config.revision}" if config.revision else "")


def load_wavlm(config: ExternalModel, offline: bool = False) -> nn.Module:
    """transformers' WavLMModel in evaluation mode, frozen, float32. ``model.normalize_input`` says whether it wants
    waves of zero mean and unit variance (the large model does). PretrainedError when it cannot be had or its weights do
    not fit."""
    from transformers import WavLMConfig, WavLMModel

    folder = resolve(config.source, "wavlm", offline, config.revision)
    if folder is None:
        small = WavLMConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            conv_dim=[16] * 7,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            num_buckets=32,
            max_bucket_distance=64,
        )
        model = _random(lambda: WavLMModel(small))
    else:
        model = _from_folder(WavLMModel, folder)
    model.normalize_input = folder is not None and wants_normalized(folder)
    return model.eval().requires_grad_(False)


def load_whisper(config: ExternalModel, offline: bool = False) -> tuple[nn.Module, Any]:
    """(WhisperForConditionalGeneration, WhisperProcessor), evaluation mode, frozen, float32. ``tiny`` has a byte-level
    tokenizer."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    folder = resolve(config.source, "whisper", offline, config.revision)
    if folder is None:
        return _tiny_whisper()
    model = _from_folder(WhisperForConditionalGeneration, folder)
    processor = WhisperProcessor.from_pretrained(folder, local_files_only=True)
    return model.eval().requires_grad_(False), processor


def load_causal_lm(config: ExternalModel, offline: bool = False) -> nn.Module:
    """transformers' causal language model (Llama, Qwen2, …) in evaluation mode, frozen, float32; ``tiny`` is a Llama.
    PretrainedError when it cannot be had or its weights do not fit."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    folder = resolve(config.source, "language", offline, config.revision)
    if folder is None:
        small = LlamaConfig(
            vocab_size=257,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=256,
            eos_token_id=256,
        )
        model = _random(lambda: LlamaForCausalLM(small))
    else:
        model = _from_folder(AutoModelForCausalLM, folder)
    return model.eval().requires_grad_(False)


def _from_folder(kind: Any, folder: Path) -> Any:
    """``from_pretrained`` without network and without pickled code, and strict: a weight that is missing or misshapen
    is an error."""
    try:
        with without_progress_bars():
            model, report = kind.from_pretrained(
                folder, local_files_only=True, weights_only=True, dtype=torch.float32, output_loading_info=True
            )
    except pickle.UnpicklingError as error:
        global_name = re.search(r"GLOBAL (\S+)", str(error))
        what = f" (it calls {global_name[1]})" if global_name else ""
        raise PretrainedError(f"{folder}/pytorch_model.bin holds more than tensors{what}: refused") from error
    missing = sorted(set(report["missing_keys"]) - UNUSED)
    if missing or report["mismatched_keys"]:
        names = ", ".join(map(str, [*missing, *report["mismatched_keys"]][:5]))
        raise PretrainedError(f"{folder} does not hold a whole {kind.__name__}: missing or misshapen {names}")
    return model


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """transformers draws no progress bars meanwhile; afterwards it does what it did before."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def wants_normalized(folder: Path) -> bool:
    """Whether a WavLM's preprocessor gives waves zero mean and unit variance."""
    path = folder / "preprocessor_config.json"
    return path.is_file() and bool(json.loads(path.read_text(encoding="utf-8")).get("do_normalize", False))


def _random(build: Any) -> Any:
    """Build with a fixed seed and leave the global random state as it was: the same weights in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TINY_SEED)
        return build()


def _tiny_whisper() -> tuple[nn.Module, Any]:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    vocabulary = {symbol: index for index, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = WhisperTokenizer(vocab=vocabulary | {"<|endoftext|>": len(vocabulary)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": WHISPER_SPECIALS[1:]})
    tokenizer.set_prefix_tokens()  # they were looked up before the special tokens existed
    number: dict[str, int] = tokenizer.get_vocab()
    end = number["<|endoftext|>"]
    small = WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_target_positions=64,
        eos_token_id=end,
        pad_token_id=end,
        bos_token_id=end,
        decoder_start_token_id=number["<|startoftranscript|>"],
    )
    model = _random(lambda: WhisperForConditionalGeneration(small))
    generation = model.generation_config
    generation.is_multilingual = True
    generation.no_timestamps_token_id = number["<|notimestamps|>"]
    generation.lang_to_id = {f"<|{code}|>": number[f"<|{code}|>"] for code in ("en", "zh", "ja")}
    generation.task_to_id = {"transcribe": number["<|transcribe|>"], "translate": number["<|translate|>"]}
    generation.max_length = small.max_target_positions
    processor = WhisperProcessor(WhisperFeatureExtractor(feature_size=small.num_mel_bins), tokenizer)
    return model.eval().requires_grad_(False), processor
