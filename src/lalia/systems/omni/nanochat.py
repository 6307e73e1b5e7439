"""nanochat's checkpoints (github.com/karpathy/nanochat) as ``omni-base`` runs: ``model_*.pt``, ``meta_*.json`` and a tokenizer.

Nothing is unpickled but plain tensors. nanochat keeps its tokenizer as a pickled object, which is refused; :data:`EXPORT` writes
its ranks as text where nanochat is installed.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lalia import checkpoint
from lalia import config as configuration
from lalia.checkpoint import LoadReport, RunFolder, partial_load
from lalia.safeload import read_tensors
from lalia.systems.omni.base import OmniBase
from lalia.systems.omni.config import Config, ModelConfig, TokenizerConfig
from lalia.systems.omni.tokenizers import ByteTokenizer, HfTokenizer, Tokenizer

log = logging.getLogger(__name__)

RANKS, PICKLE = "tokenizer.tiktoken", "tokenizer.pkl"
EXPORT = (
    "python -c \"import base64, pickle; e = pickle.load(open('tokenizer.pkl', 'rb')); open('tokenizer.tiktoken', 'w').writelines("
    "f'{base64.b64encode(t).decode()} {r}\\n' for t, r in e._mergeable_ranks.items())\""
)
#: the words that nanochat's BPE works inside, and its marks, in the order of their numbers after the ranks
SPLIT = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
MARKS = (
    "<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>",
)  # fmt: skip
#: nanochat's name → ours; ``#`` is the number of a layer
KEYS = {
    "transformer.wte.weight": "tokens.weight",
    "lm_head.weight": "head.weight",
    "transformer.h.#.attn.c_q.weight": "blocks.#.attention.query.weight",
    "transformer.h.#.attn.c_k.weight": "blocks.#.attention.key.weight",
    "transformer.h.#.attn.c_v.weight": "blocks.#.attention.value.weight",
    "transformer.h.#.attn.c_proj.weight": "blocks.#.attention.out.weight",
    "transformer.h.#.attn.ve_gate.weight": "blocks.#.attention.value_gate.weight",
    "transformer.h.#.mlp.c_fc.weight": "blocks.#.mlp.up.weight",
    "transformer.h.#.mlp.c_proj.weight": "blocks.#.mlp.down.weight",
    "value_embeds.#.weight": "value_tables.#.weight",
    "resid_lambdas": "residual_scale",
    "x0_lambdas": "input_scale",
    "smear_gate.weight": "smear_gate.weight",
    "smear_lambda": "smear_scale",
    "backout_lambda": "backout_scale",
}


class NanochatError(ValueError):
    """A folder that is no nanochat checkpoint, or not one that can be taken over. The message says what to do."""


def convert(folder: Path, run: Path, step: int = -1, tokenizer: str = "") -> LoadReport:
    """Write a checkpoint of nanochat as the ``omni-base`` run ``run``; returns which keys matched.

    Args:
        folder: with ``model_<step>.pt`` and ``meta_<step>.json``.
        step: −1 = the last one.
        tokenizer: ``byte``, a ``.tiktoken`` file, or a folder with ``tokenizer.json``; '' looks for one beside the checkpoint.

    Raises:
        NanochatError: files are missing, of an older architecture, or the tokenizer is a pickle or of another size.
        WeightsMismatch: tensors that do not fit; the report names them. Nothing is written.
        UnsafePickle: the file would run code.
    """
    if any(run.glob("step-*")):
        raise NanochatError(f"{run} already holds a run: choose another folder")
    weights, meta, number = _read(folder, step)
    words = find_tokenizer(folder, tokenizer)
    model = _shape(meta, folder)
    vocab = int(meta["model_config"]["vocab_size"])
    if words.size != vocab:
        raise NanochatError(f"the tokenizer has {words.size} tokens, the model {vocab}: this is not the one that it learnt with")
    config = Config(model=model, tokenizer=TokenizerConfig(kind=tokenizer or str(folder)))
    system = OmniBase(config, {"tokenizer": words.to_dict()})
    report = partial_load(system.model, renamed(weights, model.depth))
    with RunFolder(run) as target:
        target.write_config(configuration.to_yaml(config))
        target.write_tables(system.tables)
        figures = {"bits_per_byte": meta["val_bpb"]} if isinstance(meta.get("val_bpb"), float) else {}
        facts = {"system": config.system, "epoch": 0, "source": f"nanochat {folder.name} step {number}", "metrics": figures}
        checkpoint.save_set(run, number, system.state_dict(), {}, facts, best=True)
    return report


def _read(folder: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Any], int]:
    """Tensors, meta data and step of one checkpoint."""
    found = {int(match[1]): path for path in folder.glob("model_*.pt") if (match := re.fullmatch(r"model_(\d+)", path.stem))}
    if not found:
        raise NanochatError(f"{folder} holds no model_<step>.pt; give nanochat's folder of one model, such as base_checkpoints/d12")
    number = max(found) if step < 0 else step
    if number not in found:
        raise NanochatError(f"{folder} has no step {step}; it has {', '.join(map(str, sorted(found)))}")
    path = found[number]
    described = path.with_name(path.stem.replace("model", "meta", 1) + ".json")
    if not described.is_file():
        raise NanochatError(f"{described} is missing: it says what shape {path.name} has")
    meta = json.loads(described.read_text(encoding="utf-8"))
    if not isinstance(meta, dict) or "vocab_size" not in meta.get("model_config", {}):
        raise NanochatError(f"{described} has no model_config with a vocab_size: it is not nanochat's")
    return read_tensors(path), meta, number


def _shape(meta: Mapping[str, Any], folder: Path) -> ModelConfig:
    """nanochat's ``model_config`` as ours. The width is given by ``aspect``, whole heads of ``n_embd / n_head``."""
    given = meta["model_config"]
    try:
        depth, heads, width = (int(given[key]) for key in ("n_layer", "n_head", "n_embd"))
        context, kv_heads = int(given["sequence_len"]), int(given.get("n_kv_head", heads))
    except KeyError as error:
        raise NanochatError(f"{folder}: model_config lacks {error}") from error
    window = str(given.get("window_pattern", "L")).upper()  # models from before the windows see everything
    model = ModelConfig(depth=depth, context=context, aspect=max(1, width // depth), head_width=width // heads, window=window)
    model.kv_heads = 0 if kv_heads == heads else kv_heads
    if model.gpt(1).width != width:
        raise NanochatError(f"{folder}: {depth} layers of width {width} and {heads} heads are no shape that can be taken over")
    return model


def renamed(weights: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """nanochat's tensors under our names, in float32; names that are not its own stay as they are, for the report.

    Models from before the learnt scales of the residual stream get the ones that change nothing, as nanochat does itself.
    NanochatError for a model that lacks more than these.
    """
    given = {name.removeprefix("_orig_mod."): tensor.float() for name, tensor in weights.items()}
    given.setdefault("resid_lambdas", torch.ones(depth))
    given.setdefault("x0_lambdas", torch.zeros(depth))
    old = [name for name in ("smear_lambda", "backout_lambda", "smear_gate.weight") if name not in given]
    if old:
        raise NanochatError(
            f"the model lacks {', '.join(old)}: it is of an older nanochat, which computes differently: train it with the present"
        )
    result: dict[str, Tensor] = {}
    for name, tensor in given.items():
        number = re.search(r"\.(\d+)\.", name)
        pattern = name.replace(number[0], ".#.", 1) if number else name
        own = KEYS.get(pattern, name)
        result[own.replace("#", number[1]) if number else own] = tensor
    return result


# --- tokenizer ------------------------------------------------------------------------------------------------------
def find_tokenizer(folder: Path, given: str) -> Tokenizer:
    """The tokenizer that ``given`` names, or one beside the checkpoint or in nanochat's ``tokenizer`` folder. NanochatError, with
    the way out, when there is none or only a pickle."""
    if given == "byte":
        return ByteTokenizer()
    if given:
        return _open_tokenizer(Path(given))
    places = (folder, folder.parent / "tokenizer", folder.parent.parent / "tokenizer")
    for place in places:
        if (place / RANKS).is_file():
            return read_ranks(place / RANKS)
        if (place / "tokenizer.json").is_file():
            return HfTokenizer.from_folder(place)
    for place in places:
        if (place / PICKLE).is_file():
            raise _refused(place / PICKLE)
    raise NanochatError(f"no tokenizer beside {folder}: name one with --tokenizer ({RANKS}, a folder with tokenizer.json, or byte)")


def _open_tokenizer(path: Path) -> Tokenizer:
    if path.is_dir():
        return HfTokenizer.from_folder(path)
    if path.suffix in (".pkl", ".pickle"):
        raise _refused(path)
    if not path.is_file():
        raise NanochatError(f"there is no tokenizer {path}")
    return HfTokenizer.from_folder(path.parent) if path.name == "tokenizer.json" else read_ranks(path)


def _refused(path: Path) -> NanochatError:
    return NanochatError(
        f"{path} is a pickled object; loading it would run code, so it was not. Where nanochat is installed and you trust the file,"
        f" run in {path.parent}: {EXPORT}"
    )


def read_ranks(path: Path) -> HfTokenizer:
    """A file of lines ``base64-of-the-bytes rank`` as nanochat's tokenizer: byte-level BPE inside :data:`SPLIT`, then the marks.

    NanochatError for a line of another form, ranks that are not 0, 1, 2, …, or a byte without a token.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise NanochatError(f"{path}:{number} is not 'base64 rank': {line[:40]!r}") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([value]) not in ranks for value in range(256)):
        raise NanochatError(f"{path} is not a whole byte-level BPE: ranks must be 0, 1, 2, … and every byte must have one")
    return HfTokenizer(_library(ranks), bos=len(ranks), eos=len(ranks))


def _library(ranks: Mapping[bytes, int]) -> dict[str, Any]:
    """The JSON of a ``tokenizers`` tokenizer that merges what ``ranks`` merge, in their order."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    letters = _letters()
    names = {token: "".join(letters[value] for value in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += [(names[a], names[b]) for a, b in sorted(halves, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))]
    model = models.BPE({names[token]: rank for token, rank in ranks.items()}, merges, ignore_merges=True)
    library = Library(model)
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])  # type: ignore[assignment]
    library.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    library.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    return json.loads(library.to_str())


def _letters() -> dict[int, str]:
    """The letter that byte-level BPE (GPT-2) writes for each byte: printable ones for themselves, the others from U+0100 on."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in set(kept)]
    return {value: chr(value) for value in kept} | {value: chr(256 + place) for place, value in enumerate(others)}
