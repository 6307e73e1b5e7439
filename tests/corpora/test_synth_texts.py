"""Sentences of given texts, and flite: a stand-in program takes its place, which writes tones and keeps a diary."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cli_runner import lalia, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prepare import rejected, rows, run

from lalia import audio
from lalia.corpora import CorpusError, CorpusUnavailable, Report, _flite
from lalia.corpora._questions import plain
from lalia.corpora._sentences import Limits, excluded_texts, find, sentences, sentences_of, texts_of, unwrapped
from lalia.data import Row

TALK = [
    "The kettle whistles. Nobody hears it at first! Is the tea ready yet?",
    "We walked to the pier; the boats were gone. Only the gulls were left there.",
    'The old man said nothing. "You may keep the blue one."',
]
STAND_IN = """#!{python} -IS
import json, math, os, struct, sys, time, wave
told = sys.argv[1:]
if told == ["-lv"]:
    sys.exit(print("Voices available: kal16 awb rms slt "))
if told == ["--version"]:
    print("  version: flite-9.1-test Sep 2018 (http://cmuflite.org)")
    sys.exit(1)
_, voice, _, stretch, _, text, _, path = told
assert told[::2] == ["-voice", "--setf", "-t", "-o"] and not text.startswith("-"), told
with open({diary!r}, "a") as diary:
    diary.write(json.dumps([voice, stretch, text]) + "\\n")
time.sleep({nap})
if "silence" in text:
    sys.exit(print("cst_wave_save: can't open file", file=sys.stderr))  # flite's exit status is 0 even so
count = int(1000 * len(text) * float(stretch.removeprefix("duration_stretch=")))
with wave.open(path, "wb") as file:
    file.setparams((1, 2, 16000, 0, "NONE", ""))
    file.writeframes(struct.pack(f"<{{count}}h", *(int(9e3 * math.sin(i * (0.05 + len(voice) / 99))) for i in range(count))))
"""
needs_programs = pytest.mark.skipif(os.name == "nt", reason="the stand-in is a script with a #! line")


@pytest.fixture
def diary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the stand-in writes what it was told; it is in use from here on."""
    return stand_in(tmp_path, monkeypatch)


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nap: float = 0.0) -> Path:
    program, diary = tmp_path / "flite", tmp_path / "diary"
    program.write_text(STAND_IN.format(python=sys.executable, diary=str(diary), nap=nap), "utf-8")
    program.chmod(0o755)
    monkeypatch.setenv(_flite.PROGRAM, str(program))
    return diary


def said(diary: Path) -> list[tuple[str, str, str]]:
    return [tuple(json.loads(line)) for line in diary.read_text("utf-8").splitlines()]


def manifest(path: Path, texts: list[str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": f"t{i}", "text": text}) + "\n" for i, text in enumerate(texts)), "utf-8")
    return str(path)


def speak(out: Path, **options: Any) -> Report:
    return run("synth", out, **{"engine": "flite", "split": (0.4, 0.3, 0.3), **options})


# --- what is a sentence -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Mr. Smith met J. Doe. They left.", ["Mr. Smith met J. Doe.", "They left."]),
        ("“It’s late,” he said.  Go!\nNow then", ['It\'s late," he said.', "Go!", "Now then"]),
        ("Apples, pears, plums... and so on. Done", ["Apples, pears, plums... and so on.", "Done"]),
        ("please hold. press one", ["please hold.", "press one"]),
        ("-- !\n\n 12", ["12"]),
        ("Wrapped lines go on as they\ncome. The next one ends at a\ndistant point.", ["Wrapped lines go on as they come.",
                                                                                      "The next one ends at a distant point."]),
        ("a line\nof a poem", ["a line", "of a poem"]),
    ],
)  # fmt: skip
def test_texts_are_cut_at_full_stops_and_line_ends(text: str, parts: list[str]) -> None:
    assert sentences_of(text) == parts


@pytest.mark.parametrize(
    ("sentence", "alone", "reason"),
    [
        ("Two words.", False, "fewer than 3 words"),
        ("a " * 13, False, "more than 12 words"),
        ("Room 12 is free.", False, "digits"),
        ("The NATO treaty holds.", False, "abbreviations or capitals"),
        ("He met Mr. Smith there.", False, "abbreviations or capitals"),
        ("Bring apples, pears, etc.", False, "abbreviations or capitals"),
        ("A {braced} word here.", False, "other signs or letters"),
        ("- begins with a dash.", False, "other signs or letters"),
        ("A café by night.", False, "other signs or letters"),
        ("The line goes on", False, "cut off by the end of a line"),
        ("goes on from before.", False, "cut off by the end of a line"),
        ("the line goes on", True, ""),
        ("Well-known gulls, I think, don't sing; do they?", False, ""),
        ("I have a dog!", False, ""),
    ],
)
def test_what_cannot_be_read_aloud_without_guessing_is_passed_over(sentence: str, alone: bool, reason: str) -> None:
    assert Limits(ascii_only=True).misfit(sentence, alone) == reason


def test_other_letters_are_for_the_engine_that_knows_them() -> None:
    assert Limits().misfit("A café by night.", False) == ""
    assert Limits().misfit("Das ist ÄRGER genug.", False) == "abbreviations or capitals"


def test_lines_of_a_fixed_width_are_joined_and_others_are_not() -> None:
    wide = "One sentence ends. Another goes on\nover the line. And so on\nto the end.\n\nNext paragraph."
    assert unwrapped(wide).splitlines()[0] == "One sentence ends. Another goes on over the line. And so on to the end."
    prompts = "please hold the line\npress one for sales\n"
    assert unwrapped(prompts) == prompts


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("abcDE é.?!,'\"-\n 1’"), max_size=120))
def test_whatever_is_found_can_be_spoken_and_is_found_again_alone(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("texts") / "any.txt"
    path.write_text(text + "\nA line that is spoken.\n", "utf-8")
    limits = Limits(least_words=2, most_words=6)
    found = find([path], limits, set())
    for key, (sentence, _) in found.sentences.items():
        assert 2 <= len(sentence.split()) <= 6 and key == plain(sentence) and "1" not in sentence
        assert limits.misfit(sentence, alone=True) == "" and not set(sentence) & set('"\n’')
    offered = sum(len(sentences_of(line)) for line in texts_of(path) if isinstance(line, str))
    assert offered == len(found.sentences) + found.passed_over.total()  # nothing is dropped silently


# --- the choice -------------------------------------------------------------------------------------------------------
def test_a_choice_does_not_depend_on_files_or_its_own_length(tmp_path: Path) -> None:
    one, two = (Path(manifest(tmp_path / f"{n}.jsonl", sentences(60)[n::2])) for n in (0, 1))
    limits = Limits(1, 99)
    found = find([one, two], limits, set())
    assert len(found.sentences) == 60 and found.texts == 60
    assert found.chosen(9, 0) == find([two, one, one], limits, set()).chosen(20, 0)[:9]
    assert found.chosen(9, 0) != found.chosen(9, 1)
    assert {source for _, source in found.chosen(60, 0)} == {str(one), str(two)}


def test_short_prompts_are_taken_as_they_are(tmp_path: Path) -> None:
    prompts = ["press the pound key", "please hold", "press the Pound key.", "", "to leave, press 9"]
    found = find([Path(manifest(tmp_path / "prompts.jsonl", prompts))], Limits(), set())
    assert [s for s, _ in found.chosen(9, 0)] == ["press the pound key"] and found.texts == 4
    assert dict(found.passed_over) == {"fewer than 3 words": 1, "said already": 1, "digits": 1}


def test_evaluation_texts_are_kept_out_whole_and_by_sentence(tmp_path: Path) -> None:
    held = Path(manifest(tmp_path / "valid.jsonl", ["NOBODY hears it, at first", "The old man said nothing. Go on."]))
    talk = Path(manifest(tmp_path / "talk.jsonl", TALK))
    found = find([talk], Limits(), excluded_texts([held]))
    assert found.excluded == {"nobodyhearsitatfirst", "theoldmansaidnothing"}
    assert not found.excluded & set(found.sentences) and "onlythegullswereleftthere" in found.sentences
    empty = tmp_path / "test.jsonl"
    empty.touch()
    assert excluded_texts([empty]) == set()


def test_a_line_that_cannot_be_kept_out_stops_everything(tmp_path: Path) -> None:
    for content in (b'{"text": "fine"}\n{"text": 7}\n', b"\xff\xfe\n", b"{broken\n"):
        (tmp_path / "valid.jsonl").write_bytes(content)
        with pytest.raises(CorpusError, match=r"--exclude .*valid.jsonl:\d.*could not be kept out"):
            run("synth", tmp_path / "out", exclude=[str(tmp_path / "valid.jsonl")])
    (tmp_path / "valid.jsonl").write_text('{"audio": "a.wav"}\n', "utf-8")
    with pytest.raises(CorpusError, match="valid.jsonl: no row has a text"):
        run("synth", tmp_path / "out", exclude=[str(tmp_path / "valid.jsonl")])


# --- flite ------------------------------------------------------------------------------------------------------------
@needs_programs
def test_flite_speaks_given_texts_and_the_report_tells_all(tmp_path: Path, diary: Path) -> None:
    talk, held = manifest(tmp_path / "talk.jsonl", TALK), manifest(tmp_path / "valid.jsonl", ["the old man said nothing"])
    more = {"voices": ["slt", "kal16"], "stretch": ["0.5", "1"], "sample_rate": 8000, "max_rate": 40.0}
    report = speak(tmp_path / "out", texts=[talk], exclude=[held], sentences=20, **more)
    found = rows(tmp_path / "out")
    assert set(found) == {f"flite-{voice}-{number:05d}" for number, voice in enumerate(["slt", "kal16"] * 3)}
    assert {row.speaker for row in found.values()} == {"flite-slt", "flite-kal16"} and found["flite-slt-00000"].language == "en"
    assert report.facts["engine"] == "flite" and report.facts["version"] == "9.1-test" and report.facts["excluded"] == 1
    assert report.facts["sentences"] == {talk: 6} and report.facts["passed_over"] == {} and report.facts["fit"] == 6
    assert any("only 6 sentences of the 20" in note for note in report.notes) and any("flite" in note for note in report.notes)
    paces = {text: stretch for _, stretch, text in said(diary)}
    assert set(paces.values()) == {"duration_stretch=0.5", "duration_stretch=1"} and len(paces) == 6
    for row in found.values():
        seconds = len(row.text) / 16 * float(paces[row.text].partition("=")[2])
        assert row.duration == pytest.approx(seconds, abs=0.12) and audio.info(row.audio).sample_rate == 8000
    assert not (tmp_path / "out" / "unfinished").exists()


@needs_programs
def test_a_killed_run_goes_on_and_ends_like_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diary = stand_in(tmp_path, monkeypatch, nap=0.15)
    texts = [manifest(tmp_path / "talk.jsonl", sentences(40))]
    options = {"texts": texts, "sentences": 12, "engine": "flite", "max_rate": 40.0, "split": (0.4, 0.3, 0.3)}
    code = f"from lalia.corpora import prepare; prepare('synth', {str(tmp_path / 'out')!r}, progress=False, **{options!r})"
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    deadline = time.monotonic() + 60
    while len(done := list((tmp_path / "out").glob("unfinished/*/*.wav"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)  # the stand-ins at work too
    child.wait()
    assert 3 <= len(done) < 12 and not (tmp_path / "out" / "train.jsonl").exists()
    before = len(said(diary))
    stand_in(tmp_path, monkeypatch)
    kept = len(list((tmp_path / "out").glob("unfinished/*/*.wav")))
    speak(tmp_path / "out", **options)
    assert len(said(diary)) - before == 12 - kept
    speak(tmp_path / "whole", **options)
    for name in ("train.jsonl", "valid.jsonl", "test.jsonl", "rejected.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    clips = sorted((tmp_path / "whole" / "audio").iterdir())
    assert len(clips) == 12
    assert all((tmp_path / "out" / "audio" / clip.name).read_bytes() == clip.read_bytes() for clip in clips)


@needs_programs
def test_a_sentence_that_flite_cannot_say_is_rejected_by_name(tmp_path: Path, diary: Path) -> None:
    texts = [manifest(tmp_path / "talk.jsonl", [*TALK, "There was silence at last."])]
    report = speak(tmp_path / "out", texts=texts, max_rate=40.0)
    assert report.rejected == {"missing audio": 1} and report.usable == 7
    record = json.loads((tmp_path / "out" / "rejected.jsonl").read_text("utf-8"))
    assert "flite said nothing: cst_wave_save" in record["details"] and record["id"].startswith("flite-")


@needs_programs
def test_a_text_is_never_an_option(tmp_path: Path, diary: Path) -> None:
    assert _flite.find().speak("-lv is said", "slt", 1.0, tmp_path / "a.wav") == ""
    assert said(diary) == [("slt", "duration_stretch=1", " -lv is said")]
    assert "null" in _flite.find().speak("zero \0 byte", "slt", 1.0, tmp_path / "b.wav") and not (tmp_path / "b.wav").exists()


@needs_programs
def test_broken_rows_are_told(tmp_path: Path, diary: Path) -> None:
    path = tmp_path / "talk.jsonl"
    manifest(path, TALK)
    path.write_bytes(path.read_bytes() + b'{"text": ["no"]}\n\xff\n')
    speak(tmp_path / "out", texts=[str(path)], max_rate=40.0, max_bad_fraction=0.5)
    assert rejected(tmp_path / "out") == {"talk.jsonl:4": "broken line", "talk.jsonl:5": "broken line"}


@needs_programs
def test_unknown_voices_and_missing_programs_are_named(tmp_path: Path, diary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CorpusError, match=r"no voice 'slr'.*'slt'.*lists awb, kal16, rms, slt"):
        speak(tmp_path / "out", voices=["slt", "slr"])
    assert not diary.exists()
    (tmp_path / "flite").write_text("#!/bin/sh\necho 'no libflite' >&2\nexit 127\n", "utf-8")
    with pytest.raises(CorpusUnavailable, match="lists no voices: no libflite"):
        speak(tmp_path / "out")
    monkeypatch.setenv(_flite.PROGRAM, str(tmp_path / "nowhere"))
    with pytest.raises(CorpusUnavailable, match="LALIA_FLITE=.*nowhere: no such program"):
        speak(tmp_path / "out")
    monkeypatch.delenv(_flite.PROGRAM)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(CorpusUnavailable, match=r"flite is not on this machine.*apt-get install flite.*brew install flite"):
        speak(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "flyte"}, "no engine 'flyte'.*'flite'.*espeak, flite"),
        ({"engine": "flite", "words_per_minute": 90}, "flite has stretch"),
        ({"stretch": [1.0]}, "espeak has words_per_minute"),
        ({"engine": "flite", "stretch": ["fast"]}, "stretch must be factors"),
        ({"engine": "flite", "stretch": ["0"]}, r"stretch must be in 0\.3…3"),
        ({"sentences": 2001}, "built-in sentences at most 2000"),
        ({"least_words": 5, "most_words": 4}, "least_words <= most_words"),
        ({"words_per_minute": 7}, "80…450"),
        ({"texts": ["/nowhere.jsonl"]}, "/nowhere.jsonl: no such file"),
        ({"exclude": ["/nowhere.jsonl"]}, "/nowhere.jsonl: no such file"),
        ({"texts": [__file__]}, r"manifests \(.jsonl\) or text files"),
    ],
)
def test_wrong_options_name_the_right_ones(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    pytest.importorskip("espeakng_loader")
    with pytest.raises(CorpusError, match=message):
        run("synth", tmp_path / "out", **options)


@needs_programs
def test_files_without_sentences_are_named(tmp_path: Path, diary: Path) -> None:
    for name, content in {"a.jsonl": '{"audio": "a.wav"}\n', "b.txt": "\n \n", "c.txt": ""}.items():
        (tmp_path / name).write_text(content, "utf-8")
        with pytest.raises(CorpusError, match=f"{name}: nothing to speak in it"):
            speak(tmp_path / "out", texts=[str(tmp_path / name)])
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\xff" * 9)
    with pytest.raises(CorpusError, match=r"d\.txt: not UTF-8"):
        speak(tmp_path / "out", texts=[str(tmp_path / "d.txt")])
    with pytest.raises(CorpusError, match="no sentence is left to be spoken; 0 sentences of 3 texts fit; passed over: 7 fewer"):
        speak(tmp_path / "out", texts=[manifest(tmp_path / "talk.jsonl", TALK)], least_words=40, most_words=50)


@needs_programs
def test_the_command_takes_texts_engine_and_exclusions(tmp_path: Path, diary: Path) -> None:
    talk, held = manifest(tmp_path / "talk.jsonl", TALK), manifest(tmp_path / "v.jsonl", ["Nobody hears it at first"])
    command = ["prepare", "synth", "-o", tmp_path / "out", "--engine", "flite", "--voice", "awb", "--max-rate", 40]
    command += ["--set", "stretch=0.8,1.2", "--set", "most_words=9"]
    told = lalia(*command, "--texts", talk, "--exclude", held, "--sentences", 4)
    assert told.exit_code == 0 and "1 sentences are not spoken" in told.output and "6 sentences of 3 texts fit" in told.output
    assert {voice for voice, _, _ in said(diary)} == {"awb"} and len(said(diary)) == 4
    assert "no engine 'flit'; did you mean 'flite'" in refused("prepare", "synth", "--engine", "flit")


# --- espeak-ng --------------------------------------------------------------------------------------------------------
def test_espeak_speaks_given_texts_and_leaves_the_excluded_out_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader")
    text = tmp_path / "talk.txt"
    text.write_text("\n".join(TALK[:2]), "utf-8")
    report = run("synth", tmp_path / "one", texts=[str(text)], sentences=3, split=(0.4, 0.3, 0.3), language="en-GB")
    found: dict[str, Row] = rows(tmp_path / "one")
    assert report.facts["engine"] == "espeak" and report.facts["version"].startswith("espeakng-loader")
    assert set(found) == {"espeak-en-us-00000", "espeak-en-us-f3-00001", "espeak-en-gb-x-rp-00002"}
    assert {row.language for row in found.values()} == {"en-GB"}
    held = manifest(tmp_path / "held.jsonl", sentences(4)[::2])
    report = run("synth", tmp_path / "two", exclude=[held], sentences=3, split=(0.4, 0.3, 0.3))
    assert [row.text for row in sorted(rows(tmp_path / "two").values(), key=lambda row: row.id[-4:])] == [
        sentences(5)[i] for i in (1, 3, 4)
    ]
    assert report.facts["excluded"] == 2 and report.facts["sentences"] == {"built-in sentences": 3}


@pytest.mark.skipif(not shutil.which(os.environ.get(_flite.PROGRAM) or "flite"), reason="flite is not installed")
def test_the_real_flite_speaks_the_same_each_time(tmp_path: Path) -> None:
    texts = [manifest(tmp_path / "talk.jsonl", TALK)]
    for out in ("one", "two"):
        assert speak(tmp_path / out, texts=texts, sentences=6).usable == 6
    clips = sorted((tmp_path / "one" / "audio").iterdir())
    assert len(clips) == 6
    assert all((tmp_path / "two" / "audio" / clip.name).read_bytes() == clip.read_bytes() for clip in clips)
    flite = _flite.find()
    with pytest.raises(CorpusError, match="no voice"):
        flite.check(["nobody"])
    seconds = []
    for stretch in (0.7, 1.4):
        assert flite.speak("-lv is not a list of voices.", "slt", stretch, tmp_path / "a.wav") == ""
        seconds.append(audio.info(tmp_path / "a.wav").seconds)
    assert 1.6 < seconds[1] / seconds[0] < 2.2
