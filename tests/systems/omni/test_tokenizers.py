"""Bytes, a BPE, a Hugging Face folder: round trips, marks, storage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lalia.data import Corpus, Row
from lalia.systems.omni.config import TokenizerConfig
from lalia.systems.omni.tokenizers import (
    BpeTokenizer,
    ByteTokenizer,
    HfTokenizer,
    build_tokenizer,
    plain,
    tokenizer_from_dict,
    train_bpe,
)

TEXTS = ["the cat sat on the mat", "the other cat sat there", "你好，世界", "naïve café — Ελλάδα", "  spaces\t\n\n"] * 4


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    return train_bpe(TEXTS, 280)


def test_bytes_have_257_tokens() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.size, tokenizer.bos, tokenizer.eos) == (257, 256, 256)
    assert tokenizer.encode("é") == [0xC3, 0xA9]


def test_bytes_round_trip_every_code_point() -> None:
    tokenizer = ByteTokenizer()
    text = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    ids = tokenizer.encode(text)
    assert max(ids) < 256 and tokenizer.decode(ids) == text


def test_broken_bytes_and_marks_are_no_error() -> None:
    assert ByteTokenizer().decode([256, 0x41, 0xC3, 256]) == "A\ufffd"


@settings(max_examples=60, deadline=None)
@given(text=st.text())
def test_bpe_round_trips_any_text(text: str) -> None:
    tokenizer = train_bpe_once()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.bos for i in ids)


def train_bpe_once(made: list[BpeTokenizer] = []) -> BpeTokenizer:  # noqa: B006
    if not made:
        made.append(train_bpe(TEXTS, 280))
    return made[0]


def test_bpe_has_the_size_asked_for_and_is_shorter_than_bytes(bpe: BpeTokenizer) -> None:
    assert bpe.size == 280 and bpe.bos == bpe.eos == 279
    assert len(bpe.encode("the cat sat")) < len(b"the cat sat")
    assert bpe.decode([bpe.bos, *bpe.encode("the cat"), bpe.bos]) == "the cat"


def test_bpe_is_the_same_for_the_same_text() -> None:
    assert train_bpe(TEXTS, 280).to_dict() == train_bpe(TEXTS, 280).to_dict()


@pytest.mark.parametrize("kind", ["byte", "bpe", "hf"])
def test_storage_is_json(kind: str, bpe: BpeTokenizer, tmp_path: Path) -> None:
    tokenizer = {"byte": ByteTokenizer(), "bpe": bpe, "hf": HfTokenizer.from_folder(folder(tmp_path, bpe))}[kind]
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert (again.size, again.bos, again.eos) == (tokenizer.size, tokenizer.bos, tokenizer.eos)
    assert again.encode("the cat 你") == tokenizer.encode("the cat 你")
    assert again.decode(again.encode("the cat 你")) == "the cat 你"


def folder(path: Path, bpe: BpeTokenizer, eos: object = "<|end|>") -> Path:
    """A model folder with two marks on top of a BPE."""
    marks = [("<|begin|>", bpe.bos), ("<|end|>", bpe.bos + 1)]
    shape = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    model = bpe.model | {"added_tokens": [{"id": number, "content": mark, **shape} for mark, number in marks]}
    (path / "tokenizer.json").write_text(json.dumps(model), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}), encoding="utf-8")
    return path


def test_a_folder_without_a_beginning_mark_uses_its_end(tmp_path: Path, bpe: BpeTokenizer) -> None:
    tokenizer = HfTokenizer.from_folder(folder(tmp_path, bpe, {"content": "<|end|>"}))
    assert tokenizer.bos == tokenizer.eos == bpe.bos + 1 and tokenizer.size == bpe.bos + 2
    ids = tokenizer.encode("the<|end|>")
    assert ids[-1] == tokenizer.eos and tokenizer.decode(ids) == "the"


def test_added_tokens_of_spaces_are_no_marks(tmp_path: Path, bpe: BpeTokenizer) -> None:
    model = json.loads((folder(tmp_path, bpe) / "tokenizer.json").read_text(encoding="utf-8"))
    shape = model["added_tokens"][0] | {"special": False, "normalized": True}
    model["added_tokens"] += [shape | {"id": 300 + n, "content": " " * n} for n in (2, 3, 4)]
    marks = HfTokenizer(model, 1, 2).marks
    assert marks == ("<|begin|>", "<|end|>") and plain("the  cat<|end|>", marks) == "the  cat< |end|>"


def test_a_folder_that_names_no_end_is_refused(tmp_path: Path, bpe: BpeTokenizer) -> None:
    with pytest.raises(ValueError, match="tokenizer.json"):
        HfTokenizer.from_folder(tmp_path)
    with pytest.raises(ValueError, match="eos_token"):
        HfTokenizer.from_folder(folder(tmp_path, bpe, None))


def test_built_as_configured(tmp_path: Path, bpe: BpeTokenizer) -> None:
    rows = Corpus.from_rows(Row(f"r{i}", text=text) for i, text in enumerate(TEXTS))
    assert isinstance(build_tokenizer(TokenizerConfig(), rows), ByteTokenizer)
    assert build_tokenizer(TokenizerConfig("bpe", 280), rows).to_dict() == bpe.to_dict()
    assert isinstance(build_tokenizer(TokenizerConfig(str(folder(tmp_path, bpe))), rows), HfTokenizer)
    with pytest.raises(ValueError, match="no folder 'bite'"):
        build_tokenizer(TokenizerConfig("bite"), rows)
    with pytest.raises(ValueError, match="tokenizer.size="):
        build_tokenizer(TokenizerConfig("bpe", 5000), rows)
    with pytest.raises(ValueError, match="258"):
        TokenizerConfig("bpe", 200)
    with pytest.raises(ValueError, match="unknown tokenizer"):
        tokenizer_from_dict({"kind": "pickle"})
