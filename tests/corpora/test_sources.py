"""Each source on a tiny generated tree; nothing here needs a network."""

from __future__ import annotations

import gzip
import json
import subprocess
from pathlib import Path

import pytest
from factories import make_corpus, make_wave, write_container, write_wav
from test_prepare import rejected, rows, run

from lalia import audio
from lalia.corpora import CorpusError, CorpusUnavailable, _debian, synth
from lalia.corpora._sentences import MOST_SENTENCES, sentences
from lalia.corpora.asterisk import parse_transcript, spoken_text

WORDS = "Some plain words."


# --- folder ---
def test_folder_with_sidecars_and_speakers(tmp_path):
    root = tmp_path / "in"
    write_wav(root / "ann" / "one.wav", 1.0, 22050)
    write_wav(root / "bob" / "one.flac", 1.0, channels=2)
    write_container(root / "bob" / "two.webm", make_wave(1.0, 48000), 48000, "libopus", "webm")
    (root / "ann" / "one.lab").write_text("\ufeffFirst line,\nsecond  line.\n", "utf-8")
    (root / "bob" / "one.txt").write_text(WORDS, "utf-8")
    (root / "bob" / "two.txt").write_bytes("déjà vu".encode("latin-1"))
    run("folder", tmp_path / "out", inputs=[str(root)], language="fr", max_bad_fraction=0.5)
    found = rows(tmp_path / "out")
    assert {(r.id, r.speaker, r.text, r.language) for r in found.values()} == {
        ("ann-one", "ann", "First line, second line.", "fr"), ("bob-one", "bob", WORDS, "fr"),
    }  # fmt: skip
    assert rejected(tmp_path / "out") == {"bob-two": "no transcript"}
    assert found["bob-one"].duration == 1.0


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("metadata.csv", 'file,text,speaker\na.wav,"Hello, my friend",kim\nb,Good day,lee\n'),
        ("metadata.tsv", "path\tsentence\tclient_id\na.wav\tHello, my friend\tkim\nclips/b.wav\tGood day\tlee\n"),
        ("metadata.csv", "a|kim|Hello, my friend\nb|lee|Good day\n"),
    ],
)
def test_folder_with_a_table(tmp_path, name, table):
    root = tmp_path / "in"
    write_wav(root / "a.wav", 1.0)
    write_wav(root / "clips" / "b.wav", 1.0)
    write_wav(root / "unlisted.wav", 1.0)
    (root / name).write_text(table + table.splitlines()[-1].replace("b", "gone", 1) + "\n", "utf-8")
    run("folder", tmp_path / "out", inputs=[str(root)], max_bad_fraction=0.6)
    found = rows(tmp_path / "out")
    assert {(r.id, r.text, r.speaker) for r in found.values()} == {
        ("a", "Hello, my friend", "kim"), ("clips-b", "Good day", "lee"),
    }  # fmt: skip
    assert set(rejected(tmp_path / "out").values()) == {"missing audio", "no transcript"}


def test_folder_reports_broken_table_lines(tmp_path):
    root = tmp_path / "in"
    write_wav(root / "a.wav", 1.0)
    (root / "list.csv").write_bytes(b"file;text\na.wav;Good words\nonly-one-cell\n\xff\xfe;x\n")
    run("folder", tmp_path / "out", inputs=[str(root)], metadata="list.csv", max_bad_fraction=0.7)
    assert rejected(tmp_path / "out") == {"list.csv:3": "broken line", "list.csv:4": "broken line"}
    with pytest.raises(CorpusError, match=r"no metadata table other\.csv"):
        run("folder", tmp_path / "out", inputs=[str(root)], metadata="other.csv")


# --- jsonl ---
def test_jsonl_of_other_toolkits_segments_and_broken_lines(tmp_path):
    write_wav(tmp_path / "long.wav", 4.0)
    lines = [
        {"audio_path": "long.wav", "text": WORDS},
        {"audio_filepath": "long.wav", "offset": 1.0, "duration": 1.5, "text": WORDS, "speaker": 7, "snr": 30},
        {"id": "emo", "audio": "long.wav", "start": 2, "text": WORDS, "labels": {"valence": 0.5}, "turn": 2},
        {"id": "emo", "audio": "long.wav", "text": WORDS},
        {"id": "outside", "audio": "long.wav", "start": 3.5, "duration": 2.0, "text": WORDS},
        {"id": "typed", "audio": "long.wav", "start": "soon", "text": WORDS},
        {"id": "nowhere", "text": WORDS},
        {"id": "gone", "audio": "gone.wav", "text": WORDS},
        ["no", "object"],
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{broken\n", "utf-8")
    run("jsonl", tmp_path / "out", inputs=[str(tmp_path / "in.jsonl")], max_bad_fraction=0.8, language="en")
    found = rows(tmp_path / "out")
    assert set(found) == {"long", "long@1", "emo"}
    assert (found["long@1"].start, found["long@1"].duration, found["long@1"].speaker) == (1.0, 1.5, "7")
    assert found["long@1"].extra == {"snr": 30} and found["long@1"].language == "en"
    assert found["emo"].labels == {"valence": 0.5} and found["emo"].turn == 2
    assert rejected(tmp_path / "out") == {
        "emo": "duplicate id", "outside": "unreadable", "in.jsonl:6": "broken line", "in.jsonl:7": "broken line",
        "gone": "missing audio", "in.jsonl:9": "broken line", "in.jsonl:10": "broken line",
    }  # fmt: skip


def test_jsonl_segments_are_cut_out_when_rewritten(tmp_path):
    wave = write_wav(tmp_path / "long.wav", 4.0)
    record = {"id": "part", "audio": "long.wav", "start": 1.0, "duration": 1.5, "text": WORDS}
    (tmp_path / "in.jsonl").write_text(json.dumps(record), "utf-8")
    run("jsonl", tmp_path / "out", inputs=[str(tmp_path / "in.jsonl")], sample_rate=16000)
    row = rows(tmp_path / "out")["part"]
    assert (row.start, row.duration) == (0.0, 1.5)
    got, _ = audio.read(row.audio)
    assert abs(got - wave[16000:40000]).max() < 1e-4


def test_limit_looks_at_the_first_clips(tmp_path):
    manifest = make_corpus(tmp_path / "in", clips=6)
    assert run("jsonl", tmp_path / "out", inputs=[str(manifest)], limit=2).found == 2


# --- list ---
def test_filelists_of_each_width(tmp_path):
    for name in "abcd":
        write_wav(tmp_path / "wavs" / f"{name}.wav", 1.0)
    lines = [
        f"wavs/a.wav|{WORDS}",
        f"wavs/b.wav|kim|{WORDS}",
        "wavs/c.wav|lee|ZH|你好世界",
        f"wavs/d.wav|lee|EN|{WORDS}|_ s ah m _|0 0 2 1 0|1 3 1",
        f"wavs/e.wav|lee|EN|{WORDS}|_ s _|0 0|1 1 1",
        "just one field",
    ]
    (tmp_path / "train.list").write_text("\n".join(lines), "utf-8")
    run("list", tmp_path / "out", inputs=[str(tmp_path / "train.list")], max_bad_fraction=0.5)
    found = rows(tmp_path / "out")
    assert {(r.id, r.speaker, r.language) for r in found.values()} == {
        ("wavs-a", "speaker", "en"), ("wavs-b", "kim", "en"), ("wavs-c", "lee", "zh"), ("wavs-d", "lee", "en"),
    }  # fmt: skip
    phones = ["_", "s", "ah", "m", "_"]
    assert found["wavs-d"].extra == {"phones": phones, "tones": [0, 0, 2, 1, 0], "word2ph": [1, 3, 1]}
    assert rejected(tmp_path / "out") == {"train.list:5": "broken line", "train.list:6": "broken line"}


def test_filelist_root(tmp_path):
    write_wav(tmp_path / "data" / "a.wav", 1.0)
    (tmp_path / "train.list").write_text(f"a.wav|{WORDS}\n", "utf-8")
    out = tmp_path / "out"
    assert run("list", out, inputs=[str(tmp_path / "train.list")], root=str(tmp_path / "data")).usable == 1
    with pytest.raises(CorpusError, match="missing audio"):
        run("list", out, inputs=[str(tmp_path / "train.list")])


# --- LJSpeech ---
def test_ljspeech(tmp_path):
    root = tmp_path / "LJSpeech-1.1"
    write_wav(root / "wavs" / "LJ001-0001.wav", 1.0, 22050)
    write_wav(root / "wavs" / "LJ001-0002.wav", 1.0, 22050)
    table = 'LJ001-0001|Chapter 4 "it|chapter four "it\nLJ001-0002|Same.|Same.\nLJ001-0003|Gone.|Gone.\nnonsense\n'
    (root / "metadata.csv").write_text(table, "utf-8")
    run("ljspeech", tmp_path / "out", inputs=[str(root)], max_bad_fraction=0.5)
    found = rows(tmp_path / "out")
    assert found["LJ001-0001"].text == 'chapter four "it' and found["LJ001-0001"].extra == {"raw_text": 'Chapter 4 "it'}
    assert found["LJ001-0002"].extra == {} and found["LJ001-0002"].speaker == "ljspeech"
    assert rejected(tmp_path / "out") == {"LJ001-0003": "missing audio", "metadata.csv:4": "broken line"}
    with pytest.raises(CorpusError, match="not an LJSpeech folder"):
        run("ljspeech", tmp_path / "out", inputs=[str(tmp_path)])


# --- LibriSpeech ---
def libri_chapter(root, subset, speaker, chapter, clips):
    folder = root / subset / speaker / chapter
    lines = []
    for number in range(clips):
        identifier = f"{speaker}-{chapter}-{number:04d}"
        write_wav(folder / f"{identifier}.flac", 0.6, seed=number)
        lines.append(f"{identifier} HE DIDN'T GO")
    (folder / f"{speaker}-{chapter}.trans.txt").write_text("\n".join(lines) + "\n", "utf-8")


def test_librispeech_official_and_hashed_splits(tmp_path):
    root = tmp_path / "LibriSpeech"
    libri_chapter(root, "train-clean-5", "19", "198", 40)
    report = run("librispeech", tmp_path / "hashed", inputs=[str(root / "train-clean-5")], split=(0.6, 0.2, 0.2))
    assert min(report.clips.values()) > 0  # one subset alone: the split by the hash
    libri_chapter(root, "dev-clean-2", "84", "121", 3)
    libri_chapter(root, "test-other", "61", "70", 2)
    report = run("librispeech", tmp_path / "out", inputs=[str(root)], split=(0.6, 0.2, 0.2))
    assert report.clips == {"train": 40, "valid": 3, "test": 2}
    row = rows(tmp_path / "out")["84-121-0000"]
    assert row.speaker == "84" and row.text == "he didn't go"


def test_librispeech_without_dev_takes_it_from_training(tmp_path):
    libri_chapter(tmp_path / "L", "train-clean-5", "19", "198", 40)
    libri_chapter(tmp_path / "L", "test-clean", "61", "70", 2)
    report = run("librispeech", tmp_path / "out", inputs=[str(tmp_path / "L")], split=(0.6, 0.2, 0.2))
    assert report.clips["test"] == 2 and report.clips["valid"] > 0
    with pytest.raises(CorpusError, match="not a LibriSpeech folder"):
        run("librispeech", tmp_path / "out", inputs=[str(tmp_path / "out")])


# --- asterisk ---
def fake_packages(monkeypatch, seen):
    """``_run`` that leaves what apt-get and dpkg-deb would leave for the English packages."""

    def run_command(command, work):
        seen.append(command[0])
        if command[0] == "apt-get":
            (work / f"{command[-1]}_9_all.deb").write_bytes(b"deb")
            return
        root = work / "root" / "usr/share"
        doc, sounds = root / "doc/asterisk-core-sounds-en", root / "asterisk/sounds/en_US_f_Allison"
        for folder in (doc, sounds / "digits", sounds / "silence"):
            folder.mkdir(parents=True, exist_ok=True)
        text = "; comment: no\n\nhello: Hello  there.\nbeep: [a beep]\ndigits/1: one [!]\nempty: Nothing.\n"
        text += "gone: Gone.\nsilence/1: (1 second of silence)\nno text:\nnote: IAX (note: does not say it)\n"
        (doc / "core-sounds-en.txt.gz").write_bytes(gzip.compress(text.encode("utf-8-sig")))
        for key in ("hello", "beep", "digits/1", "silence/1", "no text", "note"):
            write_container(sounds / f"{key}.g722", make_wave(1.0), 16000, "g722", "g722")
        (sounds / "empty.g722").touch()

    monkeypatch.setattr(_debian, "_run", run_command)


def test_asterisk_without_a_network(tmp_path, monkeypatch, caplog):
    seen: list[str] = []
    fake_packages(monkeypatch, seen)
    report = run("asterisk", tmp_path / "out", max_bad_fraction=0.9)
    found = rows(tmp_path / "out")
    assert {(r.id, r.text, r.speaker) for r in found.values()} == {
        ("en-hello", "Hello there.", "allison"), ("en-digits-1", "one", "allison"),
    }  # fmt: skip
    assert all(r.audio.endswith(".flac") for r in found.values())
    assert rejected(tmp_path / "out") == {
        "en-beep": "non-speech", "en-empty": "empty file", "en-gone": "missing audio", "en-silence-1": "non-speech",
        "en-no text": "no transcript", "en-note": "non-speech",
    }  # fmt: skip
    assert "is not the asterisk-core-sounds-en 1.6.1-1 that was tested" in caplog.text
    assert report.facts["packages"]["asterisk-core-sounds-en"]["tested"] == "false"
    assert seen.count("apt-get") == 2
    run("asterisk", tmp_path / "out", max_bad_fraction=0.9)
    assert seen.count("apt-get") == 2  # packages are kept


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (FileNotFoundError("apt-get"), "apt-get is not on this machine"),
        (subprocess.TimeoutExpired("apt-get", 600), "took over"),
        (subprocess.CompletedProcess([], 100, "", "W: late\nE: Unable to locate package\n"), "Unable to locate"),
    ],
)
def test_asterisk_unavailable_says_what_to_do(tmp_path, monkeypatch, failure, message):
    def failing(*_args, **_kwargs):
        if isinstance(failure, Exception):
            raise failure
        return failure

    monkeypatch.setattr(subprocess, "run", failing)
    with pytest.raises(CorpusUnavailable, match=f"{message}.*lalia prepare synth"):
        run("asterisk", tmp_path / "out")


def test_asterisk_tries_fresh_package_lists(tmp_path, monkeypatch):
    """A bare container has no package lists; private ones need no root."""
    calls = []

    def run_command(command, work):
        calls.append(command)
        if command[:2] == ["apt-get", "download"]:
            raise CorpusUnavailable("no lists")

    monkeypatch.setattr(_debian, "_run", run_command)
    _debian._download("asterisk-core-sounds-en", tmp_path)
    assert [c[-1] for c in calls] == ["asterisk-core-sounds-en", "update", "asterisk-core-sounds-en"]
    assert f"Dir::State::Lists={tmp_path / 'lists'}" in calls[1]


def test_transcript_lines():
    content = "; a: comment\n\nkey: The time: 10 o'clock.\nempty:\nnot a line\n"
    assert list(parse_transcript(content)) == [("key", "The time: 10 o'clock."), ("empty", "")]


@pytest.mark.parametrize(
    ("text", "spoken", "usable"),
    [
        ("Hello.", "Hello.", True),
        ("dash [-]", "dash", True),
        ("[!] exclamation point", "exclamation point", True),
        ("spazio []", "spazio", True),
        ("[ascending tones]", "", False),
        ("<beep ascending>", "", False),
        ("Il [suo] messaggio", "", False),
    ],
)
def test_brackets(text, spoken, usable):
    got, problem = spoken_text(text)
    assert bool(problem) != usable and (not usable or got == spoken)


# --- synth ---
def test_sentences_are_many_different_and_stable():
    assert len(set(sentences(MOST_SENTENCES))) == MOST_SENTENCES
    assert sentences(300)[:50] == sentences(50)
    assert all(s[0].isupper() and s[-1] in ".?!" and "{" not in s for s in sentences(MOST_SENTENCES))
    assert sum(s.endswith("?") for s in sentences(400)) > 20


def test_synth_speaks_the_same_each_time(tmp_path):
    pytest.importorskip("espeakng_loader")
    options = {"sentences": 6, "voices": ["en-us", "en-us+f3"], "sample_rate": 16000}
    report = run("synth", tmp_path / "one", **options)
    run("synth", tmp_path / "two", **options)
    found = rows(tmp_path / "one")
    assert report.usable == 6 and {r.speaker for r in found.values()} == {"espeak-en-us", "espeak-en-us+f3"}
    assert any("robotic" in note for note in report.notes)
    for row in found.values():
        other = row.audio.replace(str(tmp_path / "one"), str(tmp_path / "two"))
        assert Path(row.audio).read_bytes() == Path(other).read_bytes()
    assert [found["synth-en-us-0000"].text] == sentences(1)


def test_synth_names_an_unknown_voice_and_a_missing_library(tmp_path, monkeypatch):
    pytest.importorskip("espeakng_loader")
    with pytest.raises(CorpusError, match="no voice 'no-such-voice'"):
        run("synth", tmp_path / "out", sentences=1, voices=["no-such-voice"])
    monkeypatch.setattr(synth.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(CorpusUnavailable, match="pip install espeakng-loader"):
        run("synth", tmp_path / "out", sentences=1)
