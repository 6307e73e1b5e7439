"""Text ↔ token numbers: bytes, a BPE trained here, or a Hugging Face folder's tokenizer. Stored as JSON, never pickled."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lalia.data import Corpus
from lalia.systems.omni.config import LEAST_BPE, TokenizerConfig

BYTES = 256
SPECIAL_FILE, SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"


class Tokenizer(Protocol):
    """``size`` tokens, of which ``bos`` stands before each document and ``eos`` ends a text (ours: the mark of the next one).
    ``marks``: strings that :meth:`encode` reads as a mark wherever they stand (ours: none)."""

    size: int
    bos: int
    eos: int
    marks: tuple[str, ...]

    def encode(self, text: str) -> list[int]:
        """Tokens of ``text``, without ``bos``."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens; marks are left out, bytes that are no UTF-8 become U+FFFD."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """What :func:`tokenizer_from_dict` builds it from again: JSON data."""
        ...


class ByteTokenizer:
    """UTF-8 bytes 0 … 255 and the document mark 256: 257 tokens, and no text that it cannot hold."""

    size, bos, eos = BYTES + 1, BYTES, BYTES
    marks: tuple[str, ...] = ()

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < BYTES).decode("utf-8", errors="replace")

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "byte"}


class BpeTokenizer:
    """Byte-level BPE (Sennrich et al. 1508.07909; GPT-2's split into words). The document mark is the last token, so that no text,
    whatever it holds, is read as a mark."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        from tokenizers import Tokenizer as Library

        self.model = dict(model)
        self._library = Library.from_str(json.dumps(self.model))
        self.bos = self.eos = self._library.get_vocab_size()
        self.size = self.bos + 1
        self.marks: tuple[str, ...] = ()

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._library.decode([i for i in ids if i < self.bos])

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "bpe", "model": self.model}


class HfTokenizer:
    """The ``tokenizer.json`` of a Hugging Face folder. ``bos`` is its beginning mark, or its end mark where it has none (Qwen).

    :meth:`encode` reads marks that stand in the text as such (``<|im_end|>`` is one token): who encodes a stranger's text takes
    them apart first, by :func:`plain`.
    """

    def __init__(self, model: Mapping[str, Any], bos: int, eos: int) -> None:
        from tokenizers import Tokenizer as Library

        self.model, self.bos, self.eos = dict(model), bos, eos
        self._library = Library.from_str(json.dumps(self.model))
        self.size = 1 + max(self._library.get_vocab(with_added_tokens=True).values())  # numbers may have gaps
        added = [str(item["content"]) for item in self.model.get("added_tokens", [])]
        self.marks = tuple(mark for mark in added if mark.strip())  # spaces side by side (GPT-NeoX, Phi) are text

    @classmethod
    def from_folder(cls, folder: str | Path) -> HfTokenizer:
        """ValueError when the folder has no ``tokenizer.json``, or nothing says which token ends a text."""
        from tokenizers import Tokenizer as Library

        folder = Path(folder)
        path = folder / SPECIAL_FILE
        if not path.is_file():
            raise ValueError(f"{folder} has no {SPECIAL_FILE}: save it with transformers' fast tokenizer (save_pretrained)")
        model = json.loads(path.read_text(encoding="utf-8"))
        settings = _json_of(folder / SETTINGS_FILE)
        marks = {name: _content(settings.get(f"{name}_token")) for name in ("bos", "eos")}
        known, config = Library.from_str(json.dumps(model)), _json_of(folder / "config.json")
        numbers = {name: known.token_to_id(mark) if mark else None for name, mark in marks.items()}
        found = {name: _number(config.get(f"{name}_token_id")) if numbers[name] is None else numbers[name] for name in marks}
        eos = found["eos"] if found["eos"] is not None else found["bos"]
        if eos is None:
            raise ValueError(f"{folder}: neither {SETTINGS_FILE} (eos_token) nor config.json (eos_token_id) names the end mark")
        return cls(model, eos if found["bos"] is None else found["bos"], eos)

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._library.decode(list(ids), skip_special_tokens=True)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "hf", "model": self.model, "bos": self.bos, "eos": self.eos}


def plain(text: str, marks: Iterable[str]) -> str:
    """``text`` with nothing in it that counts as one of ``marks``: of one character becomes a space, a longer one is taken apart
    (``<|im_end|>`` → ``< |im_end|>``)."""
    for mark in marks:
        text = text.replace(mark, f"{mark[0]} {mark[1:]}" if len(mark) > 1 else " ")
    return text


def _json_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _content(mark: Any) -> str:
    """A mark is text, or an object with it as ``content``."""
    return str(mark.get("content", "")) if isinstance(mark, dict) else str(mark or "")


def _number(value: Any) -> int | None:
    """Some models have several end marks; the first is the usual one."""
    value = value[0] if isinstance(value, list) and value else value
    return int(value) if isinstance(value, int) else None


def train_bpe(texts: Iterable[str], size: int) -> BpeTokenizer:
    """A BPE of ``size`` tokens in all from ``texts``; the same texts in the same order give the same one.

    ValueError when ``size`` is below 258, or the texts are too few for so many tokens.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if size < LEAST_BPE:
        raise ValueError(f"a BPE needs at least {LEAST_BPE} tokens (256 bytes, the document mark, one merge), got {size}")
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    library.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False, min_frequency=2)
    library.train_from_iterator(texts, trainer)
    if library.get_vocab_size() < size - 1:
        least = library.get_vocab_size() + 1
        raise ValueError(f"the text gives a BPE of {least} tokens at most, not {size}: more text, or tokenizer.size={least}")
    return BpeTokenizer(json.loads(library.to_str()))


def build_tokenizer(config: TokenizerConfig, rows: Corpus) -> Tokenizer:
    """As the configuration says; a BPE is trained on the training rows, of which every n-th is taken when they are too many."""
    if config.kind == "byte":
        return ByteTokenizer()
    if config.kind != "bpe":
        if not Path(config.kind).is_dir():
            raise ValueError(f"tokenizer.kind is byte, bpe or a folder with {SPECIAL_FILE}; there is no folder {config.kind!r}")
        return HfTokenizer.from_folder(config.kind)
    total = sum(len(row.text.encode("utf-8")) for row in rows)
    every = max(1, -(-total // int(config.megabytes * 1e6)))
    return train_bpe((rows[index].text for index in range(0, len(rows), every)), config.size)


def tokenizer_from_dict(stored: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that ``to_dict`` came from. ValueError for an unknown kind."""
    kind = stored.get("kind")
    if kind == "byte":
        return ByteTokenizer()
    if kind == "bpe":
        return BpeTokenizer(stored["model"])
    if kind == "hf":
        return HfTokenizer(stored["model"], int(stored["bos"]), int(stored["eos"]))
    raise ValueError(f"unknown tokenizer {kind!r}; known: byte, bpe, hf")
