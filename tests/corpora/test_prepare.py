"""The driver: reasons of rejection, split, report, limits."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile
from factories import make_corpus, make_wave, write_wav

from lalia import audio
from lalia.corpora import SOURCES, SPLITS, CorpusError, prepare, split_of
from lalia.corpora._common import file_name, text_units
from lalia.data import read_manifest


def run(source, out, **options):
    return prepare(source, out, progress=False, **options)


def rejected(out) -> dict[str, str]:
    """id (or place) → reason."""
    records = [json.loads(line) for line in (out / "rejected.jsonl").read_text("utf-8").splitlines()]
    return {record["id"] or record["path"].rsplit("/", 1)[-1]: record["reason"] for record in records}


def rows(out) -> dict[str, object]:
    found = {}
    for name in SPLITS:
        if (out / f"{name}.jsonl").stat().st_size:
            found.update({row.id: row for row in read_manifest(out / f"{name}.jsonl")})
    return found


@pytest.fixture
def bad_folder(tmp_path):
    """One clip for each fate."""
    folder = tmp_path / "in"
    write_wav(folder / "good.wav", 1.0)
    write_wav(folder / "short.wav", 0.3)
    write_wav(folder / "long.wav", 3.0)
    write_wav(folder / "fast.wav", 0.6)
    write_wav(folder / "slow.wav", 2.5)
    write_wav(folder / "wordless.wav", 1.0)
    write_wav(folder / "signs.wav", 1.0)
    write_wav(folder / "cut.flac", 2.0)
    (folder / "cut.flac").write_bytes((folder / "cut.flac").read_bytes()[:9000])
    (folder / "empty.wav").touch()
    (folder / "noise.mp3").write_bytes(b"this is not audio" * 99)
    soundfile.write(folder / "silent.wav", np.zeros(16000), 16000)
    for stem in ("good", "short", "long", "cut", "empty", "noise", "silent", "orphan"):
        (folder / f"{stem}.txt").write_text("A few good words.", "utf-8")
    (folder / "fast.txt").write_text("far too many words for such a short recording", "utf-8")
    (folder / "slow.txt").write_text("a", "utf-8")
    (folder / "signs.txt").write_text(" …!? ", "utf-8")
    return folder


def test_every_reason_of_rejection(tmp_path, bad_folder):
    out = tmp_path / "out"
    with pytest.raises(CorpusError, match=r"11 of 12 clips .*above max_bad_fraction 0\.2; see .*rejected"):
        run("folder", out, inputs=[str(bad_folder)], max_seconds=2.6)
    assert rejected(out) == {
        "short": "too short", "long": "too long", "fast": "implausible characters per second",
        "slow": "implausible characters per second", "wordless": "no transcript", "signs": "no transcript",
        "cut": "unreadable", "empty": "empty file", "noise": "unreadable", "silent": "silent",
        "orphan": "missing audio",
    }  # fmt: skip
    report = json.loads((out / "report.json").read_text("utf-8"))
    assert report["found"] == 12 and report["usable"] == 1 and sum(report["rejected"].values()) == 11
    tolerant = run("folder", out, inputs=[str(bad_folder)], max_seconds=2.6, max_bad_fraction=0.95, split=(1, 0, 0))
    assert tolerant.usable == 1


def test_nothing_usable_is_an_error(tmp_path):
    write_wav(tmp_path / "in" / "a.wav", 0.1)
    (tmp_path / "in" / "a.txt").write_text("ab", "utf-8")
    with pytest.raises(CorpusError, match=r"no usable clip among 1 \(1 too short\)"):
        run("folder", tmp_path / "out", inputs=[str(tmp_path / "in")], max_bad_fraction=1.0)
    (tmp_path / "none").mkdir()
    with pytest.raises(CorpusError, match="found no clip at all"):
        run("folder", tmp_path / "out", inputs=[str(tmp_path / "none")])


def test_manifests_and_report_agree_and_audio_is_rewritten(tmp_path):
    manifest = make_corpus(tmp_path / "in", clips=40)
    out = tmp_path / "out"
    report = run("jsonl", out, inputs=[str(manifest)], sample_rate=8000, split=(0.6, 0.2, 0.2))
    found = rows(out)
    assert report.usable == len(found) == 40 and sum(report.clips.values()) == 40 and min(report.clips.values()) > 0
    for name in SPLITS:
        assert all(split_of(row.id, (0.6, 0.2, 0.2)) == name for row in read_manifest(out / f"{name}.jsonl"))
    total = sum(row.duration for row in found.values()) / 3600
    for hours in (report.hours, report.hours_by_speaker, report.hours_by_language):
        assert sum(hours.values()) == pytest.approx(total, abs=3e-4)
    assert set(report.hours_by_speaker) == {"s0", "s1"} and set(report.hours_by_language) == {"en"}
    for row in found.values():
        wave, rate = audio.read(row.audio)
        assert rate == 8000 and len(wave) / rate == row.duration and row.audio.startswith(str(out.resolve()))
    assert "usable" in report.summary() and "train" in report.summary()


def test_without_a_wish_the_audio_stays_where_it_is(tmp_path):
    manifest = make_corpus(tmp_path / "in", clips=4)
    run("jsonl", tmp_path / "out", inputs=[str(manifest)])
    assert not (tmp_path / "out" / "audio").exists()
    assert {row.audio for row in rows(tmp_path / "out").values()} == {
        str((tmp_path / "in" / "audio" / f"clip{i:03d}.wav").resolve()) for i in range(4)
    }


def test_trim_on_request(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    padded = np.concatenate([np.zeros(16000), make_wave(1.0), np.zeros(8000)])
    soundfile.write(folder / "a.wav", padded, 16000)
    (folder / "a.txt").write_text("Some words here.", "utf-8")
    report = run("folder", tmp_path / "out", inputs=[str(folder)], trim=True, split=(1.0, 0.0, 0.0))
    assert report.seconds["max"] == pytest.approx(1.1, abs=0.03)
    assert any("valid split is empty" in note for note in report.notes)


def test_full_scale_clips_are_not_clipped_by_resampling(tmp_path, caplog):
    folder = tmp_path / "in"
    folder.mkdir()
    square = np.sign(np.sin(2 * np.pi * 200 * np.arange(44100) / 44100)).astype(np.float32)
    soundfile.write(folder / "a.wav", square, 44100)
    (folder / "a.txt").write_text("Loud words.", "utf-8")
    run("folder", tmp_path / "out", inputs=[str(folder)], sample_rate=16000)
    assert "clipped" not in caplog.text


def test_split_depends_on_the_id_alone_and_meets_the_shares():
    names = [split_of(f"clip-{i}") for i in range(20000)]
    shares = [names.count(name) / 20000 for name in SPLITS]
    assert shares == pytest.approx([0.9, 0.05, 0.05], abs=0.01)
    assert (split_of("en-activated"), split_of("en-added")) == ("train", "train")  # the same in every release
    assert {split_of(str(i), (1.0, 0.0, 0.0)) for i in range(1000)} == {"train"}


def test_added_rows_move_no_other(tmp_path):
    manifest = make_corpus(tmp_path / "in", clips=30)
    run("jsonl", tmp_path / "all", inputs=[str(manifest)])
    lines = manifest.read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "in" / "few.jsonl").write_text("".join(lines[::2]), "utf-8")
    run("jsonl", tmp_path / "few", inputs=[str(tmp_path / "in" / "few.jsonl")])
    for name in SPLITS:
        ids = [{json.loads(x)["id"] for x in (tmp_path / d / f"{name}.jsonl").open()} for d in ("few", "all")]
        assert ids[0] <= ids[1]


def test_texts_shared_between_test_and_training_are_counted(tmp_path):
    manifest = make_corpus(tmp_path / "in", clips=40)
    records = [json.loads(line) for line in manifest.read_text("utf-8").splitlines()]
    for record in records:
        record["text"] = "Always the same."
    manifest.write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
    report = run("jsonl", tmp_path / "out", inputs=[str(manifest)])
    assert report.shared_texts == report.clips["test"] > 0


def test_the_same_call_gives_the_same_files(tmp_path):
    manifest = make_corpus(tmp_path / "in", clips=6)
    contents = []
    for _ in range(2):
        run("jsonl", tmp_path / "out", inputs=[str(manifest)], sample_rate=8000)
        files = sorted(p for p in (tmp_path / "out").rglob("*") if p.is_file())
        contents.append({str(p): p.read_bytes() for p in files})
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("foldr", {}, "no source 'foldr'.*folder"),
        ("folder", {"sample_rat": 1}, "no option 'sample_rat'.*sample_rate"),
        ("folder", {}, "at least one folder"),
        ("folder", {"inputs": ["/nowhere"]}, "no such folder"),
        ("jsonl", {"inputs": ["/nowhere.jsonl"]}, "no such file"),
        ("folder", {"min_seconds": 5.0, "max_seconds": 1.0}, "min_seconds"),
        ("folder", {"split": (0.5, 0.5, 0.5)}, "three shares"),
        ("folder", {"split": (0.0, 0.5, 0.5)}, "three shares"),
        ("folder", {"sample_rate": 16}, "sample_rate"),
        ("asterisk", {"languages": ["de"]}, "languages of asterisk"),
        ("synth", {"sentences": 0}, "sentences"),
    ],
)
def test_wrong_options_are_named(tmp_path, source, options, message):
    with pytest.raises(CorpusError, match=message):
        run(source, tmp_path / "out", **options)


def test_the_table_names_what_the_command_offers():
    speech = {"asterisk", "folder", "jsonl", "list", "synth", "ljspeech", "librispeech"}
    assert set(SOURCES) == speech | {"dialogues", "iemocap", "msp_podcast", "cremad", "ravdess"} | {"text", "sines", "instructions"}


def test_units_of_text():
    assert text_units("Hello, world!") == 10
    assert text_units("Press 10") == 5 + 8
    assert text_units("你好。") == 6
    assert text_units("こんにちは") == 15
    assert text_units("…!?") == 0


def test_file_names_are_safe_and_distinct():
    assert file_name("en-activated.1") == "en-activated.1"
    names = {file_name(i) for i in ("a/b", "a b", "a_b", "../a", "a" * 300, "a" * 301, "", "话/语")}
    assert len(names) == 8 and all("/" not in n and len(n) < 100 and not n.startswith(".") for n in names)
