"""Readers of plain text: what a file holds, as documents without markup. Nothing here knows where the files come from."""

from __future__ import annotations

import gzip
import html.parser
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u0080-\u009f\ufeff\ufffe\uffff]")
BROKEN_BYTES = 100_000
MANY_LINES = re.compile(r"\n{3,}")

#: (what names the document within its file, its text)
Document = tuple[str, str]


def clean(text: str) -> str:
    """NFC, unix lines without trailing blanks, no control or colour codes, no runs of empty lines."""
    text = unicodedata.normalize("NFC", ANSI.sub("", text).replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " "))
    lines = (line.rstrip() for line in CONTROL.sub("", text).split("\n"))
    return MANY_LINES.sub("\n\n", "\n".join(lines)).strip()


def reflow(text: str) -> str:
    """Paragraphs on one line each: line breaks of a fixed width say nothing."""
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "\n\n".join(part for part in paragraphs if part)


def contents(path: Path) -> tuple[str, int]:
    """A file as text, unpacked if gzipped (``.gz``, dictzip ``.dz``), and how many broken bytes were left out.

    UnicodeDecodeError when more than a byte in :data:`BROKEN_BYTES` is not UTF-8: then it is another encoding.
    """
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix in (".gz", ".dz") else data
    text = data.decode("utf-8-sig", errors="replace")
    broken = text.count("\ufffd") - data.count("\ufffd".encode())
    if broken * BROKEN_BYTES > len(data):
        data.decode("utf-8-sig")
    return (text.replace("\ufffd", ""), broken) if broken else (text, 0)


def blocks(pieces: Iterable[str], size: int, joint: str = "\n\n") -> Iterator[Document]:
    """Neighbouring small pieces (entries, sayings) together, at most ``size`` bytes where no piece is longer.

    A block is named by its number.
    """
    held: list[str] = []
    number = length = 0
    for piece in filter(None, map(str.strip, pieces)):
        bytes_more = len(piece.encode("utf-8")) + len(joint)
        if held and length + bytes_more > size:
            yield f"{number:05d}", joint.join(held)
            held, number, length = [], number + 1, 0
        held.append(piece)
        length += bytes_more
    if held:
        yield f"{number:05d}", joint.join(held)


# --- dictionaries and sayings ---------------------------------------------------------------------------------------
NOTES = re.compile(r"\[(?:1913 Webster|Webster 1913[^\]]*|PJC|WordNet 1\.5|Century Dict\.[^\]]*|Obs\.|R\.|RP|AS)[^\]]*\]")
RESPELLING = re.compile(r"\\[^\\\n]{1,80}\\")


def gcide(text: str, size: int) -> Iterator[Document]:
    """The GNU Collaborative International Dictionary in dictd's form: an entry begins at the margin, its body is indented."""
    body = text[text.find("\nA \\") + 1 :] if "\nA \\" in text else text
    entries = re.split(r"\n\s*\n(?=\S)", NOTES.sub("", RESPELLING.sub("", body)))
    yield from blocks((reflow(entry).replace(" ,", ",") for entry in entries), size)


def wordnet(text: str, size: int) -> Iterator[Document]:
    """WordNet's ``data.*``: ``word, word: gloss`` of each synset (wndb(5): the word count is the fourth field, in base 16)."""
    yield from blocks(_synsets(text), size, "\n")


def _synsets(text: str) -> Iterator[str]:
    for line in text.splitlines():
        head, bar, gloss = line.partition(" | ")
        if bar and not line.startswith("  "):
            parts = head.split()
            words = parts[4 : 4 + 2 * int(parts[3], 16) : 2]
            yield f"{', '.join(word.partition('(')[0].replace('_', ' ') for word in words)}: {' '.join(gloss.split())}"


def fortunes(text: str, size: int) -> Iterator[Document]:
    """Sayings and poems between lines of ``%``; their line breaks are their own."""
    yield from blocks((clean(piece) for piece in re.split(r"(?m)^%\s*$", text)), size)


# --- markup ---------------------------------------------------------------------------------------------------------
class _Text(html.parser.HTMLParser):
    """Running text of a page: block elements end lines; code of programs, navigation and headings of the frame are left out."""

    SKIPPED = ("script", "style", "head", "nav", "table", "footer", "noscript", "svg")
    BLOCKS = ("p", "div", "li", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "dt", "dd", "blockquote", "br", "ul", "ol", "dl")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skipped: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        frame = tag in self.SKIPPED or (tag in ("ul", "ol", "div", "p") and "nav" in (dict(attrs).get("class") or ""))
        if frame or tag in self.skipped[-1:]:
            self.skipped.append(tag)
        elif tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if self.skipped and tag == self.skipped[-1]:
            self.skipped.pop()
        elif tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.parts.append(data)


def page(text: str, size: int) -> Iterator[Document]:
    """HTML without its markup, as one document."""
    reader = _Text()
    reader.feed(text)
    yield "", reflow("".join(reader.parts))


ESCAPES = {
    r"\-": "-", r"\e": "\\", r"\ ": " ", r"\~": " ", r"\(bu": "•", r"\(co": "©", r"\(em": "—", r"\(lq": "“", r"\(rq": "”",
    r"\(aq": "'", r"\(dq": '"', r"\(->": "→",
}  # fmt: skip
ESCAPE = re.compile(r"\\f(?:\([A-Z]{2}|\[[^\]]*\]|.)|\\s[+-]?\d|\\\([\w*+<>-]{2}|\\\(->|\\\*(?:\(..|\[[^\]]*\]|.)|\\.")
FONTS = re.compile(r"\.(?:BR|RB|BI|IB|IR|RI|B|I|SM|SB)\s+(.*)")
SECTION = re.compile(r"\.(?:SH|SS|Sh|Ss)\s+(.*)")
BREAKS = re.compile(r"\.(?:PP|P|LP|HP|TP|IP|sp|Pp|br)\b")


def manual(text: str, size: int) -> Iterator[Document]:
    """A manual page's prose: roff requests, fonts and escapes are taken out, tables and macro definitions left out."""
    lines: list[str] = []
    until = ""
    for line in text.splitlines():
        if until:
            until = "" if line.startswith(until) else until
        elif line.startswith(".de"):
            until = ".."
        elif line.startswith(".TS"):
            until = ".TE"
        else:
            lines.append(_roff(line))
    yield "", reflow("\n".join(lines))


def _roff(line: str) -> str:
    """One line of roff as text; a break of paragraphs is a blank line."""
    font, section = FONTS.match(line), SECTION.match(line)
    if section:
        line = f"\n{section[1].strip(chr(34))}\n"
    elif font:
        line = font[1].replace('"', "") if line[1:3] in ("B ", "I ", "SM", "SB") else re.sub(r'\s*"\s*|\s+', "", font[1])
    elif line.startswith((".", "'")):
        return "\n" if BREAKS.match(line) else ""
    return ESCAPE.sub(lambda found: ESCAPES.get(found[0], ""), line)


# --- plain files ----------------------------------------------------------------------------------------------------
def plain(text: str, size: int) -> Iterator[Document]:
    """The file is the document."""
    yield "", text


def json_lines(text: str, size: int) -> Iterator[Document]:
    """``{"text": …}`` a line, a document each. ValueError names the line that is none."""
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise ValueError(f"line {number} has no field 'text'")
            yield f"{number:06d}", record["text"]


Reader = Callable[[str, int], Iterator[Document]]
SUFFIXES: dict[str, Reader] = {".txt": plain, ".md": plain, ".jsonl": json_lines, ".html": page, ".htm": page}


def reader_of(path: Path) -> Reader | None:
    """The reader of a user's file by its suffix (before ``.gz``); None for other files."""
    return SUFFIXES.get(Path(path.stem).suffix.lower() if path.suffix == ".gz" else path.suffix.lower())


# --- rows -----------------------------------------------------------------------------------------------------------
def cut(text: str, size: int) -> list[str]:
    """Pieces of at most ``size`` bytes that joined are the text: cut after a paragraph, else a line, a sentence, a space."""
    pieces = []
    while len(data := text.encode("utf-8")) > size:
        head = data[:size].decode("utf-8", errors="ignore")  # a character that straddles the limit goes to the next piece
        half = len(head) // 2
        at = next((i + len(mark) for mark in ("\n\n", "\n", ". ", "。", " ") if (i := head.rfind(mark)) > half), len(head))
        pieces.append(text[:at])
        text = text[at:]
    return [*pieces, text] if text else pieces
