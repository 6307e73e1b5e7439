"""IEMOCAP, MSP-Podcast, CREMA-D and RAVDESS on small generated trees of their real layouts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
from cli_runner import lalia, refused
from factories import write_wav
from test_prepare import rejected, rows, run

from lalia.corpora import CorpusError
from lalia.data import read_manifest
from lalia.dialogues import dialogues

HEADER = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
ANNOTATORS = "C-E2:\tNeutral;\t()\nA-E3:\tval 3; act 2; dom  2;\t()\n\n"


def make_dialogue(root: Path, session: int, name: str, turns: list[tuple[str, float, str, str]], wavs: bool = True) -> None:
    """One dialogue with (turn, start, ratings, text); ratings '' = in the transcription alone."""
    folder = root / f"Session{session}"
    full = f"Ses{session:02d}{name}"
    rated, said = HEADER, ""
    for turn, start, ratings, text in turns:
        identifier = f"{full}_{turn}"
        if ratings:
            rated += f"[{start:.4f} - {start + 0.5:.4f}]\t{identifier}\tneu\t[{ratings}]\n{ANNOTATORS}"
        said += f"{identifier} [{start:08.4f}-{start + 0.5:08.4f}]: {text}\n"
        if wavs:
            write_wav(folder / "sentences" / "wav" / full / f"{identifier}.wav", 0.2, seed=len(said))
    for kind, text in (("EmoEvaluation", rated), ("transcriptions", said)):
        path = folder / "dialog" / kind / f"{full}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
        (path.parent / f"._{full}.txt").write_bytes(b"\x00\x05\x16\x07 resource fork \xff")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three sessions. In Ses01F_impro01 the man speaks first, although the file lists the woman's turns first."""
    root = tmp_path / "IEMOCAP_full_release"
    make_dialogue(root, 1, "F_impro01", [
        ("F000", 6.2901, "2.5000, 2.5000, 2.5000", "Excuse me."), ("F001", 9.5, "0.5, 5.5, 3.0", "Do you have your forms?"),
        ("M000", 1.25, "nan, 2.0, oops", "Next."), ("M001", 8.0, "", "Yeah."),
    ])  # fmt: skip
    make_dialogue(root, 1, "M_script01_1", [("F000", 0.5, "3, 3, 3", "What's the matter?")])
    for session in (2, 3):
        make_dialogue(root, session, "F_impro01", [("F000", 1.0, "3, 3, 3", "One."), ("M000", 2.0, "4, 4, 4", "Two.")])
        make_dialogue(root, session, "M_script01_1", [("M000", 0.5, "3, 3, 3", "What's the matter?")])
    return root


# --- IEMOCAP --------------------------------------------------------------------------------------------------------
def test_iemocap_turns_are_in_true_time_order_with_the_speaker_of_the_turn(tree: Path, tmp_path: Path) -> None:
    report = run("iemocap", tmp_path / "out", inputs=[str(tree)])
    found = rows(tmp_path / "out")
    first = sorted((r for r in found.values() if r.dialogue == "Ses01F_impro01"), key=lambda r: r.turn)
    assert [(r.turn, r.id[-4:], r.speaker) for r in first] == [
        (0, "M000", "Ses01M"), (1, "F000", "Ses01F"), (2, "M001", "Ses01M"), (3, "F001", "Ses01F"),
    ]  # fmt: skip
    assert first[1].labels == {"valence": 2.5, "arousal": 2.5, "dominance": 2.5} and first[1].text == "Excuse me."
    assert first[1].extra == {"session": "Ses01", "scripted": False, "gender": "F", "time": 6.2901, "emotion": "neu"}
    assert found["Ses01M_script01_1_F000"].speaker == "Ses01F" and found["Ses01M_script01_1_F000"].extra["scripted"]
    assert report.usable == 11 and not report.rejected


def test_iemocap_labels_are_clipped_or_left_out_and_counted(tree: Path, tmp_path: Path) -> None:
    report = run("iemocap", tmp_path / "out", inputs=[str(tree)])
    found = rows(tmp_path / "out")
    assert found["Ses01F_impro01_F001"].labels == {"valence": 1.0, "arousal": 5.0, "dominance": 3.0}
    assert found["Ses01F_impro01_M000"].labels == {"arousal": 2.0}
    assert found["Ses01F_impro01_M001"].labels == {} and found["Ses01F_impro01_M001"].text == "Yeah."
    assert len(report.facts["clipped_labels"]) == 2 and len(report.facts["unusable_labels"]) == 2
    told = " ".join(report.notes)
    assert "2 labels lay outside 1…5" in told and "2 labels are no numbers" in told and "1 turns have no labels" in told


def test_iemocap_folds_and_scripted_sentences(tree: Path, tmp_path: Path) -> None:
    report = run("iemocap", tmp_path / "out", inputs=[str(tree)])
    folds = json.loads((tmp_path / "out" / "folds.json").read_text("utf-8"))
    assert folds["protocol"] == "loso" and not folds["leaking"] and len(folds["folds"]) == 3
    assert folds["folds"][0]["parts"]["test"]["sessions"] == ["Ses01"]
    assert folds["folds"][0]["audit"]["train-test"]["sentences"] == ["whats the matter"]
    assert any("--improvised-only" in note for note in report.notes)
    clean = run("iemocap", tmp_path / "clean", inputs=[str(tree)], improvised_only=True)
    assert clean.usable == 8 and not any("--improvised-only" in note for note in clean.notes)
    assert any("3 turns of scripted dialogues are left out" in note for note in clean.notes)
    assert {r.dialogue for r in read_manifest(tmp_path / "out" / "fold2" / "test.jsonl")} == {"Ses02F_impro01", "Ses02M_script01_1"}


def test_iemocap_random5_warns_aloud(tree: Path, tmp_path: Path) -> None:
    result = lalia("prepare", "iemocap", tree, "-o", tmp_path / "out", "--protocol", "random5")
    assert "random5 LEAKS" in result.output
    assert len(json.loads((tmp_path / "out" / "folds.json").read_text("utf-8"))["folds"]) == 5
    with pytest.raises(CorpusError, match="loso and random5, got 'speakers'"):
        run("iemocap", tmp_path / "out", inputs=[str(tree)], protocol="speakers")


def test_iemocap_a_missing_wav_leaves_the_rest_of_the_dialogue(tree: Path, tmp_path: Path) -> None:
    wavs = tree / "Session1" / "sentences" / "wav" / "Ses01F_impro01"
    (wavs / "Ses01F_impro01_F000.wav").unlink()
    (wavs / "Ses01F_impro01_M001.wav").unlink()  # never rated: no wav, no turn
    write_wav(wavs / "Ses01F_impro01_F999.wav", 0.2)
    run("iemocap", tmp_path / "out", inputs=[str(tree)])
    assert rejected(tmp_path / "out") == {"Ses01F_impro01_F000": "missing audio", "Ses01F_impro01_F999": "no transcript"}
    kept = {r.turn: r.id[-4:] for r in rows(tmp_path / "out").values() if r.dialogue == "Ses01F_impro01"}
    assert kept == {0: "M000", 1: "F001"}


def test_iemocap_silence_and_a_turn_of_ten_minutes_stay(tree: Path, tmp_path: Path) -> None:
    folder = tree / "Session2" / "sentences" / "wav" / "Ses02F_impro01"
    soundfile.write(folder / "Ses02F_impro01_F000.wav", np.zeros(8000), 16000)
    soundfile.write(folder / "Ses02F_impro01_M000.wav", 0.1 * np.ones(610 * 8000, dtype=np.float32), 8000)
    report = run("iemocap", tmp_path / "out", inputs=[str(tree)])
    found = rows(tmp_path / "out")
    assert found["Ses02F_impro01_F000"].extra["silent"] and found["Ses02F_impro01_M000"].duration == 610
    assert report.facts["silent"] == ["Ses02F_impro01_F000"] and any("1 silent clips are kept" in note for note in report.notes)


TABLES = {
    "seed": "name,V,A\n{0},2.5,3.5\n{1},nan,4\n",
    "bom and crlf": "\ufeffFile,Valence,Activation,Dominance,Start\r\nx/{0}.wav,2.5,3.5,3,6.3\r\nx/{1}.wav,nan,4,3,9.5\r\n",
    "semicolons": "utterance;val;aro;emo\n{0};2,5;3,5;neu\n{1};;4;ang\n",
    "tabs and Windows paths": "wav\tvalence\tarousal\nC:\\x\\{0}.wav\t2.5\t3.5\nC:\\x\\{1}.wav\t-\t4\n",
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
def test_iemocap_from_a_label_table(tree: Path, tmp_path: Path, table: str) -> None:
    path = tmp_path / "iemocap_label.csv"
    path.write_bytes(table.format("Ses01F_impro01_F000", "Ses01F_impro01_F001").encode("utf-8"))
    report = run("iemocap", tmp_path / "out", inputs=[str(tree)], labels=str(path))
    found = rows(tmp_path / "out")
    one, two = found["Ses01F_impro01_F000"], found["Ses01F_impro01_F001"]
    assert (one.labels["valence"], one.labels["arousal"], one.turn, one.text) == (2.5, 3.5, 1, "Excuse me.")
    assert two.labels["arousal"] == 4 and "valence" not in two.labels
    assert report.usable == 11 and sum(bool(r.labels) for r in found.values()) == 2  # the others are context


def test_iemocap_label_table_over_a_folder_of_wavs_alone(tmp_path: Path) -> None:
    lines = ["file,v,a", "Ses01F_impro01_F000,0.5,3", "Ses01F_impro01_F000,2,3", "other,1,1"]
    for session in (1, 2, 3):
        for turn in ("F000", "M001"):
            write_wav(tmp_path / "in" / "flat" / f"Ses{session:02d}F_impro01_{turn}.wav", 0.2)
            lines += [f"Ses{session:02d}F_impro01_{turn},2,3"] if (session, turn) != (1, "F000") else []
    (tmp_path / "labels.csv").write_text("\n".join(lines), "utf-8")
    report = run(
        "iemocap", tmp_path / "out", inputs=[str(tmp_path / "in")], labels=str(tmp_path / "labels.csv"), max_bad_fraction=0.3
    )
    assert rejected(tmp_path / "out") == {"labels.csv:3": "broken line", "labels.csv:4": "broken line"}
    assert report.usable == 6 and any("6 turns have no start time" in note for note in report.notes)
    assert [len(d) for d in dialogues(read_manifest(tmp_path / "out" / "test.jsonl"))] == [2]


def test_iemocap_wrong_inputs_are_told_the_way(tree: Path, tmp_path: Path) -> None:
    assert "IEMOCAP_full_release?" in refused("prepare", "iemocap", tree.parent, "-o", tmp_path / "out")
    (tmp_path / "bad.csv").write_text("clip,joy\na,1\n", "utf-8")
    message = refused("prepare", "iemocap", tree, "--labels", tmp_path / "bad.csv", "-o", tmp_path / "out")
    assert "no column for file" in message and "the columns are clip, joy" in message
    assert "no label table none.csv" in refused("prepare", "iemocap", tree, "--labels", "none.csv", "-o", tmp_path / "out")
    message = refused("prepare", "iemocap", tree, "--set", "improvised_onl=true", "-o", tmp_path / "out")
    assert "did you mean 'improvised_only'" in message
    refused("prepare", "iemocap", tree, "--set", "allow_leaks=perhaps", "-o", tmp_path / "out", code=2)
    refused("prepare", "iemocap", tree, "--set", "allow_leaks", "-o", tmp_path / "out", code=2)


def test_iemocap_broken_lines_are_listed(tree: Path, tmp_path: Path) -> None:
    path = tree / "Session3" / "dialog" / "EmoEvaluation" / "Ses03F_impro01.txt"
    path.write_bytes(path.read_bytes() + b"[1.0 - 2.0]\tnonsense\n[1.0 - 2.0]\tWho_F000\tneu\t[3, 3, 3]\n\xff\xfe\n")
    run("iemocap", tmp_path / "out", inputs=[str(tree)], max_bad_fraction=0.5)
    assert list(rejected(tmp_path / "out").values()) == ["broken line"] * 3


# --- MSP-Podcast ----------------------------------------------------------------------------------------------------
MSP = """\ufeffFileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set\r
MSP-PODCAST_0001_0001.wav,H,4.5,7.5,4,1,Male,Train\r
MSP-PODCAST_0001_0002.wav,N,4,nan,4,Unknown,Unknown,Train\r
MSP-PODCAST_0002_0001.wav,S,2,2,2,2,Female,Development\r
MSP-PODCAST_0003_0001.wav,A,6,1,5,Unknown,Male,Test1\r
MSP-PODCAST_0003_0002.wav,A,6,1,5,{speaker},Male,Test1\r
MSP-PODCAST_0004_0001.wav,A,6,1,5,4,Male,Test2\r
MSP-PODCAST_0004_0002.wav,A,6,1,5,4,Male,Nowhere\r
"""


def make_msp(root: Path, speaker: str) -> Path:
    for name in ("0001_0001", "0001_0002", "0002_0001", "0003_0001", "0003_0002", "0004_0001", "0004_0002"):
        write_wav(root / "Audios" / f"MSP-PODCAST_{name}.wav", 0.2)
    (root / "Labels").mkdir()
    (root / "Labels" / "labels_consensus.csv").write_bytes(MSP.format(speaker=speaker).encode("utf-8"))
    (root / "Transcripts").mkdir()
    (root / "Transcripts" / "MSP-PODCAST_0001_0001.txt").write_text("So here we are.", "utf-8")
    return root


def test_msp_podcast_has_its_own_parts_and_unknown_is_no_speaker(tmp_path: Path) -> None:
    report = run("msp_podcast", tmp_path / "out", inputs=[str(make_msp(tmp_path / "in", "3"))])
    found = rows(tmp_path / "out")
    assert report.clips == {"train": 2, "valid": 1, "test": 2}
    assert [r.id for r in read_manifest(tmp_path / "out" / "test2.jsonl")] == ["MSP-PODCAST_0004_0001"]
    first, second = found["MSP-PODCAST_0001_0001"], found["MSP-PODCAST_0001_0002"]
    assert first.labels == {"valence": 7.0, "arousal": 4.5, "dominance": 4.0} and first.text == "So here we are."
    assert first.speaker == "1" and first.dialogue == "" and first.extra["podcast"] == "MSP-PODCAST_0001"
    assert second.speaker == "" and "valence" not in second.labels and found["MSP-PODCAST_0003_0001"].speaker == ""
    audit = json.loads((tmp_path / "out" / "folds.json").read_text("utf-8"))["folds"][0]["audit"]["train-test"]
    assert (audit["unknown_speakers"], audit["unknown_in_training"], audit["fatal"]) == (1, 1, False)
    assert rejected(tmp_path / "out") == {"labels_consensus.csv:8": "broken line"}


def test_msp_podcast_with_a_speaker_in_training_and_test_is_refused(tmp_path: Path) -> None:
    root = make_msp(tmp_path / "in", "1")
    assert "speakers are in both parts: '1'" in refused("prepare", "msp_podcast", root, "-o", tmp_path / "out")
    assert not (tmp_path / "out" / "train.jsonl").exists()
    assert lalia("prepare", "msp_podcast", root, "-o", tmp_path / "out", "--set", "allow_leaks=true").exit_code == 0
    assert (tmp_path / "out" / "train.jsonl").is_file()


# --- categories -----------------------------------------------------------------------------------------------------
def test_cremad_keeps_categories_and_invents_no_labels(tmp_path: Path) -> None:
    for actor in range(1001, 1007):
        for code in ("DFA_ANG_XX", "IEO_HAP_HI", "ITS_NEU_X"):
            write_wav(tmp_path / "in" / "AudioWAV" / f"{actor}_{code}.wav", 0.2)
    write_wav(tmp_path / "in" / "AudioWAV" / "1001_DFA_JOY_XX.wav", 0.2)
    report = run("cremad", tmp_path / "out", inputs=[str(tmp_path / "in")])
    found = rows(tmp_path / "out")
    angry = found["1001_DFA_ANG_XX"]
    assert angry.labels == {} and angry.text == "Don't forget a jacket." and angry.speaker == "cremad-1001"
    assert angry.extra == {"scripted": True, "emotion": "angry", "intensity": "unspecified"}
    assert report.usable == 18 and rejected(tmp_path / "out") == {"1001_DFA_JOY_XX": "broken line"}
    assert any("--circumplex" in note for note in report.notes) and any("scripted sentences" in note for note in report.notes)
    folds = json.loads((tmp_path / "out" / "folds.json").read_text("utf-8"))
    assert folds["protocol"] == "speakers" and len(folds["folds"]) == 5 and not folds["leaking"]


def test_ravdess_leaves_songs_out_and_derives_labels_only_when_asked(tmp_path: Path) -> None:
    for actor in range(1, 7):
        write_wav(tmp_path / "in" / f"Actor_{actor:02d}" / f"03-01-06-01-02-01-{actor:02d}.wav", 0.2)
        write_wav(tmp_path / "in" / f"Actor_{actor:02d}" / f"03-02-03-02-01-01-{actor:02d}.wav", 0.2)
    report = run("ravdess", tmp_path / "out", inputs=[str(tmp_path / "in")], circumplex=True)
    row = rows(tmp_path / "out")["03-01-06-01-02-01-02"]
    assert row.labels == {"valence": 1.5, "arousal": 4.0} and row.extra["derived_labels"] is True
    assert (row.extra["emotion"], row.extra["intensity"], row.extra["gender"]) == ("fearful", "normal", "F")
    assert row.text == "Dogs are sitting by the door." and row.speaker == "ravdess-02"
    assert report.usable == 6 and any("6 songs are left out" in note for note in report.notes)
    assert any("NOT ratings" in note for note in report.notes)
    plain = run("ravdess", tmp_path / "plain", inputs=[str(tmp_path / "in")])
    assert not any(r.labels for r in rows(tmp_path / "plain").values()) and not math.isnan(plain.seconds["median"])
