from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lalia import data
from lalia.data import BadRow, Corpus, ManifestError, Row, pad_stack, read_manifest, write_manifest, write_rejected


def manifest(folder: Path, lines: list[str | bytes], name: str = "train.jsonl") -> Path:
    path = folder / name
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
    return path


def good(count: int, start: int = 0) -> list[str]:
    return [json.dumps({"id": f"r{i}", "audio": f"a/{i}.wav", "text": "hi"}) for i in range(start, start + count)]


def test_round_trip_keeps_every_field_and_relative_paths(tmp_path: Path) -> None:
    rows = [
        Row("é1", str(tmp_path / "wavs" / "a b.wav"), 0.5, 1.25, "你好\n", "anna", "zh", {"valence": 0.1}, "d", 3, "t"),
        Row("3", extra={"n": [1, None, "“q”"]}),
        Row("2", text="only text"),
    ]
    path = tmp_path / "m" / "x.jsonl"
    write_manifest(path, rows)
    first = json.loads(path.read_text("utf-8").splitlines()[0])
    assert first["audio"] == "../wavs/a b.wav"
    assert json.loads(path.read_text("utf-8").splitlines()[2]) == {"id": "2", "text": "only text"}
    assert list(read_manifest(path)) == rows
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    os.rename(path, moved / "x.jsonl")
    assert read_manifest(moved / "x.jsonl")[0].audio == str(tmp_path / "wavs" / "a b.wav")


def test_seed_lines_bom_crlf_and_blank_lines(tmp_path: Path) -> None:
    path = manifest(tmp_path, [b"\xef\xbb\xbf" + b'{"audio_path": "b/x.flac", "text": "one"}\r', b"\r",
                               b'{"audio_path": "/abs/y.wav", "text": "two", "start": 2.5}\r'])  # fmt: skip
    rows = list(read_manifest(path))
    assert [(r.id, r.audio, r.text) for r in rows] == [
        ("b/x", str(tmp_path / "b/x.flac"), "one"),
        ("/abs/y@2.5", "/abs/y.wav", "two"),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": "x"', "bad JSON"),
        ('{"id": "x", "speker": "a"}', "unknown key: 'speker'; did you mean 'speaker'?"),
        ('{"id": "x", "duration": "3"}', "wrong type: 'duration'"),
        ('{"id": "x", "duration": -1}', "wrong value: 'duration'"),
        ('{"id": "x", "duration": NaN}', "wrong value: 'duration'"),
        ('{"id": "x", "duration": 1' + "0" * 400 + "}", "too large"),
        ('{"id": "x", "start": true}', "wrong type: 'start'"),
        ('{"id": 7}', "wrong type: 'id'"),
        ('{"id": "x", "turn": 1.5}', "wrong type: 'turn'"),
        ('{"id": "x", "labels": {"valence": "high"}}', "labels.valence"),
        ('{"id": "x", "extra": []}', "wrong type: 'extra'"),
        ('{"text": "no id"}', "no id"),
        ('{"id": "r3"}', "duplicated id: 'r3'"),
        ('{"id": "x", "audio": "a", "audio_path": "b"}', "beside"),
        ("[1, 2]", "wrong type: a line"),
        ("[" * 100_000, "bad JSON"),
        ('{"id": "x", "text": "\\ud800"}', "surrogate"),
        (b'{"id": "\xff"}', "not UTF-8"),
    ],
)
def test_broken_line_17_is_named_with_its_reason(tmp_path: Path, line: str | bytes, reason: str) -> None:
    path = manifest(tmp_path, [*good(16), line, *good(10, 17)])
    with pytest.raises(ManifestError) as caught:
        read_manifest(path, max_bad_fraction=0.0)
    assert f"{path}:17: " in str(caught.value)
    assert reason in str(caught.value)
    corpus = read_manifest(path, max_bad_fraction=1 / 27)
    assert len(corpus) == 26
    [(where, why)] = corpus.rejected
    assert where == f"{path}:17"
    assert reason in why


def test_tolerance_is_warned_about_and_has_a_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = manifest(tmp_path, [*good(9), "{"])
    assert len(read_manifest(path, 0.1)) == 9
    assert "train.jsonl:10" in caplog.text
    with pytest.raises(ManifestError, match=r"1 of 10 lines are broken"):
        read_manifest(path, 0.09)


def test_nothing_usable_and_missing_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no usable row"):
        read_manifest(manifest(tmp_path, ["", ""]))
    with pytest.raises(ManifestError, match="no usable row in 1 lines; the first: .*:1: bad JSON"):
        read_manifest(manifest(tmp_path, ["{"]), max_bad_fraction=1.0)
    with pytest.raises(ManifestError, match="did you mean 'train.jsonl'"):
        read_manifest(tmp_path / "trian.jsonl")
    with pytest.raises(ManifestError, match="no manifest was given"):
        Corpus.read([])


def test_corpus_sequence_and_columns(tmp_path: Path) -> None:
    rows = [Row(f"r{i}", duration=i / 2, speaker="ab"[i % 2], labels={"v": float(i)}) for i in range(10)]
    corpus = Corpus.from_rows(rows)
    assert list(corpus) == rows
    assert corpus[-1] == rows[-1]
    assert list(corpus[2:8:3]) == [rows[2], rows[5]]
    assert list(corpus.subset([7, 0, 7])) == [rows[7], rows[0], rows[7]]
    assert corpus.durations().tolist() == [i / 2 for i in range(10)]
    assert corpus.column("labels")[3] == {"v": 3.0}
    assert corpus.with_durations(np.full(10, 9.0))[4].duration == 9.0
    with pytest.raises(IndexError):
        corpus[10]
    with pytest.raises(ManifestError, match="did you mean 'speaker'"):
        corpus.column("speakers")
    with pytest.raises(ManifestError, match="'r4' is there twice"):
        Corpus.from_rows([*rows, rows[4]])
    assert len(corpus.subset([])) == 0


def test_read_several_and_duplicates_between_them(tmp_path: Path) -> None:
    one, two = manifest(tmp_path, good(3), "1.jsonl"), manifest(tmp_path, good(3, 3), "2.jsonl")
    assert [r.id for r in Corpus.read([one, two])] == [f"r{i}" for i in range(6)]
    with pytest.raises(ManifestError, match="'r0' is in more than one manifest"):
        Corpus.read([one, one])


def test_chunk_borders_keep_order_and_line_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CHUNK", 4)
    path = manifest(tmp_path, [*good(9), "", *good(1), *good(5, 9)])
    corpus = read_manifest(path)
    assert [r.id for r in corpus] == [f"r{i}" for i in range(14)]
    assert corpus.rejected == [(f"{path}:11", "duplicated id: 'r0'")]


def test_memory_is_arrow_not_python_objects() -> None:
    """200,000 rows stay under 100 bytes each, and no Row survives."""
    corpus = Corpus.from_rows(Row(f"clip-{i}", duration=1.0) for i in range(200_000))
    assert corpus.table.nbytes < 100 * 200_000 + 8 * 12 * 200_000
    assert corpus[123_456].id == "clip-123456"
    assert not any(isinstance(value, (list, dict)) and value for value in vars(corpus).values())


def test_write_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_manifest(path, [Row("old")])

    def failing() -> object:
        yield Row("new")
        raise BadRow("broke")

    with pytest.raises(BadRow):
        write_manifest(path, failing())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_manifest(path, [Row("new", duration=float("nan"))])
    assert [r.id for r in read_manifest(path)] == ["old"]
    assert os.listdir(tmp_path) == ["m.jsonl"]


def test_write_rejected(tmp_path: Path) -> None:
    write_rejected(tmp_path / "rejected.jsonl", [("a", "too short"), ("m:17", "bad")])
    lines = (tmp_path / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"row": "a", "reason": "too short"},
        {"row": "m:17", "reason": "bad"},
    ]


def test_pad_stack() -> None:
    padded, lengths = pad_stack([torch.ones(2, 3), torch.ones(2, 1)], value=-1)
    assert padded.tolist() == [[[1, 1, 1], [1, 1, 1]], [[1, -1, -1], [1, -1, -1]]]
    assert lengths.tolist() == [3, 1]
