"""Real studio speech without a model hub: the telephone prompts of Asterisk, from Debian packages.

English, Spanish, French, Italian and Russian, 16 kHz G.722, about 25 minutes a language with transcripts, four speakers
(licences CC-BY-SA-3.0 and CC-BY-3.0). ``apt-get download`` and ``dpkg-deb -x`` need no root and install nothing.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lalia.corpora import _debian
from lalia.corpora._common import (
    CorpusError,
    CorpusUnavailable,
    Options,
    PrepareResult,
    Reason,
    Rejected,
    progress,
    select,
)
from lalia.data import Row

VERSION = "1.6.1-1"
SHA256 = {  # of the packages this was tested with; another version is used with a warning
    "asterisk-core-sounds-en": "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
    "asterisk-core-sounds-en-g722": "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806",
    "asterisk-core-sounds-es": "9afdab7f559f036649fb406e625899306ca1004df8ebe39c30bfbd5912d66f74",
    "asterisk-core-sounds-es-g722": "e4e3b4281057d3b81b779298fd6be705f57411513955c518eed1bcaabbd615b8",
    "asterisk-core-sounds-fr": "04c82c78c570c43a7136cbc5e2488d0c470b775468dff9fbce4a131b18cf1056",
    "asterisk-core-sounds-fr-g722": "7add61d5e42279ecff1bbdf842a5a946ac3644fac9a0fe44384731aa7270c8e0",
    "asterisk-core-sounds-it": "3884d9457e12f21caa018c18f0d587df5d53ebea14b673d8453a134c5941ab3b",
    "asterisk-core-sounds-it-g722": "46b4cf7afc508a5fcfc051b7ea233251c0d195dd4ef83cc4b7facb4c6429b016",
    "asterisk-core-sounds-ru": "28a61616bb0cd3345a7ea532dec4df9f071e5d0fa9f8c1a563ea9669002f39ab",
    "asterisk-core-sounds-ru-g722": "673b4238a6b8269960f055d868c6a11083f7a0d00979167cb01554046b48ed9b",
}
SPEAKERS = {"en": "allison", "es": "allison", "fr": "june", "it": "carlo", "ru": "ivrvoice"}  # en and es: one woman
FOLDERS = {"en": "en_US", "es": "es_MX", "fr": "fr_CA", "it": "it_IT", "ru": "ru_RU"}
ADVICE = "`lalia prepare synth` makes a synthetic corpus that needs neither apt nor a network"
BRACKETS = re.compile(r"\[[^\]]*\]|\([^)]*\)|<[^>]*>")


@dataclass
class AsteriskOptions(Options):
    """``download`` keeps the packages between runs; empty = ``out/download``."""

    languages: list[str] = field(default_factory=lambda: ["en"])
    download: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.languages if name not in SPEAKERS]
        if unknown or not self.languages:
            raise CorpusError(f"languages of asterisk are {', '.join(SPEAKERS)}; got {', '.join(unknown) or 'none'}")


def prepare_asterisk(options: AsteriskOptions) -> PrepareResult:
    """Download, unpack, decode and trim the prompts of ``options.languages``.

    Raises:
        CorpusUnavailable: no apt-get or dpkg-deb, or the packages cannot be had.
    """
    work = Path(options.download) if options.download else options.out / "download"
    work.mkdir(parents=True, exist_ok=True)
    names = [f"asterisk-core-sounds-{language}{kind}" for language in options.languages for kind in ("", "-g722")]
    wanted = progress(names, "fetching packages", options)
    packages = {name: _debian.fetch(name, work, SHA256[name], VERSION, ADVICE) for name in wanted}
    found: list[Row | Rejected] = []
    for language in options.languages:
        found.extend(find_prompts(work / "root", language))
    result = select(found, options, rewrite=True, trim=True)
    result.facts["packages"] = packages
    return result


def find_prompts(root: Path, language: str) -> Iterator[Row | Rejected]:
    """The prompts of one language in an unpacked package tree, in the order of its transcript."""
    name = f"core-sounds-{language}.txt.gz"
    transcript = root / "usr/share/doc" / f"asterisk-core-sounds-{language}" / name
    sounds = sorted((root / "usr/share/asterisk/sounds").glob(f"{FOLDERS[language]}_*"))
    if not transcript.is_file() or not sounds:
        raise CorpusUnavailable(f"the {language} packages hold no {name} or no sounds under {root}; {ADVICE}")
    for key, text in parse_transcript(gzip.decompress(transcript.read_bytes()).decode("utf-8-sig")):
        identifier, path = f"{language}-{key.replace('/', '-')}", sounds[0] / f"{key}.g722"
        spoken, problem = spoken_text(text)
        if problem and path.is_file():
            yield Rejected(identifier, str(path), Reason.non_speech, problem)
        else:
            yield Row(identifier, str(path), text=spoken, speaker=SPEAKERS[language], language=language)


def parse_transcript(content: str) -> Iterator[tuple[str, str]]:
    """``key: text`` lines → (key, text); lines that start with ``;`` are comments."""
    for line in content.splitlines():
        key, colon, text = line.partition(":")
        if colon and not line.lstrip().startswith(";"):
            yield key.strip(), text.strip()


def spoken_text(text: str) -> tuple[str, str]:
    """The text without the signs in brackets (``dash [-]``), and what is wrong with it.

    Words in brackets are notes about the recording (``[ascending tones]``, ``(1 second of silence)``) or may be left
    out by the speaker, so that the text cannot be trusted.
    """
    for bracket in BRACKETS.findall(text):
        if any(character.isalnum() for character in bracket):
            return text, f"the transcript is or holds a note: {text}"
    return BRACKETS.sub(" ", text).strip(), ""
