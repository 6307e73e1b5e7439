from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from cli_runner import lalia, refused
from factories import write_wav
from torch import Tensor

from lalia import audio
from lalia.data import Corpus, ManifestError, Row, write_manifest
from lalia.features import FAILURES, FeatureStore, egemaps_of, egemaps_store, extract, file_name, recordings
from lalia.safeload import UnsafePickle


def loudness(row: Row) -> Tensor:
    """A feature that shows what was read: samples and energy. At the top of the module, so that it reaches other processes."""
    wave, _ = audio.read(row.audio, start=row.start, duration=row.duration)
    return torch.tensor([float(len(wave)), float((wave**2).sum())])


def not_finite(row: Row) -> Tensor:
    return torch.tensor([float("nan")])


def dies(row: Row) -> Tensor:
    os._exit(3)


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    made = []
    for index in range(5):
        path = tmp_path / "audio" / f"{index}.wav"
        write_wav(path, 0.2 + 0.1 * index, seed=index)
        made.append(Row(f"a/b {index}", str(path)))
    return made


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore(tmp_path / "features", "loudness", "1")


def test_one_tensors_only_file_a_row_that_reads_back(rows: list[Row], store: FeatureStore) -> None:
    assert store.get(rows[0]) is None
    whole = torch.arange(6.0)
    store.put(rows[0], whole[2:4])
    assert torch.equal(store.get(rows[0]), torch.tensor([2.0, 3.0]))  # type: ignore[arg-type]
    stored = torch.load(store.path(rows[0]), weights_only=True)
    assert len(stored["value"].untyped_storage()) == 8  # a view does not drag its whole storage along
    assert not [p for p in store.folder.iterdir() if p.suffix != ".pt"]


def test_names_are_safe_and_unlike() -> None:
    names = [file_name(i) for i in ("Ses01F_impro01_F000", "a/b", "a_b", "a b", "../../etc", "é" * 200, "")]
    assert names[0] == "Ses01F_impro01_F000" and len(set(names)) == len(names)
    assert not any("/" in name or name.startswith(".") or len(name.encode()) > 250 for name in names)


def test_a_changed_recording_segment_or_version_is_stale(rows: list[Row], store: FeatureStore) -> None:
    store.put(rows[0], torch.ones(2))
    assert store.get(replace(rows[0], start=0.1)) is None
    assert store.get(replace(rows[0], duration=0.1)) is None
    assert FeatureStore(store.folder, "loudness", "2").get(rows[0]) is None
    assert FeatureStore(store.folder, "pitch", "1").get(rows[0]) is None
    os.utime(rows[0].audio, ns=(1, 1))
    assert store.get(rows[0]) is None
    store.put(rows[0], torch.ones(2))
    write_wav(rows[0].audio, 0.35, seed=9)
    os.utime(rows[0].audio, ns=(1, 1))  # the same time, another size
    assert store.get(rows[0]) is None
    os.unlink(rows[0].audio)
    assert store.get(rows[0]) is None


def test_a_duration_of_0_is_what_the_header_says(rows: list[Row], store: FeatureStore) -> None:
    """Manifests may leave the duration out; training fills it in from the header and must find what was stored."""
    store.put(rows[0], torch.ones(2))
    assert store.get(replace(rows[0], duration=0.2)) is not None
    store.put(rows[1], torch.ones(2))
    store.put(replace(rows[2], duration=audio.info(rows[2].audio).seconds), torch.ones(2))
    assert store.get(rows[2]) is not None
    store.put(replace(rows[3], duration=0.3), torch.ones(2))  # a part of the file
    assert store.get(rows[3]) is None


def test_a_damaged_file_is_computed_anew_and_a_program_is_refused(rows: list[Row], store: FeatureStore) -> None:
    store.put(rows[0], torch.ones(2))
    path = store.path(rows[0])
    path.write_bytes(path.read_bytes()[:100])
    assert store.get(rows[0]) is None
    assert extract(rows[:1], store, loudness, progress=False).computed == 1 and store.get(rows[0]) is not None
    torch.save({"value": sys.exit}, path)
    with pytest.raises(UnsafePickle):
        store.get(rows[0])


def test_extraction_goes_on_and_lists_failures(rows: list[Row], store: FeatureStore, tmp_path: Path) -> None:
    first = extract(rows[:2], store, loudness, progress=False)
    assert (first.computed, first.kept, len(first)) == (2, 0, 0) and not (store.folder / FAILURES).exists()
    empty = tmp_path / "empty.wav"
    empty.touch()
    bad = [Row("gone", str(tmp_path / "gone.wav")), Row("empty", str(empty)), Row("text only")]
    second = extract([*bad, *rows], store, loudness, progress=False)
    assert (second.computed, second.kept) == (3, 2) and [row for row, _ in second] == ["gone", "empty", "text only"]
    assert second.fraction == pytest.approx(3 / 8)
    lines = (store.folder / FAILURES).read_text().splitlines()
    assert len(lines) == 3 and "gone.wav" in lines[0]
    for row in rows:
        assert torch.equal(store.get(row), loudness(row))  # type: ignore[arg-type]
    third = extract(rows, store, loudness, progress=False)
    assert (third.computed, third.kept) == (0, 5) and not (store.folder / FAILURES).exists()


def test_features_that_are_not_finite_are_failures(rows: list[Row], store: FeatureStore) -> None:
    assert "not finite" in extract(rows[:1], store, not_finite, progress=False).failed[0][1]
    assert store.get(rows[0]) is None


def test_a_fault_of_the_program_is_not_swallowed(rows: list[Row], store: FeatureStore) -> None:
    def broken(row: Row) -> Tensor:
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        extract(rows, store, broken, progress=False)


def test_processes_give_the_same_and_a_dead_one_is_told(rows: list[Row], store: FeatureStore, tmp_path: Path) -> None:
    result = extract([*rows, Row("gone", str(tmp_path / "gone.wav"))], store, loudness, workers=2, progress=False)
    assert (result.computed, len(result)) == (5, 1)
    assert all(torch.equal(store.get(row), loudness(row)) for row in rows)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="worker process died"):
        extract(rows, FeatureStore(tmp_path / "other", "loudness", "1"), dies, workers=1, progress=False)


def test_rows_of_several_manifests_count_once(rows: list[Row], tmp_path: Path) -> None:
    write_manifest(tmp_path / "a.jsonl", rows[:3])
    write_manifest(tmp_path / "b.jsonl", rows[2:])
    assert [row.id for row in recordings([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])] == [row.id for row in rows]
    write_manifest(tmp_path / "c.jsonl", [replace(rows[0], audio=rows[1].audio)])
    with pytest.raises(ManifestError, match="'a/b 0' is one recording"):
        recordings([tmp_path / "a.jsonl", tmp_path / "c.jsonl"])


def test_the_command_fills_the_folder_that_training_reads(rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lalia.features.egemaps_of", loudness)
    monkeypatch.setattr("lalia.egemaps.VERSION", "test", raising=False)
    write_manifest(tmp_path / "train.jsonl", [*rows, Row("gone", str(tmp_path / "gone.wav"))])
    done = lalia("features", "egemaps", tmp_path / "train.jsonl", "--workers", 0, "--max-bad-fraction", 0.2)
    assert done.exit_code == 0 and "5 computed" in done.output and "1 failed" in done.output and "gone" in done.output
    store = egemaps_store(tmp_path / "features" / "egemaps")
    assert all(store.get(row) is not None for row in Corpus.read([tmp_path / "train.jsonl"]) if row.id != "gone")
    again = lalia("features", "egemaps", tmp_path / "train.jsonl", "--workers", 0)
    assert again.exit_code == 1 and "5 there before" in again.output and "above --max-bad-fraction" in again.output
    assert lalia("features", "egemaps", tmp_path / "train.jsonl", "-o", tmp_path / "x", "--workers", 0).exit_code == 1
    assert len(list((tmp_path / "x").glob("*.pt"))) == 5
    assert "no manifest" in refused("features", "egemaps", tmp_path / "absent.jsonl")


def test_functionals_do_not_depend_on_the_rate_of_the_file(tmp_path: Path) -> None:
    wave = write_wav(tmp_path / "a.wav", 1.0)
    soundfile.write(tmp_path / "b.wav", audio.resample(wave, 16000, 48000), 48000)
    first, second = (egemaps_of(Row(name, str(tmp_path / f"{name}.wav"))) for name in "ab")
    assert first.shape == (88,) and first.dtype == torch.float32 and bool(torch.isfinite(first).all())
    assert float(np.corrcoef(first, second)[0, 1]) > 0.99
