"""Folds: which row is where, as a function of ids, sessions and speakers alone; leaking ones are refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from lalia.corpora import CorpusError
from lalia.corpora.folds import PARTS, Fold, Protocol, audited, make_folds, official_fold, write_folds
from lalia.data import Row, read_manifest

SESSION_TURNS = (1819, 1811, 2136, 2103, 2170)  # of IEMOCAP; 10,039 together


def iemocap() -> list[Row]:
    """A table of the size and the names of IEMOCAP."""
    rows = []
    for session, count in enumerate(SESSION_TURNS, start=1):
        for number in range(count):
            name = f"Ses{session:02d}"
            dialogue = f"{name}F_impro{number // 40:02d}"
            speaker = f"{name}{'FM'[number % 2]}"
            identifier = f"{dialogue}_{'FM'[number % 2]}{number % 40:03d}"
            extra = {"session": name, "scripted": False}
            rows.append(Row(identifier, speaker=speaker, dialogue=dialogue, labels={"valence": 3.0}, extra=extra))
    return rows


def ids(rows: list[Row], fold: Fold) -> dict[str, set[str]]:
    return {name: {rows[i].id for i in indices} for name, indices in fold.parts.items()}


def test_random5_has_exactly_8031_turns_in_training_of_fold_1_and_warns() -> None:
    rows = iemocap()
    folds = make_folds(rows, Protocol.random5)
    assert len(folds.folds[0].train) == 8031 == int(0.8 * len(rows))
    tested = [i for fold in folds.folds for i in fold.test]
    assert sorted(tested) == list(range(10039))
    assert all(fold.valid == fold.test and not set(fold.train) & set(fold.test) for fold in folds.folds)
    assert folds.leaking and not folds.refused and "LEAKS" in folds.verdict()[0]
    assert len(folds.audits[0]["train-test"].speakers) == 10


def test_the_order_of_the_rows_changes_nothing() -> None:
    rows = iemocap()[::20]
    mixed = random.Random(1).sample(rows, len(rows))
    for protocol in (Protocol.random5, Protocol.loso, Protocol.speakers):
        one, other = make_folds(rows, protocol), make_folds(mixed, protocol)
        assert [ids(rows, fold) for fold in one.folds] == [ids(mixed, fold) for fold in other.folds]


def test_leave_one_session_out_validates_on_a_session_that_is_not_tested() -> None:
    rows = iemocap()
    folds = make_folds(rows, Protocol.loso)
    assert [10039 - len(fold.test) for fold in folds.folds] == [8220, 8228, 7903, 7936, 7869]
    described = folds.describe(rows)
    sessions = [{part: about["sessions"] for part, about in fold["parts"].items()} for fold in described["folds"]]
    assert sessions[0] == {"train": ["Ses03", "Ses04", "Ses05"], "valid": ["Ses02"], "test": ["Ses01"]}
    assert sessions[4]["valid"] == ["Ses01"] and sessions[4]["test"] == ["Ses05"]
    assert not folds.leaking and "no speaker, session or dialogue crosses" in folds.verdict()[-1]
    assert set(described["folds"][0]["audit"]) == {"train-valid", "train-test", "valid-test"}


def test_folds_by_speaker_hold_every_speaker_out_once_with_both_genders() -> None:
    rows = [Row(f"{s}-{i}", speaker=f"s{s:02d}", extra={"gender": "FM"[s % 2]}) for s in range(24) for i in range(3)]
    folds = make_folds(rows, Protocol.speakers)
    assert sorted(i for fold in folds.folds for i in fold.test) == list(range(72)) and not folds.leaking
    for fold in folds.folds:
        assert {rows[i].extra["gender"] for i in fold.test} == {"F", "M"}


def test_random5_leaves_unlabelled_turns_out_and_says_so() -> None:
    rows = [*iemocap()[:100], Row("context", speaker="x", extra={"session": "Ses01"})]
    folds = make_folds(rows, Protocol.random5)
    assert 100 not in {i for fold in folds.folds for i in [*fold.train, *fold.test]}
    assert any("1 without labels" in note for note in folds.verdict())


def test_too_few_groups_and_nameless_rows_are_errors() -> None:
    two = [Row("a", extra={"session": "1"}), Row("b", extra={"session": "2"})]
    with pytest.raises(CorpusError, match="three sessions or speakers.*found 1, 2"):
        make_folds(two, Protocol.loso)
    with pytest.raises(CorpusError, match="row 'a' names no speaker"):
        make_folds(two, Protocol.speakers)
    with pytest.raises(CorpusError, match="official folds come from the corpus"):
        make_folds(two, Protocol.official)


def test_leaking_folds_are_refused_unless_that_is_wanted(tmp_path: Path) -> None:
    rows = [Row("a", speaker="kim"), Row("b", speaker="lee"), Row("c", speaker="kim")]
    parts = {"a": "train", "b": "valid", "c": "test"}
    with pytest.raises(CorpusError, match=r"fold 1, train-test: 1 speakers are in both parts: 'kim'"):
        write_folds(tmp_path, rows, official_fold(rows, parts))
    assert json.loads((tmp_path / "folds.json").read_text("utf-8"))["leaking"]
    assert not (tmp_path / "train.jsonl").exists() and not (tmp_path / "fold1").exists()
    write_folds(tmp_path, rows, official_fold(rows, parts, allow_leaks=True))
    assert [row.id for row in read_manifest(tmp_path / "test.jsonl")] == ["c"]


def test_manifests_of_every_fold_and_the_first_at_the_top(tmp_path: Path) -> None:
    rows = iemocap()[::100]
    folds = make_folds(rows, Protocol.loso)
    write_folds(tmp_path, rows, folds)
    for fold in folds.folds:
        for part in PARTS:
            found = [row.id for row in read_manifest(tmp_path / f"fold{fold.number}" / f"{part}.jsonl")]
            assert found == [rows[i].id for i in fold.parts[part]]
    for part in PARTS:
        assert (tmp_path / f"{part}.jsonl").read_bytes() == (tmp_path / "fold1" / f"{part}.jsonl").read_bytes()


def test_further_test_parts_are_audited_and_written_too(tmp_path: Path) -> None:
    rows = [Row(name, speaker=name) for name in "abcd"]
    folds = official_fold(rows, {"a": "train", "b": "valid", "c": "test", "d": "test2"})
    assert set(folds.audits[0]) == {"train-valid", "train-test", "train-test2", "valid-test", "valid-test2"}
    write_folds(tmp_path, rows, folds)
    assert [row.id for row in read_manifest(tmp_path / "test2.jsonl")] == ["d"]


def test_a_shared_scripted_sentence_is_counted_with_advice() -> None:
    rows = [Row(n, speaker=n, text="Same words.", extra={"scripted": True}) for n in "abc"]
    verdict = audited(rows, [Fold(1, [0], [1], [2])], Protocol.official).verdict()
    assert any("1 (in 1 of 1 test rows)" in line and "--improvised-only" in line for line in verdict)
