"""Plain text from packages and files, and the five sines."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_prepare import rejected, rows, run

from lalia import audio
from lalia.corpora import CorpusError, _debian
from lalia.corpora._documents import blocks, clean, cut, gcide, manual, page, wordnet
from lalia.corpora.sines import CAPTIONS
from lalia.corpora.text import PACKAGES
from lalia.data import read_manifest

SHARES = (0.5, 0.25, 0.25)
#: of all five files, in the order of their names
SINES = "9bf93b261abcf9b0b0c10b80bdecaa9c14144870069d3ea39b0491570b0453f3"


# --- sines ------------------------------------------------------------------------------------------------------------
def digest(folder: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("audio/*.wav")))).hexdigest()


def test_sines_are_the_same_bytes_everywhere(tmp_path: Path) -> None:
    run("sines", tmp_path / "one")
    run("sines", tmp_path / "two")
    assert digest(tmp_path / "one") == digest(tmp_path / "two") == SINES
    assert (tmp_path / "one/manifest.jsonl").read_bytes() == (tmp_path / "two/manifest.jsonl").read_bytes()


def test_sines_are_what_they_say(tmp_path: Path) -> None:
    report = run("sines", tmp_path)
    found = list(read_manifest(tmp_path / "manifest.jsonl"))
    assert report.clips == {"train": 5, "valid": 0, "test": 0} and len(found) == 5
    assert {len(row.text) for row in found} == {18} and len({row.text for row in found}) == 5
    assert len({row.text[0] for row in found}) >= 4  # told apart from the first letter on
    for row, hertz in zip(found, CAPTIONS, strict=True):
        wave, rate = audio.read(row.audio)
        assert (len(wave), rate) == (80000, 16000)
        assert np.abs(np.fft.rfft(wave)).argmax() / 5 == hertz
        assert np.abs(wave).max() == pytest.approx(0.5, abs=2e-3)
    with pytest.raises(CorpusError, match="fixed set"):
        run("sines", tmp_path, sample_rate=8000)


# --- text -------------------------------------------------------------------------------------------------------------
def test_files_of_every_kind(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("\ufeffOne paragraph of text.\r\n\r\n\r\n\r\nAnother\u00a0one.  \x07", "utf-8")
    records = [json.dumps({"text": f"The {which} of two documents."}) for which in ("first", "second")]
    (folder / "b.jsonl").write_text("\n\n".join(records), "utf-8")
    (folder / "c.md.gz").write_bytes(gzip.compress(b"# A packed document\n\nwith some words."))
    body = "<body><p>Words &amp; signs of a page,<br>and lines.</p></body>"
    (folder / "d.html").write_text(f"<html><head><title>no</title></head>{body}</html>", "utf-8")
    (folder / "e.txt").write_bytes("Grüße aus einer anderen Zeit".encode("latin-1"))
    (folder / "f.jsonl").write_text('{"words": 1}\n', "utf-8")
    (folder / "g.txt").write_text("short", "utf-8")
    (folder / "h.txt").write_text("One paragraph of text.\n\nAnother one.", "utf-8")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    report = run("text", tmp_path / "out", inputs=[str(folder)], max_bad_fraction=0.9, split=(1, 0, 0), language="en")
    texts = {row.id: row.text for row in rows(tmp_path / "out").values()}
    assert texts == {
        "a.txt-0000": "One paragraph of text.\n\nAnother one.",
        "b.jsonl-000001-0000": "The first of two documents.",
        "b.jsonl-000003-0000": "The second of two documents.",
        "c.md.gz-0000": "# A packed document\n\nwith some words.",
        "d.html-0000": "Words & signs of a page,\n\nand lines.",
    }
    assert rejected(tmp_path / "out") == {
        "e.txt": "unreadable", "f.jsonl": "unreadable", "g.txt": "too short", "h.txt": "duplicate id",
    }  # fmt: skip
    assert report.megabytes["train"] == pytest.approx(sum(len(t.encode()) for t in texts.values()) / 1e6, abs=1e-3)
    assert "MB" in report.summary() and "clips" not in report.summary().split("\n")[0]


def test_a_document_is_in_one_split_and_its_pieces_are_the_document(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    random = np.random.default_rng(0)
    originals = {}
    for number in range(30):
        words = random.choice(["alpha", "beta", "gamma", "delta\n\n", "epsilon."], 300)
        originals[f"d{number}.txt"] = clean(" ".join(words) + str(number))
        (folder / f"d{number}.txt").write_text(originals[f"d{number}.txt"], "utf-8")
    run("text", tmp_path / "out", inputs=[str(folder)], row_bytes=512, split=SHARES)
    owners: dict[str, set[str]] = {}
    joined: dict[str, str] = {}
    for name in ("train", "valid", "test"):
        for row in sorted(read_manifest(tmp_path / "out" / f"{name}.jsonl"), key=lambda row: row.id):
            owners.setdefault(row.extra["document"], set()).add(name)
            joined[row.extra["document"]] = joined.get(row.extra["document"], "") + row.text
            assert len(row.text.encode()) <= 512
    assert joined == originals and all(len(names) == 1 for names in owners.values())
    assert {name for names in owners.values() for name in names} == {"train", "valid", "test"}


def test_only_the_last_piece_ends_its_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 300, "utf-8")
    run("text", tmp_path / "out", inputs=[str(tmp_path / "a.txt")], row_bytes=400, split=(1, 0, 0))
    more = [bool(row.extra.get("more")) for row in read_manifest(tmp_path / "out" / "train.jsonl")]
    assert more == [True] * (len(more) - 1) + [False] and len(more) > 2


@given(text=st.text(alphabet="ab .\n\n。你é😀", max_size=400), size=st.integers(8, 64))
def test_cut_loses_nothing(text: str, size: int) -> None:
    pieces = cut(text, size)
    assert "".join(pieces) == text and all(0 < len(piece.encode("utf-8")) <= size for piece in pieces)


def test_blocks_hold_whole_pieces() -> None:
    assert [text for _, text in blocks(["aa", "bb", " ", "c" * 9, "d"], 8, "\n")] == ["aa\nbb", "c" * 9, "d"]


# --- packages ---------------------------------------------------------------------------------------------------------
def test_readers() -> None:
    entry = 'A \\A\\, n.\n   The first letter.\n   [1913 Webster]\n\n   It is a vowel.\n\nAb \\Ab\\, n.\n   The fifth\n   month.\n'
    assert [text for _, text in gcide("00-database-info\n" + entry, 10)] == [
        "A, n. The first letter.\n\nIt is a vowel.", "Ab, n. The fifth month.",
    ]  # fmt: skip
    line = "00039021 04 n 02 eye_contact 0 look(a) 0 006 @ 00037396 n 0000 | a mutual gaze  \n"
    assert [text for _, text in wordnet("  1 This software\n" + line, 100)] == ["eye contact, look: a mutual gaze"]
    source = '.\\" no\n.TH ar 1\n.de BP\n.sp\n..\n.SH NAME\nar \\- create \\fBarchives\\fR\n.PP\n'
    source += 'The \n.B name\n.BR ar " (" 1 )\n.TS\nx\n.TE\n'
    assert [text for _, text in manual(source, 0)] == ["NAME\n\nar - create archives\n\nThe name ar(1)"]
    html = "<body><div class='navheader'><p>Next</p><div>x</div></div><p>One <b>two</b>\n three.</p>"
    html += "<script>x()</script><ul><li>four</li></ul>"
    assert [text for _, text in page(html, 0)] == ["One two three.\n\nfour"]


def test_packages_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def run_command(command: list[str], work: Path) -> None:
        if command[0] == "apt-get":
            (work / f"{command[-1]}_1_all.deb").write_bytes(b"deb")
        else:
            folder = work / command[-1] / "usr/share/games/fortunes"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "wise").write_text("\x1b[32mA stitch in time saves nine.\x1b[m\n%\nLook before you leap.\n" * 3, "utf-8")
            (folder / "wise.dat").write_bytes(b"\0")
            (folder / "wise.u8").symlink_to("wise")

    monkeypatch.setattr(_debian, "_run", run_command)
    report = run("text", tmp_path / "out", packages=["fortunes"], split=(1, 0, 0))
    found = list(rows(tmp_path / "out").values())
    assert len(found) == 1 and found[0].text.startswith("A stitch in time saves nine.\n\nLook before you leap.")
    assert report.facts["packages"]["fortunes"]["licence"].startswith("BSD") and "fortunes" in report.facts["megabytes"]
    assert "that was tested" in caplog.text and any("BSD" in note for note in report.notes)
    assert json.loads((tmp_path / "out/report.json").read_text("utf-8"))["megabytes"]["train"] >= 0


def test_wrong_options_are_named(tmp_path: Path) -> None:
    for options, words in (
        ({"packages": ["fortune"]}, "no text package 'fortune'.*fortunes"),
        ({"languages": ["xx"]}, "text packages are in en"),
        ({"inputs": ["/nowhere"]}, "no such file or folder"),
        ({"row_bytes": 1}, "row_bytes"),
    ):
        with pytest.raises(CorpusError, match=words):
            run("text", tmp_path / "out", **options)
    assert {package.language for package in PACKAGES.values()} == {"en", "ja", "zh"}
    assert all(len(package.sha256) == 64 and package.licence for package in PACKAGES.values())
