"""Feature shards: plain tar, found by key, resumed after a kill, bounded in memory."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from factories import make_corpus

from lalia.cache import INDEX, CacheError, ShardStore, ShardWriter, batches, fill, shard_key
from lalia.data import Corpus, Row
from lalia.features import FAILURES
from lalia.runfolder import RunLocked


def encode(waves: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
    """[T, 2] of each clip: every hundredth sample and where it is."""
    return [torch.stack([w[:n:100], torch.arange(0, n, 100) / 1000], 1) for w, n in zip(waves, lengths.tolist(), strict=True)]


@pytest.fixture
def rows(tmp_path) -> list[Row]:
    return list(Corpus.read([make_corpus(tmp_path / "corpus", 10)]))


def filled(rows, folder, **options) -> ShardStore:
    store = ShardStore(folder, "test", "1")
    fill(rows, store, encode, progress=False, **options)
    return store


def test_values_come_back_by_row_in_float16(rows, tmp_path) -> None:
    store = filled(rows, tmp_path / "shards", batch_seconds=3, shard_mb=0.005)
    assert len(store) == 10 and len(store.shards) > 2
    for again in (store, ShardStore(tmp_path / "shards", "test", "1")):
        for row in rows:
            value = again.get(row)
            wave = torch.from_numpy(soundfile.read(row.audio, dtype="float32")[0])
            torch.testing.assert_close(value.float(), encode(wave[None], torch.tensor([len(wave)]))[0], rtol=1e-3, atol=1e-3)
            assert value.dtype is torch.float16
    assert store.bytes == sum(p.stat().st_size for p in (tmp_path / "shards").glob("*.tar"))


def test_plain_tarfile_reads_webdataset_samples(rows, tmp_path) -> None:
    store = filled(rows, tmp_path / "shards")
    found = {}
    for path in (tmp_path / "shards").glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                found[member.name] = tar.extractfile(member).read()
    assert sorted(found) == sorted(f"{shard_key(row.id)}.{kind}" for row in rows for kind in ("npy", "json"))
    for row in rows:
        key = shard_key(row.id)
        np.testing.assert_array_equal(np.load(io.BytesIO(found[f"{key}.npy"])), store.array(key))
        about = json.loads(found[f"{key}.json"])
        assert (about["id"], about["text"], about["seconds"]) == (row.id, row.text, row.duration)


def test_equal_features_are_equal_bytes(rows, tmp_path) -> None:
    for name in ("a", "b"):
        filled(rows, tmp_path / name)
    one, two = (sorted(p.read_bytes() for p in (tmp_path / name).glob("*.tar")) for name in ("a", "b"))
    assert one == two


def test_a_second_run_computes_nothing_and_a_changed_recording_again(rows, tmp_path) -> None:
    store = filled(rows, tmp_path / "shards")
    again = fill(rows, store, encode, progress=False)
    assert (again.computed, again.kept) == (0, 10)
    os.utime(rows[3].audio, (1, 1))
    assert store.get(rows[3]) is None and store.get(rows[4]) is not None
    assert fill(rows, store, encode, progress=False).computed == 1
    assert store.get(rows[3]) is not None and len(store) == 10


KILLED = """
import os, signal, sys, torch
from lalia.cache import ShardStore, fill
from lalia.data import Corpus
rows = list(Corpus.read([sys.argv[1]]))
seen = []
def encode(waves, lengths):
    seen.append(len(waves))
    if len(seen) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return [torch.ones(2000, 2) * n for n in lengths.tolist()]
fill(rows, ShardStore(sys.argv[2], "test", "1"), encode, batch_seconds=0.1, shard_mb=0.015, progress=False)
"""


def test_what_a_killed_process_left_is_found_and_done_again(rows, tmp_path) -> None:
    folder = tmp_path / "shards"
    command = [sys.executable, "-c", KILLED, str(tmp_path / "corpus" / "all.jsonl"), str(folder)]
    source = str(Path(__file__).resolve().parents[1] / "src")
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": source}, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(folder.glob(".tmp-*.tar")), "a shard was half written"
    store = ShardStore(folder, "test", "1")
    assert 0 < len(store) < 5
    before = {key: store.array(key) for key in store.entries}
    result = fill(rows, store, encode, progress=False)
    assert result.kept == len(before) and result.computed == 10 - len(before) and not list(folder.glob(".tmp-*"))
    assert all(np.array_equal(store.array(key), value) for key, value in before.items())
    assert all(store.get(row) is not None for row in rows)


def test_a_shard_that_the_index_does_not_name_or_that_is_cut_short_is_done_again(rows, tmp_path, caplog) -> None:
    folder = tmp_path / "shards"
    store = filled(rows, folder, batch_seconds=1, shard_mb=0.005)
    (folder / "shard-000099.tar").write_bytes(b"not entered yet")
    last = sorted(store.shards)[0]
    (folder / last).write_bytes((folder / last).read_bytes()[:-700])
    again = ShardStore(folder, "test", "1")
    lost = 10 - len(again)
    assert 0 < lost < 10 and "cut short" in caplog.text
    assert fill(rows, again, encode, progress=False).computed == lost
    assert all(again.get(row) is not None for row in rows)
    assert {p.name for p in folder.glob("*.tar")} == set(again.shards)


def test_damage_inside_a_shard_is_named(rows, tmp_path) -> None:
    store = filled(rows, tmp_path / "shards")
    path = tmp_path / "shards" / next(iter(store.shards))
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CacheError, match="shard-000000.tar does not hold"):
        store.get(rows[0])


def test_other_features_are_refused(rows, tmp_path) -> None:
    filled(rows, tmp_path / "shards")
    with pytest.raises(CacheError, match="holds test 1, wanted test 2"):
        ShardStore(tmp_path / "shards", "test", "2")
    (tmp_path / "shards" / INDEX).write_text("{", encoding="utf-8")
    with pytest.raises(CacheError, match="cannot be read"):
        ShardStore(tmp_path / "shards", "test", "1")


def _read(store: ShardStore, row: Row, answers) -> None:
    answers.put(float(store.get(row).float().sum()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_it(method: str, rows, tmp_path) -> None:
    store = filled(rows, tmp_path / "shards")
    store.get(rows[0])
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    process = context.Process(target=_read, args=(store, rows[1], answers))
    process.start()
    assert answers.get(timeout=60) == float(store.get(rows[1]).float().sum())
    process.join()


def test_failed_rows_are_listed_and_their_batch_is_not_lost(rows, tmp_path) -> None:
    bad = Row("gone", str(tmp_path / "gone.wav"), duration=1.0)

    def choosy(waves: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
        if 0.8 * 16000 in lengths.tolist():
            raise ValueError("too short for me")
        return [torch.full((2,), 1e9 if n == 19200 else 1.0) for n in lengths.tolist()]

    store = ShardStore(tmp_path / "shards", "test", "1")
    result = fill([*rows, bad, Row("text only")], store, choosy, progress=False, longest_seconds=1.15)
    reasons = dict(result.failed)
    short = [row.id for row in rows if row.duration == 0.8]
    assert all(reasons[name] == "too short for me" for name in short) and "gone.wav" in reasons["gone"]
    assert reasons["text only"] == "the row names no audio"
    assert all("1.2 s are more than the limit" in reasons[row.id] for row in rows if row.duration == 1.2)
    assert result.computed == len(store) == 10 - len(short) - 2
    assert (tmp_path / "shards" / FAILURES).read_text(encoding="utf-8").count("\n") == len(reasons)


def test_float16_overflow_is_a_failure_of_the_row(rows, tmp_path) -> None:
    store = ShardStore(tmp_path / "shards", "test", "1")
    result = fill(rows[:2], store, lambda w, n: [torch.full((2,), 1e6), torch.ones(2)], progress=False)
    assert len(store) == 1 and "not finite in float16" in result.failed[0][1]


def test_a_fault_of_the_program_ends_it_and_keeps_whole_shards(rows, tmp_path) -> None:
    store, calls = ShardStore(tmp_path / "shards", "test", "1"), []

    def breaks(waves: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
        calls.append(1)
        return encode(waves, lengths) if len(calls) < 4 else [][0]

    with pytest.raises(IndexError):
        fill(rows, store, breaks, batch_seconds=0.1, shard_mb=0.001, progress=False)
    assert len(ShardStore(tmp_path / "shards", "test", "1")) == 3 and not list((tmp_path / "shards").glob(".tmp-*"))


def test_memory_holds_one_batch(rows) -> None:
    groups = list(batches(rows, 3.0))
    assert sorted(row.id for group in groups for row in group) == sorted(row.id for row in rows)
    assert all(len(group) * max(row.duration for row in group) <= 3.0 for group in groups) and len(groups) < len(rows)
    unknown = [Row("a", "a.wav"), Row("b", "b.wav")]
    assert [len(group) for group in batches(unknown, 3.0)] == [1, 1]


def test_two_writers_do_not_meet(rows, tmp_path) -> None:
    store = ShardStore(tmp_path / "shards", "test", "1")
    with ShardWriter(store), pytest.raises(RunLocked), ShardWriter(ShardStore(tmp_path / "shards", "test", "1")):
        pass


def test_keys_end_at_no_dot_and_differ() -> None:
    names = ["a.b", "a/b", "a_b", "ä", "x" * 300, "x" * 301, "1089-134686-0000"]
    keys = [shard_key(name) for name in names]
    assert len(set(keys)) == len(names) and not any(set("./ ") & set(key) for key in keys)
    assert keys[-1] == names[-1] and max(map(len, keys)) + len(".json") < 100
