"""Plain text for language models, without a hub: Debian packages of prose, or any text files.

Documents are cleaned, cut into rows of a few kB, and split by a hash of the document, so that no document is in two splits.
A piece that is not its document's last has ``extra.more``: whatever comes after it in a batch is not its continuation.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

from lalia.config import nearest
from lalia.corpora import _debian
from lalia.corpora._common import CorpusError, Options, PrepareResult, Reason, Rejected, path_id, progress
from lalia.corpora._documents import (
    Reader,
    clean,
    contents,
    cut,
    fortunes,
    gcide,
    manual,
    page,
    plain,
    reader_of,
    wordnet,
)
from lalia.data import Row

log = logging.getLogger(__name__)

ADVICE = "`lalia prepare text FILES…` takes your own .txt, .md, .html and .jsonl files instead"
LEAST_ROW = 256  # bytes


class Package(NamedTuple):
    """A Debian package with prose in it: what to read, how, in what language, under which licence, and the tested file."""

    version: str
    sha256: str
    language: str
    licence: str
    pattern: str
    reader: Reader


PACKAGES: dict[str, Package] = {
    "dict-gcide": Package(
        "0.48.5+nmu2", "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f", "en", "GPL-3+",
        "dictd/gcide.dict.dz", gcide),
    "wordnet-base": Package(
        "1:3.0-37", "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752", "en", "WordNet 3.0 (permissive)",
        "wordnet/data.*", wordnet),
    "fortunes": Package(
        "1:1.99.1-7.3", "41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5", "en", "BSD; quotations of many authors",
        "games/fortunes/*", fortunes),
    "miscfiles": Package(
        "1.5+dfsg-4", "b29fdc907760ded52adbc1b4322da22b94108cd124caf0b23da8c23cc3578a28", "en", "GPL-2+; the state papers are free",
        "state/*.gz", plain),
    "debian-reference-en": Package(
        "2.100", "9f31d3a17df505de09689ca255512ea58c1fc47c59bb1b0c7bf1c23362e9743f", "en", "GPL-2+",
        "debian-reference/ch*.html", page),
    "debian-handbook": Package(
        "11.20220922", "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa", "en", "GPL-2+ or CC-BY-SA-3.0",
        "doc/debian-handbook/html/en-US/*.html", page),
    "manpages-zh": Package(
        "1.6.4.0-1", "81bae29495f6445db290e3f329f1203eb19b651c2a7ea165b74ebdc853a32ac1", "zh", "GFDL-1.2+ and others",
        "man/zh_CN/man*/*.gz", manual),
    "fortunes-zh": Package(
        "2.98", "211c5ddee59d0ae74ce01cbfd02f7c8714740bae1835d5661eb2254edd739105", "zh", "GPL-3+; poems of the Tang and Song",
        "games/fortunes/*", fortunes),
    "debian-reference-zh-cn": Package(
        "2.100", "6d2d8d9a646397e28b04cdff23d2e4374101ebf9be348e35961af62c8a2d0977", "zh", "GPL-2+",
        "debian-reference/ch*.html", page),
    "manpages-ja": Package(
        "0.5.0.0.20221215+dfsg-1",
        "4d270e9a1e83be4de0c072a110892a17dc9caa4b501257324006ac28d82c5743", "ja", "several, all DFSG-free",
        "man/ja/man*/*.gz", manual),
    "debian-reference-ja": Package(
        "2.100", "f67140e0b994409413bd5fcc8dfcce832445c99d724401f0275fa238daf30325", "ja", "GPL-2+",
        "debian-reference/ch*.html", page),
}  # fmt: skip
LANGUAGES = sorted({package.language for package in PACKAGES.values()})


@dataclass
class TextOptions(Options):
    """``inputs``: files or folders of text instead of packages. ``packages`` empty = all of ``languages``.

    ``download`` keeps the packages between runs; empty = ``out/download``.
    """

    needs_text: ClassVar[bool] = True

    languages: list[str] = field(default_factory=lambda: ["en"])
    packages: list[str] = field(default_factory=list)
    row_bytes: int = 4000  # a row of text has at most so many
    min_letters: int = 20  # documents with fewer letters are rejected
    download: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.packages:
            if name not in PACKAGES:
                raise CorpusError(f"no text package {name!r}{nearest(name, PACKAGES)}; known: {', '.join(PACKAGES)}")
        unknown = [name for name in self.languages if name not in LANGUAGES]
        if not self.inputs and not self.packages and (unknown or not self.languages):
            raise CorpusError(f"text packages are in {', '.join(LANGUAGES)}; got {', '.join(unknown) or 'none'}")
        if self.row_bytes < LEAST_ROW:
            raise CorpusError(f"row_bytes must be at least {LEAST_ROW}, got {self.row_bytes}")


class _Found(NamedTuple):
    """A file to read."""

    id: str
    path: Path
    reader: Reader
    language: str
    source: str


def prepare_text(options: TextOptions) -> PrepareResult:
    """Rows of text from ``options.inputs``, or from Debian packages.

    Raises:
        CorpusUnavailable: the packages cannot be had.
        CorpusError: an input that is not there.
    """
    names = options.packages or ([] if options.inputs else [n for n, p in PACKAGES.items() if p.language in options.languages])
    files = [found for given in options.inputs for found in _given(Path(given).expanduser(), options.language)]
    result = PrepareResult([], [])
    if names:
        result.facts["packages"] = _fetched(names, options)
        files += [found for name in names for found in _packaged(name, _work(options) / "root" / name / "usr/share")]
        result.notes += [f"{name}: {PACKAGES[name].licence}" for name in names]
    seen: set[bytes] = set()
    megabytes: Counter[str] = Counter()
    for found in progress(files[: options.limit or None], "reading text", options):
        for item in _rows(found, seen, options):
            if isinstance(item, Rejected):
                result.rejected.append(item)
            else:
                result.rows.append(item)
                result.split_keys[item.id] = str(item.extra["document"])
                megabytes[found.source] += len(item.text.encode("utf-8"))
    result.facts["megabytes"] = {name: round(count / 1e6, 3) for name, count in megabytes.most_common()}
    return result


def _work(options: TextOptions) -> Path:
    return Path(options.download) if options.download else options.out / "download"


def _fetched(names: list[str], options: TextOptions) -> dict[str, dict[str, str]]:
    work = _work(options)
    work.mkdir(parents=True, exist_ok=True)
    packages: dict[str, dict[str, str]] = {}
    for name in progress(names, "fetching packages", options):
        package = PACKAGES[name]
        fetched = _debian.fetch(name, work, package.sha256, package.version, ADVICE, f"root/{name}")
        packages[name] = fetched | {"licence": package.licence}
    return packages


def _packaged(name: str, share: Path) -> Iterator[_Found]:
    """The files of a package that hold text; not the same page under another name, nor a table of offsets."""
    package = PACKAGES[name]
    for path in sorted(share.glob(package.pattern)):
        if path.is_file() and not path.is_symlink() and path.suffix not in (".dat", ".u8"):
            yield _Found(f"{name}-{path.name.removesuffix('.gz')}", path, package.reader, package.language, name)


def _given(path: Path, language: str) -> Iterator[_Found]:
    """A user's file, or every file of a folder that has a known suffix."""
    if path.is_file():
        reader = reader_of(path)
        yield _Found(path.stem, path, reader or plain, language, path.name)
        return
    if not path.is_dir():
        raise CorpusError(f"{path}: no such file or folder")
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        reader = reader_of(file)
        if reader is not None and not any(part.startswith(".") for part in file.relative_to(path).parts):
            yield _Found(path_id(file, path) + file.suffix, file, reader, language, path.name)


def _rows(found: _Found, seen: set[bytes], options: TextOptions) -> Iterator[Row | Rejected]:
    try:
        text, broken = contents(found.path)
        documents = list(found.reader(text, options.row_bytes))
    except (ValueError, OSError, EOFError) as error:  # not UTF-8, not gzip, no JSON
        yield Rejected(found.id, str(found.path), Reason.unreadable, str(error))
        return
    if broken:
        log.warning("%s: %d bytes that are not UTF-8 are left out", found.path, broken)
    for name, raw in documents:
        identifier, text = f"{found.id}-{name}".rstrip("-"), clean(raw)
        digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
        if sum(character.isalpha() for character in text) < options.min_letters:
            yield Rejected(identifier, str(found.path), Reason.too_short, f"{len(text)} characters")
        elif digest in seen:
            yield Rejected(identifier, str(found.path), Reason.duplicate, "the same text is there already")
        else:
            seen.add(digest)
            pieces = cut(text, options.row_bytes)
            for number, piece in enumerate(pieces):
                extra = {"document": identifier, "source": found.source}
                more = {"more": True} if number + 1 < len(pieces) else {}
                yield Row(f"{identifier}-{number:04d}", text=piece, language=found.language, extra={**extra, **more})

