"""Transcription judged by hand: error rates, the controls, failures, what the rows are, words and page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transcription_fake import RATE, Aligner, Scribe, length, make_rows

from lalia.data import Corpus, Row
from lalia.evaluate import transcription
from lalia.evaluate.harness import choose
from lalia.evaluate.results import Figure
from lalia.evaluate.transcription import Heard, TranscriptionEvaluation, evaluate_transcription, judged, kind_of_rows
from lalia.evaluate.transcription_report import chosen, figure_lines, verdict, write_transcription_report

#: text, what is said of it, word errors: right, one substituted, one missing, two too many
CASES = [
    ("Please hold the line.", "please hold the line", 0),
    ("Press 2 now.", "press three now", 1),
    ("Thank you for calling us.", "thank you for us", 1),
    ("Goodbye.", "goodbye my friend", 2),
]
TEXTS = [text for text, _, _ in CASES]
WORDS = [4, 3, 5, 1]


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    return make_rows(tmp_path / "audio", TEXTS)


def scribe(kind: type[Scribe] = Scribe, **changed: Any) -> Scribe:
    said = {length(n): said for n, (_, said, _) in enumerate(CASES)}
    return kind(said | {length(int(name[1:])): answer for name, answer in changed.items()}, silence="thank you")


def judge(system: Scribe, rows: Any, out: Path, **options: Any) -> TranscriptionEvaluation:
    return evaluate_transcription(system, rows, out=out, progress=False, **options)


def value(evaluation: TranscriptionEvaluation, name: str) -> float:
    figure = evaluation.figure(name)
    assert figure is not None, name
    return figure.value


# --- figures --------------------------------------------------------------------------------------------------------
def test_error_rates_are_pooled_over_clips_by_hand(rows: list[Row], tmp_path: Path) -> None:
    found = judge(scribe(), rows, tmp_path)
    assert [clip.id for clip in found.clips] == [row.id for row in rows]
    assert [(clip.errors["real"], clip.words) for clip in found.clips] == [
        (e, n) for (_, _, e), n in zip(CASES, WORDS, strict=True)
    ]
    assert value(found, "wer.real") == pytest.approx(100 * 4 / 13)
    # "two" → "three": four substituted letters at least; "calling" is 7; "my friend" is 8
    assert [clip.character_errors["real"] for clip in found.clips] == [0, 4, 7, 8]
    assert value(found, "cer.real") == pytest.approx(100 * 19 / (17 + 11 + 20 + 7))
    assert value(found, "length.real") == pytest.approx((4 + 3 + 4 + 3) / 13)
    assert value(found, "rtf.real") > 0 and found.parameters == 8 and found.corpus_rows == 4
    for name in ("wer.real", "wer.other", "wer.silent", "cer.real", "cer.other", "cer.silent", "length.real"):
        figure = found.figure(name)
        assert figure is not None and figure.low <= figure.value <= figure.high and figure.low < figure.high and figure.n == 4


def test_the_controls_are_other_clips_words_and_one_silence(rows: list[Row], tmp_path: Path) -> None:
    system = scribe()
    found = judge(system, rows, tmp_path)
    by_id = {clip.id: clip for clip in found.clips}
    assert len({clip.other for clip in found.clips}) == 4 and all(clip.other != clip.id for clip in found.clips)
    order = [row.id for row in choose(rows, 0, 0)]
    for number, name in enumerate(order):
        assert by_id[name].other == order[(number + 1) % 4]  # a cyclic shift
    assert system.silences == [round(sum(sorted(map(length, range(4)))[1:3]) / 2)]  # once, and as long as the median
    assert found.silence == "thank you" and found.silence_seconds == pytest.approx(system.silences[0] / RATE)
    # "thank you" for each: 4, 3, 3 missing of 5, 1 substituted and 1 too many
    assert [clip.errors["silent"] for clip in found.clips] == [4, 3, 3, 2]
    assert value(found, "wer.silent") == pytest.approx(100 * 12 / 13)
    others = sum(clip.errors["other"] for clip in found.clips)
    assert others > 4 and value(found, "wer.other") == pytest.approx(100 * others / 13)


def test_another_clip_has_another_text() -> None:
    def clips(*pairs: tuple[str, str]) -> list[transcription.Transcript]:
        heard = [Heard(Row(f"c{n}", text=text, language="en"), 1.0, said) for n, (text, said) in enumerate(pairs)]
        return judged(heard)

    found = clips(("Yes.", "yes"), ("YES", "no"), ("One two.", "one two three"), ("yes", "yes"))
    assert [clip.other for clip in found] == ["c2", "c2", "c3", "c2"]
    assert [clip.errors["other"] for clip in found] == [3, 3, 2, 3]
    assert all(set(clip.errors) == {"real"} and not clip.other for clip in clips(("Yes.", "yes"), ("yes", "no")))


def test_calls_hold_eight_clips_of_like_length(tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "audio", [f"number {n}" for n in range(19)])
    system = Scribe({length(n): f"number {n}" for n in range(19)})
    found = judge(system, rows, tmp_path)
    warm, *calls, silence = system.calls
    assert [len(call) for call in calls] == [8, 8, 3] and len(warm) == len(silence) == 1 and warm == calls[0][:1]
    assert sum(calls, []) == sorted(map(length, range(19)))
    assert [clip.hypothesis for clip in found.clips] == [f"number {n}" for n in range(19)] and value(found, "wer.real") == 0


def test_a_limit_is_a_choice_by_hash(rows: list[Row], tmp_path: Path) -> None:
    two = judge(scribe(), rows, tmp_path, limit=2, seed=3)
    assert {clip.id for clip in two.clips} == {row.id for row in choose(rows, 2, 3)} and two.corpus_rows == 4
    assert [clip.id for clip in two.clips] == sorted(clip.id for clip in two.clips)
    three = judge(scribe(), rows, tmp_path, limit=3, seed=3)
    assert {clip.id for clip in two.clips} < {clip.id for clip in three.clips}


# --- what goes wrong ------------------------------------------------------------------------------------------------
def test_a_clip_that_cannot_be_taken_counts_as_missed(rows: list[Row], tmp_path: Path) -> None:
    found = judge(scribe(c2=ValueError("recording 1 is too long")), rows, tmp_path)
    [failed] = found.failures()
    assert (failed.id, failed.failure, failed.hypothesis) == ("c02", "recording 1 is too long", "")
    assert failed.errors["real"] == 5 and failed.character_errors["real"] == 20
    assert value(found, "wer.real") == pytest.approx(100 * (0 + 1 + 5 + 2) / 13)  # the others of its call are heard alone
    assert value(found, "length.real") == pytest.approx((4 + 3 + 3) / 8)
    wer, rtf = found.figure("wer.real"), found.figure("rtf.real")
    assert wer is not None and rtf is not None and wer.note.startswith("1 clips that") and (wer.n, rtf.n) == (4, 3)
    assert any("1 clips could not be transcribed" in line for line in figure_lines(found))


def test_a_system_that_takes_nothing_is_judged_all_the_same(rows: list[Row], tmp_path: Path) -> None:
    deaf = Scribe(dict.fromkeys(map(length, range(4)), ValueError("no ears")), silence=ValueError("no ears"))
    found = judge(deaf, rows, tmp_path)
    assert value(found, "wer.real") == 100 and found.figure("rtf.real") is None and found.figure("wer.silent") is None
    assert "silence" in found.notes[0] and "no ears" in found.notes[0] and "does not transcribe" in verdict(found)[0]
    write_transcription_report(tmp_path / "report.html", found)


def test_a_fault_of_the_program_is_not_hidden(rows: list[Row], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        judge(scribe(c1=RuntimeError("a bug")), rows, tmp_path)


def test_rows_that_cannot_be_used_are_named(rows: list[Row], tmp_path: Path) -> None:
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    bad = [
        Row("mute", text="words"),
        Row("wordless", rows[0].audio, text="…?"),
        Row("gone", str(tmp_path / "gone.wav"), text="words"),
        Row("late", str(tmp_path / "gone.wav"), duration=1.0, text="words"),
        Row("broken", str(tmp_path / "broken.wav"), text="words"),
    ]
    corpus = Corpus.from_rows([*rows, *bad], rejected=[("test.jsonl:9", "bad JSON")])
    found = judge(scribe(), corpus, tmp_path)
    assert set(found.skipped) == {"test.jsonl:9", *(row.id for row in bad)} and len(found.clips) == 4
    assert found.skipped["mute"] == "no audio" and found.skipped["wordless"] == "no words in the text"
    assert any("6 rows could not be used" in line for line in figure_lines(found))
    page = write_transcription_report(tmp_path / "report.html", found).read_text()
    assert "wordless" in page and "bad JSON" in page
    with pytest.raises(ValueError, match="none of the 1 rows can be evaluated: mute: no audio"):
        judge(scribe(), bad[:1], tmp_path)
    with pytest.raises(ValueError, match="no rows"):
        judge(scribe(), [], tmp_path)


# --- what rows are --------------------------------------------------------------------------------------------------
QUESTION = Row("q", "q.wav", text="yes", extra={"question": "?", "options": ["a", "b", "c", "d"], "right": 0})
SPEECH = Row("s", "s.wav", text="yes")
TALK = Row("t", "t.wav", text="yes", extra={"messages": []})
TEXT = Row("n", text="yes")


@pytest.mark.parametrize(
    ("rows", "kind"),
    [([QUESTION], "questions"), ([SPEECH], "speech"), ([SPEECH, TEXT], "speech")],
)
def test_rows_are_questions_or_speech(rows: list[Row], kind: str) -> None:
    assert kind_of_rows(Corpus.from_rows(rows)) == kind


@pytest.mark.parametrize(
    ("rows", "counts"),
    [
        ([QUESTION, SPEECH], "1 of 2 rows are four-way questions, 1 recordings"),
        ([QUESTION, TEXT], "1 of 2 rows are four-way questions, 0 recordings with their text, 0 conversations and 1 none"),
        ([SPEECH, TALK], "0 of 2 rows are four-way questions, 1 recordings with their text, 1 conversations"),
        ([TEXT], "0 of 1 rows"),
    ],
)
def test_anything_else_is_refused_with_both_ways_out(rows: list[Row], counts: str) -> None:
    with pytest.raises(ValueError, match=counts) as caught:
        kind_of_rows(Corpus.from_rows(rows))
    assert "audiobench-mini.jsonl" in str(caught.value) and "test.jsonl" in str(caught.value)


# --- audio and text -------------------------------------------------------------------------------------------------
def test_a_system_that_compares_audio_and_text_is_asked(rows: list[Row], tmp_path: Path) -> None:
    rows[1].speaker = "nobody"
    system = scribe(Aligner)
    found = judge(system, rows, tmp_path)
    assert isinstance(system, Aligner) and sorted(system.measured) == ["c00", "c02", "c03"]
    cka, retrieval = found.figure("align.cka"), found.figure("align.retrieval@1")
    assert cka is not None and retrieval is not None and (cka.value, cka.n, cka.note) == (0.75, 3, "0.250 by chance")
    assert (retrieval.value, retrieval.note) == (0.5, "0.100 by chance")
    assert found.figure("align.pairs") is None and found.figure("align.cka_shuffled") is None
    assert found.notes == ["1 clips are left out of the comparison of audio and text; the first: c01: too long: 99 soft tokens"]
    page = write_transcription_report(tmp_path / "report.html", found).read_text()
    assert "data:image/png" in page and "Audio and text · CKA" in page
    system.failure = "2 recordings are too few"
    again = judge(system, rows, tmp_path)
    assert again.figure("align.cka") is None and again.notes[-1] == "audio and text were not compared: 2 recordings are too few"
    assert "data:image/png" not in write_transcription_report(tmp_path / "report.html", again).read_text()  # not an older picture


# --- words ----------------------------------------------------------------------------------------------------------
def figures(*rates: tuple[str, float, float, float], length: float = 1.0) -> TranscriptionEvaluation:
    made = [Figure(f"wer.{name}", value, low, high, 30, "%") for name, value, low, high in rates]
    return TranscriptionEvaluation("x", [*made, Figure("length.real", length, length, length, 30)], [])


NAN = float("nan")


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        (
            [("real", 20, 15, 25), ("other", 130, 120, 140), ("silent", 99, 98, 100)],
            "listens: with the right recordings WER 20",
        ),
        ([("real", 90, 85, 97), ("other", 130, 120, 140), ("silent", 99, 96, 100)], "not shown that the model listens"),
        ([("real", 110, 105, 115), ("other", 190, 180, 195)], "does not transcribe: .* it does hear something"),
        ([("real", 190, 180, 195), ("other", 190, 180, 195)], "does not transcribe: .* would score 100 %$"),
        ([("real", 20, NAN, NAN), ("other", 130, NAN, NAN)], "too few clips"),
        ([("real", 20, 15, 25)], "too few clips"),
    ],
)
def test_the_verdict_follows_the_figures(rates: list[tuple[str, float, float, float]], said: str) -> None:
    [line] = verdict(figures(*rates))
    assert re.search(said, line), line


def test_a_model_that_does_not_stop_is_told() -> None:
    assert "3.00 words for each word of the text: it does not stop" in verdict(figures(("real", 300, 290, 310), length=3.0))[1]
    assert "it stops too early" in verdict(figures(("real", 80, 70, 90), length=0.3))[1]


# --- record and page ------------------------------------------------------------------------------------------------
def test_the_record_reads_back_and_names_each_clip(rows: list[Row], tmp_path: Path) -> None:
    found = judge(scribe(), rows, tmp_path, label="step 7")
    text = (tmp_path / "eval.json").read_text()
    record = json.loads(text)
    assert next(iter(record)) == "schema" and record["schema"] == "transcription-1" and "NaN" not in text
    assert {"id": "c01", "text": "Press 2 now.", "hypothesis": "press three now"}.items() <= record["clips"][1].items()
    assert record["clips"][1]["errors"]["real"] == 1
    assert TranscriptionEvaluation.load(tmp_path / "eval.json").to_dict() == found.to_dict()
    (tmp_path / "eval.json").write_text(text.replace("transcription-1", "emotion-1"))
    with pytest.raises(ValueError, match="schema 'emotion-1', this version reads schema 'transcription-1'"):
        TranscriptionEvaluation.load(tmp_path / "eval.json")


def test_worst_clips_come_first_and_typical_ones_are_round_the_median() -> None:
    def clip(rate: int) -> transcription.Transcript:
        return transcription.Transcript(f"c{rate}", "", "", {"real": rate}, {"real": 0}, 10, 10, 10, 1.0)

    worst, typical = chosen([clip(rate) for rate in range(21)], 5)
    assert [c.errors["real"] for c in worst] == [20, 19, 18, 17, 16]
    assert [c.errors["real"] for c in typical] == [12, 11, 10, 9, 8]
    worst, typical = chosen([clip(rate) for rate in range(7)], 5)
    assert len(worst) == 5 and [c.errors["real"] for c in typical] == [1, 0]
    assert chosen([clip(1)], 5)[1] == []


def test_the_page_shows_text_against_transcript_and_nothing_as_markup(rows: list[Row], tmp_path: Path) -> None:
    found = judge(scribe(c3="<script>goodbye</script>"), rows, tmp_path, label="step 7")
    page = write_transcription_report(tmp_path / "report.html", found).read_text()
    assert "<script>" not in page and "&lt;script&gt;goodbye" in page and "scribe: step 7" in page
    assert page.index("Goodbye.") < page.index("Press 2 now.") and "Of silence it says: thank you" in page
    assert "Word error rate · another recording" in page and "<dd>scribe</dd>" in page
