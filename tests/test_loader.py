from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from lalia import audio, loader
from lalia.data import BadRow, Corpus, ManifestError, Row, pad_stack
from lalia.loader import Loader, _Task, effective_workers, usable, write_dataset_report
from lalia.sections import BatchPlan, DataConfig, RunConfig
from lalia.system import Clock, System, TensorBatch

RATE, HOP = 8000, 80


@dataclass
class Batch(TensorBatch):
    """``wave`` float32 [B, S]; ``noise`` [B, 3] drawn from Python, numpy and torch; ``steps`` of the clocks."""

    ids: list[str]
    wave: Tensor
    noise: Tensor
    steps: list[int]
    threads: int


class Fake(System):
    """Loads the row's audio; rows whose text is ``bad`` fail in prepare, rows without text are rejected before."""

    def reject(self, row: Row) -> str:
        return "" if row.text else "no text"

    def length(self, row: Row) -> float:
        return row.duration * RATE / HOP

    def prepare(self, row: Row, clock: Clock) -> tuple[str, Tensor, list[float], int]:
        if row.text == "bad":
            raise BadRow("too bad: 3 of 4")
        if row.text == "bug":
            raise KeyError("typo")
        wave, _ = audio.read(row.audio, RATE, row.start, row.duration)
        noise = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        return row.id, torch.from_numpy(wave), noise, clock.step

    def collate(self, examples: Sequence[Any]) -> Batch:
        ids, waves, noise, steps = zip(*examples, strict=True)
        return Batch(list(ids), pad_stack(waves)[0], torch.tensor(noise), list(steps), torch.get_num_threads())


def make_system() -> Fake:
    return Fake(RunConfig(), {})


def make_corpus(folder: Path, count: int = 12, bad: Sequence[int] = ()) -> Corpus:
    rows = []
    for i in range(count):
        path = folder / f"{i}.wav"
        samples = RATE // 10 + 100 * i
        soundfile.write(path, np.full(samples, 0.1, dtype=np.float32), RATE)
        rows.append(Row(f"r{i}", str(path), 0.0, samples / RATE, "bad" if i in bad else "ok", "ab"[i % 2], "en"))
    return Corpus.from_rows(rows)


def seen(batches: Sequence[Batch]) -> dict[str, list[float]]:
    return {name: b.noise[i].tolist() for b in batches for i, name in enumerate(b.ids)}


@pytest.mark.parametrize(
    ("wanted", "cores", "got"), [(4, 1, 1), (4, 2, 1), (4, 8, 4), (16, 8, 7), (0, 8, 0), (1, 1, 1)]
)
def test_effective_workers(wanted: int, cores: int, got: int) -> None:
    assert effective_workers(wanted, cores) == got


def test_workers_and_main_process_give_the_same_batches(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    runs = []
    for workers in (0, 1):
        made = Loader(make_system(), corpus, DataConfig(batch_size=4, workers=workers), seed=3, pin=True)
        runs.append([list(made.batches(epoch)) for epoch in (0, 1, 0)])
        made.close()
    assert torch.cuda.is_available() or not runs[0][0][0].wave.is_pinned()
    for epoch in range(3):
        assert [b.ids for b in runs[0][epoch]] == [b.ids for b in runs[1][epoch]]
        for ours, theirs in zip(runs[0][epoch], runs[1][epoch], strict=True):
            assert torch.equal(ours.noise, theirs.noise)
            assert torch.equal(ours.wave, theirs.wave)
    assert seen(runs[0][0]) == seen(runs[0][2])
    assert sorted(seen(runs[0][0])) == sorted(r.id for r in corpus)
    assert runs[1][0][0].threads == 1
    assert all(seen(runs[0][0])[i] != seen(runs[0][1])[i] for i in seen(runs[0][0])), "another epoch, other numbers"


def test_a_spawned_process_gets_the_data_side_alone(tmp_path: Path) -> None:
    """Windows and macOS pickle the data set for each loader process; networks with weight norm refuse that."""
    corpus, system = make_corpus(tmp_path, 4), make_system()
    system.network = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2))
    made = Loader(system, corpus, DataConfig(batch_size=2, workers=0), seed=3)
    there = ForkingPickler.loads(ForkingPickler.dumps(made._dataset))
    assert not list(there.system.parameters()) and len(list(system.parameters())) == 3
    task = _Task((0, 1), Clock(3))
    assert torch.equal(there[task].batch.noise, made._dataset[task].batch.noise)


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_sigterm_to_all_processes_is_left_to_the_trainer(tmp_path: Path) -> None:
    made = Loader(make_system(), make_corpus(tmp_path, 12), DataConfig(batch_size=2, workers=1, prefetch=1), seed=3)
    batches = made.batches(0)
    got = [next(batches)]
    (worker,) = made._loader._iterator._workers  # type: ignore[union-attr]
    os.kill(worker.pid, signal.SIGTERM)
    got += list(batches)
    assert len(seen(got)) == 12 and worker.is_alive()
    made.close()


def test_randomness_depends_on_the_row_not_on_its_batch_or_step(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    small = Loader(make_system(), corpus, DataConfig(batch_size=2, workers=0), seed=3)
    large = Loader(make_system(), corpus, DataConfig(batch_size=5, workers=0), seed=3)
    other = Loader(make_system(), corpus, DataConfig(batch_size=5, workers=0), seed=4)
    assert seen(list(small.batches(2, clock_step=100))) == seen(list(large.batches(2)))
    assert seen(list(other.batches(2))) != seen(list(large.batches(2)))


@pytest.mark.parametrize("workers", [0, 1])
def test_resume_in_mid_epoch_is_exact_and_decodes_nothing_before(tmp_path: Path, workers: int) -> None:
    corpus = make_corpus(tmp_path)
    made = Loader(make_system(), corpus, DataConfig(batch_size=2, workers=workers), seed=3)
    whole = list(made.batches(1, clock_step=60))
    assert [b.steps[0] for b in whole] == list(range(60, 66))
    begun = made.batches(1)
    next(begun)
    begun.close()
    again = Loader(make_system(), corpus, DataConfig(batch_size=2, workers=workers), seed=3)
    for batch in whole[:4]:
        for name in batch.ids:
            Path(corpus[int(name[1:])].audio).unlink()
    for late in (made, again):
        rest = list(late.batches(1, start=4, clock_step=64))
        assert [b.ids for b in rest] == [b.ids for b in whole[4:]]
        assert [b.steps for b in rest] == [b.steps for b in whole[4:]]
        assert seen(rest) == seen(whole[4:])
        late.close()


def test_loading_in_the_main_process_leaves_its_random_state(tmp_path: Path) -> None:
    made = Loader(make_system(), make_corpus(tmp_path, 4), DataConfig(batch_size=2, workers=0), seed=3)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = (random.random(), np.random.rand(), torch.rand(()).item())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    list(made.batches(0))
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_rows_shrink_their_batch_and_are_reported_once(tmp_path: Path, workers: int) -> None:
    corpus, told = make_corpus(tmp_path, 12, bad=(0, 5)), list[tuple[str, str]]()
    Path(corpus[7].audio).write_bytes(b"RIFF")
    config = DataConfig(batch_size=3, workers=workers, max_bad_fraction=0.3)
    made = Loader(make_system(), corpus, config, seed=3, on_bad=lambda *bad: told.append(bad))
    both = [list(made.batches(0)), list(made.batches(0))]
    assert [b.ids for b in both[0]] == [b.ids for b in both[1]]
    assert len(both[0]) == made.count(0) == 4
    assert sorted(seen(both[0])) == sorted(f"r{i}" for i in range(12) if i not in (0, 5, 7))
    reasons = dict(told)
    assert len(told) == 3
    assert reasons["r5"] == "too bad: 3 of 4"
    assert reasons["r7"].startswith("unreadable audio: ")
    made.close()


def test_a_wholly_bad_batch_is_replaced_and_too_many_bad_rows_end_the_run(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, 12, bad=(0, 1))
    config = DataConfig(batch_size=2, workers=0, max_bad_fraction=0.2, jitter=0.0)
    made = Loader(make_system(), corpus, config, seed=3)
    batches = list(made.batches(0))
    position = next(i for i, rows in enumerate(made.plan(0)) if set(rows) == {0, 1})
    assert len(batches) == 6
    assert batches[position].ids == batches[(position + 1) % 6].ids
    strict = DataConfig(batch_size=2, workers=0, max_bad_fraction=0.1)
    with pytest.raises(ManifestError, match=r"2 of 12 rows cannot be used.*2 × too bad"):
        list(Loader(make_system(), corpus, strict, seed=3).batches(0))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_programming_error_names_the_row(tmp_path: Path, workers: int) -> None:
    corpus = Corpus.from_rows([Row("r9", text="bug", duration=1.0)])
    made = Loader(make_system(), corpus, DataConfig(workers=workers), seed=1)
    with pytest.raises(RuntimeError, match="row 'r9' could not be prepared: KeyError"):
        list(made.batches(0))
    made.close()


def test_ranks_share_an_epoch(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, 11)
    ranks = [Loader(make_system(), corpus, DataConfig(batch_size=2, workers=0), 3, rank, 2) for rank in (0, 1)]
    assert ranks[0].count(5) == ranks[1].count(5)
    ids = [name for each in ranks for b in each.batches(5) for name in b.ids]
    assert sorted(ids) == sorted(r.id for r in corpus)


def test_seconds_per_unit_and_budget(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    made = Loader(make_system(), corpus, DataConfig(batch_size=100, batch_seconds=0.5, workers=0), seed=3)
    assert made.seconds_per_unit == pytest.approx(HOP / RATE)
    assert all(b.wave.numel() / RATE <= 0.5 for b in made.batches(0))
    assert 0 < made.waste(0) < 0.2
    assert loader.seconds_per_unit(np.zeros(3), np.ones(3)) == 1.0


def formats(folder: Path) -> list[Row]:
    """The same half second in stereo, float, flac, 24 bit and 8 bit: file sizes differ by 12 x, lengths do not."""
    wave = np.random.default_rng(0).uniform(-0.1, 0.1, (4000, 2))
    kinds = [("a.wav", "PCM_16", 1), ("b.wav", "FLOAT", 2), ("c.flac", "PCM_24", 2), ("d.wav", "PCM_24", 1)]
    rows = []
    for name, subtype, channels in kinds:
        soundfile.write(folder / name, wave[:, :channels], RATE, subtype=subtype)
        rows.append(Row(name, str(folder / name), text="ok"))
    return rows


def test_usable_takes_durations_from_headers_not_sizes(tmp_path: Path) -> None:
    rows = [*formats(tmp_path), Row("tail", str(tmp_path / "a.wav"), 0.3, text="ok")]
    corpus, rejected = usable(make_system(), Corpus.from_rows(rows), DataConfig())
    assert rejected == []
    assert corpus.durations() == pytest.approx([0.5, 0.5, 0.5, 0.5, 0.2])


def test_usable_names_every_excluded_row_and_writes_the_report(tmp_path: Path) -> None:
    good = formats(tmp_path)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "noise.wav").write_bytes(b"not audio at all")
    soundfile.write(tmp_path / "long.wav", np.zeros(2 * RATE), RATE)
    soundfile.write(tmp_path / "short.wav", np.zeros(400), RATE)
    soundfile.write(tmp_path / "edge.wav", np.zeros(RATE * 4 // 10), RATE)
    bad = {
        "gone": (Row("gone", str(tmp_path / "gone.wav"), text="ok"), "missing audio"),
        "empty": (Row("empty", str(tmp_path / "empty.wav"), text="ok"), "empty audio file"),
        "noise": (Row("noise", str(tmp_path / "noise.wav"), text="ok"), "unreadable audio"),
        "past": (Row("past", str(tmp_path / "a.wav"), 0.4, 0.4, text="ok"), "past the end"),
        "long": (Row("long", str(tmp_path / "long.wav"), text="ok"), "too long"),
        "short": (Row("short", str(tmp_path / "short.wav"), text="ok"), "too short"),
        "mute": (Row("mute", str(tmp_path / "a.wav"), text=""), "no text"),
        "edge": (Row("edge", str(tmp_path / "edge.wav"), text="ok"), "below the buckets"),
    }
    source = Corpus.from_rows([*good, *(row for row, _ in bad.values())], rejected=[("m.jsonl:17", "bad JSON: x")])
    config = DataConfig(
        min_seconds=0.1, max_seconds=1.0, max_bad_fraction=0.9, plan=BatchPlan.buckets, boundaries=[40.0, 60.0]
    )
    corpus, rejected = usable(make_system(), source, config)
    assert [r.id for r in corpus] == [r.id for r in good]
    assert rejected[0] == ("m.jsonl:17", "bad JSON: x")
    assert {row: reason.split(":")[0] for row, reason in rejected[1:]} == {k: why for k, (_, why) in bad.items()}
    write_dataset_report(tmp_path / "dataset_report.json", corpus, rejected)
    report = json.loads((tmp_path / "dataset_report.json").read_text())
    assert (report["rows"], report["usable"], len(report["rejected"])) == (13, 4, 9)
    assert report["hours"] == pytest.approx(2 / 3600, abs=1e-4)
    assert report["reasons"]["too long"] == 1
    config.max_bad_fraction = 0.6
    with pytest.raises(ManifestError, match=r"9 of 13 rows cannot be used.*1 × missing audio"):
        usable(make_system(), source, config)


def test_zero_usable_rows_is_an_error(tmp_path: Path) -> None:
    corpus = Corpus.from_rows([Row("a", text="")])
    with pytest.raises(ManifestError, match=r"no usable row of 1 \(1 × no text\)"):
        usable(make_system(), corpus, DataConfig(max_bad_fraction=1.0))
    with pytest.raises(ManifestError, match="no rows at all"):
        usable(make_system(), corpus.subset([]), DataConfig())
